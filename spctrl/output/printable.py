"""Text of unknown origin, made safe to print: what would act on a terminal becomes a visible escape."""

from __future__ import annotations

import re

# C0 but tab and newline, DEL and C1; marks of direction; line and paragraph separators; lone surrogates, which stand
# for bytes of file names that are no UTF-8.
_ACTING = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNPRINTABLE = re.compile(f"[{_ACTING}]")
_UNPRINTABLE_IN_LINE = re.compile(f"[{_ACTING}\t\n]")


def printable(text: str) -> str:
    r"""A text whose control characters are shown as escapes such as ``\x1b``; tabs and newlines stay."""
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str) -> str:
    r"""The same with tabs and newlines as ``\t`` and ``\n``: a name cannot look like another line of output."""
    return _UNPRINTABLE_IN_LINE.sub(_escape, text)


def indented(text: str) -> str:
    """``printable``, with all lines but the first indented, so that none looks like the start of a message."""
    return printable(text).replace("\n", "\n  ")


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
