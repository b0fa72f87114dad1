"""Verify, gc, accept and status: as functions, and as the commands that people type."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Workspace
from stores import commit, locations

from spctrl.store.code_version import copy_code
from spctrl.store.store import Store
from tasks.maintenance import collect, verify

IMAGES = 8
NO_GRACE = ("--grace-hours", "0")


@pytest.fixture
def built(make_workspace: Callable[..., Workspace], sample: Path) -> Workspace:
    workspace = make_workspace("built", sample)
    workspace.configure("build", datasets=["ap10k"], splits=["val"])
    assert workspace.build().succeeded
    return workspace


def damage_an_artifact(workspace: Workspace, stage: str) -> str:
    """Flip a byte in the middle of a stage's first artifact; gives its key."""
    store = Store(workspace.store)
    key, place = next(iter(locations(store, stage).items()))
    path = store.pack_path(stage, place.pack)
    data = bytearray(path.read_bytes())
    data[place.offset + place.size // 2] ^= 0xFF
    path.write_bytes(data)
    return key


def check(workspace: Workspace, *, repair: bool) -> list[str]:
    found = verify(Store(workspace.store), workspace.exports, repair=repair)
    return [f"{damage.place}: {damage.fault}" for damage in found]


def test_a_sound_store_has_no_damage(built: Workspace) -> None:
    assert check(built, repair=True) == []
    assert built.build().stages == set()


def test_a_damaged_artifact_is_named_and_made_again(built: Workspace) -> None:
    exported = built.exported()
    key = damage_an_artifact(built, "spatext")
    (damage,) = check(built, repair=True)
    assert key in damage
    assert "digest" in damage
    again = built.build()
    assert again.succeeded
    assert again.worked == {"spatext": 1}
    assert built.exported() == exported
    assert built.faults() == []


def test_verify_leaves_the_store_alone_when_asked_to(built: Workspace) -> None:
    damage_an_artifact(built, "openpose")
    assert len(check(built, repair=False)) == 1
    assert built.build().stages == set()
    assert len(check(built, repair=True)) == 1


def test_a_deleted_pack_is_named_and_made_again(built: Workspace) -> None:
    exported = built.exported()
    for path in built.store.glob("packs/spatext/*.tar"):
        path.unlink()
    assert any("spatext" in damage for damage in check(built, repair=True))
    again = built.build()
    assert again.counted("spatext", "made") == IMAGES
    assert built.exported() == exported


def test_a_changed_manifest_of_a_run_is_named_and_written_again(built: Workspace) -> None:
    (path,) = built.store.glob("runs/index/*/*/records.parquet")
    before = path.read_bytes()
    path.write_bytes(before[:-1] + b"!")
    assert any("records.parquet is missing or changed" in damage for damage in check(built, repair=True))
    assert built.build().succeeded
    assert path.read_bytes() == before


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"?")])
def test_a_harmed_exported_file_is_named_and_written_again(
    built: Workspace, harm: Callable[[Path], object]
) -> None:
    exported = built.exported()
    path = min(built.export_folder("ap10k").glob("pose_kptindex/*.png"))
    harm(path)
    assert check(built, repair=True) == [f"{path}: the exported file is missing or changed"]
    again = built.build()
    assert again.counted("export", "made") == 1
    assert built.exported() == exported


def test_gc_keeps_all_that_the_present_settings_use(built: Workspace) -> None:
    exported = built.exported()
    done = built.spctrl("gc", "--keep", "0", *NO_GRACE)
    assert done.returncode == 0, done.stderr
    assert "Removed 0 runs, 0 packs" in done.stdout
    assert built.build().stages == set()
    assert built.exported() == exported


def test_gc_removes_what_other_settings_made(built: Workspace) -> None:
    built.configure("openpose", style="coco")
    assert built.build().succeeded
    before = built.keys("openpose")
    assert "Would remove 4 runs, 1 packs" in built.spctrl("gc", "--dry-run", "--keep", "1", *NO_GRACE).stdout
    assert built.keys("openpose") == before
    assert "Removed 4 runs, 1 packs" in built.spctrl("gc", "--keep", "1", *NO_GRACE).stdout
    assert len(built.keys("openpose")) == len(before) // 2
    assert built.build().stages == set()
    assert built.faults() == []


def test_gc_keeps_what_a_build_under_way_may_have_just_made(built: Workspace) -> None:
    built.configure("openpose", style="coco")
    assert built.build().succeeded
    assert "Removed 0 runs, 0 packs" in built.spctrl("gc", "--keep", "0").stdout


def test_gc_writes_mostly_dead_packs_anew(built: Workspace) -> None:
    with built.edit_annotations("ap10k", "val") as content:
        for annotation in content["annotations"][:-2]:
            annotation["keypoints"][0] += 1
    try:
        assert built.build().succeeded
        exported = built.exported()
        store = Store(built.store)
        current = [
            run for run in store.runs() if run is store.runs(run.stage)[0] or run == store.runs(run.stage)[0]
        ]
        size = sum(path.stat().st_size for path in built.store.glob("packs/spatext/*.tar"))
        waste = collect(store, current, keep=1, grace_s=0, dry_run=False)
        assert {stage for stage, _ in waste.repacked} == {"spatext", "openpose"}
        assert sum(path.stat().st_size for path in built.store.glob("packs/spatext/*.tar")) <= size
        assert len(built.keys("spatext")) == IMAGES
        assert built.faults() == []
        assert built.build().stages == set()
        shutil.rmtree(built.exports)
        assert built.build().succeeded
        assert built.exported() == exported
    finally:
        with built.edit_annotations("ap10k", "val") as content:
            for annotation in content["annotations"][:-2]:
                annotation["keypoints"][0] -= 1


def test_gc_removes_what_killed_writers_left(built: Workspace) -> None:
    left = built.store / "packs" / "spatext" / ".tmp-1-x.tar"
    left.write_bytes(b"half")
    waste = collect(Store(built.store), [], keep=1, grace_s=3600, dry_run=False)
    assert waste.leftovers == []
    long_ago = time.time() - 7200
    os.utime(left, (long_ago, long_ago))
    assert collect(Store(built.store), [], keep=1, grace_s=3600, dry_run=False).leftovers == [
        left.relative_to(built.store).as_posix()
    ]
    assert not left.exists()


def test_status_says_that_nothing_would_run(built: Workspace) -> None:
    done = built.spctrl("status")
    assert done.returncode == 0, done.stderr
    assert "Everything is up to date" in done.stdout


def test_status_says_why_a_stage_would_run_and_how_much(built: Workspace) -> None:
    built.configure("openpose", style="coco")
    lines = built.spctrl("status").stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("openpose")]
    assert "parameter style: openpose -> coco" in line
    assert f" {IMAGES} " in line
    (line,) = [line for line in lines if line.startswith("spatext")]
    assert "up to date" in line
    assert any("input openpose changed" in line for line in lines)


def test_status_of_an_empty_store_says_never_built(
    make_workspace: Callable[..., Workspace], sample: Path
) -> None:
    done = make_workspace("empty", sample).spctrl("status")
    assert done.returncode == 0, done.stderr
    assert "never built" in done.stdout


def test_accept_keeps_outputs_after_a_harmless_change(
    make_workspace: Callable[..., Workspace], sample: Path, tmp_path: Path
) -> None:
    workspace = make_workspace("accepting", sample)
    workspace.configure("build", datasets=["ap10k"], splits=["val"])
    workspace.code = code = tmp_path / "code"
    copy_code(code)
    assert workspace.run().succeeded
    source = code / "spctrl" / "conditions" / "spatext.py"
    source.write_text(source.read_text().replace("half_length_px = int(", "half_length_px = int(0 + "))

    assert "code spctrl.conditions.spatext:link_polygon changed" in " ".join(
        workspace.spctrl("status").stdout.split()
    )
    done = workspace.spctrl("accept", "spatext", "openpose", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    again = workspace.run()
    assert again.succeeded
    assert again.stages == set()


def test_accept_knows_the_stages_of_other_targets(
    make_workspace: Callable[..., Workspace], sample: Path, tmp_path: Path
) -> None:
    workspace = make_workspace("prompting", sample)
    workspace.code = code = tmp_path / "code"
    copy_code(code)
    config = workspace.folder / "generate.yaml"
    config.write_text("{dataset: ap10k, methods: [{name: theirs, kind: external, folder: images}]}")
    prompts = ("--dataset", "ap10k", "--split", "val")
    assert workspace.run(*prompts, family="Prompts").succeeded
    source = code / "spctrl" / "prompts.py"
    source.write_text(source.read_text().replace("text = text.rstrip()", "text = str(text.rstrip())"))
    done = workspace.spctrl("accept", "prompts", "--yes", "--target", "Generate", "--config", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "code spctrl.prompts:fill changed" in " ".join(done.stdout.split())
    again = workspace.run(*prompts, family="Prompts")
    assert again.succeeded
    assert again.stages == set()


def test_accept_refuses_what_it_does_not_know(built: Workspace) -> None:
    done = built.spctrl("accept", "sketch", "--yes")
    assert done.returncode == 2
    assert "spatext" in done.stderr
    for arguments in (("--target", "Generate"), ("--target", "Report", "--config", "x.yaml")):
        done = built.spctrl("accept", "samples", "--yes", *arguments)
        assert done.returncode == 2
        assert "Benchmark with --config, found" in " ".join(done.stderr.replace("│", " ").split())


def test_verify_as_a_command_exits_with_1_and_names_the_artifact(built: Workspace) -> None:
    key = damage_an_artifact(built, "spatext")
    done = built.spctrl("verify")
    assert done.returncode == 1
    assert key in done.stdout
    assert built.spctrl("verify").returncode == 0, (
        "what was struck out is not damage any more, but work to do"
    )


def test_doctor_names_what_is_missing(
    make_workspace: Callable[..., Workspace], sample: Path, tmp_path: Path
) -> None:
    healthy = make_workspace("healthy", sample)
    healthy.configure("paths", weights="nowhere")
    (healthy.folder / "configs").mkdir()
    (healthy.folder / "configs" / "weights.yaml").write_text("{}")
    looked = healthy.spctrl("doctor")
    assert looked.returncode == 0
    assert re.search(r"spatext +yes +yes", looked.stdout)
    assert re.search(r"latents .*no: .*weights", looked.stdout), (
        "what the settings do not make possible, and why"
    )
    assert "configs/weights.yaml: your own, in use" in looked.stdout
    done = make_workspace("ill", tmp_path / "nothing").spctrl("doctor")
    assert done.returncode == 1
    assert "ap10k-train-split1.json" in done.stdout


def test_sample_draws_both_datasets(make_workspace: Callable[..., Workspace], tmp_path: Path) -> None:
    done = make_workspace("drawing", tmp_path).spctrl("sample", "drawn", "--images-per-split", "2")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "drawing" / "drawn").rglob("*.jpg"))) == 8


@pytest.mark.parametrize("command", ["status", "verify", "gc", "accept", "sample", "doctor"])
def test_every_command_explains_itself(
    command: str, make_workspace: Callable[..., Workspace], sample: Path
) -> None:
    done = make_workspace("asking", sample).spctrl(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_gc_leaves_trained_networks(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for stage in ("train", "spatext"):
        for number in range(3):
            run = store.run(stage, "all", f"{stage}{number}")
            run.write("controlnet/weights", b"days of work")
            commit(run)
    waste = collect(store, [], keep=1, grace_s=0, dry_run=False)
    assert [run.stage for run in waste.runs] == ["spatext"] * 2
    assert len(list((tmp_path / "runs" / "train").rglob("weights"))) == 3
    assert len(list((tmp_path / "runs" / "spatext").rglob("weights"))) == 1


def test_gc_passes_over_the_links_of_a_trainings_tracker(built: Workspace, tmp_path: Path) -> None:
    (tmp_path / ".tmp-12345678-theirs").write_text("content")
    runs = built.store / "training/ap10k/fingerprint/wandb"
    runs.mkdir(parents=True)
    (runs / "latest-run").symlink_to(tmp_path)
    collect(Store(built.store), [], keep=3, grace_s=-1, dry_run=False)
    assert (tmp_path / ".tmp-12345678-theirs").read_text() == "content"
