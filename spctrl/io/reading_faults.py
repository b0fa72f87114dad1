"""Errors of libraries that make an object from a user's file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from spctrl.errors import ExpectedError

MAX_SHOWN = 400
"""Characters of a library's message; some list every key of a network."""


@contextmanager
def faults_of(what: str, remedy: str = "", error_type: type[ExpectedError] = ExpectedError) -> Iterator[None]:
    """Turn any exception into one sentence: libraries raise nearly all kinds for a value that they do not expect.

    Args:
        what: the file and what is wrong with it, without a full stop.
        remedy: what to do, as sentences.
        error_type: what is raised.

    Raises:
        ExpectedError: with the library's reason.
        MemoryError: as it is; the file need not be at fault.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), MAX_SHOWN, placeholder=" ...") or type(error).__name__
        end = "" if reason.endswith(".") and not reason.endswith("...") else "."
        raise error_type(f"{what}: {reason}{end} {remedy}".rstrip()) from error
