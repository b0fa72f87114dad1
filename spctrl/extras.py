"""Optional packages: which extra of this project installs one that is missing."""

from __future__ import annotations

import functools
import importlib.metadata
import shlex
import sys
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
    wanted = f"'{PROJECT}[{extras[0]}]'" if extras else name
    others = "".join(f", or '{PROJECT}[{extra}]' {PURPOSES[extra]}" for extra in extras[1:])
    return MissingPackageError(
        f"expected the package {name} in {sys.prefix}, found none. Install it with "
        f"{shlex.quote(sys.executable)} -m pip install {wanted}{others}"
    )


def import_explained(error: BaseException | None) -> MissingPackageError | None:
    """``missing_package`` for an import that failed for want of what an extra installs; None for any other error.

    Libraries raise errors of their own from the failed import of what they need.
    """
    while isinstance(error, ImportError | RuntimeError):
        if isinstance(error, ModuleNotFoundError) and error.name and extras_with(error.name):
            return missing_package(error.name)
        error = error.__cause__
    return None


@contextmanager
def imports_explained() -> Iterator[None]:
    """Turn such errors into ones that say what to install.

    Raises:
        MissingPackageError: in place of the error.
    """
    try:
        yield
    except (ImportError, RuntimeError) as error:
        if (explained := import_explained(error)) is None:
            raise
        raise explained from None


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

    found: set[str] = set()
    for requirement in map(Requirement, importlib.metadata.requires(PROJECT) or []):
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == PROJECT:
            # An extra that it includes; some build backends write its packages instead.
            found.update(*map(_packages, requirement.extras))
        else:
            found.add(canonicalize_name(requirement.name))
    return frozenset(found)
