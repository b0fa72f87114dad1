"""A console of rich that takes text for text: no markup, no control characters, no secrets, a line for each string."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from spctrl.output.printable import one_line, printable
from spctrl.output.secrets import masked

WIDTH_OF_FILES = 2**20
"""Columns of an output that is no terminal, such as a pipe: more than any line has."""


class PlainConsole(Console):
    """Shows strings, also those in tables, literally and in one line; styles come from ``Text`` and ``style=``.

    Lines end where the terminal ends; in files and pipes only where ``COLUMNS`` asks for it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)
        if not (self.is_terminal or "width" in options or os.environ.get("COLUMNS", "").isdigit()):
            self.width = WIDTH_OF_FILES

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


class FoldedTable(Table):
    """A table that breaks what is wider than its column; rich cuts it."""

    def add_column(self, *header: Any, **options: Any) -> None:
        super().add_column(*header, **{"overflow": "fold", **options})


def lines(*texts: str, style: str = "") -> Text:
    """Strings below each other, for one cell of a table."""
    return Text("\n".join(one_line(masked(each)) for each in texts), style)
