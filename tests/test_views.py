"""Views: which run they show, and whether they still do."""

from __future__ import annotations

from pathlib import Path

from spctrl.storage import Folder
from spctrl.store.digests import DigestCache
from spctrl.store.store import Store
from tasks.dataset.views import RenderedView


def test_a_view_is_of_the_run_that_it_was_written_for_until_it_is_changed(tmp_path: Path) -> None:
    folder = tmp_path / "exports"
    view = RenderedView(Folder(folder, ".spctrl"), ".spctrl/tables.json")
    store, cache = Store(tmp_path / "store"), DigestCache(tmp_path / "cache.sqlite")
    run, other = (store.run("tables", "tiny", letter * 32) for letter in "ab")
    assert not view.is_of(run, cache)
    view.write(run, {"table.md": b"numbers", "grid.png": b"picture"})
    assert view.is_of(run, cache) and not view.is_of(other, cache)

    (folder / "table.md").write_text("mine")
    assert not view.is_of(run, cache)
    view.write(run, {"table.md": b"numbers", "grid.png": b"picture"})
    (folder / "grid.png").unlink()
    assert not view.is_of(run, cache)

    # Another run has fewer files; those of the user stay.
    (folder / "notes.txt").write_text("mine")
    view.write(other, {"table.md": b"others"})
    assert view.is_of(other, cache) and not view.is_of(run, cache)
    assert {path.name for path in folder.iterdir()} == {".spctrl", "table.md", "notes.txt"}
    view.write(run, {"table.md": b"numbers", "grid.png": b"picture"})
    assert view.is_of(run, cache)
