"""What a method is: how images come from poses. Read from YAML, compared in a benchmark."""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Any, Literal

import msgspec

from spctrl.configuration import PathText
from spctrl.fingerprints import without_neutral
from spctrl.paths import name_fault

Kind = Literal["spctrl", "controlnet", "t2i_adapter", "external"]
Condition = Literal["spatext", "openpose", "mask", "depth", "masked_depth"]
Precision = Literal["auto", "float32", "float16", "bfloat16"]
FinalSigmas = Literal["zero", "sigma_min"]
MapResize = Literal["centre", "floor"]
Preset = Literal["released"]

CONDITIONS_OF: dict[Kind, tuple[Condition, ...]] = {
    "spctrl": ("spatext",),
    "controlnet": ("openpose", "mask", "depth", "masked_depth"),
    "t2i_adapter": ("openpose", "mask", "depth", "masked_depth"),
    "external": (),
}
"""Conditions that each kind can be given."""

DEFAULTS: dict[str, str] = {"final_sigmas_type": "zero", "map_resize": "centre"}
PRESETS: dict[Preset, dict[str, str]] = {
    "released": {"final_sigmas_type": "sigma_min", "map_resize": "floor"},
}
_NOT_GIVEN: Any = None
"""In place of a setting until ``Sampler`` takes it from a preset."""

LATENT_FACTOR = 8
_SAFE_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


def _check(is_right: bool, expected: str, found: object) -> None:
    if not is_right:
        raise ValueError(f"{expected}, found {found}")


class Sampler(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an image is drawn from noise; the defaults are those of the released evaluation (REFERENCE section 11).

    They differ from it in two settings, which the preset ``released`` sets as there. Images start from this project's
    own noise in both cases (``image_seed``).

    Attributes:
        preset: ``released``: what is not given of the settings in ``PRESETS`` is as in the released inference. A
            setting that is given wins. Read as None once it has been applied.
        final_sigmas_type: noise level at which sampling ends. ``zero``; or ``sigma_min``, that of the first training
            timestep (0.0292 in Stable Diffusion 1.5), at which older versions of diffusers ended, and with them the
            released inference. The latents of the two differ by about 0.1% of their norm.
        map_resize: how index maps are stretched to ``resolution``: ``centre``, as in training, or ``floor``, as in the
            released inference (``spctrl.conditions.index_maps.resize_index_map``). Other conditions are always resized
            bilinearly.
        steps: of the UniPC multistep scheduler.
        guidance_scale: weight of the prompt against the negative prompt; 1 or less leaves the latter out.
        conditioning_scale: weight of the condition.
        control_guidance_start, control_guidance_end: the share of the steps in which the condition acts.
        resolution: side of the image in pixels; a multiple of 8. The condition is stretched to it.
        negative_prompt: what the image should not show.
        precision: of the networks; ``auto`` is float16 on a GPU and float32 on a processor. The image decoder always
            works in float32.
    """

    steps: int = 50
    guidance_scale: float = 7.5
    conditioning_scale: float = 1.0
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0
    resolution: int = 512
    negative_prompt: str = ""
    precision: Precision = "auto"
    preset: Preset | None = None
    final_sigmas_type: FinalSigmas = _NOT_GIVEN
    map_resize: MapResize = _NOT_GIVEN

    def __post_init__(self) -> None:
        preset = PRESETS[self.preset] if self.preset else {}
        for name, value in {**DEFAULTS, **preset}.items():
            if getattr(self, name) is _NOT_GIVEN:
                msgspec.structs.force_setattr(self, name, value)
        # Equal settings are equal, however they were written.
        msgspec.structs.force_setattr(self, "preset", None)
        _check(self.steps >= 1, "steps: expected at least 1", self.steps)
        _check(
            self.resolution >= LATENT_FACTOR and self.resolution % LATENT_FACTOR == 0,
            f"resolution: expected a multiple of {LATENT_FACTOR}",
            self.resolution,
        )
        window = self.control_guidance_start, self.control_guidance_end
        _check(0 <= window[0] < window[1] <= 1, "control_guidance: expected 0 <= start < end <= 1", window)


def sampler_parameters(sampler: Sampler) -> dict[str, Any]:
    """The settings that decide an image, as JSON values for its fingerprint.

    ``preset`` is part of the others, and those of ``DEFAULTS`` are left out where they are neutral.
    """
    settings: dict[str, Any] = msgspec.to_builtins(sampler)
    del settings["preset"]
    return without_neutral(settings, DEFAULTS)


class Method(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A way to make images of poses.

    Attributes:
        name: in tables and folder names; letters, digits and ``_.+-``, at most ``spctrl.paths.MAX_NAME_BYTES``.
        kind: ``spctrl``, ``controlnet``, ``t2i_adapter``, or ``external`` for images that someone else's code made.
        checkpoint: entry of weights.yaml or folder of the ControlNet or adapter, or the folder around it
            (``controlnet/`` or ``adapter/``). Keypoint tokens are read from ``learned_embeds.bin`` in it or beside it.
        train: instead of a checkpoint: a file of configs/train/, which is trained first.
        folder: of an external method: ``<image name>/<i>.jpg``, or ``<image name>.jpg``; see
            ``spctrl.inference.folders.find_images``.
        condition: what the ControlNet or adapter was trained on.
        stable_diffusion: Stable Diffusion 1.5: entry of weights.yaml, or folder.
        keypoint_words: whether prompts name the labelled keypoints, as learned ``tokens`` or as plain ``names``.
        templates: file of prompt templates; by default ``prompts/<dataset>.yaml``.
        images_per_pose: images for each pose, from different noise.
        seed: decides the noise, together with the image's id and the number of the image; so the same pose starts
            from the same noise with every method.
        sampler: how an image is drawn.
    """

    name: str
    kind: Kind
    checkpoint: PathText = ""
    train: PathText = ""
    folder: PathText = ""
    condition: Condition | None = None
    stable_diffusion: PathText = "stable_diffusion"
    keypoint_words: Literal["tokens", "names"] | None = None
    templates: PathText = ""
    images_per_pose: int = 1
    seed: int = 0
    sampler: Sampler = Sampler()

    def __post_init__(self) -> None:
        _check(
            _SAFE_NAME.fullmatch(self.name) is not None,
            "name: expected letters, digits and _.+-",
            repr(self.name),
        )
        if (fault := name_fault(self.name)) is not None:
            raise ValueError(f"name: {fault}")
        _check(self.images_per_pose >= 1, "images_per_pose: expected at least 1", self.images_per_pose)
        given = [name for name in ("checkpoint", "train", "folder") if getattr(self, name)]
        wanted = "folder" if self.kind == "external" else "checkpoint or train"
        _check(
            len(given) == 1 and given[0] in wanted.split(" or "),
            f"{self.name}: a method of kind {self.kind} needs {wanted}",
            " and ".join(given) or "none",
        )
        conditions = CONDITIONS_OF[self.kind]
        if self.condition is None and len(conditions) == 1:
            msgspec.structs.force_setattr(self, "condition", conditions[0])
        _check(
            self.condition in conditions or not (conditions or self.condition),
            f"{self.name}: a method of kind {self.kind} needs as condition {' or '.join(conditions) or 'none'}",
            self.condition or "none",
        )
        window = self.sampler.control_guidance_start, self.sampler.control_guidance_end
        _check(
            self.kind != "t2i_adapter" or window == (0, 1),
            f"{self.name}: a T2I-Adapter acts in all steps: expected control_guidance from 0 to 1",
            window,
        )


class Generation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of configs/generate/: which poses, and the methods that make images of them."""

    dataset: Literal["ap10k", "humanart"]
    methods: list[Method]
    split: Literal["train", "val", "test"] = "val"

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        _check(
            len(set(names)) == len(names) > 0, "methods: expected at least one, with different names", names
        )


def image_seed(seed: int, image_id: int, index: int) -> int:
    """Seed of the noise of the ``index``-th image of a pose: 63 bits."""
    state = blake2b(f"{seed} {image_id} {index}".encode(), digest_size=8)
    return int.from_bytes(state.digest(), "big") >> 1
