"""What is done before Luigi is imported, which reads the settings files while it is."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType

from pipelines.luigi_setup import settings_files
from spctrl.errors import ExpectedError
from spctrl.output import secrets
from spctrl.output.printable import printable
from spctrl.output.terminal import say, say_message

STOPPED = "stopped. What was finished stays, run again to go on"

_show_uncaught = sys.excepthook


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show Ctrl-C, and errors that explain themselves, without a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        say(STOPPED, err=True)
    elif issubclass(kind, ExpectedError) or kind.__module__ == "luigi.task_register":  # no such target
        say_message(f"ERROR: {error}")
    elif _show_uncaught is sys.__excepthook__:
        sys.stderr.write(printable(secrets.masked("".join(traceback.format_exception(kind, error, trace)))))
    else:  # a notebook's own
        _show_uncaught(kind, error, trace)


def _is_command() -> bool:
    """Whether this process is ``luigi`` or ``spctrl``, not a notebook or a program that imports this package."""
    program = Path(*sys.argv[:1])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return name in {"luigi", "spctrl"}


def hold_sigusr1() -> None:
    """Let SIGUSR1 wait until ``StageWorker`` takes it, in all threads and processes that are started from here on.

    Slurm sends it to each process of a job step, and what does not handle it dies. Only for commands: a user's own
    process keeps its signals.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


sys.excepthook = _show_error
if _is_command():
    hold_sigusr1()
    for _stream in (sys.stdout, sys.stderr):
        if isinstance(_stream, io.TextIOWrapper):
            _stream.reconfigure(errors="backslashreplace")  # a terminal need not know all characters
    secrets.mask_output(os.environ, sys.argv)
settings_files.check_settings_files()
