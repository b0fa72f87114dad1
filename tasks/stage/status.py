"""What a build would do and why, without doing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from spctrl.extras import MissingPackageError
from spctrl.store.provenance import is_readable
from tasks.stage.base import StageTask
from tasks.stage.record_stage import RecordStage

if TYPE_CHECKING:
    import luigi

MOST_NAMED = 3
"""Changed definitions and inputs that are named before the rest is counted."""


@dataclass(frozen=True)
class StageStatus:
    """What a build would do about one stage.

    Attributes:
        task: the stage.
        reasons: why it would run, in words; none where it would not.
        to_make: artifacts that it would have to make; None where that is not known or it makes none of its
            own.
        last_duration_s: how long its latest run took; None where there is none.
    """

    task: StageTask
    reasons: tuple[str, ...]
    to_make: int | None
    last_duration_s: float | None


def stages_in_order(goal: luigi.Task) -> list[StageTask]:
    """All stages that a goal stands on, each after those that it reads."""
    found: dict[str, StageTask] = {}

    def visit(task: luigi.Task) -> None:
        if task.task_id in found:
            return
        for upstream in cast("list[luigi.Task]", task.requires()):
            visit(upstream)
        if isinstance(task, StageTask):
            found[task.task_id] = task

    visit(goal)
    return list(found.values())


def statuses(goal: luigi.Task) -> Iterator[StageStatus]:
    """The status of every stage that a goal stands on."""
    would_run: set[str] = set()
    for task in stages_in_order(goal):
        upstream = [each for each in task.requires() if each.task_id in would_run]
        try:
            reasons = _reasons(task, cast("list[StageTask]", upstream))
            to_make = task.missing_records() if reasons and isinstance(task, RecordStage) else None
        except MissingPackageError as error:
            reasons, to_make = (str(error),), None
        if reasons:
            would_run.add(task.task_id)
        runs = task.store.runs(task.stage, task.part)
        duration_s = runs[0].history().get("duration_s") if runs else None
        yield StageStatus(task, reasons, to_make, duration_s)


def _reasons(task: StageTask, upstream: list[StageTask]) -> tuple[str, ...]:
    if task.is_up_to_date():
        # Finished earlier with the inputs that its upstream stages would make again: it will only be looked at.
        return tuple(f"{each.stage} runs first" for each in upstream)
    if task.is_made():
        return (f"{task.view_address} is missing or out of date",)
    runs = task.store.runs(task.stage, task.part)
    if not runs:
        return ("never built",)
    if not (latest := runs[0].history()):
        return ("never built",)  # taken back since it was listed
    now = task.code_and_parameters()
    reasons = []
    if now["code_version"] != latest["code_version"]:
        reasons += changes("code", latest["code"], now["code"])
        reasons += changes("library", latest["libraries"], now["libraries"], with_values=True)
    reasons += changes("parameter", latest["parameters"], now["parameters"], with_values=True)
    if (ingredients := task.ingredients()) is None:
        reasons += [f"{each.stage} runs first" for each in upstream] or ["its input files changed"]
    else:
        reasons += changes("input", latest["inputs"], ingredients.inputs)
    current = task.current_run()
    if current is not None and current.provenance():
        fault = task.reject_fault(current.provenance()["counts"])
        reasons = [fault or "files of its result are missing or damaged"]
    if not is_readable(task.stage, latest):
        reasons.append("its tables have the form of an earlier version of spctrl")
    return tuple(reasons) or ("its result is not there",)


def changes(
    kind: str, before: Mapping[str, Any], after: Mapping[str, Any], *, with_values: bool = False
) -> list[str]:
    """Sentences on what of one kind differs, such as ``code``; the first few, and how many more there are."""
    names = [name for name in {**before, **after} if _plain(before.get(name)) != _plain(after.get(name))]
    shown = [_change(kind, name, before, after, with_values=with_values) for name in names[:MOST_NAMED]]
    return shown + ([f"{len(names) - MOST_NAMED} more of kind {kind}"] if len(names) > MOST_NAMED else [])


def _change(
    kind: str, name: str, before: Mapping[str, Any], after: Mapping[str, Any], *, with_values: bool
) -> str:
    if not with_values:
        return f"{kind} {name} changed"
    if name not in after:
        return f"{kind} {name} no longer counts; it was {_plain(before[name])}"
    return f"{kind} {name}: {_plain(before.get(name))} -> {_plain(after[name])}"


def _plain(value: Any) -> Any:
    """Tuples come back from JSON as lists."""
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
