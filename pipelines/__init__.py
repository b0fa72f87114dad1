"""The graphs that users name. Only wiring: what a stage does is in ``tasks``."""

from __future__ import annotations

from pipelines.luigi_setup import startup  # noqa: F401 - before anything imports Luigi

# isort: split
import logging
import re
import traceback
from collections.abc import Iterator
from typing import Any

import luigi
from luigi.task_register import Register
from luigi.worker import TaskException

from pipelines.benchmark import Benchmark, Evaluate
from pipelines.generate import Generate
from pipelines.luigi_setup import options, scheduler, settings_check
from spctrl.errors import ExpectedError
from spctrl.extras import import_explained
from spctrl.io.disk_errors import access_error
from spctrl.output import secrets
from tasks import settings
from tasks.dataset.conditions import CONDITIONS
from tasks.dataset.export import FOLDERS, Export
from tasks.dataset.report import Report, print_summary
from tasks.execution import logs
from tasks.experiment.train import Train
from tasks.parameters import NamesParameter
from tasks.stage.rejects import MeetsBadRecords

__all__ = ["Benchmark", "BuildDataset", "Evaluate", "Generate", "Train"]


class BuildDataset(MeetsBadRecords, luigi.WrapperTask):
    """Raw annotations to triplet folders, Parquet manifests and a report; only what changed is done again.

    ``luigi --module pipelines BuildDataset``
    """

    dataset = NamesParameter(
        default=("ap10k", "humanart"),
        choices=("ap10k", "humanart"),
        config_path={"section": "build", "name": "datasets"},
        description="datasets to build",
    )
    split = NamesParameter(
        default=("train", "val"),
        choices=("train", "val", "test"),
        config_path={"section": "build", "name": "splits"},
        description="splits to build",
    )
    conditions = NamesParameter(
        default=("spatext", "openpose"),
        choices=CONDITIONS,
        config_path={"section": "build", "name": "conditions"},
        description="conditioning images to make",
    )
    images = luigi.ChoiceParameter(
        default="required",
        choices=["required", "optional"],
        config_path={"section": "build", "name": "images"},
        description="optional: records without an image file are built all the same",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not list(self.exports()):
            raise ExpectedError(
                f"expected a split that {' or '.join(self.dataset)} has, found {', '.join(self.split)}"
            )
        if FOLDERS in settings.export().format:
            settings.export_folder("[export] format = folders (webdataset and parquet do not)")

    def exports(self) -> Iterator[Export]:
        """One task for each split that a dataset has."""
        for dataset in self.dataset:
            for split in self.split:
                if split in settings.dataset_of(dataset).split_words:
                    yield self.clone(Export, dataset=dataset, split=split)

    def requires(self) -> list[luigi.Task]:
        return [*self.exports(), self.clone(Report)]

    def run(self) -> None:
        print_summary(self.exports())


ASKED = "error in complete() method:\n"
OWN_ERROR = re.compile(r"^(?:spctrl|eval|tasks|pipelines)\.[\w.]+: ", re.MULTILINE)


def _without_the_way(warning: str) -> str:
    """A warning that something could not be asked whether it is complete: Luigi gives the traceback, as text."""
    start, asked, trace = warning.partition(ASKED)
    _, *explanations = OWN_ERROR.split(trace)
    if not asked or not explanations or '\n  File "' in explanations[-1]:
        return warning
    return f"{start}{asked}{explanations[-1].strip()}"


class _OnlyWhatMatters(logging.Filter):
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
            record.msg, record.args = _without_the_way(record.getMessage()), ()
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
            f"{error} What a stage had made is not there: another build with other settings writes into the same "
            "folders, somebody removes files, or of several machines one has other code, libraries or another store. "
            "Run again when that is over"
        )
    return None


logs.LOGGER.addFilter(_OnlyWhatMatters())


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

for _section, _settings in DEFAULTS.items():
    for _name, _value in _settings.items():
        if not luigi.configuration.get_config().has_option(_section, _name):
            luigi.configuration.get_config().set(_section, _name, _value)

options.install()
scheduler.install()

KNOWN = {section.__name__: [name for name, _ in section.get_params()] for section in settings.SECTIONS}
KNOWN["build"] = [settings.place_of(BuildDataset, *each)[1] for each in BuildDataset.get_params()]
"""Names of the settings of each section."""


def _check_settings() -> None:
    """Refuse settings that there are not, and those that Luigi cannot read.

    Raises:
        ExpectedError: names the setting.
    """
    config = luigi.configuration.get_config()
    secrets.remember({section: dict(config.items(section, raw=True)) for section in config.sections()})
    read = {section for section, *_ in Register.get_all_params()} | {*KNOWN, "resources"}
    settings_check.refuse_unknown_settings(config, KNOWN, Register.task_names())
    settings_check.refuse_unreadable_values(config, read)


_check_settings()
