"""Where a run starts: at the latest checkpoint whose steps are also steps of this run.

A step depends on its number, on the settings and on its learning rates (``schedule``). So a checkpoint of a shorter run
is one of a longer run too where both have the same learning rates up to it: at any step of a constant schedule, and
within the warm-up of one that decays over the run's length.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from spctrl.configuration import without_paths
from spctrl.errors import ExpectedError
from spctrl.training.checkpoints import (
    DamagedCheckpointError,
    adopt_checkpoint,
    check_contents,
    check_digests,
    checkpoint_path,
    checkpoints,
    has_digests,
    read_run,
    read_state,
    set_aside,
    step_of,
)
from spctrl.training.config import NEUTRAL, RATE_SETTINGS, TrainingConfig, decisive_settings
from spctrl.training.networks import trained_files
from spctrl.training.schedule import Schedule, learning_rates, make_schedule

HISTORY, VALIDATION = "losses.jsonl", "validation"
MAX_LINE_BYTES = 2**16
"""Of the losses of a step."""
FACTS = ("images", "processes", "files")
MOST_NAMED = 3
"""Earlier runs that a message names."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: that it continues from; None at step 0.
        state: of that checkpoint, as ``read_state`` returns it.
    """

    checkpoint: Path | None = None
    state: Mapping[str, Any] | None = None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)


def run_facts(config: TrainingConfig, schedule: Schedule, files_digest: str | None = None) -> dict[str, Any]:
    """What checkpoints say of the run that wrote them; JSON values.

    Args:
        config: of the run.
        schedule: of the run.
        files_digest: of the content of all files that the settings name, by which they count in place of their paths.
    """
    return {
        "settings": decisive_settings(config if files_digest is None else without_paths(config)),
        "images": schedule.images,
        "processes": schedule.processes,
        "files": files_digest,
    }


def find_start(
    config: TrainingConfig,
    schedule: Schedule,
    output: Path,
    earlier_runs: Sequence[Path] = (),
    files_digest: str | None = None,
) -> Start:
    """The latest usable checkpoint of a run and of earlier ones; says in the log which one, and which are not usable.

    Args:
        config: of the run.
        schedule: of the run.
        output: its folder. All checkpoints in it must be its own.
        earlier_runs: folders of other runs on the same data, weights and code; those that do not fit are passed over.
        files_digest: as ``run_facts`` takes it.

    Raises:
        ExpectedError: ``output`` has checkpoints of another run, or of a longer one.
    """
    if config.resume_from_checkpoint is None:
        return Start()
    facts = run_facts(config, schedule, files_digest)
    _check_own(config, schedule, output, facts)
    unusable = {
        folder: f"{found[-1]}: of a longer run, without a checkpoint within the first {schedule.total_steps:,} steps"
        for folder in earlier_runs
        if (found := checkpoints(folder)) and step_of(found[0]) > schedule.total_steps
    }
    unusable |= {folder: f"{folder}: no checkpoint" for folder in earlier_runs if not checkpoints(folder)}
    for checkpoint in _candidates(schedule.total_steps, output, earlier_runs):
        try:
            if difference := _difference(checkpoint, config, schedule, facts):
                unusable.setdefault(checkpoint.parent, f"{checkpoint}: {difference}")
                continue
            if has_digests(checkpoint):
                check_digests(checkpoint)
            else:
                check_contents(checkpoint, trained_files(config))
            state = read_state(checkpoint)
        except DamagedCheckpointError as error:
            if not checkpoint.exists():  # another run removed it, which may have written a later one
                return find_start(config, schedule, output, earlier_runs, files_digest)
            log.warning("%s. An earlier checkpoint is tried", error)
            continue
        log.info("continues after step %d, from %s", step_of(checkpoint), checkpoint)
        return Start(checkpoint=checkpoint, state=state)
    if unusable:
        named = "; ".join([*unusable.values()][:MOST_NAMED])
        log.info("starts from step 1: no checkpoint of %d earlier runs fits: %s", len(unusable), named)
    return Start()


def take_start(
    config: TrainingConfig,
    schedule: Schedule,
    output: Path,
    earlier_runs: Sequence[Path] = (),
    files_digest: str | None = None,
) -> Start:
    """``find_start``, with its checkpoint in the run's own folder: another run may remove its own at any moment.

    Own checkpoints that were passed over are damaged and set aside.

    Raises:
        ExpectedError: as ``find_start``, or a checkpoint of another run cannot be copied.
        OSError: what another run wrote of its steps cannot be copied.
    """
    while True:
        start = find_start(config, schedule, output, earlier_runs, files_digest)
        for checkpoint in checkpoints(output):
            if checkpoint != start.checkpoint and start.step <= step_of(checkpoint) <= schedule.total_steps:
                set_aside(checkpoint)
        if start.checkpoint is None or start.checkpoint.parent == output:
            return start
        try:
            carry_over(start.checkpoint.parent, output, start.step, config.logging_dir)
            return replace(start, checkpoint=adopt_checkpoint(start.checkpoint, output))
        except (OSError, ExpectedError):
            if start.checkpoint.exists():
                raise  # or else the other run removed it, and may have written a later one


def _candidates(total_steps: int, output: Path, earlier_runs: Sequence[Path]) -> Iterator[Path]:
    """Checkpoints within a run's length, latest first, its own before others."""
    found = [path for folder in (output, *earlier_runs) for path in checkpoints(folder)]
    within = [path for path in found if step_of(path) <= total_steps]
    yield from sorted(within, key=lambda path: (-step_of(path), path.parent != output, str(path)))


def _check_own(config: TrainingConfig, schedule: Schedule, output: Path, facts: Mapping[str, Any]) -> None:
    """Refuse a folder of another run.

    Raises:
        ExpectedError: a checkpoint in it was made with other settings, images or processes, or the folder is that of a
            longer run without a checkpoint at the end of this one.
    """
    own = checkpoints(output)
    for checkpoint in own:
        with suppress(DamagedCheckpointError):  # reported when it is its turn to be used
            if difference := _difference(checkpoint, config, schedule, facts):
                raise ExpectedError(
                    f"{checkpoint}: expected a checkpoint of this run, found one of another: {difference}. Train into "
                    "another folder, or start from step 1 with resume_from_checkpoint: null"
                )
    is_longer = bool(own) and step_of(own[-1]) > schedule.total_steps
    if is_longer and not checkpoint_path(output, schedule.total_steps).exists():
        raise ExpectedError(
            f"{output}: expected checkpoints of at most {schedule.total_steps:,} steps, found {own[-1].name} of a "
            "longer run and none at the end of this one. Train into another folder"
        )


def _difference(
    checkpoint: Path, config: TrainingConfig, schedule: Schedule, expected: Mapping[str, Any]
) -> str:
    """How the run that wrote a checkpoint differs up to it from this one, in words; empty where it does not.

    Raises:
        DamagedCheckpointError: the checkpoint cannot be read.
    """
    found = {"files": None, **read_run(checkpoint)}
    if None in (found["files"], expected["files"]):  # of a run that was started by hand: paths decide
        found, expected = {**found, "files": None}, run_facts(config, schedule)
    try:
        before, now = (
            {**NEUTRAL, **facts["settings"], **{each: facts[each] for each in FACTS}}
            for facts in (found, expected)
        )
    except (KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{checkpoint}: its settings cannot be read: {error}") from error
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    listed = "; ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in changed)
    if not RATE_SETTINGS.issuperset(changed):
        return listed
    try:
        earlier = msgspec.convert(found["settings"], TrainingConfig)
    except msgspec.ValidationError as error:
        raise DamagedCheckpointError(f"{checkpoint}: its settings cannot be read: {error}") from error
    earlier_schedule = make_schedule(earlier, images=schedule.images, processes=schedule.processes)
    rates, earlier_rates = learning_rates(config, schedule), learning_rates(earlier, earlier_schedule)
    for step in range(step_of(checkpoint) if changed else 0):
        if rates(step) != earlier_rates(step):
            return f"{listed}: the learning rates differ from step {step + 1:,} on"
    return ""


def carry_over(source: Path, output: Path, step: int, logging_dir: str) -> None:
    """Copy what another run wrote of its steps: losses and validation images up to a checkpoint, TensorBoard's files.

    TensorBoard's are copied whole, since the tracker purges later steps; a folder outside the run is shared anyway.
    """
    if (source / HISTORY).is_file():
        shutil.copyfile(source / HISTORY, output / HISTORY)
        keep_history(output / HISTORY, step)
    folders = [
        path
        for path in (source / VALIDATION).glob("step-*")
        if (number := path.name.removeprefix("step-")).isdigit() and int(number) <= step
    ]
    for folder in (*folders, source / os.path.normpath(logging_dir)):
        if folder.is_dir() and source in folder.parents and ".." not in folder.relative_to(source).parts:
            shutil.copytree(folder, output / folder.relative_to(source), dirs_exist_ok=True)


def keep_history(path: Path, step: int) -> None:
    """Drop what a killed run wrote of steps after its last checkpoint, which are done again, and unreadable lines."""
    if not path.is_file():
        return
    partial = path.with_name(f"{path.name}.partial")
    with path.open("rb") as lines, partial.open("wb") as kept:
        while line := lines.readline(MAX_LINE_BYTES):
            if (found := _step_in(line)) is not None and found <= step:
                kept.write(line.rstrip() + b"\n")
    partial.replace(path)  # another run may be reading it


def _step_in(line: bytes) -> int | None:
    """The step of a line of ``HISTORY``; None where it cannot be read, such as one that was cut off."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if type(step) is int else None
