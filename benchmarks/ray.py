"""Builds on a Ray cluster of two nodes on this machine: the same bytes with one of them killed, speed-up and overhead.

Each node has one processor. The build that loses a node runs as people run it, in a process of its own; throughput is
taken in one process, of index maps and renders of the same batches, by workers that have loaded what they need.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import secrets
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import BUILD, CONSOLE, Report, run_process, turns, wait_for_calm
from benchmarks.inputs import SPLITS, ap10k_root
from spctrl.data.datasets import AP10K
from spctrl.data.index import write_index
from spctrl.data.records import COLUMNS_OF_RECORD
from spctrl.store.digests import digest
from spctrl.store.store import Store
from tasks.execution.executor import run_jobs
from tasks.execution.ray.cluster import Cluster
from tasks.execution.ray.executor import run_batches
from tasks.execution.worker import ArtifactSource, Batch, Source, make_pack

if TYPE_CHECKING:
    from spctrl.store.pack_index import Location

    Run = Callable[[Iterator[Batch]], Iterator[dict[str, Location]]]

NODE = {"num_cpus": 1, "object_store_memory": 150 * 2**20}
RECORDS_PER_PACK = 256
REPEATS, QUICK_REPEATS = 5, 1
QUICK_RECORDS = 2048
POLL_S, GUEST_POLL_S = 0.02, 0.2
LOCAL_1, LOCAL_2, RAY_1, RAY_2 = "local, 1 worker", "local, 2 workers", "Ray, 1 worker", "Ray, 2 workers"
SIZES = {"keypoint_radius_px": 4, "link_half_width_px": 4}


def run(report: Report) -> None:
    if importlib.util.find_spec("ray") is None:
        CONSOLE.print("Ray is not installed (pip install 'spctrl[ray]'): nothing measured.")
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    with _two_nodes() as (cluster, second):
        _throughput(report, cluster, second)
        _lost_node(report, cluster, second)


@contextlib.contextmanager
def _two_nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster and its second node; only who has the token gets in, as the processes started from here do."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import cluster_utils

    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        yield cluster, cluster.add_node(**NODE)
    finally:
        ray.shutdown()
        cluster.shutdown()


# Throughput


def _throughput(report: Report, cluster: Any, second: Any) -> None:
    """Maps and renders of all records by each executor in turn, its workers warm."""
    records = _rows().slice(0, QUICK_RECORDS if report.quick else None)
    where = Cluster(cluster.address, Store(BUILD / "ray-throughput"), {})
    runs: dict[str, Run] = {
        LOCAL_1: lambda batches: run_jobs(make_pack, batches, 1),
        LOCAL_2: lambda batches: run_jobs(make_pack, batches, 2),
        RAY_1: lambda batches: run_batches(make_pack, batches, where, 0),
        RAY_2: lambda batches: run_batches(make_pack, batches, where, 0),
    }
    took: dict[str, list[float]] = {name: [] for name in runs}
    packs = set()
    with where.join():
        for name in turns(list(runs), QUICK_REPEATS if report.quick else REPEATS):
            with _occupied(second) if name == RAY_1 else contextlib.nullcontext():
                if not took[name]:
                    _draw(records, where.store, runs[name])
                wait_for_calm()
                took[name].append(_draw(records, where.store, runs[name]))
            packs.add(_content(where.store.home, "packs/*/*"))
    if len(packs) > 1:
        raise RuntimeError("the executors made different packs")
    medians = {name: statistics.median(each) for name, each in took.items()}
    rows = [
        (name, f"{s:.2f}", f"{len(records) / s:,.0f}", f"{s / medians[local]:.2f}")
        for local, names in ((LOCAL_1, (LOCAL_1, RAY_1)), (LOCAL_2, (LOCAL_2, RAY_2)))
        for name, s in ((name, medians[name]) for name in names)
    ]
    report.table(
        f"Map and render of {len(records):,} records in packs of {RECORDS_PER_PACK}, workers warm: medians of "
        f"{len(took[RAY_1])} turns",
        ("", "wall s", "records/s", "times local"),
        rows,
        "The same packs, to the byte, in every turn. Local, 1 worker: no other process; two are "
        f"{medians[LOCAL_1] / medians[LOCAL_2]:.2f} times as fast. Ray, 1 worker: the second node's processor is "
        "taken. Ray's own processes share the two processors with the workers.",
    )
    report.target("1 worker / 2 workers on Ray", medians[RAY_1] / medians[RAY_2], at_least=1.6)


def _rows() -> pa.Table:
    root, _ = ap10k_root()
    tables = []
    for split in SPLITS:
        index = BUILD / f"ap10k-{split}.parquet"
        write_index(root / AP10K.annotation_path(split, "1"), AP10K, split, index, max_pixels=100_000_000)
        tables.append(pq.read_table(index, columns=list(COLUMNS_OF_RECORD)))
    return pa.concat_tables(tables)


def _draw(rows: pa.Table, store: Store, run_all: Run) -> float:
    """Maps first, then renders that colour them, as in a build; gives the seconds that both took."""
    shutil.rmtree(store.home / "packs", ignore_errors=True)
    links, names = AP10K.skeleton.links, AP10K.skeleton.keypoint_names
    started = time.perf_counter()
    maps: dict[str, Location] = {}
    for found in run_all(_batches("spatext", {"links": links}, rows, store)):
        maps |= found
    style = {"style": "openpose", "keypoint_names": names, "links": links}
    for _ in run_all(_batches("openpose", style, rows, store, maps)):
        pass
    return time.perf_counter() - started


def _batches(
    stage: str,
    parameters: dict[str, Any],
    rows: pa.Table,
    store: Store,
    maps: dict[str, Location] | None = None,
) -> Iterator[Batch]:
    keys = [digest(str(image_id)) for image_id in rows.column("image_id").to_pylist()]
    for first in range(0, len(rows), RECORDS_PER_PACK):
        some = slice(first, first + RECORDS_PER_PACK)
        sources: list[tuple[Source, ...]] = [
            (ArtifactSource("spatext", maps[key]),) if maps else () for key in keys[some]
        ]
        yield Batch(
            function=f"spctrl.conditions.{stage}:render_{stage}",
            parameters={**parameters, **SIZES},
            store=store,
            stage=stage,
            suffix=".png",
            keys=keys[some],
            rows=rows.slice(first, RECORDS_PER_PACK),
            sources=sources,
        )


@contextlib.contextmanager
def _occupied(node: Any) -> Iterator[None]:
    """Have the node's worker wait, which keeps the processor and stays warm."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    begun, done = BUILD / "ray-guest-begun", BUILD / "ray-guest-done"
    for path in (begun, done):
        path.unlink(missing_ok=True)

    def stay() -> None:  # in here, as workers do not find this module
        begun.touch()
        while not done.exists():
            time.sleep(GUEST_POLL_S)

    guest = ray.remote(num_cpus=1, scheduling_strategy=there)(stay).remote()
    while not begun.exists():
        if ray.wait([guest], timeout=POLL_S)[0]:
            ray.get(guest)  # its error
    yield
    done.touch()
    ray.get(guest)


# A lost node


def _lost_node(report: Report, cluster: Any, second: Any) -> None:
    """BuildDataset of AP-10K: locally, on both nodes, and on both until one is killed half-way."""
    local, undisturbed, disturbed = (BUILD / f"ray-build-{name}" for name in ("local", "whole", "lost"))
    on_ray = ["--executor-kind=ray", f"--executor-address={cluster.address}"]
    seconds = {
        "local, 2 workers": run_process(_build(local, ["--executor-workers=2"])).wall_s,
        "Ray, two nodes": run_process(_build(undisturbed, on_ray)).wall_s,
    }
    packs = len(_drawn(local))
    killed_at: list[int] = []
    command = _build(disturbed, on_ray)

    def kill_half_way() -> None:
        while len(_drawn(disturbed)) < packs // 2:
            time.sleep(POLL_S)
        killed_at.append(len(_drawn(disturbed)))
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill_half_way, daemon=True)
    killer.start()
    seconds["Ray, two nodes, one killed half-way"] = run_process(command).wall_s
    killer.join(timeout=10)
    same = {
        folder: all(
            _content(local, what) == _content(folder, what) for what in ("store/packs/*/*", "exports/**/*")
        )
        for folder in (undisturbed, disturbed)
    }
    if not killed_at or killed_at[0] >= packs:
        raise RuntimeError(f"the node was not killed while the {packs} packs were made")
    report.table(
        "BuildDataset of AP-10K's annotations, train and val, in a process of its own",
        ("", "wall s"),
        [(name, f"{s:.1f}") for name, s in seconds.items()],
        f"The node was killed when {killed_at[0]} of {packs} packs were there. Packs and exports equal the local "
        f"build's to the byte: {same[undisturbed]} undisturbed, {same[disturbed]} with the lost node. With Ray, "
        "workers start anew for each build.",
    )
    report.target("builds with Ray that equal the local one, of 2", sum(same.values()), at_least=2)


def _build(folder: Path, options: list[str]) -> list[str]:
    shutil.rmtree(folder, ignore_errors=True)
    root, _ = ap10k_root()
    command = [sys.executable, "-m", "luigi", "--module", "pipelines", "BuildDataset"]
    paths = [
        f"--ap10k-root={root}",
        f"--paths-store={folder / 'store'}",
        f"--paths-export={folder / 'exports'}",
    ]
    return [*command, "--dataset=ap10k", "--images=optional", *paths, *options]


def _drawn(folder: Path) -> list[Path]:
    """Packs that are whole."""
    return list(folder.glob("store/packs/*/[!.]*.parquet"))


def _content(folder: Path, pattern: str) -> str:
    """Digest of the files' names and bytes; without ledgers and the report, which hold times and places."""
    state = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        if path.is_file() and ".spctrl" not in path.parts and path.name != "report.html":
            state.update(f"{path.relative_to(folder)}\0".encode())
            state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()
