"""Images of a split's poses by tiny random models, through whole runs of Generate."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from PIL import Image
from processes import HANG_S

pytest.importorskip("diffusers", reason="the models extra is not installed")

if TYPE_CHECKING:
    from conftest import Build, Workspace

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_models")]
POSES = 8
BATCH = 2
METHOD = {
    "name": "tiny",
    "kind": "spctrl",
    "checkpoint": "spctrl_ap10k",
    "keypoint_words": "tokens",
    "sampler": {"steps": 2, "resolution": 64},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from spctrl.models import tiny

    folder = tmp_path_factory.mktemp("weights")
    tiny.build_stable_diffusion(folder / "stable-diffusion-v1-5")
    tiny.build_spctrl(folder / "spctrl-ap10k", folder / "stable-diffusion-v1-5", "ap10k")
    return folder


@pytest.fixture
def drawing(workspace: Workspace, weights: Path) -> Workspace:
    workspace.configure("paths", weights=weights)
    workspace.configure("executor", device="cpu")
    workspace.configure("generate", batch_size=BATCH)
    return workspace


def config(workspace: Workspace, *methods: dict[str, Any]) -> Path:
    path = workspace.folder / "generate.yaml"
    path.write_bytes(msgspec.yaml.encode({"dataset": "ap10k", "split": "val", "methods": methods}))
    return path


def generate(workspace: Workspace, *methods: dict[str, Any]) -> Build:
    return workspace.build("Generate", config=str(config(workspace, *methods)))


def folder_of(workspace: Workspace, name: str = "tiny") -> Path:
    return workspace.exports / f"generated-{name}" / "ap10k-val"


def listing(workspace: Workspace, name: str = "tiny") -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(
        folder_of(workspace, name) / "images.parquet", partitioning=None
    ).to_pylist()
    return rows


def kill_after_the_first_pack(workspace: Workspace, path: Path) -> None:
    run = workspace.start("--config", str(path), family="Generate")
    deadline = time.monotonic() + HANG_S
    while not list(workspace.store.glob("packs/samples/[!.]*.parquet")):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline, "no pack was written"
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


def test_a_killed_run_goes_on_and_only_what_is_new_is_drawn(drawing: Workspace) -> None:
    kill_after_the_first_pack(drawing, config(drawing, METHOD))
    kept = len(drawing.keys("samples"))
    assert kept > 0
    assert not list(drawing.store.glob("runs/generate/*/*/provenance.json"))
    assert drawing.faults() == []

    built = generate(drawing, METHOD)
    assert built.succeeded, built.errors
    assert built.worked["samples"] == POSES - kept
    rows = listing(drawing)
    assert len(rows) == POSES
    assert {row["weights"] for row in rows} == {"random"}
    for row in rows:
        assert "<left-eye" in row["prompt"] or "<right-eye" in row["prompt"]
        with Image.open(folder_of(drawing) / row["path"]) as image:
            assert image.size == (64, 64)

    assert generate(drawing, METHOD).committed == {}

    # Images that somebody removed or changed come back from the store.
    gone, changed = (folder_of(drawing) / row["path"] for row in rows[:2])
    contents = gone.read_bytes(), changed.read_bytes()
    gone.unlink()
    changed.write_bytes(b"mine")
    restored = generate(drawing, METHOD)
    assert restored.succeeded, restored.errors
    assert "samples" not in restored.worked
    assert (gone.read_bytes(), changed.read_bytes()) == contents

    # More images of each pose, in other batches: the first ones stay, file for file.
    before = {row["path"]: row["digest"] for row in rows}
    drawing.configure("generate", batch_size=5)
    more = generate(drawing, {**METHOD, "images_per_pose": 2})
    assert more.succeeded, more.errors
    assert more.worked["samples"] == POSES
    rows = listing(drawing)
    assert len(rows) == 2 * POSES
    assert before.items() <= {row["path"]: row["digest"] for row in rows}.items()
    assert len({row["seed"] for row in rows}) == 2 * POSES

    # Fewer again: nothing is drawn, and the folder holds no image that the listing does not name.
    fewer = generate(drawing, METHOD)
    assert "samples" not in fewer.worked
    assert {path.name for path in folder_of(drawing).rglob("*.jpg")} == {"0.jpg"}


def test_images_of_someone_else_are_listed_with_our_prompts(drawing: Workspace) -> None:
    theirs = drawing.folder / "theirs"
    names = sorted(path.stem for path in (drawing.data / "AP-10K" / "data").glob("*.jpg"))
    for name in names:
        (theirs / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(theirs / name / "0.jpg")
    method = {"name": "GRPose", "kind": "external", "folder": str(theirs)}
    built = generate(drawing, method)
    assert built.succeeded, built.errors
    assert built.counted("generate", "made") == POSES
    assert "samples" not in built.stages
    assert generate(drawing, method).committed == {}

    # A changed image is seen, and images that are missing are counted and fail the run.
    Image.new("RGB", (64, 64), "white").save(theirs / names[-1] / "0.jpg")
    assert generate(drawing, method).stages == {"generate"}
    for name in names:
        (theirs / name / "0.jpg").unlink()
    failed = generate(drawing, method)
    assert not failed.succeeded
    (error,) = failed.errors
    assert ", such as " in error and "/0.jpg, found none that fit a pose" in error

    # A folder that is not there is an error of the stage, in one line.
    nowhere = generate(drawing, {**method, "folder": str(theirs / "nowhere")})
    assert not nowhere.succeeded
    (error,) = nowhere.errors
    assert "GRPose: expected a folder of images at" in error and str(theirs / "nowhere") in error


def test_poses_that_no_prompt_fits_are_set_aside_within_the_limit(drawing: Workspace) -> None:
    templates = drawing.folder / "prompts.yaml"
    templates.write_text("training: ['{keypoints}']\nevaluation: ['{category} {keypoints} in {background}']")
    with drawing.edit_annotations("ap10k", "val") as content:
        for position, image in enumerate(content["images"]):
            image["background"] = 1 if position > 1 else None
    method = {**METHOD, "templates": str(templates)}
    refused = generate(drawing, method)
    assert not refused.succeeded and "samples" not in refused.stages
    (error,) = refused.errors
    assert f"2 of {POSES} records cannot be used" in error and "template without background" in error
    templates.write_text("training: ['{keypoints}']\nevaluation: ['{caption} {keypoints}']")
    drawing.configure("build", max_reject_share=1)
    (error,) = generate(drawing, method).errors
    assert "expected poses with a prompt, found none" in error and "template without caption" in error
    templates.write_text("training: ['{keypoints}']\nevaluation: ['{category} {keypoints} in {background}']")
    drawing.configure("build", max_reject_share=0.25)
    built = generate(drawing, method)
    assert built.succeeded, built.errors
    assert len(listing(drawing)) == POSES - 2


def test_missing_weights_are_named(drawing: Workspace, tmp_path: Path) -> None:
    drawing.configure("paths", weights=tmp_path / "nowhere")
    done = drawing.run("--config", str(config(drawing, METHOD)), family="Generate")
    assert done.exit_code != 0
    assert "spctrl-ap10k" in done.output
    assert "arXiv 2506.20983" in done.output
