"""Training samples: equal to what torchvision makes of the stored files, the same in every worker, and refused at once
where something that they need is missing."""

from __future__ import annotations

import dataclasses
import io
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from manifests import write_manifest
from numpy.typing import NDArray
from PIL import Image

torch = pytest.importorskip("torch", reason="the models extra is not installed")
transforms = pytest.importorskip("torchvision.transforms")
transformers = pytest.importorskip("transformers")

import torch.nn.functional as F  # noqa: E402

from spctrl.conditions.heatmaps import keypoint_heatmaps  # noqa: E402
from spctrl.conditions.masks import encode_png  # noqa: E402
from spctrl.conditions.openpose import render_openpose  # noqa: E402
from spctrl.conditions.spatext import render_spatext  # noqa: E402
from spctrl.data.crops import crop_of, nearest_crop, training_crop  # noqa: E402
from spctrl.data.datasets import AP10K, DATASETS, HUMANART, Dataset  # noqa: E402
from spctrl.data.images import open_rgb  # noqa: E402
from spctrl.data.index import write_index  # noqa: E402
from spctrl.data.records import Record, RecordError, records_from_table  # noqa: E402
from spctrl.errors import ExpectedError  # noqa: E402
from spctrl.losses.heatmaps import crop_heatmaps, heatmap_targets  # noqa: E402
from spctrl.store.artifacts import StoredArtifacts  # noqa: E402
from spctrl.store.store import Store  # noqa: E402
from spctrl.training import SpCtrlDataset  # noqa: E402
from spctrl.training.dataset import _decoded, _pixel_crop  # noqa: E402

R, K = 64, 17
NEAREST = transforms.InterpolationMode.NEAREST
MODES = ("spatext", "openpose", "keypoint", "sam_hq_mask", "zeo_depth_masked")
ROOTS = {"ap10k": "AP-10K", "humanart": "HumanArt"}
ONE_LEVEL = 1.001 / 255
BINARY_BOUND, SOFT_BOUND, SOFT_MEAN_BOUND = 5e-4, 0.03, 5e-4
"""How far heatmaps may be from the stored ones' long way, whose last step is in float32, and others in 8 bit."""

Heatmaps = NDArray[np.floating[Any]]


class Made:
    """A dataset's sample as a manifest, with all that its build would have stored.

    Attributes:
        records: in the manifest's order.
        artifacts: by stage and image id.
    """

    def __init__(self, folder: Path, dataset: Dataset, sample: Path) -> None:
        self.dataset, self.root, self.store = dataset, sample / ROOTS[dataset.name], folder / "store"
        annotations = self.root / dataset.annotation_path(
            "train", {"ap10k": "1", "humanart": "humanart"}[dataset.name]
        )
        write_index(annotations, dataset, "train", folder / "index.parquet", max_pixels=10**8)
        self.index = pq.read_table(folder / "index.parquet", partitioning=None)
        self.records = records_from_table(self.index)
        self.artifacts = {
            "spatext": self._each(self._spatext),
            "openpose": self._each(lambda record: self._render(record, "openpose")),
            "mask": self._each(lambda record: encode_png(_blob(record) * np.uint8(255))),
            "masked_depth": self._each(
                lambda record: encode_png(np.stack([_blob(record) * _ramp(record)] * 3, -1))
            ),
            "latents": self._each(_latents),
        }
        self.manifest = write_manifest(folder, dataset, self.index, self.artifacts)

    def open(self, tokenizer: Any, **settings: Any) -> SpCtrlDataset:
        given = {"data_root": self.root, "store": self.store, "resolution": R, "add_keypoint_prompt": 1.0}
        return SpCtrlDataset(self.manifest, tokenizer=tokenizer, **{**given, **settings})

    def store_again(self, stage: str, change: Any) -> None:
        """Replace a stage's artifacts by what ``change`` makes of each image."""
        of_stage = self.artifacts[stage].items()
        changed = {image_id: change(Image.open(io.BytesIO(data))) for image_id, data in of_stage}
        for pack in (self.store / "packs" / stage).iterdir():
            pack.unlink()
        self.manifest = write_manifest(
            self.store.parent, self.dataset, self.index, {**self.artifacts, stage: changed}
        )

    def _each(self, make: Any) -> dict[int, bytes]:
        return {record.image_id: make(record) for record in self.records}

    def _spatext(self, record: Record) -> bytes:
        links = self.dataset.skeleton.links
        return render_spatext(record, links=links, keypoint_radius_px=4, link_half_width_px=4)

    def _render(self, record: Record, style: str) -> bytes:
        skeleton = self.dataset.skeleton
        return render_openpose(
            record,
            style=style,
            keypoint_names=skeleton.keypoint_names,
            links=skeleton.links,
            keypoint_radius_px=4,
            link_half_width_px=4,
        )

    def stored(self, i: int, mode: str) -> Image.Image:
        """The stored condition of record i."""
        stage = {"sam_hq_mask": "mask", "zeo_depth_masked": "masked_depth"}.get(mode, mode)
        record = self.records[i]
        data = (
            self._render(record, "keypoints")
            if mode == "keypoint"
            else self.artifacts[stage][record.image_id]
        )
        return Image.open(io.BytesIO(data))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _blob(record: Record) -> NDArray[np.uint8]:
    width, height = record.size_wh
    rows, columns = np.mgrid[:height, :width]
    return ((rows * 3 + columns * 2 + record.image_id * 31) % 150 < 80).astype(np.uint8)


def _ramp(record: Record) -> NDArray[np.uint8]:
    width, height = record.size_wh
    return np.tile(np.linspace(1, 255, width).astype(np.uint8), (height, 1))


def _latents(record: Record) -> bytes:
    moments = np.random.default_rng(record.image_id).normal(size=(8, R // 8, R // 8))
    return moments.astype("<f2").tobytes()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from spctrl.models.tiny import write_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    made = transformers.CLIPTokenizer.from_pretrained(folder)
    for dataset in DATASETS.values():
        made.add_tokens(list(dataset.skeleton.placeholders))
    return made


@pytest.fixture(scope="module")
def made(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return {name: Made(tmp_path_factory.mktemp(name), dataset, sample) for name, dataset in DATASETS.items()}


@pytest.fixture
def animals(made: dict[str, Made], sample: Path, tmp_path: Path) -> Made:
    """AP-10K's, to be broken."""
    return Made(tmp_path, AP10K, sample)


# What is in a sample


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extra", [False, True])
def test_conditions_equal_torchvision_s_crop_of_the_stored_files(
    made: dict[str, Made], tokenizer: Any, name: str, mode: Any, extra: bool
) -> None:
    source = made[name]
    dataset = source.open(tokenizer, conditioning_mode=mode, use_extra_mask=extra)
    crop = transforms.Compose([transforms.Resize(R), transforms.CenterCrop(R), transforms.ToTensor()])
    nearest = transforms.Compose([transforms.Resize(R, interpolation=NEAREST), transforms.CenterCrop(R)])
    for i in range(len(dataset)):
        stored = source.stored(i, mode)
        if mode == "spatext":
            expected = torch.from_numpy(np.array(nearest(stored))).float()[None]
        else:
            expected = crop(stored.convert("RGB"))
        if extra:
            expected = torch.cat([expected, crop(source.stored(i, "mask"))])
        found = dataset[i]["conditioning_image"]
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert found.any()


@pytest.mark.parametrize("mode", ["spatext", "openpose", "keypoint"])
@pytest.mark.parametrize("name", DATASETS)
def test_stored_conditions_equal_drawn_ones(
    made: dict[str, Made], tokenizer: Any, name: str, mode: Any
) -> None:
    if mode == "keypoint":
        mode = "openpose"  # its own renders are stored only where [openpose] style says so
    drawn, stored = (
        made[name].open(tokenizer, conditioning_mode=mode, stored_conditions=each) for each in (False, True)
    )
    for i in range(len(drawn)):
        assert torch.equal(drawn[i]["conditioning_image"], stored[i]["conditioning_image"])


STORED = {"spatext": {"stored_conditions": True}, "mask": {"use_extra_mask": True}}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
@pytest.mark.parametrize("stage", STORED)
def test_stored_maps_and_masks_may_be_of_any_mode(
    animals: Made, tokenizer: Any, stage: str, mode: str
) -> None:
    expected = [sample["conditioning_image"] for sample in animals.open(tokenizer, **STORED[stage])]
    animals.store_again(
        stage, lambda image: _png(image.convert("RGB").quantize() if mode == "P" else image.convert(mode))
    )
    found = [sample["conditioning_image"] for sample in animals.open(tokenizer, **STORED[stage])]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("stage", STORED)
def test_stored_maps_and_masks_with_colours_are_refused_by_name(
    animals: Made, tokenizer: Any, stage: str
) -> None:
    animals.store_again(stage, lambda image: _png(Image.new("RGB", image.size, (1, 2, 1))))
    with pytest.raises(
        ExpectedError, match=r"\.jpg: expected .*colours in an image of mode RGB: \(1, 2, 1\) at x = 0"
    ):
        animals.open(tokenizer, **STORED[stage])[0]


@pytest.mark.parametrize("name", DATASETS)
def test_images_equal_torchvision_s_crop_to_one_level(
    made: dict[str, Made], tokenizer: Any, name: str
) -> None:
    dataset = made[name].open(tokenizer)
    crop = transforms.Compose(
        [
            transforms.Resize(R),
            transforms.CenterCrop(R),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    for i, record in enumerate(made[name].records):
        path = made[name].root / made[name].dataset.image_path(record.file_name)
        expected = crop(Image.open(path).convert("RGB"))
        found = dataset[i]["pixel_values"]
        assert (found.shape, found.dtype) == ((3, R, R), torch.float32)
        assert found.is_contiguous()
        apart = (found - expected).abs()
        assert apart.max() <= 2 * ONE_LEVEL
        assert (apart > 1e-6).float().mean() < 0.05


@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK", "turned", "progressive", "cut", "PNG", "P"])
def test_images_decode_to_pil_s_pixels(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 130, 4), np.uint8)
    coarse = Image.fromarray(noise[::8, ::8, :3].copy()).resize((130, 96))
    image = Image.fromarray(noise, "CMYK") if kind == "CMYK" else coarse
    buffer, settings = io.BytesIO(), {}
    if kind in ("L", "P"):
        image = coarse.convert(kind)
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 3
        settings["exif"] = exif
    image.save(
        buffer, "PNG" if kind in ("PNG", "P") else "JPEG", progressive=kind == "progressive", **settings
    )
    data = buffer.getvalue()
    record = Record(1, "1.jpg", (130, 96), np.zeros((0, K, 3)), np.zeros((0, 4)))
    if kind == "cut":
        with pytest.raises(RecordError, match="bad_image"):
            _decoded(record, data[: len(data) // 2])
        with pytest.raises(RecordError, match="image_size"):
            _decoded(dataclasses.replace(record, size_wh=(96, 130)), data)
        return
    expected = np.array(open_rgb(record, data))
    assert np.array_equal(_decoded(record, data), expected)


@pytest.mark.parametrize("size_wh", [(640, 512), (1024, 768), (300, 500), (1200, 250), (100, 80)], ids=str)
@pytest.mark.parametrize("resolution", [512, 256])
def test_crops_of_noise_equal_pil_s_to_two_levels(size_wh: tuple[int, int], resolution: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size_wh[::-1], 3), np.uint8)
    found = _pixel_crop(noise, resolution).numpy()
    apart = np.abs(found.astype(int) - training_crop(Image.fromarray(noise), resolution).transpose(2, 0, 1))
    exact = max(size_wh) > 4 * min(size_wh) or size_wh == (100, 80)
    assert found.shape == (3, resolution, resolution)
    assert apart.max() <= (0 if exact else 2)
    assert apart.mean() < 0.1


def test_latents_are_the_posterior_that_is_stored(made: dict[str, Made], tokenizer: Any) -> None:
    dataset = made["ap10k"].open(tokenizer, latents=True, data_root=None)
    for i, record in enumerate(made["ap10k"].records):
        sample = dataset[i]
        moments = torch.cat([sample["latents_mean"], sample["latents_logvar"]])
        expected = np.frombuffer(made["ap10k"].artifacts["latents"][record.image_id], "<f2")
        assert "pixel_values" not in sample
        assert moments.dtype == torch.float32
        assert np.array_equal(moments.numpy(), expected.reshape(8, R // 8, R // 8).astype(np.float32))


def test_prompts_and_masks_belong_to_the_image(made: dict[str, Made], tokenizer: Any) -> None:
    for name, source in made.items():
        dataset = source.open(tokenizer, enable_learnable_kpttoken=True, heatmap_type="partition")
        for i, record in enumerate(source.records):
            sample = dataset[i]
            labelled = (record.keypoints[..., 2] > 0).any(axis=0)
            assert sample["image_id"] == record.image_id
            assert sample["keypoint_mask"].tolist() == labelled.tolist()
            words = tokenizer.convert_ids_to_tokens(sample["input_ids"][sample["token_mask"]].tolist())
            placeholders = DATASETS[name].skeleton.placeholders
            assert words == [placeholders[k] for k in np.flatnonzero(labelled)]
            assert all(word in sample["prompt"] for word in words)
            assert (sample["input_ids"].dtype, sample["token_mask"].dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", ["released", "soft"])
def test_the_released_target_is_binary_with_index_maps_and_only_there(
    made: dict[str, Made], tokenizer: Any, mode: Any, target: Any
) -> None:
    dataset = made["ap10k"].open(
        tokenizer, conditioning_mode=mode, heatmap_type="partition", heatmap_target=target, latents=True
    )
    for i, record in enumerate(made["ap10k"].records):
        found = dataset[i]["heatmaps"].numpy()
        binary = mode == "spatext" and target == "released"
        expected = heatmap_targets(
            record.keypoints, record.size_wh, R, heatmap_type="partition", binary=binary
        )
        assert (found.shape, found.dtype) == ((K, 64, 64), np.float32)
        assert np.array_equal(found, expected)
        if binary:
            assert set(np.unique(found)) == {0, 1}
        else:
            assert len(np.unique(found)) > 50


def test_heatmaps_are_made_only_where_asked_for(made: dict[str, Made], tokenizer: Any) -> None:
    assert "heatmaps" not in made["ap10k"].open(tokenizer)[0]
    whole = made["ap10k"].open(tokenizer, heatmap_type="whole")[0]
    assert whole["heatmaps"].shape == (1, 64, 64)
    assert whole["token_mask"].sum() == 1


# Heatmaps


def stored_way(heatmaps: Heatmaps, size_wh: tuple[int, int], resolution: int, *, binary: bool) -> Heatmaps:
    """REFERENCE sections 6 and 10: 8 bit, to the image, to the crop, and to 64 x 64 as the loss sees it."""
    how = NEAREST if binary else transforms.InterpolationMode.BILINEAR
    crop = transforms.Compose(
        [transforms.Resize(resolution, interpolation=how), transforms.CenterCrop(resolution)]
    )
    levels = [Image.fromarray((np.minimum(each, 1) * 255).astype(np.uint8)) for each in heatmaps]
    # Across first, as the released code's Pillow did; the present one starts with the axis that shrinks.
    wide = [each.resize((size_wh[0], each.height), Image.Resampling.BICUBIC) for each in levels]
    crops = np.stack([np.array(crop(each.resize(size_wh, Image.Resampling.BICUBIC))) for each in wide])
    seen = torch.from_numpy(crops if binary else crops / np.float32(255)).float()[None]
    seen = F.interpolate(seen, (64, 64), mode="bilinear", align_corners=True)[0].clamp(0, 1)
    found: Heatmaps = seen.numpy()
    return found


def poses(size_wh: tuple[int, int], seed: int) -> NDArray[np.float64]:
    """Two instances; some keypoints lie outside, are not labelled, or are so near that their sum exceeds 1."""
    rng = np.random.default_rng(seed)
    keypoints = np.empty((2, K, 3))
    keypoints[..., :2] = rng.uniform(-0.05, 1.05, (2, K, 2)) * size_wh
    keypoints[1, :6, :2] = keypoints[0, :6, :2] + rng.normal(0, 0.02, (6, 2)) * size_wh
    keypoints[..., 2] = rng.choice([0, 1, 2, 2], (2, K))
    return keypoints


SIZES_WH = [
    (1024, 768), (768, 1024), (1024, 683), (500, 375), (72, 120), (97, 53), (64, 64), (640, 130), (33, 47), (2100, 560),
    (960, 320),
]  # fmt: skip


@pytest.mark.parametrize("size_wh", SIZES_WH, ids=str)
@pytest.mark.parametrize("resolution", [512, 200, 64])
def test_heatmaps_equal_the_stored_ones_after_the_crop(size_wh: tuple[int, int], resolution: int) -> None:
    heatmaps = keypoint_heatmaps(poses(size_wh, resolution), size_wh)
    assert heatmaps.max() > 1.2
    for binary in (True, False):
        found = crop_heatmaps(heatmaps, size_wh, resolution, binary=binary)
        expected = stored_way(heatmaps, size_wh, resolution, binary=binary)
        apart = np.abs(found - expected)
        assert (found.shape, found.dtype) == ((K, 64, 64), np.float32)
        assert 0 <= found.min() <= found.max() <= 1
        assert apart.max() <= (BINARY_BOUND if binary else SOFT_BOUND)
        assert apart.mean() <= (BINARY_BOUND if binary else SOFT_MEAN_BOUND)
        assert expected.any()


def test_a_disc_has_the_radius_of_the_facts() -> None:
    """About 3.3 sigma of 2 cells, but for the cut at 6 cells."""
    keypoints = np.zeros((1, K, 3))
    keypoints[0, 3] = 256, 256, 2
    disc = heatmap_targets(keypoints, (512, 512), 512, heatmap_type="partition", binary=True)[3]
    assert np.flatnonzero(disc.any(axis=0)).tolist() == np.flatnonzero(disc.any(axis=1)).tolist()
    assert 12 <= disc.any(axis=0).sum() <= 15
    assert disc.sum() == pytest.approx(np.pi * 6.66**2, rel=0.12)


def test_a_mirrored_pose_has_mirrored_heatmaps() -> None:
    keypoints = np.zeros((1, K, 3))
    keypoints[0, :, 0] = np.arange(8, 8 + 24 * K, 24)
    keypoints[0, :, 1] = np.arange(8, 8 + 16 * K, 16)
    keypoints[0, :, 2] = 2
    mirrored = keypoints.copy()
    mirrored[..., 0] = 512 - 8 - keypoints[..., 0]  # whole cells of 8 pixels, of which there are 64
    for binary in (True, False):
        one, other = (
            heatmap_targets(each, (512, 512), 512, heatmap_type="partition", binary=binary)
            for each in (keypoints, mirrored)
        )
        assert (
            np.abs(one - other[..., ::-1]).max() < 0.02
            if not binary
            else (one != other[..., ::-1]).mean() < 0.01
        )


def test_the_whole_object_is_the_largest_of_its_keypoints() -> None:
    keypoints = poses((320, 240), 1)
    whole = heatmap_targets(keypoints, (320, 240), 512, heatmap_type="whole", binary=False)
    parts = heatmap_targets(keypoints, (320, 240), 512, heatmap_type="partition", binary=False)
    assert whole.shape == (1, 64, 64)
    assert np.abs(whole[0] - parts.max(axis=0)).max() < 0.06  # the largest before resizing, not after
    assert not heatmap_targets(np.zeros((0, K, 3)), (9, 9), 64, heatmap_type="whole", binary=True).any()


@pytest.mark.parametrize("size_wh", SIZES_WH, ids=str)
def test_the_crop_is_where_torchvision_has_it(size_wh: tuple[int, int]) -> None:
    positions = np.arange(size_wh[0] * size_wh[1]) % 251
    image = Image.fromarray(positions.reshape(size_wh[::-1]).astype(np.uint8))
    expected = transforms.CenterCrop(R)(transforms.Resize(R, interpolation=NEAREST)(image))
    assert np.array_equal(nearest_crop(np.asarray(image), R), np.array(expected))
    if max(size_wh) <= 4 * min(size_wh):
        expected = transforms.CenterCrop(R)(transforms.Resize(R)(image))
        assert np.array_equal(training_crop(image, R), np.array(expected))
    (width, height), left, top = crop_of(size_wh, R)
    assert (width, height) == transforms.Resize(R)(image).size
    assert (left + R <= width, top + R <= height) == (True, True)


# Workers


def batches(dataset: SpCtrlDataset, workers: int, **settings: Any) -> Iterator[dict[str, Any]]:
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, num_workers=workers, **settings)
    yield from loader


def test_samples_do_not_depend_on_workers_or_on_their_order(made: dict[str, Made], tokenizer: Any) -> None:
    dataset = made["ap10k"].open(
        tokenizer, heatmap_type="partition", add_keypoint_prompt=0.5, proportion_empty_prompts=0.3
    )
    alone = [dataset[i] for i in reversed(range(len(dataset)))][::-1]
    for workers in (0, 2):
        found = list(batches(dataset, workers))
        for name in (
            "pixel_values",
            "conditioning_image",
            "input_ids",
            "token_mask",
            "keypoint_mask",
            "heatmaps",
        ):
            together = torch.cat([batch[name] for batch in found])
            assert torch.equal(together, torch.stack([sample[name] for sample in alone])), name
        assert [text for batch in found for text in batch["prompt"]] == [each["prompt"] for each in alone]


def test_an_epoch_reaches_workers_that_stay(made: dict[str, Made], tokenizer: Any) -> None:
    dataset = made["ap10k"].open(tokenizer)
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append([text for batch in loader for text in batch["prompt"]])
    assert epochs[0] == epochs[2] != epochs[1]


def test_a_copy_in_another_process_is_small_and_gives_the_same(made: dict[str, Made], tokenizer: Any) -> None:
    dataset = made["humanart"].open(tokenizer, latents=True, heatmap_type="partition")
    data = pickle.dumps(dataset)
    assert len(data) < len(pickle.dumps(tokenizer)) + 100_000
    copied = pickle.loads(data)
    assert copied[2]["prompt"] == dataset[2]["prompt"]
    assert torch.equal(copied[2]["latents_mean"], dataset[2]["latents_mean"])


def test_only_the_first_images_can_be_asked_for(made: dict[str, Made], tokenizer: Any) -> None:
    dataset = made["ap10k"].open(tokenizer, max_samples=3)
    assert [dataset[i]["image_id"] for i in range(len(dataset))] == [
        record.image_id for record in made["ap10k"].records[:3]
    ]
    with pytest.raises(IndexError, match=r"0\.\.2, found 3"):
        dataset[3]


# What is missing


def rewrite(made: Made, **columns: Any) -> None:
    """Replace columns of the manifest; None drops one."""
    table = pq.read_table(made.manifest, partitioning=None)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        field = table.schema.field(place)
        table = table.remove_column(place)
        if values is not None:
            table = table.add_column(place, field, pa.array(values, field.type))
    pq.write_table(table, made.manifest)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("latents", {"latents": True}),
        ("mask", {"conditioning_mode": "sam_hq_mask"}),
        ("mask", {"use_extra_mask": True}),
        ("masked_depth", {"conditioning_mode": "zeo_depth_masked"}),
        ("spatext", {"stored_conditions": True}),
        ("openpose", {"conditioning_mode": "openpose", "stored_conditions": True}),
    ],
)
def test_what_was_not_built_is_missed_at_once(
    animals: Made, tokenizer: Any, stage: str, settings: dict[str, Any]
) -> None:
    animals.open(tokenizer, **settings)
    with pytest.raises(ExpectedError, match=f"expected the store's folder, which holds {stage}"):
        animals.open(tokenizer, **settings, store=None)
    (pack,) = (animals.store / "packs" / stage).glob("*.parquet")
    index = pq.read_table(pack, partitioning=None)
    pq.write_table(index.slice(2), pack)
    with pytest.raises(ExpectedError, match=f"found none of 2. The stage {stage} makes them"):
        animals.open(tokenizer, **settings)
    pq.write_table(index, pack)
    rewrite(animals, **{f"{stage}_key": [None, *[f"{r.image_id:032x}" for r in animals.records[1:]]]})
    with pytest.raises(ExpectedError, match=f"expected {stage} of all 8 records .* found none of 1"):
        animals.open(tokenizer, **settings)
    rewrite(animals, **{f"{stage}_key": None})
    with pytest.raises(ExpectedError, match=f"found none of 8. The stage {stage} makes them"):
        animals.open(tokenizer, **settings)


def test_a_pack_that_is_cut_holds_nothing_and_one_that_is_cut_later_says_so(
    animals: Made, tokenizer: Any
) -> None:
    dataset = animals.open(tokenizer, latents=True)
    (pack,) = (animals.store / "packs" / "latents").glob("*.safetensors")
    data = pack.read_bytes()
    pack.write_bytes(data[:-10])
    with pytest.raises(ExpectedError, match=r"expected 1024 bytes at \d+ .*`spctrl verify`"):
        [dataset[i] for i in range(len(dataset))]
    with pytest.raises(ExpectedError, match="found none of 8"):
        animals.open(tokenizer, latents=True)
    pack.unlink()
    with pytest.raises(ExpectedError, match="cannot read"):
        dataset[0]


def test_latents_of_another_resolution_are_refused(made: dict[str, Made], tokenizer: Any) -> None:
    with pytest.raises(ExpectedError, match="of 128 x 128 pixels, found 8 of 8 of 64 x 64"):
        made["ap10k"].open(tokenizer, latents=True, resolution=128)


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "data/../../secret.jpg"])
def test_a_manifest_that_leads_out_of_the_images_is_refused(animals: Made, tokenizer: Any, path: str) -> None:
    paths = pq.read_table(animals.manifest, partitioning=None).column("image_path").to_pylist()
    rewrite(animals, image_path=[*paths[:-1], path])
    with pytest.raises(ExpectedError, match=r"expected paths of files below .*, which leads out of it"):
        animals.open(tokenizer)


def test_images_that_are_missing_are_missed_at_once(animals: Made, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ExpectedError, match="expected the folder of the images, found no data_root"):
        animals.open(tokenizer, data_root=None)
    with pytest.raises(ExpectedError, match=r"expected the folder of the images, found no .*jpg"):
        animals.open(tokenizer, data_root=tmp_path)
    paths = pq.read_table(animals.manifest, partitioning=None).column("image_path").to_pylist()
    rewrite(animals, image_path=[None, None, *paths[2:]])
    with pytest.raises(ExpectedError, match="images of all 8 records, found none of 2"):
        animals.open(tokenizer)
    assert len(animals.open(tokenizer, latents=True, data_root=None)) == 8


def test_an_image_that_changed_is_named(animals: Made, tokenizer: Any, tmp_path: Path) -> None:
    shutil.copytree(animals.root, tmp_path / "copy")
    dataset = animals.open(tokenizer, data_root=tmp_path / "copy")
    path = tmp_path / "copy" / "data" / animals.records[1].file_name
    path.write_bytes(b"no image")
    with pytest.raises(ExpectedError, match=f"{path} was usable .*bad_image"):
        dataset[1]
    path.unlink()
    with pytest.raises(ExpectedError, match=f"{path} was usable"):
        dataset[1]
    assert dataset[0]["image_id"] == animals.records[0].image_id


def test_a_drawing_that_is_not_the_store_s_is_refused(made: dict[str, Made], tokenizer: Any) -> None:
    for mode in ("spatext", "openpose"):
        with pytest.raises(ExpectedError, match=f"expected {mode} to be drawn as in the store"):
            made["ap10k"].open(tokenizer, conditioning_mode=mode, keypoint_radius_px=5)


def test_a_tokenizer_without_placeholders_is_refused(made: dict[str, Made], tmp_path: Path) -> None:
    from spctrl.models.tiny import write_tokenizer

    write_tokenizer(tmp_path)
    plain = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    made["ap10k"].open(plain)
    with pytest.raises(ExpectedError, match=r"17 missing \(<left-eye>.*add_keypoint_tokens"):
        made["ap10k"].open(plain, enable_learnable_kpttoken=True)


def test_whole_heatmaps_need_a_class_token(made: dict[str, Made], tokenizer: Any) -> None:
    with pytest.raises(ExpectedError, match=r"expected {category} in all training prompts.*{caption}"):
        made["humanart"].open(tokenizer, heatmap_type="whole")


@pytest.mark.parametrize("lost", [{0}, {2, 5, 7}])
def test_images_that_no_prompt_fits_are_left_out_with_a_warning(
    animals: Made, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: set[int]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: ['{category} {keypoints} {background}']\nevaluation: ['{keypoints}']")
    whole = animals.open(tokenizer, templates=path)
    assert len(whole) == 8 and not caplog.records
    rewrite(animals, background_name=[None if i in lost else "dark" for i in range(8)])
    dataset = animals.open(tokenizer, templates=path)
    kept = [i for i in range(8) if i not in lost]
    assert [sample["image_id"] for sample in map(dataset.__getitem__, range(len(dataset)))] == [
        whole[i]["image_id"] for i in kept
    ]
    for i, j in enumerate(kept):
        assert torch.equal(dataset[i]["conditioning_image"], whole[j]["conditioning_image"])
    (warning,) = caplog.messages
    assert f"{len(lost)} of 8 images are left out" in warning and "template without background" in warning


def test_a_dataset_that_no_prompt_fits_is_refused(animals: Made, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: ['{category} {keypoints} {background}']\nevaluation: ['{keypoints}']")
    rewrite(animals, background_name=[None] * 8)
    with pytest.raises(ExpectedError, match="prompt template without background"):
        animals.open(tokenizer, templates=path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"conditioning_mode": "depth"}, "conditioning_mode among spatext, .*found 'depth'"),
        ({"heatmap_target": "hard"}, "heatmap_target among released, soft, found 'hard'"),
        ({"heatmap_type": "parts"}, "heatmap_type among partition, whole, found 'parts'"),
        ({"latents": True, "resolution": 60}, "60 x 60"),
    ],
)
def test_unknown_settings_name_the_valid_ones(
    made: dict[str, Made], tokenizer: Any, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(ExpectedError, match=match):
        made["ap10k"].open(tokenizer, **settings)


def test_what_is_no_manifest_is_named(animals: Made, tokenizer: Any, tmp_path: Path) -> None:
    for content in (None, b"", b"PAR1"):
        if content is not None:
            animals.manifest.write_bytes(content)
        else:
            animals.manifest.unlink()
        with pytest.raises(ExpectedError, match=f"expected a manifest at {animals.manifest}"):
            animals.open(tokenizer)
    pq.write_table(pa.table({"image_id": [1]}), animals.manifest)
    with pytest.raises(
        ExpectedError, match=r"expected a manifest of BuildDataset at .*no dataset, file_name"
    ):
        animals.open(tokenizer)


def test_an_empty_manifest_is_named(animals: Made, tokenizer: Any) -> None:
    pq.write_table(pq.read_table(animals.manifest, partitioning=None).slice(0, 0), animals.manifest)
    with pytest.raises(ExpectedError, match="found no rows"):
        animals.open(tokenizer)


def test_artifacts_are_found_across_packs(animals: Made) -> None:
    store = Store(animals.store)
    store.write_pack("spatext", ".png", [("new", b"later"), ("bad", ("bad_image", "broken"))])
    first = f"{animals.records[0].image_id:032x}"
    found = StoredArtifacts(animals.store, "spatext", pa.array([first, "new", first]))
    assert found.read(1) == b"later"
    assert found.read(0) == found.read(2) == animals.artifacts["spatext"][animals.records[0].image_id]
    with pytest.raises(ExpectedError, match="found none of 1"):
        StoredArtifacts(animals.store, "spatext", pa.array(["new", "bad"]))


def test_humanart_s_map_has_a_link_that_its_render_lacks(made: dict[str, Made], tokenizer: Any) -> None:
    assert len(HUMANART.skeleton.links) == 19
    maps = made["humanart"].open(tokenizer, resolution=256, data_root=made["humanart"].root)
    assert max(float(maps[i]["conditioning_image"].max()) for i in range(len(maps))) == 69
