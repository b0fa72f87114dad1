"""Settings files that cannot be read: one line names the file, the line and what to write."""

from __future__ import annotations

import os
import re
from configparser import ConfigParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from luigi.configuration import LuigiConfigParser

from pipelines.luigi_setup.settings_check import refuse_unreadable_values
from pipelines.luigi_setup.settings_files import check_settings_files
from spctrl.errors import ExpectedError

if TYPE_CHECKING:
    from conftest import Workspace

MALFORMED = {
    "no section": (b"# settings\ndata = a\n", 2, "[section] before settings, found 'data = a'"),
    "no value": (b"[paths]\ndata = a\nstore\n", 3, "`name = value` or [section], found 'store'"),
    "an open section": (b"[log]\n[paths\n", 2, "found '[paths'"),
    "Latin-1": ("[paths]\ndata = é\n".encode("latin-1"), 2, "the byte 0xe9"),
    "UTF-16": ("[paths]\n".encode("utf-16"), 1, "the byte 0x"),
    "a byte order mark": ("[paths]\n".encode("utf-8-sig"), 1, "a byte order mark"),
}
TWICE = {
    "a setting": (
        "[log]\n[paths]\ndata = a\n\ndata: b\n",
        "setting once, found [paths] data in lines 3 and 5",
    ),
    "a setting of all sections": (
        "[DEFAULT]\na = 1\na = 1\n",
        "setting once, found [DEFAULT] a in lines 2 and 3",
    ),
    "a section": ("[log]\n[paths]\ndata = a\n[log]\n", "section once, found [log] in lines 1 and 4"),
    "a section of others": ("[x]\n[x]\n", "section once, found [x] in lines 1 and 2"),
    "another spelling": (
        "[export]\nshard_images = 1\nshard-images = 2\n",
        "setting once, found [export] shard-images in line 3 and shard_images, which Luigi takes for the same, in "
        "line 2",
    ),
}
VALUES = {
    "a percentage": (
        "/disk/50%",
        r"line 3: expected %% for a percent sign in \[paths\] data, found /disk/50%",
    ),
    "a quoted URL": ("s3://b/a%20b", "line 3: expected %%"),
    "another project's": ("%(place)s/data", r"line 3: expected %%.*or %\(name\)s"),
    "a circle": ("%(data)s", "line 3: expected settings that do not refer to each other in a circle"),
    "a variable": ("${NOT_SET_ANYWHERE}/data", "line 3: expected environment variables that are set"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, without a named settings file."""
    monkeypatch.chdir(tmp_path)
    for name in ("LUIGI_CONFIG_PATH", "LUIGI_CONFIG_PARSER"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize(("content", "line", "found"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_named_with_the_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, line: int, found: str, is_named: bool
) -> None:
    name = "my.cfg" if is_named else "luigi.cfg"
    (folder / name).write_bytes(content)
    if is_named:
        (folder / "luigi.cfg").write_text("[paths]\ndata = a\n")
        monkeypatch.setenv("LUIGI_CONFIG_PATH", name)
    with pytest.raises(ExpectedError) as error:
        check_settings_files()
    assert str(error.value).startswith(f"{name}, line {line}: expected ") and found in str(error.value)


@pytest.mark.parametrize(("content", "found"), TWICE.values(), ids=TWICE)
def test_what_a_file_holds_twice_is_refused_with_both_lines(folder: Path, content: str, found: str) -> None:
    (folder / "luigi.cfg").write_text(content)
    with pytest.raises(ExpectedError) as error:
        check_settings_files()
    assert str(error.value) == f"luigi.cfg: expected each {found}"


def test_a_file_may_override_another_and_a_section_the_defaults(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "luigi.cfg").write_text("[DEFAULT]\nshard-images = 1\n[export]\nshard-images = 2\n")
    (folder / "my.cfg").write_text("[export]\nshard_images = 3\n[log]\nto-file = 1\n")
    monkeypatch.setenv("LUIGI_CONFIG_PATH", "my.cfg")
    check_settings_files()


PASSED_OVER = {
    "of a lower file": (
        "[log]\n[export]\nshard_images = 7\n", "[export]\nshard-images = 9\n", "my.cfg, line 2",
        "[export] shard_images in luigi.cfg, line 3",
    ),
    "for all sections": (
        "[export]\nshard-images = 9\n[DEFAULT]\nshard_images = 7\n", "", "luigi.cfg, line 2",
        "[DEFAULT] shard_images in luigi.cfg, line 4",
    ),
    "for all sections of a higher file": (
        "[export]\nshard-images = 9\n", "[DEFAULT]\nshard_images = 7\n", "luigi.cfg, line 2",
        "[DEFAULT] shard_images in my.cfg, line 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("low", "high", "where", "instead"), PASSED_OVER.values(), ids=PASSED_OVER)
def test_a_spelling_that_luigi_would_pass_over_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, low: str, high: str, where: str, instead: str
) -> None:
    (folder / "luigi.cfg").write_text(low)
    (folder / "my.cfg").write_text(high)
    monkeypatch.setenv("LUIGI_CONFIG_PATH", "my.cfg")
    with pytest.raises(ExpectedError) as error:
        check_settings_files()
    assert str(error.value) == (
        f"{where}: expected [export] shard_images, found shard-images, which Luigi passes over for {instead}. "
        "Write it with underscores"
    )


def test_files_that_luigi_would_pass_over_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUIGI_CONFIG_PATH", "nowhere.cfg")
    with pytest.raises(ExpectedError, match=re.escape("nowhere.cfg, found none (LUIGI_CONFIG_PATH)")):
        check_settings_files()
    (folder / "nowhere.cfg").mkdir()
    with pytest.raises(ExpectedError, match=re.escape("found something else (LUIGI_CONFIG_PATH)")):
        check_settings_files()
    monkeypatch.delenv("LUIGI_CONFIG_PATH")
    (folder / "luigi.cfg").mkdir()
    with pytest.raises(ExpectedError, match=r"settings file at luigi\.cfg, found something else$"):
        check_settings_files()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(folder: Path) -> None:
    (folder / "luigi.cfg").touch(mode=0)
    with pytest.raises(ExpectedError, match=r"luigi\.cfg, found one that cannot be read: Permission denied"):
        check_settings_files()


def test_toml_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUIGI_CONFIG_PARSER", "toml")
    with pytest.raises(ExpectedError, match="found LUIGI_CONFIG_PARSER = toml: unset it"):
        check_settings_files()


def test_no_file_an_empty_one_and_no_name_are_fine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_settings_files()
    (folder / "luigi.cfg").touch()
    monkeypatch.setenv("LUIGI_CONFIG_PATH", "")
    check_settings_files()


def parsed(folder: Path, *contents: str) -> ConfigParser:
    """Settings as Luigi reads them from files, the last of which is the named one."""
    names = [folder / name for name in ("luigi.cfg", "my.cfg")][: len(contents)]
    for path, content in zip(names, contents, strict=True):
        path.write_text(content)
    config = LuigiConfigParser()
    config.read(names)
    return config


@pytest.mark.parametrize(("value", "message"), VALUES.values(), ids=VALUES)
def test_a_value_that_luigi_cannot_resolve_is_named_with_the_line(
    folder: Path, value: str, message: str
) -> None:
    config = parsed(folder, f"[log]\n[paths]\ndata = {value}\n")
    with pytest.raises(ExpectedError, match=f"^luigi.cfg, {message}"):
        refuse_unreadable_values(config, {"paths", "log"})


@pytest.mark.parametrize("section", ["DEFAULT", "resources", "retcode"])
def test_every_value_that_luigi_reads_is_looked_at(folder: Path, section: str) -> None:
    config = parsed(folder, f"[paths]\ndata = a\n[{section}]\ngpu = %x\n")
    with pytest.raises(ExpectedError, match=rf"line 4: expected %% .*\[{section}\] gpu, found %x"):
        refuse_unreadable_values(config, {"paths", "resources", "retcode"})


def test_the_line_is_that_of_the_file_that_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUIGI_CONFIG_PATH", "my.cfg")
    config = parsed(
        folder, "[paths]\ndata = 5%\n", "\n\n[paths]\nstore = a\n[DEFAULT]\nstore = b\ndata = 6\n"
    )
    with pytest.raises(ExpectedError, match=r"luigi\.cfg, line 2: .* found 5%"):
        refuse_unreadable_values(config, {"paths"})
    config = parsed(folder, "[DEFAULT]\ndata = 5\n[paths]\n", "[log]\ndata = 1\n[paths]\ndata = 6%\n")
    with pytest.raises(ExpectedError, match=r"my\.cfg, line 4: .* found 6%"):
        refuse_unreadable_values(config, {"paths"})


def test_values_that_luigi_resolves_and_those_of_others_are_fine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", "/x/50%")
    config = parsed(
        folder,
        "[DEFAULT]\ntop = /top\n[paths]\ndata = %(top)s/50%%\nstore = ${SCRATCH}\n[theirs]\nformat = %q\n",
    )
    refuse_unreadable_values(config, {"paths"})
    assert (config.get("paths", "data"), config.get("paths", "store")) == ("/top/50%", "/x/50%")


def test_a_build_and_the_tools_say_so_in_one_line(workspace: Workspace) -> None:
    path = workspace.settings_file()
    path.write_text("[paths]\ndata = /disk/50%\n")
    workspace.settings_file = lambda: path  # type: ignore[method-assign]
    message = f"ERROR: {path}, line 2: expected %% for a percent sign in [paths] data, found /disk/50%\n"
    assert workspace.run().output == message
    path.write_text("[paths]\ndata = a\ndata = b\n")
    message = f"ERROR: {path}: expected each setting once, found [paths] data in lines 2 and 3\n"
    assert workspace.spctrl("status").stderr == message


def test_percent_signs_reach_a_build_from_files_and_options(workspace: Workspace, tmp_path: Path) -> None:
    data = workspace.data.rename(tmp_path / "50% of {it}")
    workspace.configure("paths", data=data, store=tmp_path / "100%")  # the file has %%
    built = workspace.run("--paths-export", str(tmp_path / "%(out)s"))
    assert built.succeeded, built.output
    assert (tmp_path / "100%" / "runs").is_dir()
    assert (tmp_path / "%(out)s" / "report.html").is_file()
