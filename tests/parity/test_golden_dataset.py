"""Training samples against what the released loader returns for the golden dataset (../shared/data/golden/dataset).

Its prompts are worded otherwise and its heatmaps are Gaussians that are not cut, so both are fed in as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from manifests import write_manifest
from numpy.typing import NDArray
from PIL import Image

torch = pytest.importorskip("torch", reason="the models extra is not installed")
transformers = pytest.importorskip("transformers")

from spctrl.data.datasets import AP10K  # noqa: E402
from spctrl.data.records import RECORD_SCHEMA  # noqa: E402
from spctrl.losses.heatmaps import crop_heatmaps  # noqa: E402
from spctrl.prompts import Prompt, build_prompt, load_templates, subjects_from_table, tokenize  # noqa: E402
from spctrl.training import SpCtrlDataset  # noqa: E402

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "dataset"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"needs the golden files in {GOLDEN}")

DATA = GOLDEN / "data"
RENDERS = DATA / "train_split1_openpose_skeleton"
RESOLUTION = 64
MODES = ("spatext", "openpose")


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = torch.load(GOLDEN / "dataset.pt", weights_only=True)["runs"]
    return loaded


def items(run: dict[str, Any]) -> list[dict[str, Any]]:
    return list(run["items"].values()) if isinstance(run["items"], dict) else list(run["items"])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = transformers.CLIPTokenizer.from_pretrained(GOLDEN / "tokenizer")
    made.add_tokens(list(AP10K.skeleton.placeholders))
    return made


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden dataset's lines as a manifest, with its stored maps and renders in packs."""
    categories = json.loads((DATA / "catgories.jsonl").read_text())
    rows = []
    for text in (DATA / "train_split1.jsonl").read_text().splitlines():
        line = json.loads(text)
        instances = [
            {
                "category": categories[str(each["category_id"])]["name"],
                "bbox_xywh": [float(number) for number in each["bbox"]],
                "keypoints": np.array(each["keypoints"], float).reshape(17, 3).tolist(),
            }
            for each in line["anns"]
        ]
        size = {"width": line["width"], "height": line["height"]}
        names = {"file_name": line["filename"], "background_name": AP10K.backgrounds[line["background"]]}
        rows.append(
            {"dataset": "ap10k", "image_id": line["image_id"], "instances": instances, **size, **names}
        )
    files = {"spatext": DATA / "pose_kptindex", "openpose": RENDERS}
    artifacts = {
        stage: {row["image_id"]: (folder / row["file_name"]).with_suffix(".png").read_bytes() for row in rows}
        for stage, folder in files.items()
    }
    table = pa.Table.from_pylist(rows, schema=RECORD_SCHEMA)
    return write_manifest(tmp_path_factory.mktemp("golden"), AP10K, table, artifacts)


def opened(manifest: Path, tokenizer: Any, mode: Any, **settings: Any) -> SpCtrlDataset:
    return SpCtrlDataset(
        manifest,
        data_root=DATA,
        store=manifest.parent / "store",
        tokenizer=tokenizer,
        conditioning_mode=mode,
        resolution=RESOLUTION,
        **settings,
    )


def golden_items(runs: dict[str, Any], mode: str) -> list[dict[str, Any]]:
    return items(runs[f"ap10k/{mode}/partition/learnable/train"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stored", [False, True])
def test_images_and_conditions_equal_the_released_loader_s(
    runs: dict[str, Any], manifest: Path, tokenizer: Any, mode: str, stored: bool
) -> None:
    dataset = opened(manifest, tokenizer, mode, stored_conditions=stored)
    expected = golden_items(runs, mode)
    assert len(dataset) == len(expected) == 6
    for i, item in enumerate(expected):
        sample = dataset[i]
        assert sample["pixel_values"].is_contiguous()
        assert (sample["pixel_values"] - item["pixel_values"]).abs().max() <= 1e-6
        apart = (sample["conditioning_image"] - item["conditioning_pixel_values"]).abs()
        assert sample["conditioning_image"].shape == item["conditioning_pixel_values"].shape
        assert apart.max() <= (0 if mode == "spatext" else 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_heatmaps_of_stored_files_equal_the_released_loader_s(runs: dict[str, Any], mode: str) -> None:
    for item in golden_items(runs, mode):
        stem = Path(item["file_name"]).stem
        stored: NDArray[np.float64] = np.load(DATA / "heatmap_multichannel_npy" / f"{stem}.npy")
        with Image.open(DATA / "data" / item["file_name"]) as image:
            found = crop_heatmaps(stored, image.size, RESOLUTION, binary=mode == "spatext")
        expected = item["heatmap"].float().clamp(0, 1).numpy()
        wrapped = stored.max(axis=(1, 2)) > 1 + 1 / 255  # there the released loader's 8 bit start over
        assert not wrapped.all()
        apart = np.abs(found - expected)[~wrapped]
        assert apart.max() <= (0 if mode == "spatext" else 2 / 255)


def test_tokens_equal_the_released_loader_s(runs: dict[str, Any], tokenizer: Any) -> None:
    words = AP10K.skeleton.placeholders
    for run in runs.values():
        for item in items(run):
            text = item["caption"]
            starts = [text.find(word) for word in words]
            spans = [
                (start, start + len(word)) if start >= 0 else None
                for start, word in zip(starts, words, strict=True)
            ]
            tokens = tokenize(tokenizer, Prompt(text, None, tuple(spans)))
            assert tokens.input_ids.tolist() == item["input_ids"].tolist()
            if item["token_placeholder_mask"] is not None:
                assert tokens.token_mask.tolist() == item["token_placeholder_mask"].bool().tolist()
                assert tokens.keypoint_mask.tolist() == item["keypoint_prompt_vis_mask"].tolist()


def test_prompts_carry_the_species_and_keypoints_of_the_released_ones(
    runs: dict[str, Any], manifest: Path
) -> None:
    import pyarrow.parquet as pq

    subjects = subjects_from_table(pq.read_table(manifest, partitioning=None))
    templates = load_templates(None, "ap10k")
    for subject, item in zip(subjects, golden_items(runs, "spatext"), strict=True):
        prompt = build_prompt(
            subject, templates, "ap10k", keypoints="tokens", seed=0, epoch=0, add_keypoint_prompt=1.0
        )
        head, _, listed = item["caption"].partition(" <")
        named = listed.rpartition(">")[0]
        assert f"<{named}>" in prompt.text if named else "<" not in prompt.text
        assert all(name in head and name in prompt.text for name in subject.categories)
        assert subject.labelled.tolist() == item["keypoint_prompt_vis_mask"].tolist()
