"""What one split holds: counts, keypoint visibility, sizes and rejects.

Legend: R manifest rows (one image each), M instances of all rows together, B histogram bins.

Everything here works on columns: a split of 60,000 images is audited without a Python object per instance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spctrl.data.datasets import DATASETS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from spctrl.audit.tables import SplitTables

# Fixed edges, so that splits and datasets can be compared. Values beyond the ends count in the end bins.
HISTOGRAM_EDGES: Final = {
    "long_side": tuple(float(edge) for edge in range(0, 2401, 100)),
    "aspect_ratio": tuple(float(2.0**power) for power in np.linspace(-2, 2, 25)),
    "instance_size": tuple(float(edge) for edge in np.linspace(0, 1, 21)),
    "instances_per_image": tuple(n - 0.5 for n in range(10)),
}

# COCO's limits of small, medium and large objects, in pixels of area.
COCO_SMALL_AREA: Final = 32.0**2
COCO_LARGE_AREA: Final = 96.0**2

GroupCounts = dict[str, tuple[int, int]]
"""Images and instances of each species, scenario or background."""


@dataclass(frozen=True)
class Histogram:
    """B counts between B + 1 edges; values beyond the edges are counted in the end bins.

    ``quantiles`` are the minimum, 10 %, median, 90 % and maximum of the values themselves, not clipped; None
    when there are no values.
    """

    counts: tuple[int, ...]
    quantiles: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class SplitAudit:
    """The audit of one split. ``tables`` stays attached: leakage and the gallery look at rows again.

    Attributes:
        num_conditions: artifacts of each condition.
        grouping: what ``categories`` counts.
        backgrounds: empty where the dataset has none.
        num_labelled: for each keypoint, the instances in which it is labelled (v > 0).
        histograms: of the longer image side in pixels; of width over height; of instance size, the square
            root of box area over image area; of instances per image. Named as in ``HISTOGRAM_EDGES``.
        coco_sizes: instances by COCO's size classes of the box area: below 32², up to 96², above.
        rejects: the rejects of each stage and reason code, stages in the order in which they appear.
    """

    tables: SplitTables
    num_images: int
    num_images_on_disk: int
    num_captioned: int
    num_instances: int
    num_conditions: dict[str, int]
    grouping: Literal["species", "scenario"]
    categories: GroupCounts
    backgrounds: GroupCounts
    num_labelled: dict[str, int]
    histograms: dict[str, Histogram]
    coco_sizes: tuple[int, int, int]
    rejects: dict[tuple[str, str], pa.Table]

    @property
    def num_labelled_keypoints(self) -> int:
        return sum(self.num_labelled.values())

    @property
    def num_rejects(self) -> int:
        return int(self.tables.rejects.num_rows)


def audit_split(tables: SplitTables) -> SplitAudit:
    """Counts, visibility, sizes and rejects of one split.

    Raises:
        ValueError: an instance has no box, or another number of keypoints than the dataset's skeleton.
    """
    manifest = tables.manifest
    image_rows = np.arange(manifest.num_rows)
    column = manifest.column("instances").combine_chunks()
    instances = pc.list_flatten(column)
    instance_rows = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    per_image = np.bincount(instance_rows, minlength=manifest.num_rows)
    box_areas = _box_areas(instances, tables.name)
    small, large = int((box_areas < COCO_SMALL_AREA).sum()), int((box_areas > COCO_LARGE_AREA).sum())
    widths, heights = (
        pc.cast(manifest.column(name), pa.float64()).to_numpy() for name in ("width", "height")
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # of images without a size: not finite, not counted
        values = {
            "long_side": np.maximum(widths, heights),
            "aspect_ratio": widths / heights,
            "instance_size": np.sqrt(box_areas / (widths * heights)[instance_rows]),
            "instances_per_image": per_image.astype(np.float64),
        }
    scenarios = manifest.column("category")
    has_scenarios = scenarios.null_count < len(scenarios)
    # Where there is no name, the number.
    backgrounds = pc.coalesce(
        manifest.column("background_name"), pc.cast(manifest.column("background"), pa.string())
    )
    return SplitAudit(
        tables=tables,
        num_images=manifest.num_rows,
        num_images_on_disk=_num_valid(manifest, "image_path"),
        num_captioned=pc.sum(pc.greater(pc.list_value_length(manifest.column("captions")), 0)).as_py() or 0,
        num_instances=len(instances),
        num_conditions={name: _num_valid(manifest, f"{name}_key") for name in tables.conditions},
        grouping="scenario" if has_scenarios else "species",
        categories=count_groups(scenarios, image_rows, per_image)
        if has_scenarios
        else count_groups(
            pc.struct_field(instances, "category"), instance_rows, np.ones(len(instances), dtype=np.int64)
        ),
        backgrounds=count_groups(backgrounds, image_rows, per_image)
        if backgrounds.null_count < len(backgrounds)
        else {},
        num_labelled=_num_labelled(instances, tables),
        histograms={name: histogram(values[name], edges) for name, edges in HISTOGRAM_EDGES.items()},
        coco_sizes=(small, len(box_areas) - small - large, large),
        rejects=group_rejects(tables.rejects),
    )


def count_groups(
    names: pa.Array | pa.ChunkedArray, rows: NDArray[np.int64], num_instances: NDArray[np.int64]
) -> GroupCounts:
    """Images and instances per name.

    Args:
        names: n strings, one per image or one per instance; null becomes "not given".
        rows: (n,) int64, the manifest row of each.
        num_instances: (n,) int64, how many instances each stands for.
    """
    encoded = pc.dictionary_encode(pc.fill_null(names, "not given"))
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    labels = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    # Each name once per image: an image with three dogs is one image of dogs.
    distinct_codes = np.unique(np.stack([codes, rows]), axis=1)[0]
    images = np.bincount(distinct_codes, minlength=len(labels))
    instances = np.bincount(codes, weights=num_instances, minlength=len(labels)).astype(np.int64)
    return dict(zip(labels, zip(images.tolist(), instances.tolist(), strict=True), strict=True))


def histogram(values: NDArray[np.float64], edges: Sequence[float]) -> Histogram:
    """Histogram of the finite values; values: (n,) float64, edges: B + 1 rising numbers."""
    finite = values[np.isfinite(values)]
    counts, _ = np.histogram(np.clip(finite, edges[0], edges[-1]), bins=np.asarray(edges))
    quantiles = np.quantile(finite, [0, 0.1, 0.5, 0.9, 1]).tolist() if len(finite) else [None] * 5
    return Histogram(tuple(counts.tolist()), tuple(quantiles))


def group_rejects(rejects: pa.Table) -> dict[tuple[str, str], pa.Table]:
    """The rows of each stage and reason code, in the order in which they appear."""
    stages = pc.fill_null(rejects.column("stage"), "stage not given").to_pylist()
    codes = pc.fill_null(rejects.column("code"), "no code").to_pylist()
    rows: dict[tuple[str, str], list[int]] = {}
    for row, stage_and_code in enumerate(zip(stages, codes, strict=True)):
        rows.setdefault(stage_and_code, []).append(row)
    return {stage_and_code: rejects.take(pa.array(found)) for stage_and_code, found in rows.items()}


def _num_valid(table: pa.Table, name: str) -> int:
    return int(table.num_rows - table.column(name).null_count)


def _box_areas(instances: pa.StructArray, where: str) -> NDArray[np.float64]:
    """Box areas in square pixels; (M,) float64."""
    boxes = pc.struct_field(instances, "bbox_xywh")
    if boxes.null_count:
        raise ValueError(
            f"{where}: expected a box per instance, found {boxes.null_count} without; build the index again"
        )
    sizes = boxes.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)[:, 2:]
    areas: NDArray[np.float64] = np.clip(sizes, 0, None).prod(axis=1)
    return areas


def _num_labelled(instances: pa.StructArray, tables: SplitTables) -> dict[str, int]:
    names = DATASETS[tables.dataset].skeleton.keypoint_names
    keypoints = pc.struct_field(instances, "keypoints")
    # An instance without a keypoint list has none labelled; any other wrong length is a broken manifest.
    found = sorted(set(pc.fill_null(pc.list_value_length(keypoints), 0).to_pylist()) - {0})
    if found and found != [len(names)]:
        raise ValueError(
            f"{tables.name}: expected {len(names)} keypoints per instance, found {found}; "
            f"build the index again"
        )
    values = pc.list_flatten(keypoints).flatten().to_numpy(zero_copy_only=False)
    labelled = values.reshape(-1, len(names), 3)[:, :, 2] > 0
    return dict(zip(names, labelled.sum(axis=0).tolist(), strict=True))
