"""A store and a dataset whose texts would act on a terminal or be markup: every command shows them as text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import Workspace, _luigi_settings
from tampering import run_folder

if TYPE_CHECKING:
    from click.testing import Result

HOSTILE = "a[/x][red]b\x1b[2J\x9b31m\u202e\nstage\t"
SHOWN = r"a[/x][red]b\x1b[2J\x9b31m\u202e\nstage\t"
SURROGATE = "\udcff"
ACTING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(output: str) -> str:
    """The output without line breaks and padding, with nothing in it that acts on a terminal."""
    assert not ACTING.search(output), ascii(output)
    assert "Traceback" not in output
    return re.sub(r"\s", "", output)


def spctrl(workspace: Workspace, *arguments: str) -> Result:
    """Run the ``spctrl`` command in this process."""
    from typer.testing import CliRunner

    from pipelines.cli.main import app

    with _luigi_settings(workspace.settings_file()):
        return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "500"})  # type: ignore[return-value]


@pytest.fixture(scope="module")
def hostile(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A build of a dataset with such a species, and then a store whose provenances say such things."""
    import shutil

    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(sample, folder / "data")
    workspace = Workspace(folder, folder / "data")
    workspace.configure("build", datasets=["ap10k"], splits=["val"], conditions=["spatext"])
    with workspace.edit_annotations("ap10k", "val") as content:
        for category in content["categories"]:
            category["name"] = f"{category['name']} {HOSTILE}"
        content["images"][0]["file_name"] += HOSTILE
    done = workspace.build(max_reject_share=1.0)
    assert done.succeeded, done.errors
    for stage in ("index", "spatext"):
        path = run_folder(workspace.store, stage) / "provenance.json"
        provenance = json.loads(path.read_bytes())
        for kind in ("code", "libraries", "made_by", "parameters", "inputs"):
            provenance[kind] |= {HOSTILE: HOSTILE}
        provenance["code_version"] = HOSTILE
        path.write_text(json.dumps(provenance))
        path.parent.rename(path.parent.with_name("0" * 32))  # of other code
    yield workspace


def test_the_reports_show_text_as_text(hostile: Workspace) -> None:
    page = (hostile.exports / "report.html").read_text()
    assert not ACTING.search(page.replace("\t", ""))
    assert r"\x1b[2J\x9b31m\u202e" in page


def test_status_names_what_changed(hostile: Workspace) -> None:
    output = shown(spctrl(hostile, "status").output)
    assert SHOWN in output


def test_one_look_of_watch(hostile: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.cli import store as cli

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.time, "sleep", stop)
    assert SHOWN in shown(spctrl(hostile, "status", "--watch").output)


def test_accept_lists_names_literally(hostile: Workspace) -> None:
    found = spctrl(hostile, "accept", "spatext")
    assert f"spatext:code{SHOWN}changed" in shown(found.output)


def test_prompt_shows_the_species_literally(sample: Path, hostile: Workspace) -> None:
    hostile.build(max_reject_share=1.0)
    content = json.loads(hostile.annotation_path("ap10k", "val").read_bytes())
    found = spctrl(hostile, "prompt", str(content["images"][1]["id"]))
    assert r"a[/x][red]b\x1b[2J\x9b31m\u202e" in shown(found.output)


@pytest.mark.parametrize("command", [["gc", "--dry-run", "--keep=0", "--grace-hours=0"], ["verify"]])
def test_maintenance_shows_names_literally(hostile: Workspace, command: list[str]) -> None:
    folder = hostile.store / "runs" / "spatext" / f"ap10k-{HOSTILE}{SURROGATE}".replace("/", "") / "1"
    folder.mkdir(parents=True, exist_ok=True)
    (source,) = (hostile.store / "runs/spatext/ap10k-val").glob("0*/")
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if command == ["verify"]:
        (folder / "artifacts.parquet").write_bytes(b"PAR1")
    output = shown(spctrl(hostile, *command).output)
    assert f"{SHOWN}\\udcff".replace("/", "") in output


def test_doctor_shows_paths_literally(hostile: Workspace, tmp_path: Path) -> None:
    other = Workspace(tmp_path, tmp_path / "[red]\x1b[2J\x9b[/x]")
    found = spctrl(other, "doctor")
    assert found.exit_code == 1
    assert r"[red]\x1b[2J\x9b[/x]" in shown(found.output)


def test_errors_of_options_and_files_are_literal(hostile: Workspace, tmp_path: Path) -> None:
    for arguments in (["status", f"--split={HOSTILE}"], ["accept", HOSTILE]):
        found = spctrl(hostile, *arguments)
        assert found.exit_code == 2
        assert "[/x][red]b" in shown(re.sub("[│╭╰─╮╯]", "", found.output))
    config = tmp_path / f"{HOSTILE.strip()}.yaml".replace("/", "")
    config.write_text(json.dumps({f"x{HOSTILE}": 1}))
    found = spctrl(hostile, "accept", "x", "--target=Evaluate", f"--config={config}")
    assert found.exit_code == 1 and r"\x1b[2J\x9b31m\u202e" in shown(found.output)


def test_a_failing_build_shows_names_literally(hostile: Workspace) -> None:
    with hostile.edit_annotations("ap10k", "val") as content:
        for image in content["images"]:
            image["file_name"] = f"{HOSTILE}{image['id']}.jpg"
    done = hostile.run()
    assert done.exit_code == 30
    output = done.output
    assert not ACTING.search(output), ascii(output)
    assert "[/x][red]b" in output and not re.search("^stage", output, re.MULTILINE)
