"""What a command says when a package is missing that one of the extras installs."""

from __future__ import annotations

import importlib.metadata
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from processes import HANG_S

from spctrl.errors import ExpectedError
from spctrl.extras import PURPOSES, extras_with, import_explained, imports_explained, missing_package
from tasks import base

REPOSITORY = Path(__file__).parents[1]
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
RUN_WITHOUT = """
import runpy, sys
module, hidden = sys.argv[1:3]
sys.modules.update(dict.fromkeys(hidden.split(",")))  # their import fails as if they were not installed
sys.argv = sys.argv[2:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def test_each_extra_for_users_has_a_purpose() -> None:
    assert {*PURPOSES} == {*EXTRAS} - {"dev", "all", "fuzz"}


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("torch", ["models", "train", "eval"]),
        ("segment_anything_hq", ["models", "train", "eval"]),
        ("pycocotools", ["models", "train", "eval"]),
        ("accelerate", ["train"]),
        ("Torch_Fidelity", ["eval"]),
        ("prometheus_client", ["metrics"]),
        ("numpy", []),  # always installed
        ("pytest", []),  # for development
        ("no_such_package", []),
    ],
)
def test_a_package_is_found_in_its_extras(name: str, extras: list[str]) -> None:
    assert extras_with(name) == extras


def test_the_message_has_the_command_for_each_purpose() -> None:
    assert str(missing_package("accelerate")) == (
        "expected the package accelerate, found none. Run `pip install 'spctrl[train]'`"
    )
    assert str(missing_package("torch")).endswith(
        "found none. Run `pip install 'spctrl[models]'` to run models, `pip install 'spctrl[train]'` to train, "
        "`pip install 'spctrl[eval]'` to evaluate"
    )
    assert str(missing_package("bitsandbytes")).endswith("Run `pip install bitsandbytes`")


def test_only_missing_packages_of_extras_are_explained() -> None:
    assert import_explained(None) is None
    assert import_explained(ValueError("torch")) is None
    assert import_explained(ImportError("x", name="torch")) is None  # it is there, and broken
    assert import_explained(ModuleNotFoundError("x", name="torch.absent")) is None  # the same
    assert import_explained(ModuleNotFoundError("x", name="spctrl.absent")) is None
    # As it comes from a worker process.
    error = pickle.loads(pickle.dumps(ModuleNotFoundError("x", name="torch")))
    assert str(import_explained(error)) == str(missing_package("torch"))
    with pytest.raises(ModuleNotFoundError, match=r"^x$"), imports_explained():
        raise ModuleNotFoundError("x", name="spctrl.absent")


def test_without_metadata_the_package_itself_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    monkeypatch.setattr("spctrl.extras._packages", sys.modules["spctrl.extras"]._packages.__wrapped__)
    assert str(missing_package("torch")).endswith("Run `pip install torch`")


def test_a_stage_names_the_library_that_it_does_not_find() -> None:
    with pytest.raises(ExpectedError, match="expected the package no-such-library, found none"):
        base._version("no-such-library")


@pytest.mark.parametrize(
    ("hidden", "module", "arguments"),
    [
        ("segment_anything", "spctrl", ["tiny-weights", "out"]),
        ("torch", "spctrl", ["tiny-weights", "out"]),
        ("torch", "spctrl", ["keypoint-embeddings", "-o", "out"]),
        ("accelerate", "spctrl.training", ["train.yaml", "--manifest", "none.parquet", "--output", "out"]),
        ("torch", "spctrl.training", ["train.yaml", "--manifest", "none.parquet", "--output", "out"]),
    ],
)
def test_commands_say_in_one_line_what_to_install(
    tmp_path: Path, hidden: str, module: str, arguments: list[str]
) -> None:
    (tmp_path / "train.yaml").write_bytes((REPOSITORY / "configs" / "train" / "smoke.yaml").read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT, module, hidden, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr == f"{missing_package(hidden)}\n"
