"""Settings that hold paths, as people write them, through whole commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from conftest import _luigi_settings

from spctrl.errors import ExpectedError
from tasks import settings

if TYPE_CHECKING:
    from conftest import Workspace


def test_a_build_expands_the_paths_of_files_and_options(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(workspace.folder))
    monkeypatch.setenv("RAW", str(workspace.data))
    workspace.configure("paths", data="$RAW", store="~/store", export=None)
    workspace.configure("ap10k", root="${RAW}/AP-10K")
    built = workspace.run("--paths-export=~/exports", "--dataset", "ap10k", "--split", "val")
    assert built.succeeded, built.output
    assert (workspace.exports / "report.html").is_file()
    assert not [path for path in workspace.folder.iterdir() if path.name[0] in "~$"]


def test_where_a_path_leads_decides_and_not_how_it_is_written(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(workspace.folder))
    digests, places = set(), set()
    for home in ("~", "$HOME", str(workspace.folder)):
        workspace.configure("paths", store=f"{home}/store", export=f"{home}/exports", cache=f"{home}/c")
        workspace.configure("mask", folder=f"{home}/masks/{{dataset}}", weights=f"{home}/sam.pth")
        with _luigi_settings(workspace.settings_file()):
            digests.add(settings.settings_digest())
            places.add((settings.paths().cache, settings.condition_folder(settings.mask, "ap10k")))
    assert len(digests) == 1
    assert places == {(f"{workspace.folder}/c", workspace.folder / "masks/ap10k")}


SETTINGS = {
    "data": ("paths", "data"), "weights": ("paths", "weights"), "store": ("paths", "store"),
    "export": ("paths", "export"), "cache": ("paths", "cache"), "root": ("humanart", "root"),
    "folder": ("depth", "folder"), "VAE": ("latents", "weights"),
}  # fmt: skip


@pytest.mark.parametrize(("section", "name"), SETTINGS.values(), ids=SETTINGS)
def test_an_unknown_variable_or_user_is_named_with_the_setting(
    workspace: Workspace, section: str, name: str
) -> None:
    for path in ("$NOT_SET_ANYWHERE/x", "~nobody-of-this-name/x"):
        workspace.configure(section, **{name: path})
        with _luigi_settings(workspace.settings_file()), pytest.raises(ExpectedError) as error:
            getattr(settings, section)()
        assert str(error.value).startswith(f"[{section}] {name}: expected ")
        assert path.partition("/")[0] in str(error.value)


def test_the_options_of_targets_and_files_of_settings_say_so_in_one_line(workspace: Workspace) -> None:
    built = workspace.run("--config", "$NOT_SET_ANYWHERE/x.yaml", family="Train")
    assert built.output.count("\n") == 1
    assert (
        "--config: expected environment variables that are set and not empty, found $NOT_SET_ANYWHERE"
        in built.output
    )
    built = workspace.run("--paths-data=~nobody-of-this-name")
    assert built.output.count("\n") == 1
    assert "[paths] data: expected the home folder of a user" in built.output


@pytest.mark.parametrize("root", ["{dta}/AP-10K", "{}/AP-10K", "{data", "{data.x}"])
def test_other_braces_are_refused(workspace: Workspace, root: str) -> None:
    workspace.configure("ap10k", root=root)
    with _luigi_settings(workspace.settings_file()), pytest.raises(ExpectedError, match=r"^\[ap10k\] root: "):
        settings.dataset_root("ap10k")
