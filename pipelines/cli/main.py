"""The ``spctrl`` command: looking at the store, keeping it, and drawing a sample. Building is Luigi's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import luigi
import typer
from luigi.task_register import Register
from rich.console import Group, RenderableType
from rich.text import Text
from typer.core import TyperGroup

import spctrl
from pipelines import Benchmark, BuildDataset, Evaluate, Generate, Train, luigi_setup
from pipelines.cli import cluster, pose
from spctrl import options
from spctrl.errors import ExpectedError
from spctrl.extras import extras_with, imports_explained
from spctrl.io.disk_errors import writing
from spctrl.output.console import FoldedTable, PlainConsole, lines
from spctrl.output.printable import one_line
from spctrl.output.secrets import masked
from spctrl.output.terminal import say_message
from spctrl.resources import overrides
from spctrl.storage import files_at, is_url
from spctrl.storage.files import TEMPORARY
from tasks import settings
from tasks.dataset.conditions import CONDITIONS, condition_class
from tasks.dataset.image_models import ModelStage
from tasks.dataset.index import AnnotationFile
from tasks.execution.progress import progress
from tasks.stage.base import StageTask

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Commands(TyperGroup):
    """Commands that show the message of an error that explains itself, not its traceback."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _printable_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _printable_usage_errors(), imports_explained():
                return super().invoke(ctx)
        except ExpectedError as error:
            say_message(str(error))
            raise typer.Exit(FAILED) from None


_UsageError: Any = typer.BadParameter.__base__


@contextmanager
def _printable_usage_errors() -> Iterator[None]:
    """Typer prints its own errors, whose messages may quote anything, in lines that may part a secret."""
    try:
        yield
    except _UsageError as error:
        error.message = one_line(masked(error.message))
        raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # luigi_setup.show_error shows them
)
pose.add_to(app)
cluster.add_to(app)
console = PlainConsole()

FOUND_SOMETHING = FAILED = 1

Names = Annotated[str | None, typer.Option(help="comma-separated; default: luigi.cfg")]


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"spctrl {spctrl.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Look at what is built and why it would be built again, check and clean the store, draw a sample.

    Settings come from luigi.cfg and LUIGI_CONFIG_PATH, as for luigi itself.
    """
    luigi_setup.configure()


def _build(
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


def _goal(target: str, config: Path | None) -> luigi.Task:
    """The target of a name; all but BuildDataset have a configuration file."""
    if target == BuildDataset.__name__ and config is None:
        return _build(None, None, None, None)
    configured = {each.__name__: each for each in (Train, Generate, Evaluate, Benchmark)}
    if target not in configured or config is None:
        found = f"{target} {'without' if config is None else 'with'} --config"
        raise typer.BadParameter(
            f"--target: expected BuildDataset, or {', '.join(configured)} with --config, found {found}"
        )
    return configured[target](config=str(config))


@app.command()
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
        return list(_status(_build(dataset, split, conditions, images)))

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


@app.command()
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


@app.command()
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
        for task in stages_in_order(_build(dataset, split, conditions, images))
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


@app.command()
def accept(
    stages: Annotated[
        list[str], typer.Argument(help="stages whose code changed without changing what they make")
    ],
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
    from tasks.stage.status import stages_in_order

    tasks: dict[str, StageTask] = {task.stage: task for task in stages_in_order(_goal(target, config))}
    for stage in stages:
        if stage not in tasks:
            raise typer.BadParameter(f"expected stages among {', '.join(tasks)}, found {stage!r}")
        task = tasks[stage]
        runs = task.store.runs(stage)
        if not runs:
            raise typer.BadParameter(f"{stage} was never built: there is no earlier output to accept")
        now, before = task.code_and_parameters(), runs[0].history()
        if now["code_version"] == before["code_version"]:
            console.print(f"{stage}: the code is that of the latest run already.")
            continue
        for kind in ("code", "libraries"):
            for name in {**now[kind], **before[kind]}:
                if now[kind].get(name) != before[kind].get(name):
                    console.say(f"{stage}: {kind} {name} changed")
        if not yes:
            typer.confirm(f"Keep what {stage} made before these changes?", abort=True)
        task.store.accept(now["code_version"], before["code_version"])
        console.print(f"{stage}: outputs of the earlier code count as current.")


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(parser=options.path, help="where AP-10K/ and HumanArt/ go")],
    images_per_split: Annotated[int, typer.Option(min=1, help="images of each dataset's train and val")] = 12,
    seed: Annotated[int, typer.Option(help="another seed draws other scenes")] = 0,
) -> None:
    """Draw a small dataset in both raw formats, with exact masks and depth maps beside the images."""
    from spctrl.demo_data import write_sample

    with writing(folder):
        write_sample(folder, images_per_split=images_per_split, seed=seed)
    console.say(f"Drew {4 * images_per_split} images into {folder}/AP-10K and {folder}/HumanArt.")


@app.command()
def tiny_weights(
    folder: Annotated[Path, typer.Argument(parser=options.path, help="for [paths] weights")],
) -> None:
    """Write very small models with random weights, in the formats of the real ones, to try the pipeline with.

    Whatever is made with them says `weights: random`.
    """
    import eval.tiny
    import eval.vitpose.tiny
    import spctrl.image_models.tiny

    with writing(folder):
        for module in (spctrl.image_models.tiny, eval.tiny, eval.vitpose.tiny):
            for name, path in module.write_tiny_weights(folder):
                console.say(f"{name}: {path}")


@app.command()
def doctor() -> None:
    """What is installed, found and writable, and which datasets can be built. Exits with 1 when none can."""
    versions = FoldedTable("package", "version", box=None, pad_edge=False)
    versions.add_row("python", platform.python_version())
    for name in ("luigi", "numpy", "opencv-python-headless", "pyarrow", "torch", "ray"):
        versions.add_row(name, _version_or_none(name) or Text("not installed", style="dim"))
    console.print(versions)
    console.print()
    console.say(f"cores: {len(os.sched_getaffinity(0))}; devices: {_devices()}")
    for name in ("store", "export"):
        place = getattr(settings.paths(), name)
        console.print(f"[paths] {name} = {place}:", _writable(place), soft_wrap=True)
    for path in overrides():
        console.say(f"{path}: your own, in use")
    build = _build(None, None, None, None)
    possible = False
    found = FoldedTable("dataset", "split", "annotations", box=None, pad_edge=False)
    for task in build.exports():
        path = AnnotationFile(dataset=task.dataset, split=task.split).path
        possible |= path.is_file()
        found.add_row(
            task.spec.title,
            task.split,
            f"{path}" if path.is_file() else lines(f"missing: {path}", style="red"),
        )
    console.print()
    console.print(found)
    console.print()
    console.print(_conditions_table(build))
    console.print()
    console.print(_weights_table())
    if not possible:
        console.print("No dataset can be built: say where one is in luigi.cfg, or try `spctrl sample`.")
        raise typer.Exit(FOUND_SOMETHING)


def _conditions_table(build: BuildDataset) -> FoldedTable:
    """Which conditions can be made under the present settings, and what the others lack."""
    table = FoldedTable("condition", "asked for", "possible", box=None, pad_edge=False)
    for name in CONDITIONS:
        stage = build.clone(condition_class(name), dataset=build.dataset[0], split=build.split[0])
        lacking = sorted(set(_lacking(stage)))
        possible = lines(f"no: {'; '.join(lacking)}", style="red") if lacking else "yes"
        table.add_row(name, "yes" if name in build.conditions else "", possible)
    return table


def _lacking(stage: StageTask) -> Iterator[str]:
    """Packages and weights that a stage, or one that it reads, needs and does not find."""
    for name in (*stage.libraries, *stage.packages):
        if _version_or_none(name) is None:
            extras = extras_with(name)
            yield f"no {name}{f' (extra {extras[0]})' if extras else ''}"
    if isinstance(stage, ModelStage) and not stage.weights_path.exists():
        yield f"no weights at {stage.weights_path}"
    for each in stage.requires():
        if isinstance(each, StageTask):
            yield from _lacking(each)


def _weights_table() -> FoldedTable:
    """Which weights of weights.yaml are there, and which settings they make possible."""
    from spctrl.weights import are_random, known_weights

    table = FoldedTable("weights", "for", "there", box=None, pad_edge=False)
    for name, entry in known_weights().items():
        path = Path(settings.paths().weights) / entry.file
        there = (
            "random"
            if are_random(path)
            else "yes"
            if path.exists()
            else lines(f"no: {entry.publisher}", style="dim")
        )
        table.add_row(name, entry.setting, there)
    return table


def _version_or_none(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> str:
    if importlib.util.find_spec("torch") is None:
        return "cpu (torch is not installed)"
    torch: Any = importlib.import_module("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(["cpu", *gpus])


def _writable(place: str) -> str | Text:
    if is_url(place):
        name, files = f"{TEMPORARY}doctor-{os.getpid()}", files_at(place)
        try:
            files.write(name, b"")
            files.remove([name])
        except ExpectedError as error:
            return lines(str(error), style="red")
        return "writable"
    folder = Path(place)
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not os.access(existing, os.W_OK):
        return lines(f"cannot be written ({existing})", style="red")
    return f"writable, {shutil.disk_usage(existing).free / 1e9:,.0f} GB free"
