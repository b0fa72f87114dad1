"""Log lines: text for people or, with ``[log] format = json``, one JSON object a line on standard error."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from spctrl.errors import ExpectedError
from spctrl.output.secrets import masked, masked_values
from spctrl.output.terminal import PrintableLines, say
from tasks import settings

LOGGER = logging.getLogger("luigi-interface")
"""Luigi's: it gets its handler when a build starts, and its level from ``[core] log_level``."""


class JsonLines(logging.Formatter):
    """One JSON object a record: ``time`` (UTC), ``level``, ``logger``, ``pid``, ``message``, an ``exception``
    where there is one, and the facts that ``event`` was given.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        text = json.dumps(masked_values(line), default=lambda value: masked(str(value)))
        return text.replace("\x7f", "\\u007f")  # all else but ASCII is escaped already


def are_json() -> bool:
    try:
        return bool(settings.log().format == "json")
    except ExpectedError:  # of which lines have to tell, too
        return False


def event(message: str, **facts: Any) -> None:
    """Log something for machines; people see it in other ways."""
    if are_json():
        follow_setting()
        LOGGER.info(message, extra={"facts": facts})


def notify(message: str) -> None:
    """Tell people and machines in one line."""
    if are_json():
        event(message)
    else:
        say(message, err=True)


def follow_setting() -> None:
    """Give Luigi's handler the format that is set, and have it print nothing that acts on a terminal.

    To be called before a record is handled: Luigi makes its handler after it has read the command line, and there is
    nothing of ours in between.
    """
    as_json = are_json()
    for handler in LOGGER.handlers:
        if as_json and not isinstance(handler.formatter, JsonLines):
            handler.setFormatter(JsonLines())
        elif not isinstance(handler.formatter, JsonLines | PrintableLines):
            handler.setFormatter(PrintableLines(handler.formatter))
    if as_json:
        logging.captureWarnings(True)
        warnings = logging.getLogger("py.warnings")
        if not warnings.handlers:
            warnings.handlers = LOGGER.handlers
