"""What a stage's result is made from, and the digest of it."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spctrl.extras import missing_package
from spctrl.store.code_version import PACKAGES, ROOT, code_components
from spctrl.store.digests import digest, digest_cache
from spctrl.store.store import Store


@dataclass(frozen=True)
class Ingredients:
    """What a stage's result is made from.

    Attributes:
        code: digest of each definition that the stage's function reaches.
        libraries: versions of the libraries that decide the output.
        code_version: digest of both, or the earlier version that a user declared equal.
        parameters: JSON values.
        inputs: digests or fingerprints by name.
    """

    code: dict[str, str]
    libraries: dict[str, str]
    code_version: str
    parameters: dict[str, Any]
    inputs: dict[str, str]

    @property
    def fingerprint(self) -> str:
        return digest(json.dumps([self.code_version, self.parameters, self.inputs], sort_keys=True))


def code_version(stage: str, code: Mapping[str, str], libraries: Mapping[str, str]) -> str:
    """Digest of a stage's code and of the versions of its libraries."""
    return digest(stage, json.dumps([code, libraries], sort_keys=True))


def code_of(functions: Sequence[str], store: Store) -> dict[str, str]:
    """``code_components`` of several, kept for as long as no source file of the project changes."""
    cache = digest_cache(store)
    key = f"code {' '.join(functions)} {_sources_stamp()}"
    components: dict[str, str] | None = cache.fact(key)
    if not isinstance(components, dict) or not all(isinstance(each, str) for each in components.values()):
        components = dict(
            sorted(item for function in functions for item in code_components(function).items())
        )
        cache.keep_fact(key, components)
    return components


@functools.cache
def _sources_stamp() -> str:
    """Changes with any source file of this project, by stat."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            stat = path.stat()
            found.append(f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}")
    return digest(*found)


@functools.cache
def library_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise missing_package(distribution) from None
