"""The only ways to print, besides ``spctrl.output.console``: secrets are masked, and no text can act on a terminal."""

from __future__ import annotations

import copy
import logging
import sys

from spctrl.output.printable import indented, one_line, printable
from spctrl.output.secrets import masked


def say(*lines: str, err: bool = False) -> None:
    """Print lines, each of which stays one line whatever it holds.

    Args:
        lines: without newlines at their ends.
        err: to standard error instead of standard output.
    """
    _write("\n".join(one_line(masked(line)) for line in lines), err=err)


def say_message(message: str) -> None:
    """Print a message, such as that of an error, which may have several lines, on standard error."""
    _write(indented(masked(message)), err=True)


def say_text(text: str) -> None:
    """Print a document, such as a table in Markdown, on standard output."""
    _write(printable(masked(text)), err=False)


def _write(text: str, *, err: bool) -> None:
    print(text, file=sys.stderr if err else sys.stdout, flush=True)


class PrintableLines(logging.Formatter):
    """Another formatter's text, made printable; warnings and errors have all lines but the first indented."""

    def __init__(self, formatter: logging.Formatter | None) -> None:
        super().__init__()
        self._formatter = formatter or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        # Formatters keep the text of a traceback in the record, for other handlers.
        text = self._formatter.format(copy.copy(record))
        return indented(text) if record.levelno > logging.INFO else printable(text)
