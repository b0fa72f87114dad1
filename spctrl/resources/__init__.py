"""Files that come with the package, and users' own in their stead: the list of weights and the prompt templates."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

OVERRIDES = Path("configs")
"""Folder of users' own files, below the working folder."""


def packaged(name: str) -> Path:
    """Path of a file that comes with the package, such as ``prompts/ap10k.yaml``."""
    return Path(str(files(__name__) / name))


def override(name: str) -> Path | None:
    """Path of the user's own file of that name, ``configs/<name>``; None where there is none."""
    path = OVERRIDES / name
    return path if os.path.lexists(path) else None  # a broken link is to be reported, not passed over


def overrides() -> list[Path]:
    """Paths of all own files that there are."""
    top = packaged("")
    names = sorted(path.relative_to(top).as_posix() for path in top.rglob("*.yaml"))
    return [path for name in names if (path := override(name))]


def resource(name: str) -> Path:
    """Path of the user's own file of that name, else of the one that comes with the package."""
    return override(name) or packaged(name)
