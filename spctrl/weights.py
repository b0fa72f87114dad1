"""The weight files that stages can use: what they are, where they come from, and whether they are real."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import msgspec

REGISTRY = Path(__file__).resolve().parent.parent / "configs" / "weights.yaml"


class KnownWeights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of configs/weights.yaml.

    Attributes:
        what: in words.
        file: file or folder below ``[paths] weights``.
        publisher: who offers it, and where.
        licence: as its publisher states it.
        setting: the settings that ask for it.
        sha256: of the file, or its first digits, which publishers like to put into its name.
    """

    what: str
    file: str
    publisher: str
    licence: str
    setting: str
    sha256: str | None = None


@functools.cache
def known_weights() -> dict[str, KnownWeights]:
    """All entries of configs/weights.yaml, by name."""
    return msgspec.yaml.decode(REGISTRY.read_bytes(), type=dict[str, KnownWeights])


def are_random(weights: Path) -> bool:
    """Whether weights say of themselves, in a JSON file beside or in them, that they are random."""
    beside = weights / "spctrl.json" if weights.is_dir() else weights.with_name(f"{weights.name}.json")
    try:
        return bool(json.loads(beside.read_bytes()).get("weights") == "random")
    except (OSError, ValueError, AttributeError):
        return False


def find_weights(name_or_path: str, folder: Path) -> Path:
    """Where weights are: below ``folder`` for an entry of configs/weights.yaml, else at the path itself."""
    entry = known_weights().get(name_or_path)
    return folder / entry.file if entry else Path(name_or_path)
