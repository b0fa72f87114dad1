"""What people read of Luigi's log: the summary at the end, warnings, and errors without the program's traceback."""

from __future__ import annotations

import logging
import re
import traceback

import luigi
from luigi.worker import TaskException

from spctrl.errors import ExpectedError
from spctrl.extras import import_explained
from spctrl.io.disk_errors import access_error
from spctrl.output import secrets
from tasks.execution import logs

ASKED = "error in complete() method:\n"
OWN_ERROR = re.compile(r"^(?:spctrl|eval|tasks|pipelines)\.[\w.]+: ", re.MULTILINE)


def _strip_traceback(warning: str) -> str:
    """A warning that something could not be asked whether it is complete: Luigi gives the traceback, as text."""
    start, asked, trace = warning.partition(ASKED)
    _, *explanations = OWN_ERROR.split(trace)
    if not asked or not explanations or '\n  File "' in explanations[-1]:
        return warning
    return f"{start}{asked}{explanations[-1].strip()}"


class ConciseLogFilter(logging.Filter):
    """Luigi tells of every task that it looks at; people read the summary at the end, warnings and errors.

    Of an error that explains itself they read the message, not the way it took through the program. Machines
    ([log] format = json) get every line.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        logs.follow_setting()
        error = record.exc_info[1] if record.exc_info else None
        if (explanation := _explanation(error)) is not None:
            record.msg, record.args, record.exc_info = explanation, (), None
        elif record.levelno == logging.WARNING:
            record.msg, record.args = _strip_traceback(record.getMessage()), ()
        secrets.mask_record(record)
        return (
            logs.are_json()
            or record.levelno > logging.INFO
            or "Luigi Execution Summary" in record.getMessage()
        )


def option_at_fault(error: BaseException | None) -> str | None:
    """The option of the command line whose value Luigi was reading when it met the error."""
    for frame, _ in traceback.walk_tb(error.__traceback__ if error else None):
        if frame.f_code.co_name == "_get_task_kwargs":
            return f"--{frame.f_locals['param_name'].replace('_', '-')}"
    return None


def _explanation(error: BaseException | None) -> str | None:
    """What people read of an error in place of all that it took; None where they had better read that."""
    if isinstance(error, ExpectedError | ValueError) and (option := option_at_fault(error)) is not None:
        return f"{option}: {error}"
    if isinstance(error, ExpectedError | luigi.parameter.ParameterException):
        return str(error)
    if error is not None and (explained := import_explained(error) or access_error(error, None)) is not None:
        return str(explained)
    if isinstance(error, TaskException) or str(error).startswith("Unfulfilled dependenc"):
        return (
            f"{error} A required stage output is missing. Check for a build with other settings that writes into the "
            "same folders, for deleted files, and for machines with other code, libraries or another store, then rerun"
        )
    return None
