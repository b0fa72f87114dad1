"""Folders of weights for the image models, read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spctrl.errors import ExpectedError
from spctrl.io.documents import read_document_file
from spctrl.io.network_size import MAX_CONFIG_BYTES, within_weights
from spctrl.io.reading_faults import faults_of

_KEYS_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFolder:
    """What a folder of weights has to be, for checks and messages.

    Attributes:
        what, source, files: what it is, where to get it, and the files in it.
        setting: which setting names the folder.
        kind: key and value that its ``config.json`` must have.
    """

    what: str
    source: str
    files: str
    setting: str
    kind: tuple[str, str]


def load_strictly(
    expected: WeightsFolder, folder: Path, load: Callable[[Path], tuple[Any, Mapping[str, Any]]]
) -> Any:
    """A model from a local folder, all of whose weights are the file's.

    Args:
        expected: what the folder has to be.
        folder: where it is.
        load: a ``from_pretrained`` that returns the model and its loading info.

    Raises:
        ExpectedError: the folder or a file is missing, broken or another model's, or keys do not match; the message
            names the setting, the folder and what to get.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for each tensor, gone before anyone sees it
    where = f"{expected.setting}: {folder}"
    remedy = f"Get {expected.what} from {expected.source} ({expected.files})"
    if not folder.is_dir():
        raise ExpectedError(
            f"{where} is not a folder. {remedy} and put it there, or set {expected.setting} to where it is."
        )
    key, value = expected.kind
    try:
        config = read_document_file(folder / "config.json", MAX_CONFIG_BYTES)
        found = config.get(key) if isinstance(config, dict) else None
    except (OSError, ValueError) as error:
        raise ExpectedError(f"{where}: config.json cannot be read: {error}. {remedy}.") from None
    if found != value:
        raise ExpectedError(f"{where}: expected {key} = {value} in config.json, found {found}. {remedy}.")
    fault = f"{where}: config.json or the weights cannot be read"
    with faults_of(fault, f"A file may be missing or cut short. {remedy}."), within_weights(folder):
        model, info = load(folder)
    wrong = [_keys(name, info[f"{name}_keys"]) for name in ("missing", "unexpected", "mismatched")]
    if any(wrong):
        raise ExpectedError(
            f"{where}: expected {value}'s own keys: {'; '.join(filter(None, wrong))}. {remedy}."
        )
    return model


def _keys(how: str, keys: Sequence[Any]) -> str:
    """For example "2 missing (a, b)"; mismatched ones come with their shapes."""
    names = sorted(each if isinstance(each, str) else str(each[0]) for each in keys)
    more = ", ..." if len(names) > _KEYS_NAMED else ""
    return f"{len(names)} {how} ({', '.join(names[:_KEYS_NAMED])}{more})" if names else ""


def mark_random(folder: Path) -> None:
    """Say beside weights that they are random, for the provenance of what is made with them."""
    (folder / "spctrl.json").write_text(json.dumps({"weights": "random"}) + "\n")
