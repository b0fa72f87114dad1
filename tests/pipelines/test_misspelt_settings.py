"""Settings that nobody meant: a build stops before it has made anything, and says which, and what they can be."""

from __future__ import annotations

import re
from configparser import ConfigParser
from typing import TYPE_CHECKING

import pytest
from conftest import _luigi_settings
from typer.testing import CliRunner

from pipelines import luigi_setup
from pipelines.cli.main import app
from pipelines.luigi_setup.settings_check import refuse_unknown_settings
from spctrl.errors import ExpectedError
from tasks.settings import settings_without_effect

if TYPE_CHECKING:
    from conftest import Workspace

IN_THE_FILE = {
    "a name": ("paths", "stroe", "elsewhere", ["[paths]", "stroe", "store, export"]),
    "a name of [build]": ("build", "conditons", "spatext", ["[build]", "conditons", "conditions"]),
    "a section": ("opnpose", "style", "coco", ["[opnpose]", "[openpose]"]),
    "a choice": ("openpose", "style", "cocoo", ["[openpose] style", "cocoo", "mmpose"]),
    "a choice of [build]": ("build", "conditions", "maskk", ["[build] conditions", "maskk", "masked_depth"]),
    "half a list": ("export", "format", '["folders"', ["[export] format", "JSON list", '["folders"']),
    "a number": ("export", "shard_images", "10k", ["[export] shard_images", "10k"]),
    "where errors go": ("log", "format", "jsn", ["[log] format", "jsn", "json"]),
    "where it runs": ("executor", "kind", "rai", ["[executor] kind", "rai", "ray"]),
}
ON_THE_COMMAND_LINE = {
    "a choice": (["--images", "requird"], ["--images: requird", "required"]),
    "a name": (["--dataset", "ap10"], ["--dataset: ", "ap10k, humanart, found ap10"]),
    "a percentage": (["--max-reject-share", "5"], ["--max-reject-share: 5", "[0.0, 1.0]"]),
    "a section's choice": (["--openpose-style", "cocoo"], ["[openpose] style", "cocoo", "mmpose"]),
}


SECTIONS = {
    "[PATHS]\n": "[paths]",
    "[Build]\n": "[build]",
    "[ export ]\n": "[export]",
    "[Export]\nshard-images = 9\n": "[export]",
    "[pa\u200bths]\n": "[paths]",
    "[lo\x01g]\n": "[log]",
    "[OPNPOSE]\n": "[openpose]",
    "[Resources]\n": "[resources]",
    "[Worker]\n": "[worker]",
    "[default]\n": "[DEFAULT]",
    "[openpose]\nkeypoint-radius_px = 3\n": "keypoint_radius_px",
}


def check(text: str) -> None:
    config = ConfigParser()
    config.read_string(text)
    known = {**luigi_setup.known_settings(), "log": ["level"]}
    refuse_unknown_settings(config, known, ["Export", "Report", "worker"])


@pytest.mark.parametrize(("text", "expected"), SECTIONS.items())
def test_a_section_in_another_case_or_with_hidden_characters_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ExpectedError, match=f"^expected .*{re.escape(expected)}"):
        check(text)


def test_stages_and_settings_in_both_spellings_are_known() -> None:
    check(
        "[Export]\nconditions = a\n[Report]\nx = 1\n[MyTask]\n[worker]\n[retcode]\n[openpose]\nkeypoint-radius-px=3"
    )


WITHOUT_EFFECT = {
    "of SAM": ({"mask": {"weights": "sam.pth"}}, "[mask] weights = sam.pth", "[mask] backend = precomputed"),
    "of ZoeDepth": ({"depth": {"batch_size": 4}}, "[depth] batch_size = 4", "[depth] backend = precomputed"),
    "of a folder": (
        {"depth": {"backend": "zoedepth", "folder": "d"}},
        "[depth] folder = d",
        "[depth] backend = zoedepth",
    ),
    "of a link": (
        {"openpose": {"style": "keypoints", "link_half_width_px": 9}},
        "[openpose] link_half_width_px = 9",
        "[openpose] style = keypoints",
    ),
    "of shards": ({"export": {"shard_images": 9}}, "[export] shard_images = 9", "[export] format = folders"),
    "of folders": (
        {"export": {"format": "parquet", "link": "copy"}},
        "[export] link = copy",
        "[export] format = parquet",
    ),
    "of Ray": ({"executor": {"address": "head:6379"}}, "[executor] address = head:6379", "kind = local"),
}


@pytest.mark.parametrize(("given", "setting", "reason"), WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_a_setting_without_effect_is_named_with_the_reason(
    workspace: Workspace, given: dict[str, dict[str, object]], setting: str, reason: str
) -> None:
    for section, values in given.items():
        workspace.configure(section, **values)
    with _luigi_settings(workspace.settings_file()):
        (found,) = settings_without_effect()
    assert found.startswith(f"{setting} has no effect with ") and found.endswith(reason)


def test_settings_with_an_effect_are_not_named(workspace: Workspace) -> None:
    workspace.configure("mask", backend="sam", weights="sam.pth", batch_size=2, folder="known")
    workspace.configure("depth", folder="d")
    workspace.configure("openpose", keypoint_radius_px=5, link_half_width_px=3)
    workspace.configure("export", format="folders,parquet", shard_images=9, link="copy")
    with _luigi_settings(workspace.settings_file()):
        assert not list(settings_without_effect())


def test_a_build_warns_once_of_a_setting_without_effect(workspace: Workspace) -> None:
    workspace.configure("mask", prompt="points")
    workspace.configure("build", conditions=["mask"])
    built = workspace.run()
    assert built.succeeded
    assert built.output.count("[mask] prompt = points has no effect with [mask] backend = precomputed") == 1


@pytest.mark.parametrize(("section", "name", "value", "expected"), IN_THE_FILE.values(), ids=IN_THE_FILE)
def test_a_misspelt_setting_stops_the_build(
    workspace: Workspace, section: str, name: str, value: str, expected: list[str]
) -> None:
    workspace.settings.setdefault(section, {})[name] = value
    built = workspace.run()
    assert not built.succeeded
    assert all(each in built.output for each in expected), built.output
    assert "Traceback" not in built.output
    assert not built.committed


@pytest.mark.parametrize(("options", "expected"), ON_THE_COMMAND_LINE.values(), ids=ON_THE_COMMAND_LINE)
def test_a_misspelt_value_on_the_command_line_stops_the_build(
    workspace: Workspace, options: list[str], expected: list[str]
) -> None:
    built = workspace.run(*options)
    assert not built.succeeded
    assert all(each in built.output for each in expected), built.output
    assert "Traceback" not in built.output
    assert not built.committed


def test_a_misspelt_target_is_one_line(workspace: Workspace) -> None:
    built = workspace.run(family="BuildDatset")
    assert not built.succeeded
    assert built.output == "ERROR: No task BuildDatset. Did you mean:\n  BuildDataset\n"


def test_the_tools_say_the_same(workspace: Workspace) -> None:
    workspace.settings["paths"]["stroe"] = "elsewhere"
    told = workspace.spctrl("status")
    assert told.returncode != 0
    assert "stroe" in told.stderr and "Traceback" not in told.stderr


@pytest.mark.parametrize("command", [("status",), ("join", "BuildDataset")])
def test_the_tools_name_the_option(command: tuple[str, ...]) -> None:
    told = CliRunner().invoke(app, [*command, "--dataset", "ap10"])
    assert told.exit_code == 2
    assert "--dataset: expected names among ap10k, humanart, found ap10" in " ".join(told.output.split())


def test_the_settings_of_other_projects_and_of_luigi_are_let_be(workspace: Workspace) -> None:
    workspace.settings |= {"DEFAULT": {"place": "here"}, "worker": {"wait_jitter": 1}, "MyTask": {"x": 1}}
    assert workspace.run("--dataset", "ap10k", "--split", "val").succeeded
