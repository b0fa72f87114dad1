"""The form of a run's provenance: what all of its readers rely on. One that has another form counts as none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from spctrl.io.documents import parse_document
from spctrl.paths import is_safe_relative_path
from spctrl.store.format import FIRST_FORMAT, FORMAT

RECORDS = "records.parquet"
"""Of the index stage: the records of an annotation file."""
ARTIFACTS = "artifacts.parquet"
"""Of a stage that makes artifacts: which record's artifact lies where."""
MANIFEST = "manifest.parquet"
"""Of the manifest stage: the table that users read."""
REJECTS = "rejects.parquet"
MAX_SHOWN_CHARACTERS = 60
LARGEST_COUNT = 2**63 - 1

Form = Callable[[Any, str], Iterator[str]]
"""Sentences on what is wrong with a value, whose name is the second argument."""


class ProvenanceError(ValueError):
    """What a file says is not the provenance of a run; the message says why."""


def parse_provenance(stage: str, data: bytes) -> dict[str, Any]:
    """The provenance of a run of a stage; ``is_readable`` says whether the stages of this version can read the run.

    Raises:
        ProvenanceError: it has not the form that ``StageTask.commit`` writes.
    """
    try:
        found = parse_document(data)
    except ValueError as error:
        raise ProvenanceError(f"expected a JSON object, found a fault: {error}") from error
    for fault in PROVENANCE_FORM(found, ""):
        raise ProvenanceError(fault)
    if is_readable(stage, found):
        for fault in FORMS_BY_STAGE.get(stage, ANYTHING)(found, ""):
            raise ProvenanceError(fault)
    return dict(found)


def is_readable(stage: str, provenance: Mapping[str, Any]) -> bool:
    """Whether a run has a format in which this version reads runs of its stage."""
    written: int = provenance.get("format", FIRST_FORMAT)
    return OLDEST_FORMATS.get(stage, FIRST_FORMAT) <= written <= FORMAT


def _value(expected: str, holds: Callable[[Any], bool]) -> Form:
    def faults(value: Any, name: str) -> Iterator[str]:
        if not holds(value):
            yield f"expected {expected} as {name}, found {_shown(value)}"

    return faults


def _mapping(values: Form, keys: Callable[[str], bool] = lambda key: True) -> Form:
    """An object whose values have one form, whatever they are called."""

    def faults(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"expected an object as {name}, found {_shown(value)}"
            return
        for key, each in value.items():
            if not keys(key):
                yield f"expected names of files below the run in {name}, found {_shown(key)}"
            yield from values(each, f"{name}.{key}"[:MAX_SHOWN_CHARACTERS])

    return faults


def _object(required: Mapping[str, Form], optional: Mapping[str, Form] | None = None) -> Form:
    """An object with these names, and maybe others that nobody reads."""

    def faults(value: Any, name: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"expected an object as {name or 'the whole'}, found {_shown(value)}"
            return
        for key, form in {**required, **(optional or {})}.items():
            full_name = f"{name}.{key}".lstrip(".")
            if key in value:
                yield from form(value[key], full_name)
            elif key in required:
                yield f"expected {full_name}, found none"

    return faults


def _all_of(*forms: Form) -> Form:
    def faults(value: Any, name: str) -> Iterator[str]:
        for form in forms:
            for fault in form(value, name):
                yield fault
                return

    return faults


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_COUNT


def _is_file_name(name: str) -> bool:
    return is_safe_relative_path(name) and not {"", "."} & set(name.split("/"))


def _is_duration(value: Any) -> bool:
    """A clock that was set back makes one below zero."""
    return type(value) in (int, float) and abs(value) <= LARGEST_COUNT and math.isfinite(value)


ANYTHING = _value("a JSON value", lambda value: True)
TEXT = _value("a text", lambda value: isinstance(value, str))
TEXTS = _value(
    "a list of texts", lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value)
)
COUNT = _value("a whole number of at least 0", _is_count)
SHA256 = _value(
    "a SHA-256 in hex",
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
)
FILE = _object({"size": COUNT, "digest": SHA256})
COUNTS = _mapping(COUNT)

PROVENANCE_FORM = _object(
    {
        "stage": TEXT,
        "part": TEXT,
        "code": _mapping(TEXT),
        "libraries": _mapping(TEXT),
        "code_version": TEXT,
        "parameters": _mapping(ANYTHING),
        "inputs": _mapping(TEXT),
        "counts": _all_of(COUNTS, _object({"records": COUNT, "made": COUNT})),
        "started_at": TEXT,
        "finished_at": TEXT,
        "duration_s": _value("a number of seconds", _is_duration),
        "made_by": _mapping(TEXT),
        "files": _mapping(FILE, _is_file_name),
        "packs": _mapping(COUNT, _is_file_name),
    },
    {
        "format": COUNT,
        "fingerprint": TEXT,
        "weights": TEXT,
        "adjustments": COUNTS,
        "random": TEXTS,
        "warnings": TEXTS,
        "git_commit": _value("a text or null", lambda value: isinstance(value, str | None)),
    },
)
"""What ``StageTask.commit`` and ``Run.commit`` write for every stage, and what some stages add."""


def _needs(*files: str, counts: tuple[str, ...] = (), also: tuple[str, ...] = ()) -> Form:
    """What the readers of a stage's run take for granted besides."""
    return _object(
        {
            "files": _object(dict.fromkeys(files, ANYTHING)),
            "counts": _object(dict.fromkeys(counts, ANYTHING)),
            **dict.fromkeys(also, ANYTHING),
        }
    )


ARTIFACT_STAGES = (
    "images",
    "spatext",
    "openpose",
    "mask",
    "segments",
    "depth",
    "masked_depth",
    "latents",
    "samples",
)
"""Stages that make one artifact for each record."""
OLDEST_FORMATS = dict.fromkeys(("index", *ARTIFACT_STAGES), 2)
"""The earliest format of a run that is still read, of stages whose tables changed since the first."""
EARLIER_FILES = dict.fromkeys(("index", *ARTIFACT_STAGES), frozenset({MANIFEST}))
"""Files in runs of earlier formats that the stage no longer writes."""
METRICS = ("pose_ap", "fid", "fid_infinity", "kid", "clip_score", "diversity")
FORMS_BY_STAGE = {
    **dict.fromkeys(ARTIFACT_STAGES, _needs(ARTIFACTS, REJECTS)),
    "index": _needs(RECORDS, REJECTS),
    **dict.fromkeys(METRICS, _needs("scores.parquet", "samples.npz", also=("random",))),
    "segments": _needs(ARTIFACTS, REJECTS, "instances.parquet"),
    "manifest": _needs(MANIFEST, REJECTS, counts=("instances", "images_on_disk", "rejected")),
    "poses": _needs("poses.parquet"),
    **dict.fromkeys(("features", "real_features"), _needs("features.npz")),
    "clip": _needs("clip.parquet"),
    "report": _needs("report.html"),
    "benchmark_report": _needs("report.html"),
    "tables": _needs("table.md", "table.parquet"),
    "prompts": _needs("prompts.parquet", "rejects.parquet"),
    "generate": _needs("images.parquet", "rejects.parquet"),
    "evaluated_images": _needs(
        "images.parquet", "rejects.parquet", counts=("poses", "annotated", "rejected")
    ),
}
