"""Numbers and names as the page writes them."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from spctrl.output.printable import printable


def visible(value: Any) -> Any:
    """What a template's expression stands for, without characters that turn text around or are not shown."""
    if not isinstance(value, str):
        return value
    return Markup(printable(value)) if isinstance(value, Markup) else printable(value)


def words(name: str) -> str:
    return name.replace("_", " ")


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def quantity(value: float | None) -> str:
    """A number with about three digits, for quantiles."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"
