"""Training samples from a manifest: image or latents, condition, prompt and heatmaps of one crop.

Legend: R side of the crop in pixels, K keypoints (17), T tokens of a prompt (77), C cells of a heatmap's side (64).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import cv2
import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from spctrl.conditions.index_maps import read_index_map
from spctrl.conditions.openpose import drawn_links, palette
from spctrl.conditions.spatext import draw_index_map
from spctrl.data.crops import LONGEST_SIDES, crop_of, nearest_crop, training_crop
from spctrl.data.datasets import DATASETS
from spctrl.data.images import equal_channels, open_rgb, opened_image
from spctrl.data.records import Record, RecordError, records_from_table
from spctrl.errors import ExpectedError
from spctrl.io.parquet import TableError, open_table
from spctrl.losses.heatmaps import HeatmapType, heatmap_targets
from spctrl.paths import refuse_unsafe_paths
from spctrl.prompts import (
    Subject,
    build_prompt,
    fields_of,
    keypoint_words,
    load_templates,
    rows_without_prompt,
    subjects_from_table,
    templates_path,
    tokenize,
)
from spctrl.store.artifacts import StoredArtifacts, missing_artifacts

if TYPE_CHECKING:
    from numpy.typing import NDArray

_logger = logging.getLogger(__name__)

ConditioningMode = Literal["spatext", "openpose", "keypoint", "sam_hq_mask", "zeo_depth_masked"]
HeatmapTarget = Literal["released", "soft"]

STAGES: dict[ConditioningMode, str] = {
    "spatext": "spatext",
    "openpose": "openpose",
    "keypoint": "openpose",
    "sam_hq_mask": "mask",
    "zeo_depth_masked": "masked_depth",
}
"""The stage whose artifacts a mode reads, where it reads any."""

RENDER_STYLES: dict[ConditioningMode, str] = {"openpose": "openpose", "keypoint": "keypoints"}

_COLUMNS = (
    "dataset", "image_id", "file_name", "width", "height", "background_name", "category", "captions", "image_path",
)  # fmt: skip
_INSTANCE_FIELDS = ("category", "bbox_xywh", "keypoints")
_LATENT_CHANNELS = 8
"""Mean and log-variance of four."""
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_LARGE_PX = 2**16
"""Images of fewer pixels than this are resized by PIL, which takes no time worth saving."""


class SpCtrlDataset(Dataset[dict[str, Any]]):
    """The images of a manifest as training samples (REFERENCE sections 6, 8 and 10).

    Images that no prompt template fits are left out, with a warning. Index maps, renders and heatmaps are computed on
    the fly, equal to the stored ones. Files are opened when a sample is asked for, and closed again. What is random in
    a sample depends on seed, epoch and image alone.

    A sample is a dict:

    - ``pixel_values``: (3, R, R) float32 in [-1, 1]; or, with cached latents, ``latents_mean`` and ``latents_logvar``:
      (4, R/8, R/8) float32, of the autoencoder's posterior, not scaled.
    - ``conditioning_image``: (1, R, R) float32, the index map (0, 1..17, 51..69); in the other modes (3, R, R) float32
      in [0, 1]. With ``use_extra_mask`` the mask, in [0, 1], is one more channel, the last.
    - ``input_ids`` (T,) int64, ``token_mask`` (T,) bool, ``keypoint_mask`` (K,) bool: see ``spctrl.prompts.Tokens``.
    - ``heatmaps``, where asked for: (K, C, C) or, of the whole object, (1, C, C) float32 in [0, 1].
    - ``image_id``: int, ``prompt``: str.
    """

    def __init__(
        self,
        manifest: Path,
        *,
        data_root: Path | None = None,
        tokenizer: Any,
        store: Path | None = None,
        conditioning_mode: ConditioningMode = "spatext",
        use_extra_mask: bool = False,
        stored_conditions: bool = False,
        resolution: int = 512,
        latents: bool = False,
        templates: Path | None = None,
        enable_learnable_kpttoken: bool = False,
        add_keypoint_prompt: float = 0.0,
        proportion_empty_prompts: float = 0.0,
        heatmap_type: HeatmapType | None = None,
        heatmap_target: HeatmapTarget = "released",
        seed: int = 0,
        max_samples: int | None = None,
        keypoint_radius_px: int = 4,
        link_half_width_px: int = 4,
    ) -> None:
        """Read the manifest and find what it names.

        Args:
            manifest: of a run in the store, or an exported one.
            data_root: folder of the raw dataset, or of its export; not needed with cached latents.
            tokenizer: a ``CLIPTokenizer`` of transformers 5; with ``enable_learnable_kpttoken`` one that has the
                placeholders (``spctrl.models.tokens.add_keypoint_tokens``).
            store: folder of everything computed; needed for masks, depth, latents and ``stored_conditions``.
            conditioning_mode: what the condition shows.
            use_extra_mask: whether the mask is one more channel.
            stored_conditions: read index maps and renders from the store instead of drawing them. Stored renders are of
                the style that they were built in.
            resolution: R.
            latents: whether to read cached latents instead of images.
            templates: file of prompt templates; by default the dataset's ``prompts/<dataset>.yaml``.
            enable_learnable_kpttoken: whether keypoints are written as placeholders, not as plain names.
            add_keypoint_prompt: probability that the labelled keypoints are in the prompt.
            proportion_empty_prompts: probability of an empty prompt.
            heatmap_type: what is mapped, and with ``whole`` which token is marked; None: no heatmaps.
            heatmap_target: ``released``: in mode ``spatext`` the binary discs that the paper trained on, in the others
                Gaussians; ``soft``: always Gaussians.
            seed: of all choices.
            max_samples: only so many images, the first ones.
            keypoint_radius_px, link_half_width_px: sizes in the drawings.

        Raises:
            ExpectedError: the manifest, a file, an artifact or a token that samples need is not there; says how many
                are missing and what makes them.
        """
        self.resolution = resolution
        self.conditioning_mode: ConditioningMode = _known(
            conditioning_mode, "conditioning_mode", ConditioningMode
        )
        self.heatmap_type: HeatmapType | None = (
            _known(heatmap_type, "heatmap_type", HeatmapType) if heatmap_type else None
        )
        self.binary_heatmaps = (
            _known(heatmap_target, "heatmap_target", HeatmapTarget) == "released"
            and conditioning_mode == "spatext"
        )
        self.enable_learnable_kpttoken = enable_learnable_kpttoken
        self.add_keypoint_prompt = add_keypoint_prompt
        self.proportion_empty_prompts = proportion_empty_prompts
        self.seed = seed
        self.tokenizer = tokenizer
        self.data_root = data_root
        self._sizes_px = {"keypoint_radius_px": keypoint_radius_px, "link_half_width_px": link_half_width_px}
        # In shared memory: workers that stay from epoch to epoch see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

        draws = conditioning_mode in ("spatext", *RENDER_STYLES) and not stored_conditions
        stages = {
            "condition": None if draws else STAGES[conditioning_mode],
            "mask": "mask" if use_extra_mask else None,
            "latents": "latents" if latents else None,
        }
        self._rows = _read_manifest(manifest, max_samples, [stage for stage in stages.values() if stage])
        self.dataset = self._rows.column("dataset")[0].as_py()
        self._templates_path = templates or templates_path(self.dataset)
        self.templates = load_templates(self._templates_path, self.dataset)
        self._check_images(manifest, needed=not latents)
        self._check_prompts()
        self._leave_out_rows_without_prompt()
        found = {
            name: _find_artifacts(stage, self._rows, manifest, store) if stage else None
            for name, stage in stages.items()
        }
        self._condition, self._mask, self._latents = found["condition"], found["mask"], found["latents"]
        self._check_latents()
        if draws and store is not None:
            self._check_drawing(store)

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    @property
    def image_ids(self) -> list[int]:
        """Of the samples, in order."""
        ids: list[int] = self._rows.column("image_id").to_pylist()
        return ids

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that prompts are drawn for, also in workers that are already running."""
        self._epoch.fill_(epoch)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"expected a sample among 0..{len(self) - 1}, found {i}")
        row = self._rows.slice(i, 1)
        records = records_from_table(row)
        (record,), (subject,) = records, subjects_from_table(row, records)
        sample = {
            **self._image_or_latents(i, record),
            "conditioning_image": self._conditioning_image(i, record),
            **self._tokens(subject),
            "image_id": record.image_id,
        }
        if self.heatmap_type:
            heatmaps = heatmap_targets(
                record.keypoints,
                record.size_wh,
                self.resolution,
                heatmap_type=self.heatmap_type,
                binary=self.binary_heatmaps,
            )
            sample["heatmaps"] = torch.from_numpy(heatmaps)
        return sample

    # Parts of a sample

    def _image_or_latents(self, i: int, record: Record) -> dict[str, torch.Tensor]:
        if self._latents is not None:
            side = self.resolution // 8
            moments = np.frombuffer(self._latents.read(i), "<f2").astype(np.float32)
            mean, logvar = torch.from_numpy(moments.reshape(2, _LATENT_CHANNELS // 2, side, side))
            return {"latents_mean": mean, "latents_logvar": logvar}
        path = self._image_path(i)
        try:
            pixels = _decoded(record, path.read_bytes())
        except (OSError, RecordError) as error:
            raise ExpectedError(
                f"{path} was usable when the manifest was made, and is no more: {error}. Build the dataset again"
            ) from error
        return {"pixel_values": _pixel_crop(pixels, self.resolution).float().mul_(2 / 255).sub_(1)}

    def _conditioning_image(self, i: int, record: Record) -> torch.Tensor:
        """(1 or 3, R, R), and one more with the extra mask."""
        stored = None if self._condition is None else self._condition.read(i)
        if self.conditioning_mode == "spatext":
            pixels = self._drawing(record) if stored is None else _stored_index_map(stored, record)
            condition = torch.from_numpy(nearest_crop(pixels, self.resolution)).float()[None]
        else:
            image = self._render(record).convert("RGB") if stored is None else _stored_rgb(stored, record)
            condition = _unit_range(training_crop(image, self.resolution))
        if self._mask is None:
            return condition
        mask = training_crop(_stored_mask(self._mask.read(i), record), self.resolution)
        return torch.cat([condition, _unit_range(mask[..., None])])

    def _drawing(self, record: Record) -> NDArray[np.uint8]:
        """The record's index map, or what its render colours, of the whole image: (H, W)."""
        links: Sequence[Sequence[int]] = DATASETS[self.dataset].skeleton.links
        if style := RENDER_STYLES.get(self.conditioning_mode):
            links = drawn_links(style, links)
        pixels = np.zeros(record.size_wh[::-1], np.uint8)
        draw_index_map(pixels, record.keypoints, links=links, **self._sizes_px)
        return pixels

    def _render(self, record: Record) -> Image.Image:
        skeleton = DATASETS[self.dataset].skeleton
        colours = palette(RENDER_STYLES[self.conditioning_mode], skeleton.keypoint_names, skeleton.links)
        image = Image.fromarray(self._drawing(record))
        image.putpalette(bytes(channel for colour in colours for channel in colour))
        return image

    def _tokens(self, subject: Subject) -> dict[str, Any]:
        prompt = build_prompt(
            subject,
            self.templates,
            self.dataset,
            keypoints="tokens" if self.enable_learnable_kpttoken else "names",
            seed=self.seed,
            epoch=int(self._epoch),
            add_keypoint_prompt=self.add_keypoint_prompt,
            proportion_empty_prompts=self.proportion_empty_prompts,
        )
        tokens = tokenize(self.tokenizer, prompt, concept=self.heatmap_type or "partition")
        arrays = {name: torch.from_numpy(array) for name, array in tokens._asdict().items()}
        return {**arrays, "prompt": prompt.text}

    def _image_path(self, i: int) -> Path:
        assert self.data_root is not None
        return self.data_root / str(self._rows.column("image_path")[i])

    # What must be there

    def _check_images(self, manifest: Path, *, needed: bool) -> None:
        paths = self._rows.column("image_path")
        missing = paths.null_count
        if needed and missing:
            raise ExpectedError(
                f"expected images of all {len(self):,} records, found none of {missing:,}: they were built with "
                "[build] images = optional. Put them in place and build again, or train on cached latents"
            )
        if not needed:
            return
        if self.data_root is not None:
            refuse_unsafe_paths(self.data_root, paths.to_pylist(), table=manifest)
        if self.data_root is None or not self._image_path(0).is_file():
            where = "no data_root" if self.data_root is None else f"no {self._image_path(0)}"
            raise ExpectedError(
                f"expected the folder of the images, found {where}. It is that of the raw dataset or of its export; "
                "training on cached latents does without"
            )

    def _check_prompts(self) -> None:
        words = keypoint_words(self.dataset, "tokens")
        known = self.tokenizer.get_vocab()
        missing = [word for word in words if word not in known]
        if self.enable_learnable_kpttoken and missing:
            raise ExpectedError(
                f"expected a tokenizer with a token for each keypoint of {self.dataset}, found {len(missing)} missing "
                f"({', '.join(missing[:3])}, ...): spctrl.models.tokens.add_keypoint_tokens adds them"
            )
        unnamed = [each for each in self.templates.training if "category" not in fields_of(each)]
        if self.heatmap_type == "whole" and unnamed:
            raise ExpectedError(
                "expected {category} in all training prompts, since heatmap_type = whole needs a token of the class; "
                f"found {unnamed[0]!r}. Add it to {self._templates_path}, or use heatmap_type = partition"
            )

    def _leave_out_rows_without_prompt(self) -> None:
        found = rows_without_prompt(self.templates.training, self._rows)
        if not found:
            return
        example = next(iter(found.values()))
        if len(found) == len(self):
            raise example
        _logger.warning(
            "%s of %s images are left out, since no prompt template fits them, such as %s",
            f"{len(found):,}", f"{len(self):,}", example,
        )  # fmt: skip
        fits = np.ones(len(self), np.bool_)
        fits[list(found)] = False
        self._rows = self._rows.filter(pa.array(fits))

    def _check_latents(self) -> None:
        if self._latents is None:
            return
        expected = _LATENT_CHANNELS * (self.resolution // 8) ** 2 * np.dtype("<f2").itemsize
        wrong = self._latents.sizes[self._latents.sizes != expected]
        if len(wrong) or self.resolution % 8:
            found = 8 * math.isqrt(int(wrong[0]) // (2 * _LATENT_CHANNELS)) if len(wrong) else self.resolution
            raise ExpectedError(
                f"expected cached latents of {self.resolution} x {self.resolution} pixels, found {len(wrong):,} of "
                f"{len(self):,} of {found} x {found}. Set [latents] resolution = {self.resolution} and build again, or "
                f"train at {found}"
            )

    def _check_drawing(self, store: Path) -> None:
        """Compare with a stored map or render, where there is one: the build's settings may have drawn it otherwise."""
        key = f"{STAGES[self.conditioning_mode]}_key"
        if self.conditioning_mode == "keypoint" or key not in self._rows.schema.names:
            return
        labelled = (
            i for i in range(len(self)) if subjects_from_table(self._rows.slice(i, 1))[0].labelled.any()
        )
        i = next(labelled, 0)
        row = self._rows.slice(i, 1)
        try:
            stored = StoredArtifacts(store, STAGES[self.conditioning_mode], row.column(key)).read(0)
        except ExpectedError:
            return
        (record,) = records_from_table(row)
        rendered = self.conditioning_mode in RENDER_STYLES
        drawn = self._render(record) if rendered else Image.fromarray(self._drawing(record))
        if _stored_rgb(stored, record).tobytes() != drawn.convert("RGB").tobytes():
            raise ExpectedError(
                f"expected {self.conditioning_mode} to be drawn as in the store, found another drawing of "
                f"{record.file_name}: the build had other settings in [spatext] or [openpose]. Give the same "
                "keypoint_radius_px and link_half_width_px, or stored_conditions = True"
            )


def _read_manifest(path: Path, max_samples: int | None, stages: Sequence[str]) -> pa.RecordBatch:
    """The rows of a manifest, as far as samples need them; strings and coordinates stay in Arrow's own memory.

    Raises:
        ExpectedError: it is not there, not a manifest, or empty.
    """
    keys = [f"{stage}_key" for stage in (*stages, "spatext", "openpose")]
    nested = [f"instances.list.element.{name}" for name in _INSTANCE_FIELDS]
    try:
        file = open_table(path)
        known = [name for name in dict.fromkeys(keys) if name in file.schema_arrow.names]
        table = file.read(columns=[*_COLUMNS, *nested, *known])
    except (OSError, pa.ArrowException, TableError) as error:
        raise ExpectedError(
            f"expected a manifest at {path}, found none that can be read: {error}. BuildDataset makes it"
        ) from error
    missing = [name for name in (*_COLUMNS, "instances") if name not in table.column_names]
    if missing or not table.num_rows:
        found = f"no {', '.join(missing)}" if missing else "no rows"
        raise ExpectedError(f"expected a manifest of BuildDataset at {path}, found {found}")
    (batch,) = table.slice(0, max_samples).combine_chunks().to_batches()
    return batch


def _find_artifacts(stage: str, rows: pa.RecordBatch, manifest: Path, store: Path | None) -> StoredArtifacts:
    """Raises ExpectedError where some row has no artifact of the stage."""
    name = f"{stage}_key"
    missing = rows.column(name).null_count if name in rows.schema.names else rows.num_rows
    if missing:
        raise ExpectedError(missing_artifacts(stage, missing, rows.num_rows, str(manifest)))
    if store is None:
        raise ExpectedError(f"expected the store's folder, which holds {stage}, found none ([paths] store)")
    return StoredArtifacts(store, stage, rows.column(name))


def _known(value: Any, name: str, choices: Any) -> Any:
    if value not in get_args(choices):
        raise ExpectedError(f"expected {name} among {', '.join(get_args(choices))}, found {value!r}")
    return value


@contextmanager
def _of_store(record: Record) -> Iterator[None]:
    """Faults of a stored artifact as ``ExpectedError``."""
    try:
        yield
    except RecordError as error:
        raise ExpectedError(
            f"cannot use what the store holds for {record.file_name}: {error.message}. "
            "`spctrl verify` drops what is damaged, the next build makes it again"
        ) from error


def _stored_index_map(data: bytes, record: Record) -> NDArray[np.uint8]:
    with _of_store(record):
        return read_index_map(data, record.size_wh)


def _stored_rgb(data: bytes, record: Record) -> Image.Image:
    with _of_store(record):
        return open_rgb(record, data)


def _stored_mask(data: bytes, record: Record) -> Image.Image:
    with _of_store(record), opened_image(data, record.size_wh) as image:
        return Image.fromarray(equal_channels(image, "a mask"))


def _decoded(record: Record, data: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: the pixels of ``open_rgb``; of whole JPEGs by OpenCV, which gives the same and copies less.

    Raises:
        RecordError: as ``open_rgb``.
    """
    if data.startswith(_JPEG_START) and data.endswith(_JPEG_END):
        with opened_image(data, record.size_wh) as image:  # reads the header only
            is_cmyk = image.mode == "CMYK"  # which PIL and OpenCV convert otherwise
        if not is_cmyk:
            flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
            if pixels is not None and pixels.shape == (*record.size_wh[::-1], 3):
                return np.asarray(pixels, np.uint8)
    return np.array(open_rgb(record, data))


def _pixel_crop(pixels: NDArray[np.uint8], resolution: int) -> torch.Tensor:
    """(3, R, R) uint8 of (H, W, 3): ``training_crop``, but of large images by torch, in a third of PIL's time.

    Values then differ from PIL's by one level at most: of 40 photographs made from noise, with short sides of 260 to
    1200 pixels, sides in ratios 1 to 4 and R = 512, at most 1% of the values in 33 (median 0.1%), and 18 to 24% in 7.
    Longer images are ``training_crop``'s, whose docstring has their numbers.
    """
    height, width = pixels.shape[:2]
    if width * height < _LARGE_PX or max(width, height) > LONGEST_SIDES * min(width, height):
        cropped = training_crop(Image.fromarray(pixels), resolution)
        return torch.from_numpy(cropped).permute(2, 0, 1).contiguous()
    (resized_w, resized_h), left, top = crop_of((width, height), resolution)
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = F.interpolate(channels_first, (resized_h, resized_w), mode="bilinear", antialias=True)
    return resized[0, :, top : top + resolution, left : left + resolution].contiguous()


def _unit_range(levels: NDArray[np.uint8]) -> torch.Tensor:
    """(R, R, channels) uint8 to (channels, R, R) float32 in [0, 1]."""
    channels_first = torch.from_numpy(levels).permute(2, 0, 1)
    return channels_first.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
