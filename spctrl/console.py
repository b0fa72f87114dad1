"""A console of rich that takes text for text: no markup, no control characters, no secrets, a line for each string."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from spctrl.printable import one_line, printable
from spctrl.secrets import masked


class PlainConsole(Console):
    """Shows strings, also those in tables, literally and in one line; styles come from ``Text`` and ``style=``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render_str(
        self, text: str, *, style: Any = "", justify: Any = None, overflow: Any = None, **_: Any
    ) -> Text:
        return Text(one_line(masked(text)), style, justify=justify, overflow=overflow)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What ``Text`` and other objects hold becomes printable here; rich's own control codes stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def say(self, line: str) -> None:
        """Print one line, which is not broken where the terminal ends."""
        self.print(line, soft_wrap=True)


def lines(*texts: str, style: str = "") -> Text:
    """Strings below each other, for one cell of a table."""
    return Text("\n".join(one_line(masked(each)) for each in texts), style)
