"""What the commands need of Luigi besides: checked settings, whole options, a local scheduler, signals, plain errors.

This module imports nothing of Luigi at its top: ``prepare_process`` has to come before Luigi is imported, which reads
the settings files while it is.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines.luigi_setup import settings_files
from spctrl.errors import ExpectedError
from spctrl.output import secrets
from spctrl.output.printable import printable
from spctrl.output.terminal import say, say_message

STOPPED = "stopped. What was finished stays, run again to go on"
DEFAULTS = {
    # Luigi's own default is to exit with 0 whatever happened.
    "retcode": {
        "already_running": "10",
        "missing_data": "20",
        "not_run": "25",
        "task_failed": "30",
        "scheduling_error": "35",
        "unhandled_exception": "40",
    },
    # The store takes builds side by side, so one need not keep another from starting. Luigi's own level is DEBUG,
    # of which collectors of JSON lines would get every one.
    "core": {"no_lock": "true", "log_level": "INFO"},
}
"""What Luigi is told where neither luigi.cfg nor a user's own file says otherwise."""

_show_uncaught: Callable[[type[BaseException], BaseException, TracebackType | None], Any] | None = None
"""What shows errors that do not explain themselves, once ``show_error`` is installed."""


def is_luigi_command() -> bool:
    """Whether this process runs Luigi's command: nothing else imports the module that it starts in."""
    return "luigi.cmdline" in sys.modules


def is_spctrl_command() -> bool:
    """Whether this process runs the ``spctrl`` command, by the name of the program."""
    program = Path(*sys.argv[:1])
    return (program.parent.name if program.name == "__main__.py" else program.name) == "spctrl"


def prepare_process() -> None:
    """Prepare the process of a command: signals, the characters and secrets of its output, its settings files.

    Raises:
        ExpectedError: a settings file cannot be read.
    """
    hold_sigusr1()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal need not know all characters
    secrets.mask_output(os.environ, sys.argv)
    install_excepthook()
    settings_files.check_settings_files()


def configure() -> None:
    """Set up Luigi for this project: its log, its options, its scheduler, its defaults. A second call changes nothing.

    Raises:
        ExpectedError: names a setting that there is not, or that Luigi cannot read.
    """
    import luigi

    from pipelines.luigi_setup import options, scheduler
    from pipelines.luigi_setup.messages import ConciseLogFilter
    from tasks.execution import logs

    install_excepthook()
    if not any(isinstance(each, ConciseLogFilter) for each in logs.LOGGER.filters):
        logs.LOGGER.addFilter(ConciseLogFilter())
    config = luigi.configuration.get_config()
    for section, settings in DEFAULTS.items():
        for name, value in settings.items():
            if not config.has_option(section, name):
                config.set(section, name, value)
    options.install()
    scheduler.install()
    check_settings()


def known_settings() -> dict[str, list[str]]:
    """Names of the settings of each of this project's sections."""
    from pipelines.build_dataset import BuildDataset
    from tasks import settings

    known = {section.__name__: [name for name, _ in section.get_params()] for section in settings.SECTIONS}
    known["build"] = [settings.place_of(BuildDataset, *each)[1] for each in BuildDataset.get_params()]
    return known


def check_settings() -> None:
    """Refuse settings that there are not, and those that Luigi cannot read.

    Raises:
        ExpectedError: names the setting.
    """
    import luigi
    from luigi.task_register import Register

    from pipelines.luigi_setup import settings_check

    config, known = luigi.configuration.get_config(), known_settings()
    secrets.remember({section: dict(config.items(section, raw=True)) for section in config.sections()})
    read = {section for section, *_ in Register.get_all_params()} | {*known, "resources"}
    settings_check.refuse_unknown_settings(config, known, Register.task_names())
    settings_check.refuse_unreadable_values(config, read)


def install_excepthook() -> None:
    """Have errors that explain themselves shown without a traceback, and others as before."""
    global _show_uncaught
    if _show_uncaught is None:
        _show_uncaught, sys.excepthook = sys.excepthook, show_error


def show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show Ctrl-C, and errors that explain themselves, without a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        say(STOPPED, err=True)
    elif issubclass(kind, ExpectedError) or kind.__module__ == "luigi.task_register":  # no such target
        say_message(f"ERROR: {error}")
    elif _show_uncaught in (None, sys.__excepthook__):
        sys.stderr.write(printable(secrets.masked("".join(traceback.format_exception(kind, error, trace)))))
    elif _show_uncaught is not None:  # a notebook's own
        _show_uncaught(kind, error, trace)


def hold_sigusr1() -> None:
    """Let SIGUSR1 wait until ``StageWorker`` takes it, in all threads and processes that are started from here on.

    Slurm sends it to each process of a job step, and what does not handle it dies. Only for commands: a user's own
    process keeps its signals.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
