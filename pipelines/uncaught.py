"""What people see of an error that ends a command."""

from __future__ import annotations

import sys
from types import TracebackType

from spctrl.errors import ExpectedError

_show_uncaught = sys.excepthook


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C and what explains itself are no faults of the program, whose way to them nobody wants to read."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("stopped. What was finished stays, run again to go on\n")
    elif issubclass(kind, ExpectedError) or kind.__module__ == "luigi.task_register":  # no such target
        sys.stderr.write(f"ERROR: {error}\n")
    else:
        _show_uncaught(kind, error, trace)


def install() -> None:
    """Have Python show errors so; Luigi need not be imported yet."""
    sys.excepthook = _show
