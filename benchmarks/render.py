"""Drawing index maps and renders: one record in one process, the whole stages, and how work and memory grow.

The baseline is ``plain.py``: one image at a time, PIL saving. Both sides draw the same records, and their pixels are
compared.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow.parquet as pq
from zlib_ng import zlib_ng

from benchmarks import plain
from benchmarks.common import (
    BUILD,
    SET_UP,
    ChildCost,
    Cost,
    Report,
    in_child,
    interleaved,
    measure,
    median_child,
    median_cost,
    ms,
    run_process,
    turns,
)
from benchmarks.inputs import (
    SPLITS,
    ap10k_documents,
    ap10k_root,
    by_image,
    half,
    jpeg_of_size,
    merged,
    write_document,
)
from benchmarks.plain import Json
from spctrl.conditions import png
from spctrl.conditions.openpose import render_openpose
from spctrl.conditions.spatext import render_spatext
from spctrl.data.datasets import AP10K
from spctrl.data.index import write_index
from spctrl.data.records import Record, records_from_table

MAX_PIXELS = 100_000_000
DRAWN, QUICK_DRAWN = 120, 40
REPEATS, QUICK_REPEATS = 5, 3
STAGE_REPEATS, QUICK_STAGE_REPEATS = 5, 1
LINEAR_REPEATS, QUICK_LINEAR_REPEATS = 3, 1
STAGES = ("index", "spatext", "openpose", "manifest", "export")

OURS, OURS_WRITTEN = "this project, encoded", "this project, two files written"
PLAIN_IN_MEMORY, PLAIN = "plain loop, encoded in memory", "plain loop, two files written"
PLAIN_OPENING, PLAIN_RGB = "plain loop, opening each image", "plain loop, both files RGB"
MEMSET, DEFLATE = "clearing one canvas", "one deflate of its scanlines"


class Pair(NamedTuple):
    """One record, as the plain loop and as this project sees it."""

    image: Json
    annotations: list[Json]
    record: Record


@dataclass(frozen=True)
class Files:
    """Bytes of a map and a render."""

    spatext: bytes
    openpose: bytes


def run(report: Report) -> None:
    documents, real = ap10k_documents()
    source = "AP-10K train and val" if real else "the sample's annotations, repeated (no AP-10K found)"
    pairs = _pairs(documents)
    plain_wall_s = _one_record(report, pairs, source)
    _whole_stages(report, len(pairs), plain_wall_s)
    _growth(report, merged(documents))


def ours(record: Record) -> Files:
    """What the spatext and openpose stages do with a record."""
    sizes = {"keypoint_radius_px": 4, "link_half_width_px": 4}
    links, names = AP10K.skeleton.links, AP10K.skeleton.keypoint_names
    index_map = render_spatext(record, links=links, **sizes)
    render = render_openpose(record, index_map, style="openpose", keypoint_names=names, links=links, **sizes)
    return Files(index_map, render)


def _pairs(documents: Mapping[str, Json]) -> list[Pair]:
    root, _ = ap10k_root()
    pairs = []
    for split in SPLITS:
        images = {image["id"]: image for image in documents[split]["images"]}
        annotations = by_image(documents[split])
        index = BUILD / f"ap10k-{split}.parquet"
        BUILD.mkdir(parents=True, exist_ok=True)
        write_index(root / AP10K.annotation_path(split, "1"), AP10K, split, index, max_pixels=MAX_PIXELS)
        records = records_from_table(pq.read_table(index))
        pairs += [Pair(images[each.image_id], annotations[each.image_id], each) for each in records]
    return pairs


# One record, one process


def _one_record(report: Report, pairs: list[Pair], source: str) -> float:
    """Cost of a map and a render on both sides; returns the plain loop's wall time per record."""
    some = random.Random(0).sample(pairs, QUICK_DRAWN if report.quick else DRAWN)
    repeats = QUICK_REPEATS if report.quick else REPEATS
    files = _compare(some)
    costs = interleaved(_contestants(some), repeats)
    per_record = {name: Cost(*(seconds / len(some) for seconds in cost)) for name, cost in costs.items()}
    all_of_them = median_cost([measure(lambda: [ours(pair.record) for pair in pairs]) for _ in range(3)])
    base = per_record[OURS]
    rows = []
    for name, cost in per_record.items():
        ratios = (seconds / least for seconds, least in zip(cost[::-1], base[::-1], strict=True))
        rows.append((name, ms(cost.cpu_s), ms(cost.wall_s), *(f"{ratio:.1f}" for ratio in ratios)))
    everything = Cost(*(seconds / len(pairs) for seconds in all_of_them))
    rows.append(
        (f"this project, all {len(pairs):,} records", ms(everything.cpu_s), ms(everything.wall_s), "", "")
    )
    report.table(
        f"Map and render of one record of {source}: {len(some)} records, medians of {repeats} turns",
        ("", "CPU ms", "wall ms", "CPU ratio", "wall ratio"),
        rows,
        "The image is opened once a record; the released scripts open it once a file. They also parse a pose "
        "configuration for each image, which is not imitated here.",
    )
    _tell_sizes(report, files)
    _tell_limit(report, per_record)
    report.target("record: plain loop / ours, CPU time", per_record[PLAIN].cpu_s / base.cpu_s, at_least=30)
    report.target("record: plain loop / ours, wall time", per_record[PLAIN].wall_s / base.wall_s, at_least=30)
    for kind in ("spatext", "openpose"):
        sizes = [sum(len(getattr(each, kind)) for each in side) for side in zip(*files, strict=True)]
        report.target(f"{kind} file: size of ours / of PIL's", sizes[0] / sizes[1], at_most=1)
    return per_record[PLAIN].wall_s


def _contestants(pairs: list[Pair]) -> dict[str, Callable[[], object]]:
    """Functions that work through all records, each in its own way."""
    folder = BUILD / "drawn"
    folder.mkdir(parents=True, exist_ok=True)
    jpegs = {pair.record.size_wh: jpeg_of_size(pair.record.size_wh) for pair in pairs}
    paths = {pair.record.image_id: str(folder / f"{pair.record.image_id}") for pair in pairs}
    scanlines = [_scanlines(pair.record) for pair in pairs]
    canvas = np.empty(max(each.size for each in scanlines), np.uint8)

    def write_ours() -> None:
        for pair in pairs:
            files, path = ours(pair.record), paths[pair.record.image_id]
            Path(f"{path}-map.png").write_bytes(files.spatext)
            Path(f"{path}-render.png").write_bytes(files.openpose)

    def write_plain(save_map: Callable[..., None] = plain.save_map, opening: bool = False) -> None:
        for image, labels, record in pairs:
            if opening:
                plain.open_image(jpegs[record.size_wh])
            save_map(image, labels, Path(f"{paths[record.image_id]}-map.png"))
            plain.save_render(image, labels, Path(f"{paths[record.image_id]}-render.png"))

    def encode_plain() -> None:
        for image, labels, _ in pairs:
            plain.save_map(image, labels, io.BytesIO())
            plain.save_render(image, labels, io.BytesIO())

    def clear() -> None:
        for each in scanlines:
            canvas[: each.size] = 0

    def deflate() -> None:
        for each in scanlines:
            zlib_ng.compress(each, png._COMPRESSION_LEVEL)

    return {
        OURS: lambda: [ours(pair.record) for pair in pairs],
        OURS_WRITTEN: write_ours,
        PLAIN_IN_MEMORY: encode_plain,
        PLAIN: write_plain,
        PLAIN_OPENING: lambda: write_plain(opening=True),
        PLAIN_RGB: lambda: write_plain(plain.save_rgb_map),
        MEMSET: clear,
        DEFLATE: deflate,
    }


def _scanlines(record: Record) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes that a map's compressor gets: rows led by a filter byte."""
    pixels = cv2.imdecode(np.frombuffer(ours(record).spatext, np.uint8), cv2.IMREAD_UNCHANGED)
    return np.ascontiguousarray(np.pad(pixels, ((0, 0), (1, 0))))


def _compare(pairs: list[Pair]) -> list[tuple[Files, Files]]:
    """The files of both sides, after checking that they show the same pixels."""
    compared = []
    for image, labels, record in pairs:
        both = [io.BytesIO(), io.BytesIO()]
        plain.save_map(image, labels, both[0])
        plain.save_render(image, labels, both[1])
        mine, theirs = ours(record), Files(both[0].getvalue(), both[1].getvalue())
        for kind in ("spatext", "openpose"):
            pixels = [
                cv2.imdecode(np.frombuffer(getattr(side, kind), np.uint8), cv2.IMREAD_COLOR)
                for side in (mine, theirs)
            ]
            if not np.array_equal(*pixels):
                raise RuntimeError(f"the {kind} of image {record.image_id} differs from the plain loop's")
        compared.append((mine, theirs))
    return compared


def _tell_sizes(report: Report, files: list[tuple[Files, Files]]) -> None:
    rows = []
    for kind in ("spatext", "openpose"):
        sizes = np.array([[len(getattr(each, kind)) for each in side] for side in zip(*files, strict=True)])
        mine, theirs = sizes.mean(axis=1)
        no_larger = (sizes[0] <= sizes[1]).mean()
        rows.append((kind, f"{mine:,.0f}", f"{theirs:,.0f}", f"{mine / theirs:.2f}", f"{no_larger:.0%}"))
    columns = ("file", "ours, bytes", "PIL's, bytes", "ratio", "no larger")
    report.table("Size of the files (the same pixels)", columns, rows)


def _tell_limit(report: Report, costs: Mapping[str, Cost]) -> None:
    floor_s = costs[MEMSET].cpu_s + costs[DEFLATE].cpu_s
    took_s = costs[OURS].cpu_s
    rows = [
        ("one canvas cleared, one deflate, shared by both files", ms(floor_s), f"{took_s / floor_s:.2f}"),
        ("the same for each of the two files", ms(2 * floor_s), f"{took_s / (2 * floor_s):.2f}"),
    ]
    report.table(
        "How near the limit",
        ("work that cannot be avoided", "CPU ms", "we take times"),
        rows,
        "Clearing and compressing the same maps alone: no drawing, no checksums, no Python around it.",
    )


# Whole stages


def _whole_stages(report: Report, records: int, plain_wall_s: float) -> None:
    """Keys, packs, digests and run manifests included: ``luigi`` on both splits, a fresh store each time."""
    root, _ = ap10k_root()
    store = BUILD / "stages"
    found: dict[str, list[tuple[float, float]]] = {
        "1": [],
        "2": [],
    }  # of the two stages, and with Luigi around them
    for workers in turns(list(found), QUICK_STAGE_REPEATS if report.quick else STAGE_REPEATS):
        shutil.rmtree(store, ignore_errors=True)
        cost = run_process(_luigi("Drawings", root, store, int(workers)))
        took = sum(
            each["duration_s"] for each in _provenances(store) if each["stage"] in ("spatext", "openpose")
        )
        found[workers].append((took, cost.wall_s))
    medians = {workers: np.median(each, axis=0) for workers, each in found.items()}
    plain_s = records * plain_wall_s
    rows = [
        (f"workers: {workers}", *(text for s in took for text in (f"{s:.2f}", f"{plain_s / s:.1f}")))
        for workers, took in medians.items()
    ]
    speed_up, with_luigi = medians["1"] / medians["2"]
    rows.append(("speed-up", f"{speed_up:.2f}", "", f"{with_luigi:.2f}", ""))
    report.table(
        f"Stages spatext and openpose of {records:,} records, both splits",
        ("", "stages wall s", "plain loop /", "with luigi and index, s", "plain loop /"),
        rows,
        f"The plain loop takes {plain_s:.0f} s: {ms(plain_wall_s)} ms a record, measured above, times {records:,}.",
    )
    report.target("stages, 1 worker: plain loop / ours", plain_s / float(medians["1"][0]), at_least=15)
    report.target("stages: 1 worker / 2 workers", float(speed_up), at_least=1.6)


def _luigi(task: str, root: Path, store: Path, workers: int) -> list[str]:
    command = [sys.executable, "-m", "luigi", "--module", "benchmarks.stages", task]
    return [*command, *_settings(root, store, workers)]


def _settings(root: Path, store: Path, workers: int) -> list[str]:
    paths = [f"--ap10k-root={root}", f"--paths-store={store}", f"--paths-export={store}-exports"]
    return [*paths, f"--executor-workers={workers}"]


def _provenances(store: Path) -> list[Json]:
    return [json.loads(path.read_bytes()) for path in store.glob("runs/*/*/*/provenance.json")]


# Growth


def _growth(report: Report, document: Json) -> None:
    """BuildDataset on all records and on half of them: time per stage and peak memory."""
    count = len(document["images"])
    counts = {f"{count:,}": document, f"{count // 2:,}": half(document, count // 2)}
    costs: dict[str, list[ChildCost]] = {name: [] for name in counts}
    for name in counts:
        write_document(BUILD / f"ap10k-{name}", counts[name])
    for name in turns(list(counts), QUICK_LINEAR_REPEATS if report.quick else LINEAR_REPEATS):
        costs[name].append(_build(BUILD / f"ap10k-{name}"))
    whole, part = (median_child(costs[name]) for name in counts)
    rows: list[tuple[str, ...]] = []
    for stage in STAGES:
        took = [_median_duration(costs[name], stage) for name in counts]
        rows.append((f"{stage}, s", f"{took[0]:.2f}", f"{took[1]:.2f}", f"{took[0] / 2 / took[1]:.2f}"))
        if stage in ("spatext", "openpose"):
            report.target(
                f"{stage}: time of all / twice that of half the records", took[0] / 2 / took[1], at_most=1.1
            )
    rows.append(("whole process, s", f"{whole.process_wall_s:.2f}", f"{part.process_wall_s:.2f}", ""))
    rows.append(("peak memory, MB", f"{whole.peak_mb:.0f}", f"{part.peak_mb:.0f}", ""))
    report.table(
        "BuildDataset on all records and on half of them (drawn at random), one worker",
        ("", *counts, "all / 2 / half"),
        rows,
        "Stage times from provenance. Below 1: what a stage costs once (imports) weighs less in a longer run.",
    )


def _build(root: Path) -> ChildCost:
    """One BuildDataset into a fresh store; the result is the stages' durations."""
    store = BUILD / "growth"
    for folder in (store, Path(f"{store}-exports")):
        shutil.rmtree(folder, ignore_errors=True)
    names = ["--dataset=ap10k", "--split=train", "--images=optional"]
    arguments = ["BuildDataset", *names, *_settings(root, store, 1)]
    cost = in_child(
        SET_UP,
        f"result = bool(luigi.run({arguments!r}))",
    )
    if not cost.result:
        raise RuntimeError(f"BuildDataset of {root} failed")
    return cost._replace(result={each["stage"]: each["duration_s"] for each in _provenances(store)})


def _median_duration(costs: list[ChildCost], stage: str) -> float:
    return float(np.median([cost.result[stage] for cost in costs]))
