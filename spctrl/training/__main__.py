"""One process of a training run: ``accelerate launch -m spctrl.training``, as the Luigi task ``Train`` starts it."""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spctrl import options
from spctrl.errors import ExpectedError
from spctrl.extras import imports_explained
from spctrl.io import locks
from spctrl.io.disk_errors import working
from spctrl.output.printable import printable
from spctrl.output.secrets import mask_output, masked
from spctrl.output.terminal import PrintableLines, say, say_message
from spctrl.paths import config_name, name_fault
from spctrl.training.checkpoints import CHECKPOINTS_STAY, LOCK
from spctrl.training.config import TrainingConfig, read_training_config

if TYPE_CHECKING:
    from spctrl.training.watch import Show

ERROR = "error.txt"
"""Below the output: why a run stopped, in words."""
LOOPBACK = frozenset({"", "127.0.0.1", "::1", "localhost"})
LINE_EVERY_S, JSON_EVERY_S = 5.0, 0.5
LOG = logging.getLogger("spctrl.training")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)  # a box may part a secret


@app.command()
def main(
    config: Annotated[
        Path,
        typer.Argument(parser=options.path, help="YAML file, such as configs/train/ap10k_spctrl.yaml"),
    ],
    manifest: Annotated[
        Path, typer.Option(parser=options.path, help="Parquet manifest of the images to train on")
    ],
    store: Annotated[Path, typer.Option(parser=options.path, help="folder of everything computed")] = Path(
        "store"
    ),
    data_root: Annotated[
        Path | None,
        typer.Option(parser=options.path, help="folder of the raw dataset; cached latents do without"),
    ] = None,
    weights: Annotated[
        Path, typer.Option(parser=options.path, help="folder of the entries of weights.yaml")
    ] = Path("weights"),
    output: Annotated[
        Path | None,
        typer.Option(parser=options.path, help="folder of the checkpoints; default: output_dir"),
    ] = None,
    continue_from: Annotated[
        list[Path] | None,
        typer.Option(
            parser=options.path,
            help="folder of an earlier run on the same data, weights and code, whose checkpoints may be continued; "
            "may be given several times",
        ),
    ] = None,
    files_digest: Annotated[
        str | None,
        typer.Option(
            help="of the content of all files that the settings name: checkpoints may be continued with other paths"
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the run, for trackers; default: the file's")] = None,
    validation_manifest: Annotated[
        Path | None, typer.Option(parser=options.path, help="manifest of the images to generate")
    ] = None,
    keypoint_radius_px: Annotated[int, typer.Option(help="in index maps and renders")] = 4,
    link_half_width_px: Annotated[int, typer.Option(help="in index maps and renders")] = 4,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="load everything, say what would be done")
    ] = False,
    json_progress: Annotated[
        bool, typer.Option("--json-progress", help="one JSON object a line on standard output")
    ] = False,
) -> None:
    """Train, or go on training, what a configuration describes.

    Checkpoints go below the output. A run that is started again, also with more steps, continues from the latest one.
    Without Luigi: python -m spctrl.training CONFIG --manifest FILE --output FOLDER. On several GPUs: accelerate launch
    --num_processes N -m spctrl.training CONFIG ...
    """
    found = output
    if json_progress:
        _end_without_reader()
    if name is not None and (fault := name_fault(name)) is not None:
        raise typer.BadParameter(f"--name: {fault}")
    try:
        settings = read_training_config(config)
        found = output or (Path(settings.output_dir) if settings.output_dir else None)
        if found is None:
            raise ExpectedError(f"{config}: expected output_dir, or --output FOLDER, found neither")
        with imports_explained():
            from spctrl.training.loop import TrainingInputs

        inputs = TrainingInputs(
            manifest=manifest,
            store=store,
            data_root=data_root,
            weights=weights,
            keypoint_radius_px=keypoint_radius_px,
            link_half_width_px=link_half_width_px,
            files_digest=files_digest,
            needs_vae=validation_manifest is not None and settings.validation_steps is not None,
        )
        earlier_runs = continue_from or []
        for folder in earlier_runs:
            if not folder.is_dir():
                raise ExpectedError(f"--continue-from: expected the folder of a run, found none at {folder}")
        with _log_shown(json_progress), working(found, CHECKPOINTS_STAY), imports_explained():
            if dry_run:
                _describe(settings, inputs, found, earlier_runs)
            else:
                watched = (validation_manifest, name or config_name(config), json_progress)
                _train(settings, inputs, found, earlier_runs, *watched)
    except ExpectedError as error:
        if json_progress:
            with suppress(OSError):
                _write_json({"error": masked(str(error))})
        with suppress(OSError):  # the log may be on a full disk too
            say_message(str(error))
        if found is not None and not dry_run:
            with suppress(OSError):
                found.mkdir(parents=True, exist_ok=True)
                (found / ERROR).write_text(printable(masked(f"{error}\n")))
        raise typer.Exit(1) from error


def _train(
    config: TrainingConfig,
    inputs: Any,
    output: Path,
    earlier_runs: Sequence[Path],
    validation_manifest: Path | None,
    name: str,
    json_progress: bool,
) -> None:
    from spctrl.training.loop import train
    from spctrl.training.watch import Watcher

    show = _throttled(_write_json, JSON_EVERY_S) if json_progress else _throttled(_write_text, LINE_EVERY_S)
    with _alone(output):
        (output / ERROR).unlink(missing_ok=True)
        watcher = Watcher(config, inputs, validation_manifest, output, name, show)
        try:
            last = train(config, inputs, output, watcher, earlier_runs)
        finally:
            watcher.close()
    if not json_progress and _is_main():
        say(f"trained: {last}")


def _describe(config: TrainingConfig, inputs: Any, output: Path, earlier_runs: Sequence[Path]) -> None:
    """Load everything and print what a run would do."""
    from spctrl.training.loop import make_accelerator, prepare
    from spctrl.training.resumption import find_start

    accelerator = make_accelerator(config)
    run = prepare(config, inputs, accelerator)
    schedule = run.schedule
    sizes = [sum(parameter.numel() for parameter in group) for group in run.networks.trained_groups()]
    rows = run.networks.token_rows
    tokens = "" if rows is None else f" and {len(rows):,} token embeddings"
    source = "cached latents" if config.use_cached_latents else "images encoded in every step"
    start = find_start(config, schedule, output, earlier_runs, inputs.files_digest)
    say(
        f"trains: {type(run.networks.control).__name__}, {sizes[0] / 1e6:,.1f} million parameters{tokens}",
        f"on: {schedule.images:,} images of {inputs.manifest}, {config.resolution} x {config.resolution}, {source}",
        f"in: {schedule.total_steps:,} steps of {schedule.step_images:,} images ({schedule.batch_size} x "
        f"{schedule.micro_batches} micro-batches x {schedule.processes} processes), {schedule.steps_per_epoch:,} an "
        "epoch",
        f"with: precision {config.mixed_precision} on {accelerator.device}",
        f"into: {output}, from {start.checkpoint or 'the start'}",
    )


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Be the only run that writes to a folder; wait for one that does.

    The lock is the first process's. The others wait with it: a process group gives up on a process that is not there
    after some minutes.
    """
    lock, run_id = output / LOCK, _run_id()
    if _is_main():
        with locks.exclusive(lock, f"training in {output}", LOG.info, owner=run_id):
            yield
        return
    while locks.is_held_by_another(lock, run_id):
        time.sleep(locks.POLL_S)
    yield


def _run_id() -> str:
    """The same in all processes of a run, and another one in any other run at that time.

    Launchers give a run on one machine a loopback address, and often the same port.
    """
    address = os.environ.get("MASTER_ADDR", "")
    machine = socket.gethostname() if address in LOOPBACK else ""
    return f"{machine} {address}:{os.environ.get('MASTER_PORT', os.getpid())}"


def _end_without_reader() -> None:
    """End this process as soon as nobody reads its standard output: the build that started it was killed.

    It could go on for hours otherwise, say while it waits for another run, and train beside the next build.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # nothing but the end of the reader

    def watch() -> None:
        poll.poll()
        os._exit(1)  # checkpoints are whole or absent, whenever that comes

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _log_shown(as_json: bool) -> Iterator[None]:
    """Show what this package logs: on standard error, or as JSON objects with a ``message`` on standard output.

    Only the first process does, as all of them log the same.
    """
    if not _is_main():
        yield
        return
    handler = _JsonHandler() if as_json else logging.StreamHandler()
    handler.setFormatter(PrintableLines(None))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)


class _JsonHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _write_json({"message": printable(record.getMessage())})


def _is_main() -> bool:
    """Whether this is the first of the processes that ``accelerate launch`` started."""
    return os.environ.get("RANK", "0") == "0"


def _throttled(write: Show, every_s: float) -> Show:
    """``write`` that is called at most every so many seconds, and at the end."""
    last = 0.0

    def show(progress: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_s or progress["step"] == progress["total"]:
            last = now
            write(progress)

    return show


def _write_json(progress: dict[str, Any]) -> None:
    """For the process that started this one."""
    say(json.dumps(progress))


def _write_text(progress: dict[str, Any]) -> None:
    say(progress_line(progress))


def progress_line(progress: dict[str, Any]) -> str:
    """A step, its losses and the time that is left, for people."""
    losses = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in progress["losses"].items())
    left = (
        ""
        if progress["left_s"] is None
        else f", {progress['steps_per_s']:.2f} steps/s, {_time(progress['left_s'])} left"
    )
    return f"step {progress['step']:,} of {progress['total']:,}: {losses}{left}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"


if __name__ == "__main__":
    mask_output(os.environ, sys.argv)
    app()
