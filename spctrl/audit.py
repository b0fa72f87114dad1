"""The audit of built pose datasets: what a manifest holds, what was rejected, what leaks between splits.

Legend: R manifest rows (one image each), M instances of all rows together, K keypoints, B histogram bins,
H distinct perceptual hashes of one split, P pairs of hashes.

Everything here works on columns: a split of 60,000 images is audited without a Python object per instance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spctrl.skeletons import AP10K, HUMANART

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

KEYPOINT_NAMES: Final = {"ap10k": AP10K.keypoint_names, "humanart": HUMANART.keypoint_names}

# Fixed edges, so that splits and datasets can be compared. Values beyond the ends count in the end bins.
LONG_SIDE_EDGES: Final = tuple(float(edge) for edge in range(0, 2401, 100))
ASPECT_RATIO_EDGES: Final = tuple(float(2.0**power) for power in np.linspace(-2, 2, 25))
INSTANCE_SIZE_EDGES: Final = tuple(float(edge) for edge in np.linspace(0, 1, 21))
INSTANCES_PER_IMAGE_EDGES: Final = tuple(n - 0.5 for n in range(10))

# COCO's limits of small, medium and large objects, in pixels of area.
COCO_SMALL_AREA: Final = 32.0**2
COCO_LARGE_AREA: Final = 96.0**2

NEAR_DISTANCE: Final = 4
HASH_BITS: Final = 64
# Pairs compared at once; bounds the memory of the near-duplicate search to some tens of megabytes.
PAIRS_PER_BLOCK: Final = 1 << 19

BASE_COLUMNS: Final = (
    "image_id", "file_name", "width", "height", "background", "background_name", "category", "captions",
    "instances", "image_path", "image_digest", "image_phash",
)  # fmt: skip
REJECT_COLUMNS: Final = ("stage", "image_id", "annotation_id", "file_name", "code", "message")

Grouping = Literal["species", "scenario"]


@dataclass(frozen=True, kw_only=True)
class SplitTables:
    """What the audit reads of one split of one dataset.

    Attributes:
        dataset: short name, such as "ap10k"; it chooses the keypoint names.
        title: name for readers, such as "AP-10K".
        split: name of the split, such as "train".
        manifest: one row per image: the columns of ``RECORD_SCHEMA``, image_path, image_digest (SHA-256,
            hex), image_phash (16 hex digits), and ``<condition>_path``, ``_key``, ``_digest`` per condition.
        rejects: one row per reject: stage, image_id, annotation_id, file_name, code, message.
        conditions: names of the conditions, in the order in which they are shown.
        read_image: encoded image file of manifest row i, None when it is not on disk.
        read_condition: encoded PNG of manifest row i and condition, None when there is none.
    """

    dataset: str
    title: str
    split: str
    manifest: pa.Table
    rejects: pa.Table
    conditions: tuple[str, ...]
    read_image: Callable[[int], bytes | None] = field(repr=False)
    read_condition: Callable[[int, str], bytes | None] = field(repr=False)


@dataclass(frozen=True)
class GroupCount:
    """Images and instances of one species, scenario or background."""

    name: str
    num_images: int
    num_instances: int


@dataclass(frozen=True)
class Visibility:
    """How many of a split's instances have each keypoint labelled (v > 0); K names, K counts."""

    names: tuple[str, ...]
    labelled: tuple[int, ...]
    num_instances: int

    @property
    def shares(self) -> tuple[float | None, ...]:
        """K shares in [0, 1]; None where the split has no instances."""
        return tuple(count / self.num_instances if self.num_instances else None for count in self.labelled)


@dataclass(frozen=True)
class Histogram:
    """B counts between B + 1 edges, with quantiles of the values themselves (None when there are no values).

    Values outside the edges are counted in the end bins; the quantiles, minimum and maximum are not clipped.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    minimum: float | None
    p10: float | None
    median: float | None
    p90: float | None
    maximum: float | None

    @property
    def total(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class CocoSizes:
    """Instances by COCO's size classes of the box area: below 32², up to 96², above."""

    small: int
    medium: int
    large: int


@dataclass(frozen=True)
class RejectExample:
    image_id: int | None
    annotation_id: int | None
    file_name: str | None
    message: str


@dataclass(frozen=True)
class RejectGroup:
    """The rejects of one stage with one reason code, with the first few of them."""

    stage: str
    code: str
    count: int
    examples: tuple[RejectExample, ...]


@dataclass(frozen=True, kw_only=True)
class SplitAudit:
    """The audit of one split. ``tables`` stays attached: leakage and the gallery look at rows again."""

    tables: SplitTables
    num_images: int
    num_images_on_disk: int
    num_captioned: int
    num_instances: int
    num_labelled_keypoints: int
    num_conditions: tuple[tuple[str, int], ...]
    grouping: Grouping
    categories: tuple[GroupCount, ...]
    backgrounds: tuple[GroupCount, ...]
    visibility: Visibility
    long_side: Histogram
    aspect_ratio: Histogram
    instance_size: Histogram
    instances_per_image: Histogram
    coco_sizes: CocoSizes
    rejects: tuple[RejectGroup, ...]

    @property
    def num_rejects(self) -> int:
        return sum(group.count for group in self.rejects)


@dataclass(frozen=True)
class ImageRef:
    """One manifest row of one split."""

    split: str
    row: int
    image_id: int
    file_name: str


@dataclass(frozen=True)
class LeakPair:
    """Two images of different splits; ``distance`` is that of their hashes in bits, 0 for equal files."""

    first: ImageRef
    second: ImageRef
    distance: int


@dataclass(frozen=True, kw_only=True)
class SplitPairLeakage:
    """What two splits of one dataset share.

    Attributes:
        num_same: distinct image files (by digest) that are in both splits.
        num_near: pairs of different files, one of each split, whose hashes are within the distance.
        same, near: the first of these pairs, near ones ordered by distance.
    """

    split_a: str
    split_b: str
    num_same: int
    num_near: int
    same: tuple[LeakPair, ...]
    near: tuple[LeakPair, ...]


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """Leakage between all pairs of splits of one dataset, with how many images could not be compared."""

    pairs: tuple[SplitPairLeakage, ...]
    num_images: int
    num_without_digest: int
    num_without_hash: int
    max_distance: int


@dataclass(frozen=True)
class NearHashPairs:
    """All pairs within the distance, counted; the closest of them, listed.

    Attributes:
        count: number of pairs, each counted with the product of its weights.
        index_a, index_b: (P,) int64, indices into the arrays of hashes, ordered by distance, then by index.
        distances: (P,) int64, Hamming distances.
    """

    count: int
    index_a: NDArray[np.int64]
    index_b: NDArray[np.int64]
    distances: NDArray[np.int64]


@dataclass(frozen=True)
class _Instances:
    """The instances of a split as columns.

    Attributes:
        rows: (M,) int64, manifest row of each instance.
        per_row: (R,) int64, instances of each row.
        categories: M strings.
        bbox_areas: (M,) float64, square pixels.
        labelled: (K,) int64, instances with v > 0.
    """

    rows: NDArray[np.int64]
    per_row: NDArray[np.int64]
    categories: pa.Array
    bbox_areas: NDArray[np.float64]
    labelled: NDArray[np.int64]


def audit_split(tables: SplitTables, *, max_examples: int = 3) -> SplitAudit:
    """Counts, visibility, sizes and rejects of one split.

    Args:
        tables: the split's manifest and rejects.
        max_examples: rejects kept per stage and reason.

    Raises:
        ValueError: a column is missing, or the instances do not all have the dataset's number of keypoints.
    """
    where = f"{tables.dataset} {tables.split}"
    condition_columns = tuple(
        f"{name}_{part}" for name in tables.conditions for part in ("path", "key", "digest")
    )
    _require_columns(tables.manifest, (*BASE_COLUMNS, *condition_columns), f"the manifest of {where}")
    _require_columns(tables.rejects, REJECT_COLUMNS, f"the rejects of {where}")
    manifest = tables.manifest
    names = KEYPOINT_NAMES.get(tables.dataset)
    instances = _instances(manifest, names, where)
    if names is None:
        names = tuple(f"keypoint {k + 1}" for k in range(len(instances.labelled)))
    widths, heights = _floats(manifest, "width"), _floats(manifest, "height")
    image_areas = (widths * heights)[instances.rows]
    has_size = image_areas > 0
    relative_sizes = np.sqrt(instances.bbox_areas[has_size] / image_areas[has_size])
    scenario = manifest.column("category")
    grouping: Grouping = "scenario" if scenario.null_count < len(scenario) else "species"
    num_instances = len(instances.rows)
    return SplitAudit(
        tables=tables,
        num_images=manifest.num_rows,
        num_images_on_disk=_num_valid(manifest, "image_path"),
        num_captioned=int(
            pc.sum(pc.greater(pc.list_value_length(manifest.column("captions")), 0)).as_py() or 0
        ),
        num_instances=num_instances,
        num_labelled_keypoints=int(instances.labelled.sum()),
        num_conditions=tuple((name, _num_valid(manifest, f"{name}_key")) for name in tables.conditions),
        grouping=grouping,
        categories=count_images_by(scenario, instances.per_row)
        if grouping == "scenario"
        else count_instances_by(instances.categories, instances.rows),
        backgrounds=count_images_by(_background_names(manifest), instances.per_row),
        visibility=Visibility(names, tuple(instances.labelled.tolist()), num_instances),
        long_side=histogram(np.maximum(widths, heights), LONG_SIDE_EDGES),
        aspect_ratio=histogram(_ratios(widths, heights), ASPECT_RATIO_EDGES),
        instance_size=histogram(relative_sizes, INSTANCE_SIZE_EDGES),
        instances_per_image=histogram(instances.per_row.astype(np.float64), INSTANCES_PER_IMAGE_EDGES),
        coco_sizes=coco_sizes(instances.bbox_areas),
        rejects=group_rejects(tables.rejects, max_examples=max_examples),
    )


def count_images_by(
    names: pa.Array | pa.ChunkedArray, instances_per_row: NDArray[np.int64]
) -> tuple[GroupCount, ...]:
    """Images and instances per name, most images first; names: R strings, () when all are null."""
    if names.null_count == len(names):
        return ()
    codes, labels = _codes(names)
    images = np.bincount(codes, minlength=len(labels))
    instances = np.bincount(codes, weights=instances_per_row, minlength=len(labels)).astype(np.int64)
    counts = [GroupCount(*row) for row in zip(labels, images.tolist(), instances.tolist(), strict=True)]
    return tuple(sorted(counts, key=lambda count: (-count.num_images, count.name)))


def count_instances_by(names: pa.Array, rows: NDArray[np.int64]) -> tuple[GroupCount, ...]:
    """Instances per name, and the images they are in, most first; names: M strings, rows: (M,) int64."""
    codes, labels = _codes(names)
    instances = np.bincount(codes, minlength=len(labels))
    # Each (name, image) once: an image with three dogs is one image of dogs.
    distinct = np.unique(np.stack([codes, rows]), axis=1)[0] if len(rows) else codes
    images = np.bincount(distinct, minlength=len(labels))
    counts = [GroupCount(*row) for row in zip(labels, images.tolist(), instances.tolist(), strict=True)]
    return tuple(sorted(counts, key=lambda count: (-count.num_instances, count.name)))


def primary_categories(manifest: pa.Table) -> pa.Array:
    """What each image shows: its scenario, else the species of its first instance, else null; R strings."""
    column = manifest.column("instances").combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    first = pa.array(np.cumsum(lengths) - lengths, mask=lengths == 0)
    species = pc.struct_field(pc.list_flatten(column), "category").take(first)
    return pc.coalesce(manifest.column("category").combine_chunks(), species)


def histogram(values: NDArray[np.float64], edges: Sequence[float]) -> Histogram:
    """Histogram of the finite values; values: (n,) float64, edges: B + 1 rising numbers."""
    finite = values[np.isfinite(values)]
    counts, _ = np.histogram(np.clip(finite, edges[0], edges[-1]), bins=np.asarray(edges))
    quantiles: list[float | None] = [None] * 5
    if len(finite):
        quantiles = [float(value) for value in np.quantile(finite, [0, 0.1, 0.5, 0.9, 1])]
    return Histogram(tuple(edges), tuple(counts.tolist()), *quantiles)


def coco_sizes(bbox_areas: NDArray[np.float64]) -> CocoSizes:
    """Counts of small, medium and large boxes; bbox_areas: (M,) float64, square pixels."""
    small = int((bbox_areas < COCO_SMALL_AREA).sum())
    large = int((bbox_areas > COCO_LARGE_AREA).sum())
    return CocoSizes(small, len(bbox_areas) - small - large, large)


def group_rejects(rejects: pa.Table, *, max_examples: int = 3) -> tuple[RejectGroup, ...]:
    """Rejects by stage and reason code: stages as they appear, a stage's commonest reason first."""
    stage_codes, stages = _codes(rejects.column("stage"), missing="stage not given")
    reason_codes, reasons = _codes(rejects.column("code"), missing="no code")
    joint = stage_codes * max(len(reasons), 1) + reason_codes
    groups = []
    for value, count in zip(*(array.tolist() for array in np.unique(joint, return_counts=True)), strict=True):
        stage, reason = divmod(value, len(reasons))
        examples = tuple(
            RejectExample(row["image_id"], row["annotation_id"], row["file_name"], row["message"] or "")
            for row in rejects.take(pa.array(np.flatnonzero(joint == value)[:max_examples])).to_pylist()
        )
        groups.append((stage, RejectGroup(stages[stage], reasons[reason], count, examples)))
    return tuple(
        group for _, group in sorted(groups, key=lambda item: (item[0], -item[1].count, item[1].code))
    )


def find_leakage(
    splits: Sequence[SplitTables], *, max_distance: int = NEAR_DISTANCE, max_pairs: int = 12
) -> Leakage:
    """Equal and nearly equal images between the splits of one dataset.

    Files with the same digest inside one split count once, so a pair is a pair of contents, not of rows.
    Images without digest or hash (not on disk) cannot be compared; the result says how many there are.

    Args:
        splits: the splits of one dataset.
        max_distance: Hamming distance of two hashes up to which images count as near-duplicates.
        max_pairs: pairs listed per two splits and kind; the counts are of all.

    Raises:
        ValueError: a hash is not 16 hexadecimal digits.
    """
    contents = [_contents(tables) for tables in splits]
    return Leakage(
        pairs=tuple(
            _split_pair_leakage(a, b, max_distance=max_distance, max_pairs=max_pairs)
            for a, b in combinations(contents, 2)
        ),
        num_images=sum(tables.manifest.num_rows for tables in splits),
        num_without_digest=sum(tables.manifest.column("image_digest").null_count for tables in splits),
        num_without_hash=sum(tables.manifest.column("image_phash").null_count for tables in splits),
        max_distance=max_distance,
    )


def near_hash_pairs(
    hashes_a: NDArray[np.uint64],
    hashes_b: NDArray[np.uint64],
    *,
    weights_a: NDArray[np.int64] | None = None,
    weights_b: NDArray[np.int64] | None = None,
    max_distance: int = NEAR_DISTANCE,
    limit: int = 1000,
) -> NearHashPairs:
    """All pairs of a hash of a and a hash of b that differ in at most ``max_distance`` bits.

    Two such hashes agree exactly in at least one of ``max_distance + 1`` bands of bits (pigeonhole), so only
    hashes that share a band are compared. Where bands tell too little apart (most hashes share one, as those
    of blank pages do), comparing all with all is less work and is done instead. The result is exact either
    way, and memory stays bounded.

    Args:
        hashes_a, hashes_b: (Ha,) and (Hb,) uint64; pass distinct hashes, with weights, where many are equal.
        weights_a, weights_b: (Ha,) and (Hb,) int64, how many images each hash stands for; 1 when not given.
        max_distance: bits, 0 to 63.
        limit: pairs listed at most, the closest; all are counted.
    """
    if not 0 <= max_distance < HASH_BITS:
        raise ValueError(f"max_distance: expected 0 to {HASH_BITS - 1} bits, found {max_distance}")
    weights_a = np.ones(len(hashes_a), dtype=np.int64) if weights_a is None else weights_a
    weights_b = np.ones(len(hashes_b), dtype=np.int64) if weights_b is None else weights_b
    bands = _bands(max_distance + 1)
    num_candidates = sum(_num_candidates(_band(hashes_a, band), _band(hashes_b, band)) for band in bands)
    if num_candidates < len(hashes_a) * len(hashes_b):
        hits = _banded_hits(hashes_a, hashes_b, bands, max_distance)
    else:
        hits = _direct_hits(hashes_a, hashes_b, max_distance)
    count = 0
    # One number per pair, which sorts by distance, then by index.
    kept = np.empty(0, dtype=np.int64)
    for index_a, index_b, distances in hits:
        count += int((weights_a[index_a] * weights_b[index_b]).sum())
        kept = np.concatenate([kept, (distances * len(hashes_a) + index_a) * len(hashes_b) + index_b])
        if len(kept) > limit:
            kept = np.partition(kept, limit)[:limit]
    rest, index_b = np.divmod(np.sort(kept), max(1, len(hashes_b)))
    distances, index_a = np.divmod(rest, max(1, len(hashes_a)))
    return NearHashPairs(count, index_a, index_b, distances)


def parse_hashes(hashes: pa.Array | pa.ChunkedArray, where: str) -> NDArray[np.uint64]:
    """64-bit hashes of n strings of 16 hexadecimal digits, none null; (n,) uint64.

    Raises:
        ValueError: a string is something else.
    """
    well_formed = pc.match_substring_regex(hashes, "^[0-9a-fA-F]{16}$")
    if not pc.all(well_formed, min_count=0).as_py():
        found = hashes.filter(pc.invert(well_formed))[0].as_py()
        raise ValueError(
            f"image_phash: expected 16 hexadecimal digits, found {found!r} in the manifest of {where}; "
            f"build it again"
        )
    return np.frombuffer(bytes.fromhex("".join(hashes.to_pylist())), dtype=">u8").astype(np.uint64)


def _require_columns(table: pa.Table, expected: Sequence[str], where: str) -> None:
    missing = [name for name in expected if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{where}: expected the columns {', '.join(missing)}, found {', '.join(table.column_names)}; "
            f"build it again with this version"
        )


def _instances(manifest: pa.Table, names: Sequence[str] | None, where: str) -> _Instances:
    column = manifest.column("instances").combine_chunks()
    flat = pc.list_flatten(column)
    keypoints = pc.struct_field(flat, "keypoints")
    lengths = pc.fill_null(pc.list_value_length(keypoints), 0).to_numpy(zero_copy_only=False)
    # An instance without a keypoint list has none labelled; any other wrong length is a broken manifest.
    found = sorted(set(lengths[lengths > 0].tolist()))
    expected = [len(names)] if names is not None else found[:1]
    if found and found != expected:
        raise ValueError(
            f"{where}: expected {expected[0]} keypoints per instance, found {found}; build the index again"
        )
    num_keypoints = expected[0] if expected else 0
    values = pc.list_flatten(keypoints).flatten().to_numpy(zero_copy_only=False)
    labelled = (
        values.reshape(-1, num_keypoints, 3)[:, :, 2] > 0 if num_keypoints else np.zeros((0, 0), dtype=bool)
    )
    boxes = pc.struct_field(flat, "bbox_xywh")
    if boxes.null_count:
        raise ValueError(
            f"{where}: expected a box per instance, found {boxes.null_count} without; build the index again"
        )
    sizes = boxes.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)[:, 2:]
    return _Instances(
        rows=pc.list_parent_indices(column).to_numpy(zero_copy_only=False).astype(np.int64),
        per_row=pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64),
        categories=pc.struct_field(flat, "category"),
        bbox_areas=np.clip(sizes, 0, None).prod(axis=1),
        labelled=labelled.sum(axis=0, dtype=np.int64),
    )


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Numbers of a column, null as NaN; (R,) float64."""
    values: NDArray[np.float64] = pc.cast(table.column(name), pa.float64()).to_numpy()
    return values


def _ratios(widths: NDArray[np.float64], heights: NDArray[np.float64]) -> NDArray[np.float64]:
    ratios = np.full(len(widths), np.nan)
    np.divide(widths, heights, out=ratios, where=heights > 0)
    return ratios


def _num_valid(table: pa.Table, name: str) -> int:
    return int(table.num_rows - table.column(name).null_count)


def _codes(
    names: pa.Array | pa.ChunkedArray, missing: str = "not given"
) -> tuple[NDArray[np.int64], list[str]]:
    """Names as (n,) int64 codes into the distinct names, as they appear; null becomes ``missing``."""
    array = names.combine_chunks() if isinstance(names, pa.ChunkedArray) else names
    encoded = pc.dictionary_encode(pc.fill_null(array, missing))
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _background_names(manifest: pa.Table) -> pa.ChunkedArray:
    """Names of the backgrounds, where there is none the number; R strings, null where neither is given."""
    return pc.coalesce(
        manifest.column("background_name"), pc.cast(manifest.column("background"), pa.string())
    )


@dataclass(frozen=True)
class _Contents:
    """The images of one split, each content once.

    Attributes:
        tables: the split.
        row_of_digest: the first manifest row of each digest.
        digests: R digests, None where not known.
        hashes: (H,) uint64, the distinct hashes, rising.
        rows_of_hash: for each of the H hashes, the manifest rows of the contents that have it.
        hash_of_row: the hash of each row in ``rows_of_hash``.
    """

    tables: SplitTables
    row_of_digest: dict[str, int]
    digests: list[str | None]
    hashes: NDArray[np.uint64]
    rows_of_hash: list[NDArray[np.int64]]
    hash_of_row: dict[int, int]

    def ref(self, row: int) -> ImageRef:
        manifest = self.tables.manifest
        file_name = manifest.column("file_name")[row].as_py() or ""
        return ImageRef(self.tables.split, row, manifest.column("image_id")[row].as_py(), file_name)


def _contents(tables: SplitTables) -> _Contents:
    where = f"{tables.dataset} {tables.split}"
    _require_columns(tables.manifest, BASE_COLUMNS, f"the manifest of {where}")
    digests = tables.manifest.column("image_digest").to_pylist()
    row_of_digest: dict[str, int] = {}
    for row, digest in enumerate(digests):
        if digest is not None:
            row_of_digest.setdefault(digest, row)
    hash_column = tables.manifest.column("image_phash")
    has_hash = pc.is_valid(hash_column).to_numpy()
    is_first = np.array(
        [digest is None or row_of_digest[digest] == row for row, digest in enumerate(digests)], dtype=bool
    )
    rows = np.flatnonzero(has_hash & is_first)
    hashes = parse_hashes(hash_column.take(pa.array(rows)), where)
    distinct, codes, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    by_hash = rows[np.argsort(codes, kind="stable")]
    return _Contents(
        tables=tables,
        row_of_digest=row_of_digest,
        digests=digests,
        hashes=distinct,
        rows_of_hash=np.split(by_hash, np.cumsum(counts)[:-1]) if len(distinct) else [],
        hash_of_row=dict(zip(rows.tolist(), hashes.tolist(), strict=True)),
    )


def _split_pair_leakage(a: _Contents, b: _Contents, *, max_distance: int, max_pairs: int) -> SplitPairLeakage:
    shared = sorted(
        (row, b.row_of_digest[digest]) for digest, row in a.row_of_digest.items() if digest in b.row_of_digest
    )
    # Equal files have equal hashes; they are counted already and must not count as near-duplicates too.
    num_shared_hashed = sum(
        1
        for row_a, row_b in shared
        if row_a in a.hash_of_row
        and row_b in b.hash_of_row
        and (a.hash_of_row[row_a] ^ b.hash_of_row[row_b]).bit_count() <= max_distance
    )
    near = near_hash_pairs(
        a.hashes,
        b.hashes,
        weights_a=np.array([len(rows) for rows in a.rows_of_hash], dtype=np.int64),
        weights_b=np.array([len(rows) for rows in b.rows_of_hash], dtype=np.int64),
        max_distance=max_distance,
        # A pair of hashes that stands for equal files only lists nothing; there are at most that many.
        limit=max_pairs + len(shared),
    )
    return SplitPairLeakage(
        split_a=a.tables.split,
        split_b=b.tables.split,
        num_same=len(shared),
        num_near=near.count - num_shared_hashed,
        same=tuple(LeakPair(a.ref(row_a), b.ref(row_b), 0) for row_a, row_b in shared[:max_pairs]),
        near=tuple(_near_pairs(a, b, near, max_pairs)),
    )


def _near_pairs(a: _Contents, b: _Contents, near: NearHashPairs, max_pairs: int) -> list[LeakPair]:
    pairs: list[LeakPair] = []
    for index_a, index_b, distance in zip(
        near.index_a.tolist(), near.index_b.tolist(), near.distances.tolist(), strict=True
    ):
        for row_a in a.rows_of_hash[index_a].tolist():
            for row_b in b.rows_of_hash[index_b].tolist():
                if len(pairs) == max_pairs:
                    return pairs
                if a.digests[row_a] is None or a.digests[row_a] != b.digests[row_b]:
                    pairs.append(LeakPair(a.ref(row_a), b.ref(row_b), distance))
    return pairs


_Band = tuple[int, int]
_Hits = tuple["NDArray[np.int64]", "NDArray[np.int64]", "NDArray[np.int64]"]


def _bands(num_bands: int) -> list[_Band]:
    """Shift and width in bits of bands that together cover the hash."""
    bounds = [HASH_BITS * i // num_bands for i in range(num_bands + 1)]
    return [(first, last - first) for first, last in pairwise(bounds)]


def _band(hashes: NDArray[np.uint64], band: _Band) -> NDArray[np.uint64]:
    shift, width = band
    bits: NDArray[np.uint64] = (hashes >> np.uint64(shift)) & np.uint64(2**width - 1)
    return bits


def _num_candidates(band_a: NDArray[np.uint64], band_b: NDArray[np.uint64]) -> int:
    values_a, counts_a = np.unique(band_a, return_counts=True)
    values_b, counts_b = np.unique(band_b, return_counts=True)
    _, common_a, common_b = np.intersect1d(values_a, values_b, assume_unique=True, return_indices=True)
    return int((counts_a[common_a] * counts_b[common_b]).sum())


def _banded_hits(
    hashes_a: NDArray[np.uint64], hashes_b: NDArray[np.uint64], bands: Sequence[_Band], max_distance: int
) -> Iterator[_Hits]:
    for number, band in enumerate(bands):
        band_a, band_b = _band(hashes_a, band), _band(hashes_b, band)
        order_b = np.argsort(band_b, kind="stable")
        sorted_b = band_b[order_b]
        first = np.searchsorted(sorted_b, band_a, side="left")
        counts = np.searchsorted(sorted_b, band_a, side="right") - first
        for start, stop in _blocks(counts):
            num = counts[start:stop]
            index_a = np.repeat(np.arange(start, stop), num)
            within = np.arange(int(num.sum())) - np.repeat(np.cumsum(num) - num, num)
            index_b = order_b[np.repeat(first[start:stop], num) + within]
            differing = hashes_a[index_a] ^ hashes_b[index_b]
            distances = np.bitwise_count(differing)
            hit = distances <= max_distance
            # A pair that agrees in several bands is met once per band: it counts in the first of them.
            for earlier in bands[:number]:
                hit &= _band(differing, earlier) != 0
            yield index_a[hit], index_b[hit], distances[hit].astype(np.int64)


def _blocks(counts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of the hashes of a whose candidates together are about ``PAIRS_PER_BLOCK``."""
    totals = np.cumsum(counts)
    start = 0
    while start < len(counts):
        done = int(totals[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, done + PAIRS_PER_BLOCK, side="right")))
        yield start, stop
        start = stop


def _direct_hits(
    hashes_a: NDArray[np.uint64], hashes_b: NDArray[np.uint64], max_distance: int
) -> Iterator[_Hits]:
    step = max(1, PAIRS_PER_BLOCK // max(1, len(hashes_b)))
    for start in range(0, len(hashes_a), step):
        distances = np.bitwise_count(hashes_a[start : start + step, None] ^ hashes_b[None, :])
        index_a, index_b = np.nonzero(distances <= max_distance)
        yield index_a + start, index_b, distances[index_a, index_b].astype(np.int64)
