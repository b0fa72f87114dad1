"""Paths: as people write them in settings, and as files of unknown origin list them."""

# ruff: noqa: PTH114, PTH120 - a Path for every image costs more than the check

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from spctrl.errors import ExpectedError

MAX_COMPONENT_BYTES = 255
"""Of a name in a path, on common file systems."""
SHOWN_CHARACTERS = 40
MAX_NAME_BYTES = 200
"""Of a name that users choose and that becomes part of a name in a path: leaves room for what is put around it, such as
a dataset, a split, and a temporary file's prefix."""
_VARIABLE = re.compile(r"\$(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^}]*)\})")


def expand_path(path: str) -> str:
    """A path or URL with its variables and a leading home folder put in; a shell does that only for some options.

    Variables come first, so that one may hold a path that begins with ``~``. A ``$`` that begins no name stays.

    Raises:
        ValueError: a variable that is not set or empty, a user that this machine does not know, or what no file can be
            called.
    """
    expanded = _VARIABLE.sub(_value, path)
    if (fault := _path_fault(expanded)) is not None:
        raise ValueError(fault)
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


def _path_fault(path: str) -> str | None:
    """Why no file can have a path; URLs may be longer."""
    if "\0" in path:
        return f"expected a path without null characters, found {path!r}"
    longest = max(path.split("/"), key=_num_bytes)
    if "://" in path or _num_bytes(longest) <= MAX_COMPONENT_BYTES:
        return None
    return (
        f"expected a path whose names have at most {MAX_COMPONENT_BYTES} bytes of UTF-8, found one of "
        f"{_num_bytes(longest)}: {longest[:SHOWN_CHARACTERS]}..."
    )


def name_fault(name: str) -> str | None:
    """Why a name that a user chose cannot become part of the names of files and folders; None where it can."""
    if not name.strip(".") or "/" in name or "\0" in name:
        return f"expected a name that a file can have, found {name!r}"
    if _num_bytes(name) > MAX_NAME_BYTES:
        return (
            f"expected a name of at most {MAX_NAME_BYTES} bytes of UTF-8, since it becomes part of folders' names, "
            f"found {_num_bytes(name)}: {name[:SHOWN_CHARACTERS]}..."
        )
    return None


def config_name(path: Path) -> str:
    """What runs and folders are called after a configuration: its file's name, without suffix.

    Raises:
        ExpectedError: it cannot be part of folders' names.
    """
    if (fault := name_fault(path.stem)) is not None:
        raise ExpectedError(f"{path}: {fault}. Rename the file")
    return path.stem


def _num_bytes(name: str) -> int:
    return len(name.encode("utf-8", "surrogatepass"))


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
