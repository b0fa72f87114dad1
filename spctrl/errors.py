"""Errors whose message is all that a user needs."""

from __future__ import annotations


class ExpectedError(Exception):
    """Something outside this program is wrong: a file, a disk, a setting.

    The message says what was expected, what was found, where, and what to do; a traceback would add nothing.
    """
