"""The training stage: a run of configs/train/ on what the dataset's stages made."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import luigi

from spctrl.errors import ExpectedError
from spctrl.io.disk_errors import fault_in, working
from spctrl.output.terminal import say
from spctrl.paths import config_name
from spctrl.storage import Folder, StoreError, is_url
from spctrl.storage.files import open_regular, temporary_name, write_atomic
from spctrl.store.code_version import ROOT
from spctrl.store.digests import MISSING, digest
from spctrl.store.pack_index import index_name, pack_name
from spctrl.store.provenance import MANIFEST, REJECTS
from spctrl.store.runs import Run
from tasks import settings
from tasks.dataset.conditions import Latents
from tasks.dataset.manifest import Manifest
from tasks.execution import logs
from tasks.execution.devices import gpu_environment
from tasks.execution.progress import progress
from tasks.parameters import PathParameter
from tasks.stage.base import StageTask
from tasks.stage.weights import Weights, weights_at, weights_digest

if TYPE_CHECKING:
    import pyarrow as pa

    from spctrl.training.config import TrainingConfig

CONFIG, LOG, COMPUTATION = "config.yaml", "train.log", "computation"
KEPT = (CONFIG, "losses.jsonl", "validation", "logs")
"""What is kept of a run beside its last checkpoint, where it is there."""
RESULT = ("controlnet", "adapter", "learned_embeds.bin")
"""What of a checkpoint is the result; the rest is for continuing."""
MESSAGE_LINES = 30
MAX_TEXT_BYTES = 4096
WANDB = "wandb"
"""Folder of its tracker."""


class Train(StageTask):
    """Train what a file of configs/train/ describes, from the last usable checkpoint of it or of a shorter run.

    ``luigi --module pipelines Train --config configs/train/ap10k_spctrl.yaml``

    The result is the last checkpoint: ``controlnet/`` or ``adapter/``, and ``learned_embeds.bin`` where keypoint tokens
    were trained. Earlier checkpoints lie below ``training/`` in the store until the run is done. The last one stays
    there, with the optimizer's state, for a longer run to continue; without it, such a run starts from step 1.
    """

    stage = "train"
    function = "spctrl.training.loop:train"
    libraries = ("torch", "diffusers", "transformers", "accelerate")

    config = PathParameter(description="a file of configs/train/")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if settings.executor().device != "cpu":
            self.resources = {"gpu": 1}

    @functools.cached_property
    def how(self) -> TrainingConfig:
        from spctrl.training.config import read_training_config

        return read_training_config(Path(self.config))

    @property
    def part(self) -> str:
        return config_name(Path(self.config))

    @property
    def folder(self) -> Path:
        """Where checkpoints lie."""
        return self.store.home / self._folder_name

    @property
    def _folder_name(self) -> str:
        return f"training/{self.part}/{self.made_from().fingerprint}"

    @functools.cached_property
    def _home(self) -> Folder:
        """All trainings are on this machine, wherever the store is."""
        return Folder(self.store.home)

    def computation(self) -> str:
        """The fingerprint of all that decides what a step computes, but for its learning rates."""
        from spctrl.training.config import computation_settings

        ingredients = self.made_from()
        computed = computation_settings(ingredients.parameters["settings"])
        return replace(ingredients, parameters={**ingredients.parameters, "settings": computed}).fingerprint

    def earlier_runs(self) -> list[Path]:
        """Folders of other trainings, finished or not, whose steps compute the same at equal learning rates."""
        own = self.computation()
        files = sorted(self.store.home.glob(f"training/*/*/{COMPUTATION}"))
        others = [file.parent for file in files if file.parent != self.folder and _text(file) == own]
        # Their files are copied, and so would be what their links lead to.
        return [folder for folder in others if self._link_in(folder) is None]

    def _link_in(self, folder: Path) -> Path | None:
        """A symbolic link in the folder of a training, other than those that wandb makes."""
        links = (path for path in folder.rglob("*") if path.is_symlink())
        return next((path for path in links if path.relative_to(folder).parts[0] != WANDB), None)

    # What it is made from

    def manifest_task(self, split: str = "train") -> Manifest:
        """The images of a split; those of validation are only looked at, so they need no latents."""
        conditions = [name for name in self.how.conditions if split == "train" or name != Latents.stage]
        return Manifest(
            dataset=self.how.dataset_name,
            split=split,
            conditions=conditions,
            images="required",
            on_bad_record=self.on_bad_record,
            max_reject_share=self.max_reject_share,
            max_unassigned_share=self.max_unassigned_share,
        )

    def requires(self) -> list[luigi.Task]:
        how = self.how
        start = how.controlnet_model_name_or_path
        needed: list[luigi.Task] = [
            self.manifest_task(),
            Weights(name="stable_diffusion", path=str(self.stable_diffusion)),
        ]
        if start:
            needed.append(Weights(name="controlnet", path=str(weights_at(start))))
        if how.validation_steps:
            needed.append(self.manifest_task("val"))
        return needed

    @functools.cached_property
    def stable_diffusion(self) -> Path:
        return weights_at(self.how.pretrained_model_name_or_path)

    def parameters(self) -> dict[str, Any]:
        from spctrl.configuration import without_paths
        from spctrl.training.config import decisive_settings

        return {
            "settings": decisive_settings(without_paths(self.how)),  # files count by content, as inputs
            "num_processes": settings.train().num_processes,
            **self._drawing(),
        }

    def _drawing(self) -> dict[str, int]:
        """Sizes in the conditions that training draws."""
        section = settings.spatext() if self.how.conditioning_mode == "spatext" else settings.openpose()
        return {
            "keypoint_radius_px": section.keypoint_radius_px,
            "link_half_width_px": section.link_half_width_px,
        }

    def inputs(self) -> dict[str, str] | None:
        manifest = self.manifest_task().ingredients()
        files = self._files()
        found = {name: weights_digest(self.store, path) for name, path in files.items()}
        if manifest is None or MISSING in found.values():
            return None
        return {"manifest": manifest.fingerprint, **found}

    def _files(self) -> dict[str, Path]:
        """Files and folders that the result depends on."""
        from spctrl.inference.checkpoints import learned_embeds_file, network_folder

        how = self.how
        parts = ["unet", "text_encoder", "tokenizer", "scheduler", "vae"]
        files = {part: self.stable_diffusion / part for part in parts} | {"prompts": self._templates_path}
        if how.controlnet_model_name_or_path:
            start = weights_at(how.controlnet_model_name_or_path)
            files["start"] = network_folder(start)
            if how.enable_learnable_kpttoken and (embeds := learned_embeds_file(start)):
                files["start_tokens"] = embeds
        if how.spatext_init_emb:
            files["keypoint_embeddings"] = Path(how.spatext_init_emb)
        return files

    def _files_digest(self) -> str:
        """Of the files' content, wherever they lie."""
        inputs = sorted(self.made_from().inputs.items())
        return digest(*(f"{name} {found}" for name, found in inputs if name != "manifest"))

    @property
    def _templates_path(self) -> Path:
        from spctrl.prompts import templates_path

        return Path(self.how.prompt_templates or templates_path(self.how.dataset_name))

    def weights_note(self) -> str | None:
        from spctrl.weights import are_random

        if are_random(self.stable_diffusion):
            return "random"
        return digest(*(f"{name} {found}" for name, found in sorted(self.made_from().inputs.items())))

    def notes(self) -> dict[str, Any]:
        return {"git_commit": git_commit()}

    # How it is made

    def run(self) -> None:
        # Two processes would train in the same folder. Other stages may be made twice: their packs are apart.
        with self._home.exclusive(f"{self._folder_name}.lock", f"training {self.part}", logs.notify):
            super().run()

    def commit(self, run: Run, counts: Mapping[str, int], started: float) -> None:
        """Take the result of the training, unless another machine has committed one to an object store meanwhile."""
        from spctrl.training.checkpoints import LOCK

        # No run of the training processes, of a killed build or started by hand, may be in the folder now.
        with self._home.exclusive(f"{self._folder_name}/{LOCK}", f"training in {self.folder}", logs.notify):
            run.forget()
            if not self.is_up_to_date():
                self._take_result(run)
                super().commit(run, counts, started)
            if self.is_up_to_date():  # or else the checkpoints may still be needed
                self._keep_last_checkpoint()

    def _keep_last_checkpoint(self) -> None:
        """Remove from a finished training's folder all that a longer run has no use for."""
        from spctrl.training.checkpoints import LOCK, checkpoints, remove_checkpoint

        *earlier, last = checkpoints(self.folder)
        for checkpoint in earlier:
            remove_checkpoint(checkpoint)  # another training may be about to read it
        kept = {*KEPT, COMPUTATION, LOCK, last.name}
        for path in self.folder.glob("*"):
            if path.is_dir() and path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in kept:
                with suppress(OSError):
                    path.unlink()

    def make(self, run: Run) -> dict[str, int]:
        from spctrl.training.checkpoints import checkpoints, step_of

        self._check_latents()
        images, rejects = self._images_and_rejects()
        counts = {"records": images, "rejected": len(rejects)}
        run.write_table(REJECTS, rejects)
        if self.reject_fault(counts) is not None:  # the caller raises it, before anything is trained
            return counts
        self._fetch_packs()
        self._train()
        return {**counts, "made": step_of(checkpoints(self.folder)[-1])}

    def _images_and_rejects(self) -> tuple[int, pa.Table]:
        """The number of images to train on, and those of them that no prompt template fits, as ``REJECT_SCHEMA``."""
        from spctrl.data.records import rejects_table
        from spctrl.io.parquet import read_table
        from spctrl.prompts import load_templates, rows_without_prompt

        templates = load_templates(self._templates_path, self.how.dataset_name).training
        manifest = read_table(self.manifest_task().finished_run().path(MANIFEST))
        images = manifest.slice(0, self.how.max_train_samples)
        ids, names = images.column("image_id"), images.column("file_name")
        return len(images), rejects_table(
            [
                {
                    "image_id": ids[row].as_py(),
                    "file_name": names[row].as_py(),
                    "code": "no_prompt",
                    "message": str(error),
                }
                for row, error in rows_without_prompt(templates, images).items()
            ]
        )

    def _fetch_packs(self) -> None:
        """Training reads packs on this machine; those of a store that is elsewhere are fetched first."""
        if not is_url(self.store.root):
            return
        for task in self.manifest_task().condition_tasks().values():
            run = task.finished_run()
            packs = task.packs_of(run)
            names = [name(run.stage, pack) for pack in packs for name in (pack_name, index_name)]
            with progress(f"{self.stage} {self.part}: packs", len(names), lambda percentage: None) as advance:
                for name in names:
                    self.store.files.fetch(name, self.store.home)
                    advance(1)

    def _check_latents(self) -> None:
        """Cached latents must be those that the run's own autoencoder would give."""
        if not self.how.use_cached_latents:
            return
        latents = self.manifest_task().clone(Latents)
        own = weights_digest(self.store, self.stable_diffusion / "vae")
        if latents.weights_digest != own:
            raise ExpectedError(
                f"expected cached latents of the autoencoder in {self.stable_diffusion / 'vae'}, found those of "
                f"{latents.weights_path}, which is another. Set [latents] weights to the former, or use_cached_latents "
                f"to false in {self.config}"
            )

    def _train(self) -> None:
        """Run the training processes until they are done, showing how far they are.

        Raises:
            ExpectedError: what stopped them, where they could say.
            RuntimeError: they failed in another way; with the end of what they wrote.
        """
        from spctrl.training.checkpoints import CHECKPOINTS_STAY
        from spctrl.training.config import write_training_config

        log, errors = self.folder / LOG, list[str]()
        with working(self.folder, CHECKPOINTS_STAY):
            self._own_files()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_training_config(self.how, self.folder / CONFIG)  # also what a later edit would change
            write_atomic(self.folder / COMPUTATION, self.computation().encode())
            earlier = (f"--continue-from={folder}" for folder in self.earlier_runs())
            command = [*self.command(), f"--files-digest={self._files_digest()}", *earlier]
            with log.open("ab") as output, running(command, self.environment(), output) as process:
                assert process.stdout is not None
                self._show(self._reports(process.stdout, errors))
                failed = process.wait() != 0
            if (
                failed and not errors
            ):  # on a full disk this fails as well, where the processes' own words were lost
                with log.open("ab") as output:
                    output.write(f"ended with exit code {process.returncode}\n".encode())
        if failed and errors:
            raise ExpectedError(f"{self.config}: {errors[0]}")
        if failed:
            tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-MESSAGE_LINES:])
            if (fault := fault_in(tail)) is not None:  # of the launcher, which says so in its log alone
                raise ExpectedError(f"{self.config}: {fault}, as {log} says at its end. {CHECKPOINTS_STAY}")
            raise RuntimeError(f"training {self.part} failed; the end of {log}:\n{tail}")

    def _own_files(self) -> None:
        """See that training writes into no files of others: its folder may come with a store from anywhere.

        Raises:
            StoreError: the folder, or one above it in the store, is a link, or has links in it.
        """
        folder = self._home.local(f"{self._folder_name}/{LOG}").parent
        if (link := self._link_in(folder)) is not None:
            raise StoreError(f"expected no links in {folder}, found {link}. Remove it and run again")
        for path in folder.rglob("*"):
            is_shared = path.is_file() and path.lstat().st_nlink > 1  # in a copy of the store by hard links
            if is_shared and "checkpoint-" not in path.relative_to(folder).parts[0]:  # never written to
                copy = path.with_name(temporary_name(path.name))
                shutil.copyfile(path, copy)
                copy.replace(path)

    def _reports(self, lines: Iterable[str], errors: list[str]) -> Iterator[dict[str, Any]]:
        """The reports of steps among the lines of the training process; passes its messages on, and adds to errors."""
        for line in lines:
            if not line.startswith("{"):
                continue
            report = json.loads(line)
            if "error" in report:  # not read from a file: its disk may be full
                errors.append(report["error"])
            elif "message" not in report:
                yield report
            elif logs.are_json():
                logs.event("training", what=f"{self.stage} {self.part}", note=report["message"])
            else:
                say(f"{self.stage} {self.part}: {report['message']}", err=True)

    def _show(self, reports: Iterator[dict[str, Any]]) -> None:
        """Show step, loss and the time that is left."""
        if (first := next(reports, None)) is None:
            return
        title = f"{self.stage} {self.part}"
        with progress(title, first["total"], self.set_progress_percentage) as advance:
            done = 0
            for report in itertools.chain([first], reports):
                advance(report["step"] - done, f"loss {report['losses']['loss']:.4f}")
                done = report["step"]

    def command(self) -> list[str]:
        """Arguments that start the training processes."""
        how, processes = self.how, settings.train().num_processes
        on_cpu = settings.executor().device == "cpu"
        # Several processes on a processor count as GPUs' to the launcher; the environment tells them better.
        many = ["--multi_gpu", "--main_process_port=0"]
        launch = {"num_processes": processes, "num_machines": 1, "dynamo_backend": "no"}
        inputs: dict[str, Any] = {
            "manifest": self.manifest_task().finished_run().path(MANIFEST),
            "store": self.store.home,
            "data_root": settings.dataset_root(how.dataset_name),
            "weights": settings.paths().weights,
            "output": self.folder,
            **self._drawing(),
        }
        if how.validation_steps:
            inputs["validation_manifest"] = self.manifest_task("val").finished_run().path(MANIFEST)
        return [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *(f"--{name}={value}" for name, value in launch.items()),
            f"--mixed_precision={how.mixed_precision}",
            *(many if processes > 1 else ["--cpu"] if on_cpu else []),
            *("-m", "spctrl.training", str(self.folder / CONFIG), f"--name={self.part}", "--json-progress"),
            *(f"--{name.replace('_', '-')}={value}" for name, value in inputs.items()),
        ]

    def environment(self) -> dict[str, str]:
        """The environment of the training processes: this project's code, the chosen device, no downloads."""
        device = settings.executor().device
        kind, _, numbers = device.partition(":")
        chosen = gpu_environment(numbers.split(",")) if kind == "cuda" else {}
        return {
            **os.environ,
            "PYTHONPATH": python_path(),
            "ACCELERATE_USE_CPU": str(device == "cpu").lower(),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",  # it warns of each loader process otherwise
            **chosen,
        }

    def _take_result(self, run: Run) -> None:
        """Put what is kept into the run, and nothing else."""
        from spctrl.training.checkpoints import checkpoints

        run.uncommit()
        checkpoint, names = checkpoints(self.folder)[-1], {REJECTS}
        for path in (checkpoint / name for name in RESULT):
            names |= run.add(path, link=True)  # gigabytes, and never written to again
        for path in (self.folder / name for name in KEPT):
            names |= run.add(path)
        # Last: another machine may be putting the same files there, and is not to commit a run without them.
        run.keep_only(names)


def _text(path: Path) -> str | None:
    """What a small file says; None where it cannot be read, such as one that is being removed."""
    try:
        with open_regular(path) as file:
            return file.read(MAX_TEXT_BYTES).decode()
    except (OSError, ValueError):
        return None


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]
) -> Iterator[subprocess.Popen[str]]:
    """A process whose standard output is read; it and those that it started do not outlive the context."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # checkpoints are whole or absent, whenever that comes
            raise


def python_path() -> str:
    """Where training processes look for modules first: this project's code, unless it is installed with others'.

    Those would hide modules of Python's own.
    """
    code = [] if ROOT.name in ("site-packages", "dist-packages") else [str(ROOT)]
    return os.pathsep.join([*code, *filter(None, [os.environ.get("PYTHONPATH")])])


def git_commit() -> str | None:
    """The commit of this project's code, marked where files differ from it; None outside a repository."""
    if not (ROOT / ".git").exists():  # an installed copy may lie in a repository of another project
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
