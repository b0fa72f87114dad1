"""The console that commands print to."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from spctrl.secrets import masked


class MaskedConsole(Console):
    """Rich's, with masked secrets: once the text of a table is wrapped they can no longer be found."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(masked(text), **options)
