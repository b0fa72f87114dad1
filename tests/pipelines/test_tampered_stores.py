"""Stores and exports that are made to have a build write, link, read or remove files elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tampering import correct_provenance, run_folder, tamper

from spctrl.storage import StoreError
from spctrl.storage.files import file_digest
from spctrl.store.store import Store
from tasks.maintenance import collect

if TYPE_CHECKING:
    from conftest import Workspace

SECRET = b"what must be neither copied, linked nor changed"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder beside all that a build may touch, with a file that only its owner may read."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "secret.txt").write_bytes(SECRET)
    (folder / "secret.txt").chmod(0o600)
    return folder


@pytest.fixture
def built(workspace: Workspace) -> Workspace:
    """A store with all that precedes the export, to be exported into another folder."""
    workspace.configure("build", conditions=["spatext", "mask"])
    workspace.configure("export", heatmaps="yes")
    assert workspace.build().succeeded
    shutil.rmtree(workspace.exports)
    return workspace


def everything(folder: Path) -> dict[str, bytes | None]:
    """Contents by path; None of folders."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def assert_nothing_got_out(workspace: Workspace, victim: Path) -> None:
    assert everything(victim) == {"secret.txt": SECRET}
    assert (victim / "secret.txt").stat().st_nlink == 1
    own = {workspace.exports / name for name in ("AP-10K_triplet", "report.html", ".spctrl")}
    assert set(workspace.exports.glob("*")) <= own
    for path in workspace.exports.rglob("*"):
        assert not path.is_file() or SECRET not in path.read_bytes()


def ways_out(target: Path, *starts: Path) -> list[str]:
    """Paths of a file that lead out of each of some folders."""
    relative = [os.path.relpath(target, start) for start in starts]
    return [*relative, f"data/../{relative[0]}", str(target)]


@pytest.mark.parametrize("column", ["file_name", "image_path", "spatext_path", "mask_path"])
def test_no_column_of_a_manifest_leads_out(built: Workspace, victim: Path, column: str) -> None:
    built.configure("export", format="folders,webdataset,parquet")
    root = built.data / "AP-10K/data" if column == "file_name" else built.export_folder("ap10k")
    path = run_folder(built.store, "manifest") / "manifest.parquet"
    before = path.read_bytes()
    for target in (victim / "new.txt", victim / "secret.txt", built.export_folder("ap10k") / ".spctrl/lock"):
        for way in ways_out(target, root):
            tamper(
                built.store,
                "manifest",
                "manifest.parquet",
                lambda rows, way=way: rows[3].update({column: way}),
            )
            done = built.build()
            assert not done.succeeded
            assert any(each.startswith("UnsafePathError") for each in done.errors), done.errors
            assert_nothing_got_out(built, victim)
            path.write_bytes(before)
            correct_provenance(path)
    assert built.build().succeeded


def test_an_image_that_is_not_the_listed_one_is_not_linked(built: Workspace, victim: Path) -> None:
    """A file below the dataset's root that is no image of it."""
    private = built.data / "AP-10K/data/private.txt"
    shutil.copyfile(victim / "secret.txt", private)
    tamper(built.store, "manifest", "manifest.parquet", lambda rows: rows[3].update(file_name="private.txt"))
    done = built.build()
    assert not done.succeeded
    assert any(f"{private} changed during the build" in each for each in done.errors), done.errors
    assert private.stat().st_nlink == 1


@pytest.mark.parametrize("table", ["records.parquet", "images.txt"])
def test_no_name_of_the_index_is_opened_outside_the_dataset(
    workspace: Workspace, victim: Path, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = os.path.relpath(victim / "secret.txt", workspace.data / "AP-10K/data")
    workspace.configure("build", conditions=["spatext"])
    assert workspace.build().succeeded
    if table == "images.txt":
        path = run_folder(workspace.store, "index") / table
        path.write_text(path.read_text().replace("data/000000000003.jpg", f"data/{way}"))
        correct_provenance(path)
    else:
        tamper(workspace.store, "index", table, lambda rows: rows[2].update(file_name=way))
    workspace.configure("build", conditions=["spatext", "mask"])
    digested: list[str] = []
    monkeypatch.setattr(
        "spctrl.store.digests.file_digest", lambda path: digested.append(str(path)) or file_digest(path)
    )
    done = workspace.build()
    assert not done.succeeded
    assert table == "images.txt" or any("UnsafePathError" in each for each in done.errors), done.errors
    assert not any("secret" in path for path in digested)


# Links


@pytest.mark.parametrize("name", ["data", "sam_hq_mask", ".spctrl", "manifests", "webdataset"])
def test_no_link_in_an_export_leads_out(built: Workspace, victim: Path, name: str) -> None:
    built.configure("export", format="folders,webdataset")
    folder = built.export_folder("ap10k")
    folder.mkdir(parents=True)
    (folder / name).symlink_to(victim)
    done = built.build()
    assert not done.succeeded
    assert any(
        f"expected no symbolic links to folders below {folder}, found {folder / name}" in each
        for each in done.errors
    )
    assert everything(victim) == {"secret.txt": SECRET}


def test_an_export_folder_may_itself_be_a_link(built: Workspace, tmp_path: Path) -> None:
    elsewhere = tmp_path / "large-disk"
    elsewhere.mkdir()
    built.exports.mkdir()
    built.export_folder("ap10k").symlink_to(elsewhere)
    assert built.build().succeeded
    assert (elsewhere / "manifests/train_split1.parquet").is_file()
    assert built.spctrl("verify").returncode == 0
    (elsewhere / "manifests/train_split1.parquet").write_bytes(b"")
    assert built.spctrl("verify").returncode != 0, "verify follows the link too"


@pytest.mark.parametrize("name", ["packs/spatext", "packs", "runs/spatext/ap10k-train", "runs"])
def test_gc_removes_nothing_through_a_link(built: Workspace, victim: Path, name: str) -> None:
    elsewhere = victim.with_name("elsewhere")
    shutil.move(built.store / name, elsewhere)
    (elsewhere / "lone.parquet").write_bytes(b"an index without a pack, as gc removes them")
    (built.store / name).symlink_to(elsewhere)
    before = everything(elsewhere)
    with pytest.raises(
        StoreError, match=f"expected no symbolic links to folders .*, found {built.store / name}"
    ):
        collect(Store(built.store), [], keep=0, grace_s=-1, dry_run=False)
    assert everything(elsewhere) == before
