"""Masks, depth and latents by image models with tiny random weights, through whole builds."""

from __future__ import annotations

import hashlib
import html
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from processes import HANG_S

import spctrl.weights as weights_registry

pytest.importorskip("torch", reason="the models extra is not installed")

if TYPE_CHECKING:
    from conftest import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_models")]
MODELS = {"segments", "depth", "latents"}
IMAGES = 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from spctrl.image_models.tiny import write_tiny_weights

    folder = tmp_path_factory.mktemp("weights")
    assert len(list(write_tiny_weights(folder))) >= 4
    return folder


@pytest.fixture
def modelled(workspace: Workspace, weights: Path, tmp_path: Path) -> Workspace:
    """A workspace whose masks, depth and latents come from models, with its own copy of their weights."""
    shutil.copytree(weights, tmp_path / "weights")
    workspace.configure("paths", weights=tmp_path / "weights")
    workspace.configure("build", conditions=["spatext", "mask", "depth", "masked_depth", "latents"])
    workspace.configure("mask", backend="sam_hq", model_type="vit_b", empty="keep")
    workspace.configure("depth", backend="zoedepth")
    workspace.configure("latents", resolution=64)
    workspace.configure("executor", device="cpu")
    return workspace


def provenance(workspace: Workspace, stage: str) -> dict[str, object]:
    (path,) = workspace.store.glob(f"runs/{stage}/*/*/provenance.json")
    found: dict[str, object] = json.loads(path.read_bytes())
    return found


def test_models_fill_the_manifest_and_say_that_their_weights_are_random(modelled: Workspace) -> None:
    built = modelled.build()
    assert built.succeeded, built.errors
    assert {stage: built.counted(stage, "made") for stage in MODELS} == dict.fromkeys(MODELS, IMAGES)
    rows = modelled.manifest("ap10k", "train")
    assert len(rows) == IMAGES
    for row in rows:
        assert {row[f"{name}_weights"] for name in ("mask", "depth", "masked_depth", "latents")} == {"random"}
        assert row["spatext_weights"] is None
        assert len(row["mask_instances"] or []) == len(row["instances"])
        assert row["latents_path"] is None
    assert provenance(modelled, "segments")["weights"] == "random"
    page = (modelled.exports / "report.html").read_text()
    assert "weights: random" in page
    assert "masks by sam_hq: mean IoU" in page


def test_two_devices_make_the_bytes_of_one(
    modelled: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.execution import executor
    from tasks.execution.devices import WorkerDevices
    from tasks.stage import model_stage

    workers = []

    def run_jobs(*arguments: Any, **options: Any) -> Any:
        workers.append(options["workers"])
        return executor.run_jobs(*arguments, **options)

    monkeypatch.setattr(model_stage, "RECORDS_PER_PACK", 2)
    monkeypatch.setattr(model_stage, "run_jobs", run_jobs)
    packs = []
    for devices in (1, 2):
        found = WorkerDevices("cpu", [{} for _ in range(devices)])
        monkeypatch.setattr(model_stage, "devices_of_workers", lambda _, found=found: found)
        modelled.configure("paths", store=tmp_path / f"store-{devices}")
        built = modelled.build()
        assert built.succeeded, built.errors
        files = {
            path for stage in MODELS for path in (tmp_path / f"store-{devices}" / "packs" / stage).iterdir()
        }
        packs.append({hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert set(workers) == {1, 2}
    assert packs[0] == packs[1]
    assert len(packs[0]) >= len(MODELS) * IMAGES / 2


def test_known_masks_agree_with_themselves_in_the_report(workspace: Workspace) -> None:
    workspace.configure("build", conditions=["mask"])
    assert workspace.build().succeeded
    assert "masks by precomputed: mean IoU 1.000" in (workspace.exports / "report.html").read_text()


def test_known_masks_that_cannot_be_compared_are_left_out_of_the_report(modelled: Workspace) -> None:
    modelled.configure("build", conditions=["mask"])
    other_size, empty, folder, pipe, *_ = sorted((modelled.data / "AP-10K" / "mask").iterdir())
    Image.new("L", (3, 2)).save(other_size)
    empty.write_bytes(b"")
    for each in (folder, pipe):
        each.unlink()
    folder.mkdir()
    os.mkfifo(pipe)
    built = modelled.build()
    assert built.succeeded, built.errors
    page = html.unescape((modelled.exports / "report.html").read_text())
    assert f"({IMAGES - 4} images)" in page
    assert (
        f"4 files of {other_size.parent} are left out of the mean IoU, such as {other_size}: expected" in page
    )


def test_latents_are_mapped_from_safetensors_packs(modelled: Workspace) -> None:
    from safetensors import safe_open

    modelled.configure("build", conditions=["latents"])
    assert modelled.build().succeeded
    keys = {row["latents_key"]: row["latents_digest"] for row in modelled.manifest("ap10k", "train")}
    (pack,) = modelled.store.glob("packs/latents/*.safetensors")
    with safe_open(pack, "np") as shard:
        assert set(shard.keys()) == set(keys)
        for key in keys:
            tensor = shard.get_tensor(key)
            assert tensor.shape == (8, 8, 8)
            assert tensor.dtype == np.float16
    assert modelled.faults() == []


def test_one_image_added_costs_one_pass_of_each_model(modelled: Workspace) -> None:
    from conftest import only

    with modelled.edit_annotations("ap10k", "train") as content:
        everything = json.loads(json.dumps(content))
        only({image["id"] for image in content["images"][:-1]}, content)
    assert modelled.build().succeeded
    with modelled.edit_annotations("ap10k", "train") as content:
        content |= everything
    again = modelled.build()
    assert again.succeeded, again.errors
    assert {stage: again.worked.get(stage) for stage in MODELS} == dict.fromkeys(MODELS, 1)


def test_other_weights_give_other_masks_and_no_renders(modelled: Workspace, tmp_path: Path) -> None:
    import torch

    modelled.configure("build", conditions=["spatext", "mask"])
    assert modelled.build().succeeded
    path = tmp_path / "weights" / "sam_hq_vit_b.pth"
    state = torch.load(path, weights_only=True)
    state["mask_decoder.iou_token.weight"] += 1
    torch.save(state, path)
    again = modelled.build()
    assert again.succeeded, again.errors
    assert again.worked["segments"] == IMAGES
    assert "spatext" not in again.stages


def test_where_weights_lie_does_not_matter(modelled: Workspace, tmp_path: Path) -> None:
    modelled.configure("build", conditions=["mask"])
    assert modelled.build().succeeded
    moved = tmp_path / "elsewhere.pth"
    shutil.move(tmp_path / "weights" / "sam_hq_vit_b.pth", moved)
    shutil.move(tmp_path / "weights" / "sam_hq_vit_b.pth.json", moved.with_name("elsewhere.pth.json"))
    modelled.configure("mask", weights=moved)
    assert modelled.build().stages == set()


def test_missing_weights_are_named_with_what_to_get(modelled: Workspace, tmp_path: Path) -> None:
    (tmp_path / "weights" / "sam_hq_vit_b.pth").unlink()
    done = modelled.run()
    assert done.exit_code == 20
    assert "sam_hq_vit_b.pth" in done.output
    assert "github.com/SysCV/sam-hq" in done.output


def test_a_file_that_is_not_its_publishers_is_not_used(
    modelled: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tasks.stage import weights

    path = tmp_path / "weights" / "sam_hq_vit_b.pth"
    path.with_name(f"{path.name}.json").unlink()  # it no longer says that it is random
    entry = weights_registry.known_weights()["sam_hq_vit_b"]
    genuine = hashlib.sha256(path.read_bytes()).hexdigest()
    for stated, complete in ((None, True), (genuine, True), (genuine[:8], True), ("0" * 8, False)):
        registry = {"sam_hq_vit_b": msgspec.structs.replace(entry, sha256=stated)}
        monkeypatch.setattr(weights_registry, "known_weights", lambda registry=registry: registry)
        assert weights.Weights(name="sam_hq_vit_b", path=str(path)).complete() is complete
    assert genuine in caplog.text and entry.publisher in caplog.text
    own = path.rename(path.with_name("my_own.pth"))
    assert weights.Weights(name="sam_hq_vit_b", path=str(own)).complete()


@pytest.mark.parametrize("harm", ["cut", "other"])
def test_weights_that_do_not_fit_fail_the_stage_and_nothing_else(
    modelled: Workspace, tmp_path: Path, harm: str
) -> None:
    path = tmp_path / "weights" / "sam_hq_vit_b.pth"
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        shutil.copyfile(tmp_path / "weights" / "sam_vit_b_01ec64.pth", path)
    modelled.configure("build", conditions=["spatext", "mask"])
    done = modelled.build()
    assert not done.succeeded
    assert any(str(path) in error for error in done.errors)
    assert "spatext" in done.stages


def test_an_image_without_its_file_has_no_mask(modelled: Workspace) -> None:
    modelled.configure("build", conditions=["mask"], images="optional", max_reject_share=0.5)
    min((modelled.data / "AP-10K" / "data").glob("*.jpg")).unlink()
    done = modelled.build()
    assert done.succeeded, done.errors
    assert len(modelled.manifest("ap10k", "train")) == IMAGES - 1


def test_a_killed_model_process_fails_the_build_and_the_next_one_goes_on(
    modelled: Workspace, make_killer: Callable[[Workspace], int]
) -> None:
    assert make_killer(modelled) == 30
    assert modelled.faults() == []
    assert modelled.build().succeeded


@pytest.fixture
def make_killer() -> Callable[[Workspace], int]:
    """Start a build, kill the process that loads the first model, and give the build's exit code."""
    import os
    import signal
    import time

    def run(workspace: Workspace) -> int:
        build = workspace.start()
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline and build.poll() is None:
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    command = (folder / "cmdline").read_bytes()
                    group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
                except (OSError, ValueError):
                    continue
                if group == build.pid and b"spawn_main" in command:
                    os.kill(int(folder.name), signal.SIGKILL)
                    build.communicate(timeout=HANG_S)
                    return int(build.returncode)
            time.sleep(0.05)
        raise AssertionError("no model process was started")

    return run
