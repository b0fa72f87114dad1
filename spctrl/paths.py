"""Paths: as people write them in settings, and as files of unknown origin list them."""

# ruff: noqa: PTH114, PTH120 - a Path for every image costs more than the check

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from spctrl.errors import ExpectedError

_VARIABLE = re.compile(r"\$(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^}]*)\})")


def expand_path(path: str) -> str:
    """A path or URL with its variables and a leading home folder put in; a shell does that only for some options.

    Variables come first, so that one may hold a path that begins with ``~``. A ``$`` that begins no name stays.

    Raises:
        ValueError: a variable that is not set or empty, or a user that this machine does not know.
    """
    expanded = _VARIABLE.sub(_value, path)
    if not expanded.startswith("~"):
        return expanded
    absolute = os.path.expanduser(expanded)  # noqa: PTH111 - Path would change URLs and trailing slashes
    if absolute == expanded:
        user = expanded.partition("/")[0]
        raise ValueError(
            f"expected the home folder of a user of this machine, found {user}; ./{user} is a folder"
        )
    return absolute


def _value(variable: re.Match[str]) -> str:
    name = variable["name"] or variable["braced"] or ""
    if not os.environ.get(name):  # an empty one would make another path, such as /store of $SCRATCH/store
        raise ValueError(
            f"expected environment variables that are set and not empty, found {variable[0]}, which is not"
        )
    return os.environ[name]


class UnsafePathError(ExpectedError):
    """A listed path leads out of the folder that it belongs to."""


def is_safe_relative_path(name: str) -> bool:
    """Whether a name, joined to a folder, is that of something below it, where no part of it is a link."""
    return not (name.startswith("/") or "\0" in name or ".." in name.split("/"))


def outside_folders(paths: Sequence[str], folders: Sequence[str]) -> list[bool]:
    """For each path whether symbolic links lead it out of its folder; the folder itself may be a link."""
    inside = {folder: os.path.realpath(folder) + os.sep for folder in set(folders)}
    parents = {parent: os.path.realpath(parent) for parent in {os.path.dirname(path) for path in paths}}

    def resolved(path: str) -> str:
        parent, name = os.path.split(path)
        return os.path.realpath(path) if os.path.islink(path) else f"{parents[parent]}{os.sep}{name}"

    return [
        not resolved(path).startswith(inside[folder]) for path, folder in zip(paths, folders, strict=True)
    ]


def refuse_unsafe_paths(root: str | Path, names: Iterable[str], *, table: str | Path = "") -> None:
    """Refuse paths below a folder that lead out of it by their text alone.

    Args:
        root: the folder.
        names: the paths.
        table: what lists them, for the error.

    Raises:
        UnsafePathError: names one.
    """
    for name in names:
        if not is_safe_relative_path(name):
            raise UnsafePathError(_leads_out(root, name, table))


def listed_files(root: Path, names: Sequence[str], *, follow_links: bool = False) -> list[Path]:
    """The files that a table lists by their paths below a folder; nothing is opened.

    A store or a manifest may come from anywhere, so its paths may lead anywhere. The folder and the folders directly in
    it may be links, as those of datasets are; a link below them may not lead out.

    Args:
        root: the folder, such as a dataset's.
        names: paths below it, with ``/`` between the parts.
        follow_links: whether links may lead out all the same, as in a folder that the user put together.

    Raises:
        UnsafePathError: one of the paths leads out; names it.
    """
    refuse_unsafe_paths(root, names)
    if not all(name.strip("./") for name in names):
        raise UnsafePathError(_leads_out(root, next(name for name in names if not name.strip("./"))))
    files = [root / name for name in names]
    if follow_links:
        return files
    confines = [str(root / name.split("/")[0]) if "/" in name else str(root) for name in names]
    for path, folder, is_outside in zip(
        files, confines, outside_folders(list(map(str, files)), confines), strict=True
    ):
        if is_outside:
            raise UnsafePathError(
                f"expected a file within {folder}, found {path}, which is a link that leads out of it. Put the file "
                "itself there, or leave out what it belongs to"
            )
    return files


def _leads_out(root: str | Path, name: str, table: str | Path = "") -> str:
    where = f" in {table}" if table else ""
    return (
        f"expected paths of files below {root}{where}, found {name!r}, which leads out of it. No build lists such a "
        "path: remove the run or manifest that does, and build again"
    )
