"""The stage of samples: one image of each pose by one method, in packs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import luigi

from spctrl.store.digests import MISSING, digest, digest_cache
from tasks import settings
from tasks.dataset.conditions import FromArtifacts, condition_class
from tasks.dataset.index import DatasetStage
from tasks.experiment.generate.prompts import Prompts, prompts_of
from tasks.stage.base import StageTask
from tasks.stage.model_stage import OnDevice
from tasks.stage.record_plan import NOTHING, Prepared
from tasks.stage.weights import Weights, weights_at, weights_digest

if TYPE_CHECKING:
    import pyarrow as pa

    from spctrl.inference.methods import Method

IMAGES_PER_PACK = 8
"""What a killed run may lose: an image takes seconds on a GPU and minutes on a CPU."""


class MethodStage(DatasetStage):
    """A stage of one method on one split."""

    method = luigi.Parameter(description="a Method of spctrl.inference.methods, as JSON (method_json)")

    @functools.cached_property
    def how(self) -> Method:
        import msgspec

        from spctrl.inference.methods import Method

        return msgspec.json.decode(self.method, type=Method)

    @property
    def part(self) -> str:
        return f"{super().part}-{self.how.name}"

    def prompts_task(self) -> Prompts:
        task: Prompts = self.clone(
            Prompts, keypoint_words=self.how.keypoint_words or "", templates=self.how.templates
        )
        return task


def method_json(method: Method) -> str:
    """A method as the parameter ``method`` of the tasks here; equal methods give equal texts."""
    import msgspec

    return msgspec.json.encode(method).decode()


class Samples(MethodStage, OnDevice, FromArtifacts):
    """One image of each pose, kept under its condition, prompt, seed, sampler and weights: none is made twice."""

    stage = "samples"
    function = "spctrl.inference.generator:load_generator"
    libraries = ("diffusers",)
    packages = ("torch", "transformers", "safetensors")
    section = settings.generate
    suffix = ".jpg"

    index = luigi.IntParameter(description="which of a pose's images")

    def sources(self) -> list[StageTask]:
        return [self.clone(condition_class(str(self.how.condition)))]

    def train_task(self) -> StageTask | None:
        """The training that makes the checkpoint, where it is not a folder."""
        if not self.how.train:
            return None
        from tasks.experiment.train import Train

        return Train(config=self.how.train)

    def requires(self) -> list[luigi.Task]:
        base = Weights(name="stable_diffusion", path=str(self.stable_diffusion))
        return [*super().requires(), self.prompts_task(), base, self.train_task() or self._given_checkpoint()]

    def _given_checkpoint(self) -> Weights:
        from spctrl.weights import known_weights

        name = f"spctrl_{self.dataset}" if self.how.kind == "spctrl" else self.how.kind
        if self.how.checkpoint in known_weights():
            name = self.how.checkpoint
        return Weights(name=name, path=str(weights_at(self.how.checkpoint)))

    @functools.cached_property
    def stable_diffusion(self) -> Path:
        return weights_at(self.how.stable_diffusion)

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint; of one to be trained, once it is."""
        train = self.train_task()
        return train.finished_run().folder if train else weights_at(self.how.checkpoint)

    def _checkpoint_digest(self) -> str:
        """Digest of what is used of the checkpoint."""
        from spctrl.inference.checkpoints import learned_embeds_file, network_folder

        network = weights_digest(self.store, network_folder(self.checkpoint))
        if network == MISSING:
            return MISSING
        tokens = learned_embeds_file(self.checkpoint)
        return digest(network, digest_cache(self.store).file_digest(tokens) if tokens else "")

    @functools.cached_property
    def _stable_diffusion_digest(self) -> str:
        from spctrl.models.stable_diffusion import PARTS

        parts = [weights_digest(self.store, self.stable_diffusion / part) for part in PARTS]
        return MISSING if MISSING in parts else digest(*parts)

    def parameters(self) -> dict[str, Any]:
        from spctrl.inference.methods import sampler_parameters

        return {
            "kind": self.how.kind,
            "condition": self.how.condition,
            "seed": self.how.seed,
            "index": self.index,
            "sampler": sampler_parameters(self.how.sampler),
        }

    def inputs(self) -> dict[str, str] | None:
        found = super().inputs()
        digests = {"stable_diffusion": self._stable_diffusion_digest}
        if not self.how.train:
            digests["checkpoint"] = self._checkpoint_digest()
        return None if found is None or MISSING in digests.values() else {**found, **digests}

    def arguments(self) -> dict[str, Any]:
        parameters = {name: self.parameters()[name] for name in ("kind", "sampler")}
        return {
            **parameters,
            "stable_diffusion": self._stable_diffusion_digest,
            "checkpoint": self._checkpoint_digest(),
        }

    def missing_records(self) -> int | None:
        train = self.train_task()
        return None if train and not train.complete() else super().missing_records()

    def model_parameters(self) -> dict[str, Any]:
        return {"kind": self.how.kind, "sampler": self.how.sampler}

    def model_paths(self) -> dict[str, Path]:
        return {"stable_diffusion": self.stable_diffusion, "checkpoint": self.checkpoint}

    def records_per_pack(self, total: int) -> int:
        return settings.generate().batch_size or IMAGES_PER_PACK

    def weights_note(self) -> str | None:
        from spctrl.inference.checkpoints import network_folder
        from spctrl.weights import are_random

        train = self.train_task()
        is_random = (
            are_random(self.stable_diffusion)
            or are_random(network_folder(self.checkpoint))
            or (train is not None and train.finished_run().provenance().get("weights") == "random")
            or super().weights_note() == "random"
        )
        return "random" if is_random else self._checkpoint_digest()

    @functools.cached_property
    def _prompts(self) -> dict[int, str]:
        return prompts_of(self.prompts_task().finished_run())

    def prepare(self, rows: pa.RecordBatch) -> list[Prepared]:
        from spctrl.inference.generator import request_bytes
        from spctrl.inference.methods import image_seed
        from tasks.execution.worker import TextSource

        prepared = []
        for each, image_id in zip(super().prepare(rows), rows.column("image_id").to_pylist(), strict=True):
            if each.identity is None or image_id not in self._prompts:
                prepared.append(NOTHING)  # the stage that could not make what is missing has said why
                continue
            seed = image_seed(self.how.seed, image_id, self.index)
            request = request_bytes(self._prompts[image_id], seed).decode()
            prepared.append(Prepared(f"{each.identity} {request}", (*each.sources, TextSource(request))))
        return prepared
