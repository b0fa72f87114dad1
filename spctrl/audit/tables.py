"""The tables of one split, which the audit and the report read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from spctrl.data.datasets import DATASETS

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

MANIFEST_COLUMNS: Final = (
    "image_id", "file_name", "width", "height", "background", "background_name", "category", "captions",
    "instances", "image_path", "image_digest", "image_phash",
)  # fmt: skip
REJECT_COLUMNS: Final = ("stage", "image_id", "annotation_id", "file_name", "code", "message")


@dataclass(frozen=True, kw_only=True)
class SplitTables:
    """What the audit reads of one split of one dataset.

    Attributes:
        dataset: short name, such as "ap10k"; it chooses the keypoint names.
        title: name for readers, such as "AP-10K".
        split: name of the split, such as "train".
        manifest: one row per image: the columns of ``RECORD_SCHEMA``, image_path, image_digest (SHA-256,
            hex), image_phash (16 hex digits), and ``<condition>_key`` per condition.
        rejects: one row per reject: stage, image_id, annotation_id, file_name, code, message.
        conditions: names of the conditions, in the order in which they are shown.
        read_image: encoded image file of manifest row i, None when it is not on disk; a ``RecordError``
            says why one that is there cannot be read.
        read_condition: the same for the PNG of manifest row i and condition.

    Raises:
        ValueError: the dataset is not known, or a table lacks columns.
    """

    dataset: str
    title: str
    split: str
    manifest: pa.Table
    rejects: pa.Table
    conditions: tuple[str, ...]
    read_image: Callable[[int], bytes | None] = field(repr=False)
    read_condition: Callable[[int, str], bytes | None] = field(repr=False)

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"expected a dataset among {', '.join(DATASETS)}, found {self.dataset!r}")
        manifest_columns = (*MANIFEST_COLUMNS, *(f"{condition}_key" for condition in self.conditions))
        for what, table, expected in (
            ("manifest", self.manifest, manifest_columns),
            ("rejects", self.rejects, REJECT_COLUMNS),
        ):
            if missing := [name for name in expected if name not in table.column_names]:
                raise ValueError(
                    f"the {what} of {self.name}: expected the columns {', '.join(missing)}, "
                    f"found {', '.join(table.column_names)}; build it again with this version"
                )

    @property
    def name(self) -> str:
        """Dataset and split, for messages."""
        return f"{self.dataset} {self.split}"
