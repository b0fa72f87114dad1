"""Paths in settings and options: what is expanded, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, get_origin, get_type_hints

import msgspec
import pytest
import typer

from eval.settings import Evaluation
from spctrl import options
from spctrl.configuration import ConfigurationError, read_config
from spctrl.errors import ExpectedError
from spctrl.inference.methods import Generation
from spctrl.paths import (
    UnsafePathError,
    config_name,
    expand_path,
    listed_files,
    outside_folders,
    refuse_unsafe_paths,
)
from spctrl.training.config import decisive_settings, read_training_config
from spctrl.weights import find_weights, known_weights


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("MY_DATA", "~/my data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~", "/home/me"),
        ("~/data", "/home/me/data"),
        ("~root/data", "/root/data"),
        ("$HOME/data", "/home/me/data"),
        ("${HOME}data", "/home/medata"),
        ("$SCRATCH/a/$SCRATCH", "/scratch/a//scratch"),
        ("$MY_DATA/x", "/home/me/my data/x"),
        ("s3://bucket$SCRATCH/~/store", "s3://bucket/scratch/~/store"),
        ("./~root", "./~root"),
        ("data~/~x", "data~/~x"),
        ("a$", "a$"),
        ("$1/$(pwd)/${", "$1/$(pwd)/${"),
        ("{data}/50%", "{data}/50%"),
        ("", ""),
    ],
)
def test_homes_and_variables_are_expanded_and_all_else_stays(path: str, expanded: str) -> None:
    assert expand_path(path) == expanded


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("$NOWHERE/x", r"found \$NOWHERE, which is not"),
        ("$EMPTY/x", r"found \$EMPTY, which is not"),
        ("s3://${NOWHERE}", r"found \$\{NOWHERE\}, which is not"),
        ("${HOME:-/x}", r"found \$\{HOME:-/x\}, which is not"),
        ("~nobody-of-this-name/x", "found ~nobody-of-this-name; ./~nobody-of-this-name is a folder"),
    ],
)
def test_unknown_variables_and_users_are_refused(path: str, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        expand_path(path)


@pytest.mark.parametrize("path", ["x" * 256, "/a/" + "é" * 128 + "/b", "~/" + "x" * 300, "a\0b"])
def test_what_no_file_can_be_called_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"at most 255 bytes of UTF-8, found one of|without null characters"):
        expand_path(path)


def test_long_paths_of_short_names_and_urls_stay() -> None:
    for path in ("/".join(["x" * 255] * 9), "s3://bucket/" + "x" * 300):
        assert expand_path(path) == path


def test_a_configuration_whose_name_fits_no_folder_is_refused() -> None:
    assert config_name(Path("a/" + "é" * 100 + ".yaml")) == "é" * 100
    assert config_name(Path("ap10k:v1.2.yaml")) == "ap10k:v1.2"
    for name, found in (("é" * 101, "found 202"), ("x" * 250, "found 250"), ("..", "found '..'")):
        with pytest.raises(ExpectedError, match=re.escape(found) + ".*Rename the file"):
            config_name(Path(f"{name}.yaml"))


def test_paths_of_a_training_are_expanded_whatever_they_are_written_as(tmp_path: Path) -> None:
    names = (
        "pretrained_model_name_or_path", "controlnet_model_name_or_path", "output_dir", "prompt_templates",
        "spatext_init_emb", "logging_dir",
    )  # fmt: skip
    given = {"dataset_name": "ap10k", "conditioning_mode": "spatext"}
    found = []
    for number, home in enumerate(("~", "$HOME", "${HOME}", "/home/me")):
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(msgspec.yaml.encode(given | {name: f"{home}/{name}" for name in names}))
        found.append(read_training_config(path))
        assert {getattr(found[-1], name) for name in names} == {f"/home/me/{name}" for name in names}
    assert all(decisive_settings(each) == decisive_settings(found[0]) for each in found)


METHODS = """
dataset: humanart
methods:
  - {name: a, kind: spctrl, checkpoint: ~/a, stable_diffusion: $SCRATCH/sd, templates: ~/t.yaml}
  - {name: b, kind: spctrl, train: ~/b.yaml}
  - {name: c, kind: external, folder: "${SCRATCH}/c"}
"""
EVALUATION = """
pose: {weights: ~/p, environment: ~/e, detector: {config: ~/d.py, weights: $SCRATCH/d}}
features: {weights: ~/f}
clip: {weights: ~/c}
"""


def test_paths_of_methods_and_evaluations_are_expanded(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(METHODS)
    a, b, c = read_config(path, Generation).methods
    assert (a.checkpoint, a.stable_diffusion, a.templates) == ("/home/me/a", "/scratch/sd", "/home/me/t.yaml")
    assert (b.train, c.folder, b.stable_diffusion) == ("/home/me/b.yaml", "/scratch/c", "stable_diffusion")
    path.write_text(METHODS + EVALUATION)
    found = read_config(path, Evaluation)
    assert found.methods[2].folder == "/scratch/c"
    assert (found.pose.weights, found.pose.environment) == ("/home/me/p", "/home/me/e")
    assert (found.pose.detector.config, found.pose.detector.weights) == ("/home/me/d.py", "/scratch/d")
    assert (found.features.weights, found.clip.weights) == ("/home/me/f", "/home/me/c")


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        (METHODS.replace("${SCRATCH}/c", "$NOWHERE/c"), "methods[2].folder"),
        (METHODS + EVALUATION.replace("$SCRATCH/d", "$NOWHERE"), "pose.detector.weights"),
    ],
)
def test_a_path_that_cannot_be_expanded_is_named_with_its_file(
    tmp_path: Path, text: str, setting: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        read_config(path, Evaluation)
    assert str(error.value).startswith(f"{path}: {setting}: expected environment variables that are set")


def test_paths_of_weights_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"what": "w", "publisher": "p", "licence": "l", "setting": "s"}
    good, bad = (
        {"a": entry | {"file": "$SCRATCH/a"}, "b": entry | {"file": "b"}},
        {"a": entry | {"file": "$NOWHERE/a"}},
    )
    for name, entries in {"good": good, "bad": bad}.items():
        (tmp_path / name / "configs").mkdir(parents=True)
        (tmp_path / name / "configs" / "weights.yaml").write_bytes(msgspec.yaml.encode(entries))
    monkeypatch.chdir(tmp_path / "good")
    found = [find_weights(name, Path("weights")) for name in ("a", "b")]
    assert found == [Path("/scratch/a"), Path("weights/b")]
    monkeypatch.chdir(tmp_path / "bad")
    with pytest.raises(ConfigurationError, match=r"weights\.yaml: a\.file: expected environment"):
        known_weights()


def test_every_path_among_the_options_has_a_parser_that_expands_it() -> None:
    from pipelines.cli.main import app
    from spctrl.training.__main__ import app as training

    commands = [each.callback for app in (app, training) for each in app.registered_commands]
    assert len(commands) > 10
    found = {
        f"{command.__name__} {name}": annotation.__metadata__[0]
        for command in commands
        if command is not None
        for name, annotation in get_type_hints(command, include_extras=True).items()
        if get_origin(annotation) is Annotated and "Path" in str(annotation.__origin__)
    }
    assert len(found) > 15
    assert [name for name, option in found.items() if option.parser is None] == []


def test_paths_of_options_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "map.png").touch()
    assert options.path("~/x") == options.path(Path("~/x")) == tmp_path / "x"
    assert options.name_or_path("stable_diffusion") == "stable_diffusion"
    assert options.file("~/map.png") == tmp_path / "map.png"
    for parse, value in ((options.path, "$NOWHERE"), (options.file, "~/none.png"), (options.file, "~")):
        with pytest.raises(typer.BadParameter, match="expected"):
            parse(value)


# Links that lead out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``data`` with images; ``secret`` beside it; links of each kind."""
    data, secret = tmp_path / "data", tmp_path / "secret"
    (data / "deep").mkdir(parents=True)
    secret.mkdir()
    for path in (data / "1.jpg", data / "deep/2.jpg", secret / "3.jpg"):
        path.write_bytes(b"")
    (data / "inside.jpg").symlink_to("deep/2.jpg")
    (data / "out.jpg").symlink_to(secret / "3.jpg")
    (data / "relative.jpg").symlink_to("../secret/3.jpg")
    (data / "twice.jpg").symlink_to("out.jpg")
    (data / "loop.jpg").symlink_to("loop.jpg")
    (data / "out").symlink_to(secret)
    (data / "in").symlink_to("deep")
    return data


CASES = {
    "1.jpg": False,
    "deep/2.jpg": False,
    "inside.jpg": False,
    "in/2.jpg": False,
    "out.jpg": True,
    "relative.jpg": True,
    "twice.jpg": True,
    "out/3.jpg": True,
    "out/missing.jpg": True,
    "missing.jpg": False,
    "deep/../../secret/3.jpg": True,
}


@pytest.mark.parametrize("root", ["plain", "link", "trailing slash", "relative"])
def test_links_that_lead_out_of_the_folder_are_found(
    folder: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"plain": f"{folder}", "trailing slash": f"{folder}/", "relative": "data"}.get(root, "")
    if root == "link":
        link = folder.parent.parent / f"{folder.parent.name}-link"
        link.symlink_to(folder)
        text = str(link)
    monkeypatch.chdir(folder.parent)
    paths = [f"{text}/{name}" for name in CASES]
    assert dict(zip(CASES, outside_folders(paths, [text] * len(paths)), strict=True)) == CASES


def test_a_neighbour_whose_name_starts_alike_is_outside(folder: Path) -> None:
    neighbour = folder.with_name("data-private")
    neighbour.mkdir()
    (neighbour / "4.jpg").write_bytes(b"")
    (folder / "4.jpg").symlink_to(neighbour / "4.jpg")
    assert outside_folders([f"{folder}/4.jpg"], [str(folder)]) == [True]


def test_no_paths_are_no_answers() -> None:
    assert outside_folders([], []) == []


def test_each_file_has_its_own_folder(folder: Path) -> None:
    paths = [f"{folder}/out/3.jpg", f"{folder}/out/3.jpg", f"{folder}/in/2.jpg", f"{folder}/in/2.jpg"]
    folders = [str(folder), f"{folder}/out", f"{folder}/in", str(folder.parent / "secret")]
    assert outside_folders(paths, folders) == [True, False, False, True]


# Paths that files list


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset whose folders of images are a folder and a link to one, with links to files in them."""
    root = tmp_path / "dataset"
    for path in (root / "data/1.jpg", tmp_path / "disk/2.jpg", tmp_path / "secret/3.jpg"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    (root / "images").symlink_to(tmp_path / "disk")
    (root / "data/inside.jpg").symlink_to("1.jpg")
    (root / "data/outside.jpg").symlink_to(tmp_path / "secret/3.jpg")
    (root / "images/outside").symlink_to(tmp_path / "secret")
    return root


SAFE = ("data/1.jpg", "images/2.jpg", "data/inside.jpg", "data/missing.jpg", "a..b/..c", "data/./1.jpg")
LINKED = ("data/outside.jpg", "images/outside/3.jpg")
UNSAFE = ("../secret/3.jpg", "/etc/passwd", "data/../../secret/3.jpg", "data/..", "..", "a\0b")


def test_listed_files_are_those_below_the_folder(dataset: Path) -> None:
    assert listed_files(dataset, SAFE) == [dataset / name for name in SAFE]
    assert listed_files(dataset, LINKED, follow_links=True) == [dataset / name for name in LINKED]
    assert listed_files(dataset, []) == []


@pytest.mark.parametrize("name", [*LINKED, *UNSAFE, "", ".", "data/outside.jpg/"])
def test_a_listed_path_that_leads_out_is_refused(dataset: Path, name: str) -> None:
    found = dataset / name if "outside" in name else repr(name)
    with pytest.raises(UnsafePathError, match=f"{re.escape(f'found {found}')}.* leads out of it"):
        listed_files(dataset, [*SAFE, name])


@pytest.mark.parametrize("name", UNSAFE)
def test_a_path_that_leads_out_by_its_text_is_refused_everywhere(dataset: Path, name: str) -> None:
    with pytest.raises(UnsafePathError):
        listed_files(dataset, [name], follow_links=True)
    with pytest.raises(UnsafePathError, match=r"in table\.parquet, found"):
        refuse_unsafe_paths(dataset, [name], table="table.parquet")
