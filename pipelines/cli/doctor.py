"""``spctrl doctor``: what is installed, found and writable."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from pipelines import BuildDataset
from pipelines.cli.store import FOUND_SOMETHING, build_of_settings
from spctrl.errors import ExpectedError
from spctrl.extras import extras_with
from spctrl.output.console import FoldedTable, PlainConsole, lines
from spctrl.resources import overrides
from spctrl.storage import files_at, is_url
from spctrl.storage.files import TEMPORARY
from tasks import settings
from tasks.dataset.conditions import CONDITIONS, condition_class
from tasks.dataset.image_models import ModelStage
from tasks.dataset.index import AnnotationFile
from tasks.stage.base import StageTask

if TYPE_CHECKING:
    from collections.abc import Iterator

console = PlainConsole()


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


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
    build = build_of_settings(None, None, None, None)
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
