"""Rooms import downwards only, and naming a pipeline loads nothing heavy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import HANG_S

ROOT = Path(__file__).parents[1]
ROOMS = ("spctrl", "eval", "tasks", "pipelines")
"""From the ground up: each may import those before it."""
HEAVY = (
    "torch",
    "cv2",
    "pandas",
    "numpy",
    "pyarrow",
    "PIL",
    "msgspec",
    "jinja2",
    "diffusers",
    "transformers",
)
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
COMMAND = ROOT / "spctrl" / "__main__.py"
"""``python -m spctrl``, named as the command is, which belongs to ``pipelines``."""


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=HANG_S
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "module",
    ["pipelines", "pipelines.cli.main", "tasks.stage.base", "tasks.dataset.export", "tasks.dataset.report"],
)
def test_what_only_wires_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}").isdisjoint(HEAVY)


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports anywhere, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found.add(path.relative_to(ROOT).parts[0] if node.level else module.split(".")[0])
    return found & {*ROOMS, "tests", "benchmarks"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_import_goes_up(path: Path) -> None:
    room = "pipelines" if path == COMMAND else path.relative_to(ROOT).parts[0]
    assert imported_rooms(path) <= set(ROOMS[: ROOMS.index(room) + 1])


def test_the_rooms_are_there() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ROOMS)
    assert any("spctrl" in imported_rooms(path) for path in FILES if path.is_relative_to(ROOT / "tasks"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_library_knows_nothing_of_luigi(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] in ("spctrl", "eval"):
        assert "import luigi" not in path.read_text(encoding="utf-8")
