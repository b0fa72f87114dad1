"""Exports as shards: what loaders read in them, and that only changed ones are written."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from conftest import sha256
from PIL import Image

from spctrl.data.annotations.decode import MAX_FILE_NAME_BYTES

if TYPE_CHECKING:
    from conftest import Build, Workspace

CONDITIONS = ["spatext", "openpose", "mask"]
IMAGES, SHARD_IMAGES, SHARDS = 8, 3, 3
TARS = [f"webdataset/train_split1-{number:06d}.tar" for number in range(SHARDS)]
PARQUETS = [f"parquet/train_split1-{number:06d}.parquet" for number in range(SHARDS)]
MANIFEST = "manifests/train_split1.parquet"


def built(workspace: Workspace) -> Build:
    """A build that must succeed."""
    build = workspace.build()
    assert build.succeeded, build.errors
    return build


def sharded(workspace: Workspace, *formats: str) -> Path:
    """Set a workspace to export shards; gives the export's folder."""
    workspace.configure("build", conditions=CONDITIONS)
    workspace.configure("export", format=",".join(formats), shard_images=SHARD_IMAGES)
    return workspace.export_folder("ap10k")


def files(folder: Path) -> set[str]:
    """Names of an export's files, without its ledgers."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if path.parts[0] != ".spctrl"}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    found = {name: (folder / name).stat() for name in files(folder)}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def members(tar: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(tar) as opened:
        for member in opened:
            content = opened.extractfile(member)
            assert content is not None
            yield member.name, content.read()


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """What a WebDataset loader makes of the tars: names up to the first dot group what follows them."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("webdataset/*.tar")):
        for name, data in members(path):
            key, _, field = name.partition(".")
            assert field not in found.setdefault(key, {})
            found[key][field] = data
    return found


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").tobytes()


# What is in them


def test_a_tar_holds_each_sample_whole_and_in_a_row(workspace: Workspace) -> None:
    folder = sharded(workspace, "folders", "webdataset")
    built(workspace)
    rows = workspace.manifest("ap10k", "train")
    assert [len({name.partition(".")[0] for name, _ in members(folder / tar)}) for tar in TARS] == [3, 3, 2]
    found = samples(folder)
    assert list(found) == [f"{row['image_id']:012d}" for row in rows]
    for row, sample in zip(rows, found.values(), strict=True):
        assert list(sample) == ["jpg", "spatext.png", "openpose.png", "mask.png", "json"]
        assert sample["jpg"] == (folder / row["image_path"]).read_bytes()
        for condition in CONDITIONS:
            assert sample[f"{condition}.png"] == (folder / row[f"{condition}_path"]).read_bytes()
        fields = json.loads(sample["json"])
        assert list(fields) == [name for name in row if not name.endswith("_path")]
        assert {name: fields[name] for name in ("image_id", "file_name", "width", "height")} == {
            name: row[name] for name in ("image_id", "file_name", "width", "height")
        }
        assert json.loads(fields["instances"]) == row["instances"]


def test_tars_hold_nothing_of_when_and_by_whom_they_were_made(workspace: Workspace) -> None:
    folder = sharded(workspace, "webdataset")
    built(workspace)
    with tarfile.open(folder / TARS[0]) as tar:
        for member in tar:
            assert member.isfile()
            facts = (member.mtime, member.uid, member.gid, member.uname, member.gname)
            assert facts == (0, 0, 0, "", "")


def test_datasets_reads_tars_with_images(workspace: Workspace, tmp_path: Path) -> None:
    import datasets

    folder = sharded(workspace, "webdataset")
    built(workspace)
    loaded = datasets.load_dataset(
        "webdataset",
        data_files=[str(folder / tar) for tar in TARS],
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    rows = workspace.manifest("ap10k", "train")
    assert loaded["__key__"] == [f"{row['image_id']:012d}" for row in rows]
    assert [each["file_name"] for each in loaded["json"]] == [row["file_name"] for row in rows]
    for row, image, mask in zip(rows, loaded["jpg"], loaded["mask.png"], strict=True):
        assert image.size == mask.size == (row["width"], row["height"])


def test_datasets_reads_parquet_with_images(workspace: Workspace, tmp_path: Path) -> None:
    import datasets

    workspace.configure("build", splits=["train", "val"])
    folder = sharded(workspace, "folders", "parquet")
    built(workspace)
    loaded = datasets.load_dataset(str(folder / "parquet"), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "validation"}
    for split, ours in (("train", "train"), ("validation", "val")):
        rows = workspace.manifest("ap10k", ours)
        table = loaded[split]
        for name in ("image", *CONDITIONS):
            assert isinstance(table.features[name], datasets.Image)
        labels = [name for name in rows[0] if not name.endswith("_path")]
        assert table.column_names == [*labels, "image", *CONDITIONS]
        for row, sample in zip(rows, table, strict=True):
            assert [sample[name] for name in labels] == [row[name] for name in labels]
            for name in ("image", *CONDITIONS):
                expected = (folder / row[f"{name}_path"]).read_bytes()
                assert sample[name].convert("RGB").tobytes() == pixels(expected)


def test_images_in_parquet_have_the_bytes_and_harmless_names(workspace: Workspace) -> None:
    folder = sharded(workspace, "parquet")
    built(workspace)
    rows = workspace.manifest("ap10k", "train")
    found = [row for path in PARQUETS for row in pq.read_table(folder / path, partitioning=None).to_pylist()]
    raw = workspace.data / "AP-10K"
    assert [row["image"]["bytes"] for row in found] == [(raw / r["image_path"]).read_bytes() for r in rows]
    assert [row["mask"]["path"] for row in found] == [f"{row['image_id']:012d}.mask.png" for row in rows]


def test_records_without_an_image_have_none(workspace: Workspace, tmp_path: Path) -> None:
    import datasets

    workspace.configure("build", images="optional", conditions=["spatext"])
    workspace.configure("export", format="webdataset,parquet")
    folder = workspace.export_folder("ap10k")
    gone = workspace.data / "AP-10K/data/000000000002.jpg"
    gone.unlink()
    built(workspace)
    found = samples(folder)
    assert list(found) == [
        f"{image_id:012d}" for image_id in (1, 3, 4, 5, 6, 7, 8, 2)
    ]  # of tars without image last
    assert set(found["000000000002"]) == {"spatext.png", "json"}
    assert files(folder) == {MANIFEST, *TARS[:2], PARQUETS[0]}
    tars = datasets.load_dataset(
        "webdataset", data_files=[str(folder / tar) for tar in TARS[:2]], split="train", streaming=True
    )
    assert [int(row["__key__"]) for row in tars if row["jpg"] is None] == [2]
    loaded = datasets.load_dataset(
        "parquet",
        data_files=str(folder / PARQUETS[0]),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    without = {row["image_id"] for row in loaded if row["image"] is None}
    assert without == {2}


def test_members_are_named_after_ids_and_contents_whatever_the_annotated_name(workspace: Workspace) -> None:
    raw = workspace.data / "AP-10K/data"
    longest = "x" * (MAX_FILE_NAME_BYTES - 4) + ".jpg"
    names = {1: "a.b.c.jpg", 2: longest, 3: "no suffix", 4: "<script>.jpg", 5: "true.png.jpg"}
    names |= {6: "2021-01-01T10:00:00.jpg", 7: "a::b:c.jpg"}
    with workspace.edit_annotations("ap10k", "train") as content:
        for image in content["images"]:
            if (name := names.get(image["id"])) is not None:
                (raw / image["file_name"]).rename(raw / name)
                image["file_name"] = name
    with Image.open(raw / names[5]) as image:
        image.save(raw / names[5], format="PNG")
    folder = sharded(workspace, "folders", "webdataset", "parquet")
    workspace.configure("build", conditions=["spatext"])
    built(workspace)
    assert {row["file_name"] for row in workspace.manifest("ap10k", "train")} >= set(names.values())
    for name in names.values():
        assert (folder / "data" / name).read_bytes() == (raw / name).read_bytes()
    found = samples(folder)
    assert list(found) == [f"{image_id:012d}" for image_id in range(1, IMAGES + 1)]
    used = {image_id: json.loads(found[f"{image_id:012d}"]["json"])["file_name"] for image_id in names}
    assert used == names
    assert {tuple(sample) for sample in found.values()} == {("jpg", "spatext.png", "json")}
    assert found["000000000005"]["jpg"] == (raw / names[5]).read_bytes()
    rows = [row for path in PARQUETS for row in pq.read_table(folder / path, partitioning=None).to_pylist()]
    assert {row["image"]["path"] for row in rows} == {
        f"{image_id:012d}.{'png' if image_id == 5 else 'jpg'}" for image_id in range(1, IMAGES + 1)
    }


# What is done again


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        (("webdataset",), {MANIFEST, *TARS}),
        (("parquet",), {MANIFEST, *PARQUETS}),
        (("parquet", "webdataset"), {MANIFEST, *TARS, *PARQUETS}),
    ],
)
def test_an_export_has_the_files_of_its_formats_and_no_others(
    workspace: Workspace, formats: tuple[str, ...], expected: set[str]
) -> None:
    folder = sharded(workspace, *formats)
    built(workspace)
    assert files(folder) == expected


def test_a_second_build_writes_nothing(workspace: Workspace) -> None:
    folder = sharded(workspace, "folders", "webdataset", "parquet")
    built(workspace)
    before = stamps(folder)
    again = built(workspace)
    assert (again.started, again.committed) == ([], {})
    assert stamps(folder) == before


def test_only_the_shard_of_a_changed_record_is_written_again(workspace: Workspace) -> None:
    folder = sharded(workspace, "webdataset", "parquet")
    built(workspace)
    before, contents = stamps(folder), samples(folder)
    with workspace.edit_annotations("ap10k", "train") as content:
        fifth = content["images"][4]["id"]
        (annotation,) = (each for each in content["annotations"][:] if each["image_id"] == fifth)
        annotation["bbox"][2] += 1
    build = built(workspace)
    assert build.worked == {}
    assert build.counted("export", "made") == 3  # of either format one, and the manifest
    after = stamps(folder)
    assert {name for name in after if after[name] != before[name]} == {TARS[1], PARQUETS[1], MANIFEST}
    changed = {key for key, sample in samples(folder).items() if sample != contents[key]}
    assert changed == {f"{fifth:012d}"}


def test_a_changed_image_and_a_changed_condition_reach_their_shards(workspace: Workspace) -> None:
    folder = sharded(workspace, "parquet")
    built(workspace)
    before = stamps(folder)
    first, last = (workspace.manifest("ap10k", "train")[i]["image_path"] for i in (0, -1))
    path = workspace.data / "AP-10K" / last
    with Image.open(path) as image:
        image.save(path, quality=30)
    mask = workspace.data / "AP-10K/mask" / Path(first).with_suffix(".png").name
    with Image.open(mask) as opened:
        opened.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mask)
    built(workspace)
    after = stamps(folder)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {PARQUETS[0], PARQUETS[2], MANIFEST}
    rows = pq.read_table(folder / PARQUETS[2], partitioning=None).to_pylist()
    assert rows[-1]["image"]["bytes"] == path.read_bytes()


def test_other_settings_give_another_export_and_leave_nothing_behind(workspace: Workspace) -> None:
    folder = sharded(workspace, "folders")
    built(workspace)
    only_folders = workspace.exported()
    workspace.configure("export", format="webdataset,folders")
    build = built(workspace)
    assert build.stages == {"export"}
    assert build.counted("export", "made") == SHARDS
    tars = {name: sha256(folder / name) for name in TARS}
    workspace.configure("export", shard_images=IMAGES)
    built(workspace)
    assert {name for name in files(folder) if name.startswith("webdataset")} == {TARS[0]}
    workspace.configure("export", format="webdataset", shard_images=SHARD_IMAGES)
    built(workspace)
    assert files(folder) == {MANIFEST, *TARS}
    assert {name: sha256(folder / name) for name in TARS} == tars
    workspace.configure("export", format="folders")
    built(workspace)
    assert workspace.exported() == only_folders


def test_the_order_of_formats_is_no_setting(workspace: Workspace) -> None:
    sharded(workspace, "webdataset", "parquet")
    built(workspace)
    workspace.configure("export", format="parquet,webdataset")
    assert built(workspace).stages == set()


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"?")])
def test_verify_names_a_harmed_shard_and_the_next_build_writes_it(
    workspace: Workspace, harm: Callable[[Path], object]
) -> None:
    from spctrl.store.store import Store
    from tasks.maintenance import verify

    folder = sharded(workspace, "webdataset", "parquet")
    built(workspace)
    exported = workspace.exported()
    harm(folder / TARS[1])
    (damage,) = verify(Store(workspace.store), workspace.exports, repair=True)
    assert damage.place == str(folder / TARS[1])
    assert built(workspace).counted("export", "made") == 1
    assert workspace.exported() == exported


def test_deleted_shards_are_written_again(workspace: Workspace) -> None:
    folder = sharded(workspace, "webdataset")
    built(workspace)
    exported = workspace.exported()
    for name in TARS:
        (folder / name).unlink()
    assert built(workspace).counted("export", "made") == SHARDS
    assert workspace.exported() == exported


@pytest.mark.slow
@pytest.mark.parametrize(
    ("now", "before"),
    [
        ('_IMAGE_MEMBER = "jpg"', '_IMAGE_MEMBER = "jpeg"'),
        ('_by_image(rows) if kind == "webdataset" else [rows]', "[rows]"),
    ],
)
def test_tars_of_an_earlier_layout_are_written_again_and_no_other_files(
    workspace: Workspace, tmp_path: Path, now: str, before: str
) -> None:
    folder = sharded(workspace, "webdataset", "parquet")
    workspace.configure("build", images="optional", conditions=["spatext"])
    (workspace.data / "AP-10K/data/000000000002.jpg").unlink()
    workspace.code = shutil.copytree(workspace.code, tmp_path / "earlier")
    path = workspace.code / "spctrl/export/shards.py"
    assert now in path.read_text()
    path.write_text(path.read_text().replace(now, before))
    assert workspace.run().exit_code == 0
    (folder / "webdataset/notes.txt").write_text("mine")
    earlier = stamps(folder)
    assert built(workspace).stages == {"export"}
    after = stamps(folder)
    assert {name for name, stamp in after.items() if earlier.get(name) != stamp} == {
        *TARS,
        "webdataset/train_split1-000003.tar",  # of the sample without an image
    }
    assert earlier.keys() <= after.keys()
    assert {tuple(sample) for sample in samples(folder).values()} == {
        ("jpg", "spatext.png", "json"),
        ("spatext.png", "json"),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Luigi's, of config_path
def test_status_says_that_the_format_changed(workspace: Workspace) -> None:
    from tasks.stage.status import statuses

    sharded(workspace, "folders")
    built(workspace)
    workspace.configure("export", format="parquet")
    reasons = workspace_reasons(workspace, statuses)
    assert reasons["export"] == (
        "parameter format: ['folders'] -> ['parquet']",
        f"parameter shard_images: None -> {SHARD_IMAGES}",
    )
    assert set(reasons) == {"export"}


def workspace_reasons(workspace: Workspace, statuses: Callable[..., Any]) -> dict[str, tuple[str, ...]]:
    """Why stages would run, by stage."""
    from conftest import _luigi_settings

    with _luigi_settings(workspace.settings_file()):
        import pipelines

        found = list(statuses(pipelines.BuildDataset()))
    return {each.task.stage: each.reasons for each in found if each.reasons}


# Faults


def test_a_full_disk_leaves_the_old_shards_and_the_next_build_writes_the_new(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sharded(workspace, "webdataset")
    built(workspace)
    before = {name: sha256(folder / name) for name in TARS}
    touched = workspace.manifest("ap10k", "train")[0]["image_path"]
    path = workspace.data / "AP-10K" / touched
    with Image.open(path) as image:
        image.save(path, quality=30)
    addfile = tarfile.TarFile.addfile

    def full(tar: tarfile.TarFile, member: tarfile.TarInfo, *rest: Any) -> None:
        if member.name.endswith(".spatext.png"):  # of a shard; packs have other names in them
            raise OSError(28, os.strerror(28))
        addfile(tar, member, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(tarfile.TarFile, "addfile", full)
        failed = workspace.build()
    assert not failed.succeeded
    assert any("No space left on device" in error and TARS[0] in error for error in failed.errors)
    assert {name: sha256(folder / name) for name in TARS} == before
    assert list((folder / ".spctrl").glob(".tmp-*")) == []
    assert built(workspace).counted("export", "made") == 2  # the shard and the manifest
    assert samples(folder)["000000000001"]["jpg"] == path.read_bytes()


KILL_AT_RENAME = """
import os, pathlib, signal

def dying(rename):
    def wrapped(source, target, *arguments, **options):
        if str(target).endswith("-000001.tar"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *arguments, **options)
    return wrapped

os.replace, os.rename = dying(os.replace), dying(os.rename)
pathlib.Path.replace, pathlib.Path.rename = dying(pathlib.Path.replace), dying(pathlib.Path.rename)
"""


def test_a_build_killed_between_two_shards_and_run_again_gives_the_same_bytes(
    workspace: Workspace, tmp_path: Path
) -> None:
    folder = sharded(workspace, "webdataset")
    built(workspace)
    old = workspace.exported()
    workspace.configure("openpose", style="coco")
    built(workspace)
    expected = workspace.exported()
    assert all(expected[f"{folder.name}/{tar}"] != old[f"{folder.name}/{tar}"] for tar in TARS)
    workspace.configure("openpose", style=None)
    built(workspace)
    assert workspace.exported() == old

    shutil.copytree(workspace.code, tmp_path / "dying")
    (tmp_path / "dying" / "sitecustomize.py").write_text(KILL_AT_RENAME)
    sound, workspace.code = workspace.code, tmp_path / "dying"
    workspace.configure("openpose", style="coco")
    assert workspace.run().exit_code == -signal.SIGKILL
    half = workspace.exported()
    assert [half[f"{folder.name}/{tar}"] == expected[f"{folder.name}/{tar}"] for tar in TARS] == [
        True,
        False,
        False,
    ]
    workspace.code = sound
    assert workspace.run().exit_code == 0
    assert workspace.exported() == expected
    assert list((folder / ".spctrl").glob(".tmp-*")) == []


def test_an_image_that_goes_while_it_is_exported_fails_the_build_and_says_so(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spctrl.export import shards

    folder = sharded(workspace, "webdataset")
    gone = workspace.data / "AP-10K/data/000000000002.jpg"
    write = shards.write_webdataset

    def after_a_loss(*arguments: Any) -> None:
        gone.unlink()
        write(*arguments)

    monkeypatch.setitem(shards.SHARD_WRITERS, "webdataset", after_a_loss)
    build = workspace.build()
    assert not build.succeeded
    assert any(str(gone) in error and "run again" in error for error in build.errors)
    assert not (folder / TARS[0]).exists()
