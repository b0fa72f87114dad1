"""Files of the package, and users' own below ``configs``."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from spctrl.configuration import ConfigurationError
from spctrl.errors import ExpectedError
from spctrl.prompts import load_templates, templates_path
from spctrl.resources import overrides, packaged, resource
from spctrl.weights import find_weights, known_weights, random_weights_path

ENTRY = {"what": "w", "publisher": "p", "licence": "l", "setting": "s", "file": "mine.pth"}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of users' own files, below the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "prompts").mkdir(parents=True)
    return tmp_path / "configs"


@pytest.mark.parametrize("name", ["weights.yaml", "prompts/ap10k.yaml", "prompts/humanart.yaml"])
def test_the_package_has_its_own(own: Path, name: str) -> None:
    assert resource(name) == packaged(name)
    assert packaged(name).is_file()


def test_own_entries_add_to_the_packages_or_replace_them(own: Path) -> None:
    before = known_weights()
    (own / "weights.yaml").write_bytes(msgspec.yaml.encode({"sam_vit_h": ENTRY, "new": ENTRY}))
    after = known_weights()
    assert {name for name in after if after[name] != before.get(name)} == {"sam_vit_h", "new"}
    assert {*after} == {*before, "new"}
    assert find_weights("new", Path("w")) == find_weights("sam_vit_h", Path("w")) == Path("w/mine.pth")
    assert find_weights("sam_vit_b", Path("w")) == Path("w") / before["sam_vit_b"].file


def test_own_files_are_listed(own: Path) -> None:
    assert overrides() == []
    (own / "weights.yaml").touch()
    (own / "prompts" / "other.yaml").touch()  # of no dataset
    (own / "prompts" / "humanart.yaml").touch()
    assert overrides() == [Path("configs/prompts/humanart.yaml"), Path("configs/weights.yaml")]


def test_an_own_file_of_comments_changes_nothing(own: Path) -> None:
    before = known_weights()
    (own / "weights.yaml").write_text("# none yet\n")
    assert known_weights() == before


def test_random_weights_replace_no_others(own: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.pth"
    (own / "weights.yaml").write_bytes(msgspec.yaml.encode({"sam_vit_b": {**ENTRY, "file": str(precious)}}))
    path = random_weights_path(tmp_path / "w", "sam_vit_b")
    assert path == tmp_path / "w" / "sam_vit_b_01ec64.pth", "not the file of an own entry"
    path.write_text("real")
    with pytest.raises(ExpectedError, match=rf"expected nothing at {path}, or random weights"):
        random_weights_path(tmp_path / "w", "sam_vit_b")
    path.with_name(f"{path.name}.json").write_text('{"weights": "random"}')
    assert random_weights_path(tmp_path / "w", "sam_vit_b") == path
    folder = random_weights_path(tmp_path / "w", "zoedepth")
    folder.mkdir()
    assert random_weights_path(tmp_path / "w", "zoedepth") == folder
    (folder / "config.json").write_text("{}")
    with pytest.raises(ExpectedError, match="found other weights"):
        random_weights_path(tmp_path / "w", "zoedepth")


def test_own_templates_come_before_the_packages(own: Path) -> None:
    templates = {"training": ["a {category} {keypoints}"], "evaluation": ["the {category} {keypoints}"]}
    (own / "prompts" / "ap10k.yaml").write_bytes(msgspec.yaml.encode(templates))
    assert msgspec.to_builtins(load_templates(None, "ap10k")) == templates
    assert templates_path("humanart") == packaged("prompts/humanart.yaml")


def test_an_own_file_that_cannot_be_read_is_not_passed_over(own: Path) -> None:
    (own / "prompts" / "ap10k.yaml").symlink_to("nowhere")
    with pytest.raises(ConfigurationError, match=r"configs/prompts/ap10k\.yaml, found none"):
        load_templates(None, "ap10k")
    (own / "weights.yaml").mkdir()
    with pytest.raises(ConfigurationError, match=rf"{own}/weights\.yaml, found none \(Is a directory\)"):
        known_weights()
