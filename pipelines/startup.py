"""What is done before Luigi is imported, which reads the settings files while it is."""

from __future__ import annotations

import sys
from types import TracebackType

from pipelines import settings_files
from spctrl.errors import ExpectedError

_show_uncaught = sys.excepthook


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show Ctrl-C, and errors that explain themselves, without a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("stopped. What was finished stays, run again to go on\n")
    elif issubclass(kind, ExpectedError) or kind.__module__ == "luigi.task_register":  # no such target
        sys.stderr.write(f"ERROR: {error}\n")
    else:
        _show_uncaught(kind, error, trace)


sys.excepthook = _show_error
settings_files.check_settings_files()
