"""Optional packages: which extra of this project installs one that is missing."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager

from spctrl.errors import ExpectedError

PROJECT = "spctrl"
PURPOSES = {
    "models": "to run models",
    "train": "to train",
    "eval": "to evaluate",
    "ray": "to use a Ray cluster",
    "s3": "to reach S3",
    "metrics": "to publish metrics",
}
"""What each extra is for, without those for development. The first that installs a package is recommended first."""


class MissingPackageError(ExpectedError):
    """A package that is needed is not installed."""


def missing_package(name: str) -> MissingPackageError:
    """The error for a package that is not installed, with the command that installs it.

    Args:
        name: of the distribution (``segment-anything``) or the module (``segment_anything``).
    """
    extras = extras_with(name)
    commands = [
        f"`pip install '{PROJECT}[{extra}]'`{f' {PURPOSES[extra]}' if len(extras) > 1 else ''}"
        for extra in extras
    ]
    return MissingPackageError(
        f"expected the package {name}, found none. Run {', '.join(commands) or f'`pip install {name}`'}"
    )


def import_explained(error: BaseException | None) -> MissingPackageError | None:
    """``missing_package`` for a failed import of a module that an extra installs; None for any other error."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    return missing_package(error.name) if extras_with(error.name) else None


@contextmanager
def imports_explained() -> Iterator[None]:
    """Turn failed imports of what an extra installs into errors that say so.

    Raises:
        MissingPackageError: in place of the ``ModuleNotFoundError``.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise import_explained(error) or error from None


def extras_with(name: str) -> list[str]:
    """The extras that install a distribution or module, themselves or by an extra that they include.

    None where this project is not installed, but run from its folder.
    """
    from packaging.utils import canonicalize_name

    try:
        return [extra for extra in PURPOSES if canonicalize_name(name) in _packages(extra)]
    except importlib.metadata.PackageNotFoundError:
        return []


@functools.cache
def _packages(extra: str) -> frozenset[str]:
    """Canonical names of the distributions that an extra installs."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    requirements = map(Requirement, importlib.metadata.requires(PROJECT) or [])
    return frozenset(
        canonicalize_name(each.name)
        for each in requirements
        if each.marker and each.marker.evaluate({"extra": extra})
    )
