"""The commands of ``spctrl`` that look at the store and keep it: status, verify, gc, accept."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import luigi
import typer
from luigi.task_register import Register
from rich.console import Group, RenderableType
from rich.text import Text

from pipelines import Benchmark, BuildDataset, Evaluate, Generate, Train
from spctrl import options
from spctrl.errors import ExpectedError
from spctrl.output.console import FoldedTable, PlainConsole, lines
from spctrl.store.format import FIRST_FORMAT, FORMAT
from tasks import settings
from tasks.execution.progress import progress
from tasks.stage.base import StageTask

if TYPE_CHECKING:
    from collections.abc import Iterator

console = PlainConsole()

FOUND_SOMETHING = 1
"""Exit code."""

Names = Annotated[str | None, typer.Option(help="comma-separated; default: luigi.cfg")]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (status, verify, gc, accept):
        app.command()(command)


def build_of_settings(
    dataset: str | None, split: str | None, conditions: str | None, images: str | None
) -> BuildDataset:
    """The build that the settings describe, with what the command line says otherwise."""
    given = {"dataset": dataset, "split": split, "conditions": conditions, "images": images}
    parameters = dict(BuildDataset.get_params())
    values = {}
    for name, value in given.items():
        if value is not None:
            try:
                values[name] = parameters[name].parse(value)
            except (ExpectedError, ValueError) as error:
                raise typer.BadParameter(f"--{name}: {error}") from error
    try:
        return BuildDataset(**values)
    except (ValueError, luigi.parameter.ParameterException) as error:
        raise typer.BadParameter(str(error)) from error


def target_of_name(target: str, config: Path | None) -> luigi.Task:
    """The target of a name; all but BuildDataset have a configuration file."""
    if target == BuildDataset.__name__ and config is None:
        return build_of_settings(None, None, None, None)
    configured = {each.__name__: each for each in (Train, Generate, Evaluate, Benchmark)}
    if target not in configured or config is None:
        found = f"{target} {'without' if config is None else 'with'} --config"
        raise typer.BadParameter(
            f"--target: expected BuildDataset, or {', '.join(configured)} with --config, found {found}"
        )
    return configured[target](config=str(config))


def status(
    dataset: Names = None,
    split: Names = None,
    conditions: Names = None,
    images: Names = None,
    watch: Annotated[bool, typer.Option("--watch", help="look again and again, until Ctrl-C")] = False,
    every_s: Annotated[float, typer.Option(min=0.1, help="seconds between two looks of --watch")] = 2.0,
) -> None:
    """Which stages a build would run, and why. Runs nothing, exits with 0 whatever it finds."""
    from rich.live import Live

    def look() -> list[RenderableType]:
        # Tasks remember what they found, and Luigi remembers tasks.
        Register.clear_instance_cache()
        return list(_status(build_of_settings(dataset, split, conditions, images)))

    if not watch:
        for part in look():
            console.print(part)
        return
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            table, summary = look()
            live.update(Group(summary, table), refresh=True)  # a low terminal cuts off what is below
            time.sleep(every_s)


def _status(build: BuildDataset) -> Iterator[RenderableType]:
    """A table of the stages, and a line that sums it up."""
    from tasks.stage.status import statuses

    table = FoldedTable("stage", "of", "would run because", box=None, pad_edge=False)
    table.add_column("to make", justify="right")
    table.add_column("took last time", justify="right")
    count = 0
    for each in statuses(build):
        count += bool(each.reasons)
        table.add_row(
            each.task.stage,
            each.task.part,
            lines(*each.reasons) if each.reasons else Text("up to date", style="dim"),
            "" if each.to_make is None else f"{each.to_make:,}",
            "" if each.last_duration_s is None else f"{each.last_duration_s:,.1f} s",
        )
    yield table
    yield f"{count} stages would run." if count else "Everything is up to date."


def verify(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only report; leave the store as it is")] = False,
) -> None:
    """Read all artifacts and exported files again and compare them with their digests.

    What is damaged is struck out, so that the next build makes it again. Exits with 1 when anything is
    damaged.
    """
    from tasks.maintenance import ledgers
    from tasks.maintenance import verify as verify_store

    store, exports = settings.store(), settings.paths().export
    total = (
        len([pack for stage in store.stages() for pack in store.packs(stage)])
        + len(store.runs(damaged=True))
        + len(list(ledgers(exports)))
    )
    with progress("verify", total, lambda percentage: None) as advance:
        damages = verify_store(store, exports, repair=not dry_run, advance=advance)
    for damage in damages:
        console.say(f"{damage.place}: {damage.fault}")
    if not damages:
        console.print(f"Nothing is damaged ({total:,} packs, runs and exports).")
        return
    what_next = "Left as it is (--dry-run)." if dry_run else "The next build makes it again."
    console.print(f"{len(damages):,} damaged. {what_next}")
    raise typer.Exit(FOUND_SOMETHING)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    keep: Annotated[int, typer.Option(min=0, help="latest runs to keep of each stage and split")] = 3,
    grace_hours: Annotated[
        float, typer.Option(min=0, help="keep whatever is younger, for builds under way")
    ] = 24.0,
    dataset: Names = None,
    split: Names = None,
    conditions: Names = None,
    images: Names = None,
) -> None:
    """Remove runs that are neither current nor among the latest, and artifacts that only those used."""
    from tasks.maintenance import collect
    from tasks.stage.status import stages_in_order

    current = [
        run
        for task in stages_in_order(build_of_settings(dataset, split, conditions, images))
        if (run := task.current_run())
    ]
    waste = collect(settings.store(), current, keep=keep, grace_s=grace_hours * 3600, dry_run=dry_run)
    for run in waste.runs:
        console.say(f"run {run.stage} {run.part} {run.fingerprint}")
    console.say(
        f"{'Would remove' if dry_run else 'Removed'} {len(waste.runs):,} runs, {len(waste.packs):,} packs and "
        f"{len(waste.leftovers):,} left-over files, {'would rewrite' if dry_run else 'rewrote'} "
        f"{len(waste.repacked):,} packs: {waste.freed_bytes / 1e6:,.1f} MB."
    )


def accept(
    stages: Annotated[
        list[str] | None, typer.Argument(help="stages whose code changed without changing what they make")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="all stages of the target that were built")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    target: Annotated[
        str,
        typer.Option(
            help="whose stages: BuildDataset; or with --config Train, Generate, Evaluate, Benchmark"
        ),
    ] = "BuildDataset",
    config: Annotated[
        Path | None, typer.Option(parser=options.path, help="the target's configuration file")
    ] = None,
) -> None:
    """Take the outputs of earlier code as current, after a change of code or libraries that you know to be harmless."""
    from tasks.stage.fingerprints import code_version
    from tasks.stage.status import changes, stages_in_order

    if every == bool(stages):
        raise typer.BadParameter(f"expected stages or --all, found {'both' if every else 'neither'}")
    tasks: dict[str, StageTask] = {
        task.stage: task for task in stages_in_order(target_of_name(target, config))
    }
    if unknown := [stage for stage in stages or () if stage not in tasks]:
        raise typer.BadParameter(f"expected stages among {', '.join(tasks)}, found {unknown[0]!r}")
    outputs = {stage: _earlier_output(tasks[stage], also_older=not every) for stage in stages or tasks}
    never_built = [stage for stage, before in outputs.items() if before is None]
    if never_built and (stages or len(never_built) == len(outputs)):
        raise typer.BadParameter(
            f"{', '.join(never_built)}: never built in {settings.store().files.root}, so there is no earlier output"
        )
    for stage, before in outputs.items():
        task, now = tasks[stage], tasks[stage].code_and_parameters()
        own_version = code_version(stage, now["code"], now["libraries"])
        if before is None:
            console.print(f"{stage}: never built.")
            continue
        if own_version in task.store.accepted() or own_version == before["code_version"]:
            console.print(f"{stage}: the code is that of the latest run already.")
            continue
        for kind in ("code", "libraries"):
            for change in changes(kind, before[kind], now[kind]):
                console.say(f"{stage}: {change}")
        if not yes:
            typer.confirm(f"Keep what {stage} made before these changes?", abort=True)
        task.store.accept(own_version, before["code_version"])
        console.print(f"{stage}: outputs of the earlier code count as current.")


def _earlier_output(task: StageTask, *, also_older: bool) -> dict[str, Any] | None:
    """Provenance of the run to accept: the latest one of the stage; None where there is none.

    Args:
        task: the stage.
        also_older: whether to take the latest one of an earlier format instead where the latest one is of the present
            code: the first build after an upgrade may have begun before its user accepted what was there.
    """
    now = task.code_and_parameters()
    found = [provenance for run in task.store.runs(task.stage) if (provenance := run.history())]
    # One name may stand for several stages, such as depth that is read and depth by a model.
    alike = [each for each in found if each["libraries"].keys() == now["libraries"].keys()] or found
    older = [
        each
        for each in alike
        if each.get("format", FIRST_FORMAT) < FORMAT and each["code_version"] != now["code_version"]
    ]
    if also_older and older and alike[0]["code_version"] == now["code_version"]:
        return older[0]
    return alike[0] if alike else None
