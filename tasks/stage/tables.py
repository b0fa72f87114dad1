"""The form of the tables of a run: what all of their readers rely on. A table that has another form is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from spctrl.store.provenance import ARTIFACT_STAGES, ARTIFACTS, MANIFEST, METRICS, RECORDS, REJECTS
from spctrl.store.runs import struck_out

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from spctrl.store.runs import Run

ROWS_AT_ONCE = 4096
IMAGES = "images.parquet"


class TableForm(NamedTuple):
    """What a table must hold; other columns may be there besides.

    Attributes:
        schema: names and types of columns.
        filled: columns without nulls, also in their lists; of structs in lists as ``<column>.<field>``.
    """

    schema: pa.Schema
    filled: tuple[str, ...]


def table_faults(run: Run, names: Iterable[str], counts: Mapping[str, int]) -> Iterator[str]:
    """What is wrong with the tables among some of a run's files.

    They cannot be read, have another form, or not as many rows as the run's counts say.
    """
    import pyarrow as pa

    from spctrl.io.parquet import open_table

    for name in names:
        if not name.endswith(".parquet"):
            continue
        try:
            table, kind = open_table(run.path(name)), (run.stage, name)
            fault = _form_fault(table, FORMS.get(kind)) or _rows_fault(table, ROWS.get(kind, ()), counts)
        except (ValueError, pa.ArrowException) as error:
            yield f"{name} cannot be read: {error}"
        else:
            if fault is not None:
                yield f"{name} is damaged: {fault}"


def refuse_damaged_tables(run: Run) -> None:
    """Strike out a run with a damaged table before a stage reads it, so that the next build makes it again.

    Raises:
        StoreError: the run was struck out; says why.
    """
    provenance = run.provenance()
    files, counts = provenance["files"], provenance["counts"]
    if _sound.get(run) == (files, counts):
        return
    try:
        fault = next(table_faults(run, files, counts), None)
    except OSError:  # a disk or network may be at fault: the stage that reads the file meets the same
        return
    if fault is not None:
        raise struck_out([run], fault)
    _sound[run] = (files, counts)


_sound: dict[Run, tuple[dict[str, Any], dict[str, int]]] = {}
"""Runs whose tables this process found sound, with the digests of their files, and their counts."""


def _form_fault(file: pq.ParquetFile, make_form: Callable[[], TableForm] | None) -> str | None:
    if make_form is None:
        return None
    form, found = make_form(), file.schema_arrow
    for field in form.schema:
        at = found.get_field_index(field.name)  # -1 also where there are two
        if at < 0:
            return f"expected one column {field.name}, found {found.names.count(field.name)}"
        if found.field(at).type != field.type:
            return f"expected {field.type} in the column {field.name}, found {found.field(at).type}"
    paths = [path.split(".") for path in form.filled]
    columns = sorted({column for column, *_ in paths})
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
        for column, *fields in paths:
            if _has_nulls(batch.column(column), fields):
                return f"expected no nulls in {'.'.join([column, *fields])}, found some"
    return None


def _rows_fault(file: pq.ParquetFile, names: Sequence[str], counts: Mapping[str, int]) -> str | None:
    if not names or not counts.keys() >= set(names):
        return None
    expected, found = sum(counts[name] for name in names), file.metadata.num_rows
    return None if found == expected else f"expected {expected:,} rows, found {found:,}"


def _has_nulls(array: pa.Array, fields: Sequence[str]) -> bool:
    """Whether an array has nulls: itself, its lists' elements, and of structs the field that leads on."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if array.null_count:
        return True
    if pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return _has_nulls(array.flatten(), fields)
    return bool(fields) and _has_nulls(pc.struct_field(array, fields[0]), fields[1:])


def _records() -> TableForm:
    from spctrl.data.records import RECORD_SCHEMA

    instances = ("annotation_id", "category_id", "category", "bbox_xywh", "keypoints")
    filled = ("dataset", "split", "image_id", "file_name", "width", "height")
    return TableForm(RECORD_SCHEMA, (*filled, *(f"instances.{name}" for name in instances)))


def _index() -> TableForm:
    from spctrl.data.index import INDEX_SCHEMA

    return TableForm(INDEX_SCHEMA, _records().filled)


def _manifest() -> TableForm:
    from spctrl.data.manifest import manifest_schema

    return TableForm(manifest_schema(()), _records().filled)


def _artifacts() -> TableForm:
    from spctrl.store.artifacts import artifact_schema

    return TableForm(artifact_schema(), tuple(artifact_schema().names))


def _rejects() -> TableForm:
    from spctrl.data.records import REJECT_SCHEMA

    return TableForm(REJECT_SCHEMA, ("code", "message"))


def _instances() -> TableForm:
    import pyarrow as pa

    from spctrl.data.manifest import INSTANCE_MASK_TYPE

    return TableForm(pa.schema([("image_id", pa.int64()), *INSTANCE_MASK_TYPE]), ("image_id",))


def _poses() -> TableForm:
    from eval.instances import PREDICTION_SCHEMA

    filled = ("image_id", "category_id", "bbox_xywh", "bbox_score", "keypoints")
    return TableForm(PREDICTION_SCHEMA, filled)


def _clip() -> TableForm:
    import pyarrow as pa

    return TableForm(pa.schema([("image_id", pa.int64()), ("score", pa.float64())]), ("image_id", "score"))


def _similarities() -> TableForm:
    import pyarrow as pa

    schema = pa.schema([("image_id", pa.int64()), ("annotation_id", pa.int64()), ("oks", pa.float64())])
    return TableForm(schema, tuple(schema.names))


def _scores() -> TableForm:
    from eval.scores import SCORES_SCHEMA

    return TableForm(SCORES_SCHEMA, ("metric", "kind", "group", "value", "low", "high"))


def _prompts() -> TableForm:
    import pyarrow as pa

    schema = pa.schema([("image_id", pa.int64()), ("prompt", pa.string())])
    return TableForm(schema, tuple(schema.names))


def _generated() -> TableForm:
    from spctrl.inference.folders import GENERATED_SCHEMA

    return TableForm(GENERATED_SCHEMA, ("image_id", "image_name", "index", "path", "digest"))


def _evaluated() -> TableForm:
    from eval.checks import IMAGES_SCHEMA

    return TableForm(IMAGES_SCHEMA, ("image_id", "index", "path"))


FORMS: dict[tuple[str, str], Callable[[], TableForm]] = {
    **{(stage, ARTIFACTS): _artifacts for stage in ARTIFACT_STAGES},
    **{
        (stage, REJECTS): _rejects
        for stage in ("index", *ARTIFACT_STAGES, "manifest", "prompts", "generate", "evaluated_images")
    },
    **{(stage, "scores.parquet"): _scores for stage in METRICS},
    ("index", RECORDS): _index,
    ("manifest", MANIFEST): _manifest,
    ("segments", "instances.parquet"): _instances,
    ("pose_ap", "instances.parquet"): _similarities,
    ("poses", "poses.parquet"): _poses,
    ("clip", "clip.parquet"): _clip,
    ("prompts", "prompts.parquet"): _prompts,
    ("generate", IMAGES): _generated,
    ("evaluated_images", IMAGES): _evaluated,
}
"""By stage and file. The functions load what they need: this module is imported wherever a build is planned."""

ROWS: dict[tuple[str, str], tuple[str, ...]] = {
    **{(stage, ARTIFACTS): ("artifacts",) for stage in ARTIFACT_STAGES},
    **{(stage, REJECTS): ("rejected",) for stage in (*ARTIFACT_STAGES, "prompts", "generate")},
    **{(stage, "scores.parquet"): ("made",) for stage in METRICS},
    ("index", RECORDS): ("made",),
    ("index", REJECTS): (),  # of images and of single annotations
    ("manifest", MANIFEST): ("made",),
    ("poses", "poses.parquet"): ("made",),
    ("clip", "clip.parquet"): ("made",),
    ("prompts", "prompts.parquet"): ("made",),
    ("generate", IMAGES): ("made",),
    ("evaluated_images", IMAGES): ("made",),
    ("evaluated_images", REJECTS): ("rejected", "without_prompt"),
}
"""By stage and file: the counts that make up the number of rows. Runs of earlier versions have fewer counts."""
