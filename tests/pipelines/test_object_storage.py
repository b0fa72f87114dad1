"""BuildDataset with its store and its exports in an S3 bucket: the objects of a local build, whatever goes wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import EXPORT_FOLDERS, Build, Workspace
from object_store import (
    WRITES,
    Bucket,
    BucketWorkspace,
    Fault,
    Seen,
    always,
    impatient,
    often,
)
from object_store_faults import (
    SHARD_IMAGES,
    Contents,
    build_through,
    check_sound,
    configure_small,
    kill_at_write,
)
from processes import HANG_S

from spctrl.store.store import Store, forget_what_was_found
from tasks.maintenance import collect, verify

pytestmark = pytest.mark.slow

CONDITIONS = ["spatext", "openpose", "mask"]
IMAGES = 8
SEED = 6
FAULT_SHARE = 0.1
FAULTS = {
    "refused": [Fault.ERROR, Fault.SLOW_DOWN],
    "closed": [Fault.DROPPED, Fault.LOST, Fault.CUT_UPLOAD],
    "silent": [Fault.STALLED, Fault.STALLED_AFTER],
    "cut": [Fault.CUT, Fault.SHORT, Fault.SHORT_UNCHECKED],
}
REQUESTS_ANSWERED = 30
REQUESTS_OF_NOTHING = 60
SCHEDULING_ERROR = 35
KILLED_AT_WRITES = (4, 14)


def configure(workspace: Workspace) -> None:
    workspace.configure("export", format="webdataset,parquet", shard_images=SHARD_IMAGES)
    workspace.configure("build", conditions=CONDITIONS)


@pytest.fixture
def make_remote(
    tmp_path: Path, bucket: Bucket, digest_cache: Path, code: Path
) -> Callable[..., BucketWorkspace]:
    """Makes workspaces that build into the bucket: ``make_remote(name, data)``."""
    return lambda name, data: BucketWorkspace(tmp_path / name, data, code, bucket, digest_cache)


@pytest.fixture
def remote(make_remote: Callable[..., BucketWorkspace], sample: Path) -> BucketWorkspace:
    """Set to build one condition of AP-10K's training split."""
    made = make_remote("remote", sample)
    configure_small(made)
    return made


@pytest.fixture(scope="module")
def undisturbed(
    sample: Path, code: Path, digest_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Contents:
    """What a local build of the same makes."""
    workspace = Workspace(tmp_path_factory.mktemp("local"), sample, code)
    configure_small(workspace)
    workspace.store.mkdir()
    shutil.copyfile(digest_cache, workspace.store / "cache.sqlite")
    built(workspace)
    return Contents.of(workspace)


def built(workspace: Workspace) -> Build:
    build = workspace.build()
    assert build.succeeded, build.errors
    return build


def own_copy(workspace: Workspace) -> None:
    """Let a workspace have data that a test may change."""
    shutil.copytree(workspace.data, workspace.folder / "data")
    workspace.data = workspace.folder / "data"
    workspace.configure("paths", data=workspace.data)


# The same as on a disk


def test_the_sample_in_a_bucket_equals_the_local_one(
    make_workspace: Callable[..., Workspace],
    make_remote: Callable[..., BucketWorkspace],
    sample: Path,
    tmp_path: Path,
) -> None:
    local, remote = make_workspace("local", sample), make_remote("remote", sample)
    for workspace in (local, remote):
        configure(workspace)
        build = workspace.run()
        assert build.exit_code == 0, build.output
        assert build.stages >= {*CONDITIONS, "manifest", "export", "report"}
    assert Contents.of(remote) == Contents.of(local)
    assert remote.faults() == []
    assert b"Pose dataset report" in (remote.exports / "report.html").read_bytes()
    # Nothing but the store and the exports, and of those nothing but their files.
    temporary = [
        key for key in remote.bucket.listing() if not key.startswith(("store/", "exports/")) or "tmp" in key
    ]
    assert temporary == []
    assert remote.bucket.unfinished_uploads() == []
    read_with_datasets(remote, tmp_path / "cache")


def read_with_datasets(remote: BucketWorkspace, cache: Path) -> None:
    """Load the Parquet export where it lies, and compare it with the manifest."""
    import datasets

    files = f"{remote.bucket.url}/exports/{EXPORT_FOLDERS['ap10k']}/parquet/train_split1-*.parquet"
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
    rows = remote.manifest("ap10k", "train")
    assert loaded["file_name"] == [row["file_name"] for row in rows]
    for row, sample in zip(rows, loaded, strict=True):
        for name in ("image", *CONDITIONS):
            assert sample[name].size == (row["width"], row["height"])


def test_only_what_changed_is_done_again_on_whatever_machine(remote: BucketWorkspace) -> None:
    own_copy(remote)
    assert built(remote).worked["spatext"] == IMAGES
    proxy = remote.bucket.proxy
    for machine in ("this", "another"):
        remote.on_machine(machine)
        proxy.forget()
        again = built(remote)
        assert (again.started, again.committed, again.worked) == ([], {}, {})
        assert proxy.count(*WRITES) == 0
        assert proxy.count("GET", key="*.tar") == 0
        assert len(proxy.seen) <= REQUESTS_OF_NOTHING, f"{len(proxy.seen)} requests"
    with remote.edit_annotations("ap10k", "train") as content:
        content["annotations"][0]["keypoints"][0] += 1
    edited = built(remote)
    assert edited.worked == {"spatext": 1}
    assert edited.counted("export", "made") == 3  # of either format one shard, and the manifest
    assert remote.faults() == []


def test_status_verify_and_gc_know_the_bucket(remote: BucketWorkspace, undisturbed: Contents) -> None:
    built(remote)
    said = remote.spctrl("status")
    assert said.returncode == 0, said.stderr
    lines = [line for line in said.stdout.splitlines() if "ap10k-train" in line]
    assert {line.split()[0] for line in lines} >= {"index", "spatext", "manifest", "export"}, said.stdout
    assert all("up to date" in line for line in lines), said.stdout

    # Damaged: one byte of a pack, of which this machine has a sound copy. Deleted: a shard.
    bucket = remote.bucket
    store, exports = Store(f"{bucket.url}/store", remote.folder / "upkeep"), f"{bucket.url}/exports"
    assert verify(store, exports, repair=True) == []
    (key,) = (key for key in bucket.listing("store/packs/spatext/") if key.endswith(".tar"))
    data = bytearray(bucket.read(key))
    data[700] ^= 1
    bucket.write(key, bytes(data))
    (shard, *_) = bucket.listing("exports/AP-10K_triplet/webdataset/")
    bucket.remove(shard)
    places = [damage.place for damage in verify(store, exports, repair=True)]
    assert [each.split(": ")[0] for each in places] == [f"{bucket.url}/{each}" for each in (key, shard)]
    assert built(remote).worked == {"spatext": 1}
    check_sound(remote)
    assert remote.exported() == undisturbed.exported

    # Deleted: all packs of a stage.
    for key in bucket.listing("store/packs/spatext/"):
        bucket.remove(key)
    assert built(remote).worked == {"spatext": IMAGES}
    assert Contents.of(remote) == undisturbed

    # Another setting, and the old one's results removed.
    before = set(bucket.listing("store/"))
    remote.configure("spatext", keypoint_radius_px=6)
    assert built(remote).worked == {"spatext": IMAGES}
    new = set(bucket.listing("store/")) - before
    forget_what_was_found()
    collect(store, [], keep=1, grace_s=0, dry_run=False)
    kept = set(bucket.listing("store/"))
    assert new <= kept
    assert len([key for key in kept if key.startswith("store/packs/spatext/")]) == 2  # a pack and its index
    remote.fetch()
    assert remote.faults() == []


def test_triplet_folders_are_refused_at_once(remote: BucketWorkspace) -> None:
    remote.configure("export", format="folders")
    build = remote.run()
    assert build.exit_code not in (0, None)
    assert "folders" in build.output and "webdataset" in build.output and remote.bucket.url in build.output
    assert "Traceback" not in build.output
    assert remote.bucket.listing() == []


# Several at once, and killed


def test_two_builds_at_once_give_the_objects_of_one(
    make_remote: Callable[..., BucketWorkspace], sample: Path, undisturbed: Contents
) -> None:
    workspaces = [make_remote(name, sample) for name in ("one", "two")]
    for workspace in workspaces:
        configure_small(workspace)
    builds = [workspace.start() for workspace in workspaces]
    outputs = [build.communicate(timeout=HANG_S)[0] for build in builds]
    assert [build.returncode for build in builds] == [0, 0], "\n".join(outputs)
    (one, _) = workspaces
    one.fetch()
    assert Contents.of(one) == undisturbed
    assert one.faults() == []


@pytest.mark.parametrize("number", KILLED_AT_WRITES)
def test_a_build_killed_at_a_write_and_run_again_gives_the_objects_of_one_that_was_not(
    remote: BucketWorkspace, undisturbed: Contents, number: int
) -> None:
    assert kill_at_write(remote, number)
    remote.fetch()
    assert remote.faults() == []
    assert Contents.of(remote) != undisturbed
    built(remote)
    assert Contents.of(remote) == undisturbed
    assert remote.faults() == []


# Faults of the object store


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_build_through_faults_ends_in_a_correct_store(
    remote: BucketWorkspace, undisturbed: Contents, faults: list[Fault]
) -> None:
    with impatient():
        build_through(remote, undisturbed, often(faults, FAULT_SHARE, SEED))
        assert remote.bucket.proxy.injected.total() >= len(faults)


def test_a_store_that_stops_answering_in_the_middle_is_a_clear_error(
    remote: BucketWorkspace, undisturbed: Contents
) -> None:
    proxy = remote.bucket.proxy

    def choose(seen: Seen) -> Fault | None:
        return Fault.ERROR if len(proxy.seen) > REQUESTS_ANSWERED else None

    with impatient(retries=0):
        assert not build_through(remote, undisturbed, choose).succeeded


def test_a_store_that_never_answers_is_named_without_the_way_through_the_program(
    remote: BucketWorkspace,
) -> None:
    remote.bucket.proxy.choose = always(Fault.ERROR)
    with impatient(retries=0):
        build = remote.start()
        output, _ = build.communicate(timeout=HANG_S)
    assert build.returncode == SCHEDULING_ERROR
    assert f"cannot read {remote.bucket.url}/store/" in output
    assert "Traceback" not in output and 'File "' not in output
