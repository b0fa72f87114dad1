"""Files that come with the package: the list of weights and the prompt templates."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def resource(name: str) -> Path:
    """Path of a file that comes with the package, such as ``weights.yaml``."""
    return Path(str(files(__name__) / name))
