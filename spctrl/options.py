"""Parsers of command-line options that hold paths: shells leave the ``~`` of ``--option=~/file`` as it is."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import typer

from spctrl.paths import expand_path


def name_or_path(value: str | PathLike[str]) -> str:
    """An entry of weights.yaml, or a path in which ``~`` and environment variables are expanded.

    Raises:
        typer.BadParameter: a variable that is not set, or a user that this machine does not know.
    """
    try:
        return expand_path(str(value))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def path(value: str | PathLike[str]) -> Path:
    """A path in which ``~`` and environment variables are expanded; raises as ``name_or_path`` does."""
    return Path(name_or_path(value))


def file(value: str | PathLike[str]) -> Path:
    """The same of a file, which must exist.

    Raises:
        typer.BadParameter: as for ``name_or_path``, or no such file.
    """
    found = path(value)
    if not found.is_file():
        raise typer.BadParameter(
            f"expected a file at {found}, found {'a folder' if found.is_dir() else 'none'}"
        )
    return found
