"""What a command says when a package is missing that one of the extras installs."""

from __future__ import annotations

import importlib.metadata
import os
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from processes import HANG_S

from spctrl import extras
from spctrl.errors import ExpectedError
from spctrl.extras import PURPOSES, extras_with, import_explained, imports_explained, missing_package
from tasks.stage import fingerprints

REPOSITORY = Path(__file__).parents[1]
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
RUN_WITHOUT = """
import importlib.metadata, importlib.machinery, runpy, sys
module, hidden = sys.argv[1:3]
find, version = importlib.machinery.PathFinder.find_spec, importlib.metadata.version

def find_others(name, *arguments):
    return None if name == hidden else find(name, *arguments)

def version_of_others(name):
    if name.replace("-", "_") == hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.machinery.PathFinder.find_spec = find_others
importlib.metadata.version = version_of_others
sys.argv = sys.argv[2:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""Runs a module as if one package were not installed."""


def test_each_extra_for_users_has_a_purpose() -> None:
    assert {*PURPOSES} == {*EXTRAS} - {"dev", "all", "fuzz"}


@pytest.mark.parametrize(
    ("name", "found_in"),
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
def test_a_package_is_found_in_its_extras(name: str, found_in: list[str]) -> None:
    assert extras_with(name) == found_in


def test_the_message_has_the_command_for_each_purpose() -> None:
    pip = f"Install it with {sys.executable} -m pip install"
    assert str(missing_package("accelerate")) == (
        f"expected the package accelerate in {sys.prefix}, found none. {pip} 'spctrl[train]'"
    )
    assert str(missing_package("torch")).endswith(
        f"{pip} 'spctrl[models]', or 'spctrl[train]' to train, or 'spctrl[eval]' to evaluate"
    )
    assert str(missing_package("bitsandbytes")).endswith(f"{pip} bitsandbytes")


def test_only_missing_packages_of_extras_are_explained() -> None:
    assert import_explained(None) is None
    assert import_explained(ValueError("torch")) is None
    assert import_explained(ImportError("x", name="torch")) is None  # it is there, and broken
    assert import_explained(ModuleNotFoundError("x", name="torch.absent")) is None  # the same
    assert import_explained(ModuleNotFoundError("x", name="spctrl.absent")) is None
    # As it comes from a worker process.
    error = pickle.loads(pickle.dumps(ModuleNotFoundError("x", name="torch")))
    assert str(import_explained(error)) == str(missing_package("torch"))
    # As libraries raise it from the failed import of what they need.
    wrapped = RuntimeError("failed to import a.b because of ...")
    wrapped.__cause__ = ModuleNotFoundError("x", name="safetensors")
    assert str(import_explained(wrapped)) == str(missing_package("safetensors"))


def test_other_errors_stay_as_they_are() -> None:
    reason = KeyError("the reason")
    with pytest.raises(ModuleNotFoundError, match=r"^x$") as error, imports_explained():
        raise ModuleNotFoundError("x", name="spctrl.absent") from reason
    assert error.value.__cause__ is reason


def test_an_extra_that_includes_another_installs_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    written = [
        "torch>=2; extra == 'models'",
        "spctrl[models]; extra == 'train'",
        'moto; extra == "dev"',
        "numpy",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: written)
    monkeypatch.setattr("spctrl.extras._packages", extras._packages.__wrapped__)
    assert extras_with("torch") == ["models", "train"]
    assert extras_with("numpy") == extras_with("moto") == []


def test_without_metadata_the_package_itself_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    monkeypatch.setattr("spctrl.extras._packages", extras._packages.__wrapped__)
    assert str(missing_package("torch")).endswith("-m pip install torch")


def test_a_stage_names_the_library_that_it_does_not_find() -> None:
    with pytest.raises(ExpectedError, match=r"expected the package no-such-library in .*, found none"):
        fingerprints.library_version("no-such-library")


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
    done = run_without(hidden, module, *arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr == f"{missing_package(hidden)}\n"


SETTINGS = """
[build]
datasets = ["ap10k"]
splits = ["val"]
conditions = ["spatext", "mask", "depth", "latents"]

[mask]
backend = sam

[depth]
backend = zoedepth
"""


@pytest.mark.parametrize(
    ("hidden", "conditions", "weights"),
    [
        ("torch", 4, "expected weights"),
        ("segment_anything", 2, "expected weights at weights/sam"),
        ("transformers", 2, "expected weights at weights/zoedepth"),
    ],
)
def test_a_build_asks_for_packages_before_weights_and_the_rest_goes_on(
    hidden: str, conditions: int, weights: str, sample: Path, tmp_path: Path
) -> None:
    (tmp_path / "luigi.cfg").write_text(f"[paths]\ndata = {sample}\n{SETTINGS}")

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_without(hidden, module, *arguments, folder=tmp_path)

    status = run("spctrl", "status")
    assert status.returncode == 0, status.stderr
    assert run("spctrl", "gc", "--dry-run").returncode == 0
    package = hidden.replace("_", "-")
    doctor = " ".join(run("spctrl", "doctor").stdout.split())
    assert doctor.count(f"no {package} (extra models)") == conditions, doctor
    build = run("luigi", "--module", "pipelines", "BuildDataset", "--local-scheduler")
    assert build.returncode != 0
    assert str(missing_package(package)) in build.stdout + build.stderr
    assert "Traceback" not in build.stdout + build.stderr
    assert weights not in build.stdout + build.stderr


def run_without(hidden: str, module: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT, module, hidden, *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
