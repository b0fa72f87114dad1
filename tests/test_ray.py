"""Batches on a Ray cluster: the bytes of a local build, also when a node or a worker is lost on the way."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from object_store import Bucket, BucketWorkspace, Server
from object_store_faults import Contents, configure_small
from processes import HANG_S

import tasks
from spctrl.errors import ExpectedError
from spctrl.storage import StoreError
from spctrl.store.store import Store
from tasks.execution import worker
from tasks.execution.executor import WorkerError
from tasks.execution.ray import cluster as ray_cluster
from tasks.execution.ray import executor as ray_executor
from tasks.execution.ray import probe as ray_probe
from tasks.execution.ray.cluster import ClusterError, Site, connect
from tasks.execution.ray.executor import run_batches

if TYPE_CHECKING:
    from conftest import Workspace

pytestmark = pytest.mark.slow
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the ray extra is not installed"
)

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
"""Small, so that tests leave the machine's memory alone."""
BEGUN, GO, KILLED, LOADS = "begun-", "go", "killed", "loads-"


# The cluster: of this machine alone, closed to whoever has not its token


@pytest.fixture(scope="module", autouse=True)
def closed_to_others() -> Iterator[pytest.MonkeyPatch]:
    """Ray looks for the token when it is imported, which any test may be the first to do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield patch


@pytest.fixture(scope="module")
def cluster(closed_to_others: pytest.MonkeyPatch, object_server: Server) -> Iterator[Any]:
    """A head with one processor, to which ``auto`` leads. Its workers inherit the way to the object store."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    closed_to_others.setenv("RAY_ADDRESS", made.address)
    # Workers cannot import this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def second_node(cluster: Any) -> Iterator[Any]:
    """Another node of one processor."""
    node = cluster.add_node(**NODE)
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)


def on_ray(workspace: Workspace) -> Workspace:
    workspace.configure("executor", kind="ray", workers=0)
    return workspace


def packs(workspace: Workspace) -> dict[str, bytes]:
    """Every pack of the store, index included."""
    return {
        path.relative_to(workspace.store).as_posix(): path.read_bytes()
        for path in workspace.store.glob("packs/*/*")
    }


def markers(workspace: Workspace) -> list[Path]:
    return list(workspace.store.glob(".tmp-ray-*"))


# Whole builds


@needs_ray
def test_the_bytes_of_a_local_build(
    cluster: Any, sample: Path, make_workspace: Callable[..., Workspace]
) -> None:
    conditions = ["spatext", "openpose", "mask", "depth", "masked_depth"]
    local, ray = make_workspace("local", sample), on_ray(make_workspace("ray", sample))
    for workspace in (local, ray):
        workspace.configure("build", splits=["train"], conditions=conditions)
        done = workspace.build()
        assert done.succeeded, done.errors
        assert done.counted("spatext", "made") == 2 * 8
    assert packs(ray) == packs(local)
    assert ray.exported() == local.exported()
    assert ray.faults() == []
    assert markers(ray) == []


@needs_ray
def test_a_bucket_holds_the_objects_of_a_local_build(
    cluster: Any,
    bucket: Bucket,
    sample: Path,
    code: Path,
    tmp_path: Path,
    make_workspace: Callable[..., Workspace],
) -> None:
    local, ray = (
        make_workspace("local", sample),
        on_ray(BucketWorkspace(tmp_path / "ray", sample, code, bucket)),
    )
    for workspace in (local, ray):
        configure_small(workspace)
        done = workspace.build()
        assert done.succeeded, done.errors
    assert Contents.of(ray) == Contents.of(local)
    assert ray.faults() == []
    assert markers(ray) == []


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + HANG_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


def make_pack_when_told(batch: worker.Batch) -> dict[str, Any]:
    """Says where it runs, and waits for the go."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    (batch.store.home / f"{BEGUN}{node}-{uuid.uuid4().hex}").touch()
    wait_for(batch.store.home / GO)
    return worker.make_pack(batch)


@needs_ray
def test_a_node_lost_while_it_works_costs_no_byte(
    cluster: Any,
    second_node: Any,
    sample: Path,
    make_workspace: Callable[..., Workspace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One record a pack: enough batches for both nodes.
    monkeypatch.setattr("tasks.stage.record_stage.SMALLEST_PACK", 1)
    local, ray = make_workspace("local", sample), on_ray(make_workspace("ray", sample))
    for workspace in (local, ray):
        workspace.configure("build", datasets=["ap10k"], splits=["train"], conditions=["spatext"])
    assert local.build().succeeded

    def begun() -> list[str]:
        """Nodes of the batches that were begun."""
        return [path.name.removeprefix(BEGUN).split("-")[0] for path in ray.store.glob(f"{BEGUN}*")]

    def lose_the_node_once_both_work() -> None:
        deadline = time.monotonic() + HANG_S
        while len(set(begun())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster.remove_node(second_node, allow_graceful=False)
        (ray.store / GO).touch()

    monkeypatch.setattr("tasks.execution.worker.make_pack", make_pack_when_told)
    loss = threading.Thread(target=lose_the_node_once_both_work)
    loss.start()
    done = ray.build()
    loss.join()
    assert done.succeeded, done.errors
    assert len(set(begun())) == 2
    assert len(begun()) > len(ray.packs("spatext")) == 8
    assert packs(ray) == packs(local)
    assert ray.exported() == local.exported()


HELD_WORK = f"""
_make_pack = make_pack

def make_pack(batch):
    import os, time
    (batch.store.home / f"{BEGUN}{{os.getpid()}}").touch()
    time.sleep({2 * HANG_S})
    return _make_pack(batch)
"""


@needs_ray
def test_a_killed_driver_takes_its_batches_along_and_another_build_gives_the_same_bytes(
    cluster: Any, sample: Path, make_workspace: Callable[..., Workspace], tmp_path: Path
) -> None:
    local, ray = make_workspace("local", sample), on_ray(make_workspace("ray", sample))
    for workspace in (local, ray):
        workspace.configure("build", datasets=["ap10k"], splits=["train"], conditions=["spatext"])
    assert local.build().succeeded
    ray.code = tmp_path / "held"
    shutil.copytree(local.code, ray.code)
    with (ray.code / "tasks" / "execution" / "worker.py").open("a") as file:
        file.write(HELD_WORK)
    driver = ray.start()
    deadline = time.monotonic() + HANG_S
    while not (begun := list(ray.store.glob(f"{BEGUN}*"))):
        assert time.monotonic() < deadline and driver.poll() is None, driver.communicate()[0]
        time.sleep(0.05)
    worker = Path("/proc", begun[0].name.removeprefix(BEGUN))
    assert worker.exists()
    driver.kill()
    driver.communicate()
    killed_at = time.monotonic()
    while worker.exists():
        assert time.monotonic() < killed_at + HANG_S, "the worker goes on"
        time.sleep(0.05)
    assert not any(name.startswith("packs/spatext") for name in packs(ray))
    done = ray.build()
    assert done.succeeded, done.errors
    assert packs(ray) == packs(local)
    assert ray.exported() == local.exported()


# Models


def die_once_then_make_pack(batch: worker.ModelBatch) -> dict[str, Any]:
    """The first process to come here dies; the others say how many models they have loaded."""
    try:
        (batch.store.home / KILLED).touch(exist_ok=False)
    except FileExistsError:
        found = worker.make_model_pack(batch)
        loads = worker._loaded_model.cache_info().misses
        (batch.store.home / f"{LOADS}{os.getpid()}").write_text(str(loads))
        return found
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")


@needs_ray
def test_models_are_loaded_once_by_actors_one_of_which_is_killed(
    cluster: Any,
    sample: Path,
    tmp_path: Path,
    make_workspace: Callable[..., Workspace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch", reason="the models extra is not installed")
    from spctrl.image_models.depth import build_tiny

    build_tiny(tmp_path / "weights")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many as an actor has: sums are rounded by their number
    monkeypatch.setattr("tasks.stage.model_stage.RECORDS_PER_PACK", 2)
    local, ray = make_workspace("local", sample), on_ray(make_workspace("ray", sample))
    for workspace in (local, ray):
        workspace.configure("build", datasets=["ap10k"], splits=["train"], conditions=["depth"])
        workspace.configure("depth", backend="zoedepth", weights=tmp_path / "weights")
        workspace.configure("executor", device="cpu")
    assert local.build().succeeded
    monkeypatch.setattr("tasks.execution.worker.make_model_pack", die_once_then_make_pack)
    done = ray.build()
    assert done.succeeded, done.errors
    assert packs(ray) == packs(local)
    assert len(ray.packs("depth")) == 4
    assert (ray.store / KILLED).exists()
    assert [path.read_text() for path in ray.store.glob(f"{LOADS}*")] == ["1"]


# What goes wrong


def code_file(job: int) -> str:
    return str(tasks.__file__)


def fail(job: int) -> int:
    if job == 1:
        raise ExpectedError("the reason")
    if job == 3:
        raise StoreError("the disk is full")
    return job


def die(job: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return job


@pytest.fixture
def here(tmp_path: Path) -> ray_cluster.Cluster:
    return ray_cluster.Cluster("auto", Store(tmp_path), {})


@needs_ray
def test_the_code_travels_with_the_build(cluster: Any, here: ray_cluster.Cluster) -> None:
    (path,) = run_batches(code_file, [0], here, 0)
    assert "working_dir_files" in path


@needs_ray
def test_a_batch_that_fails_stops_no_other_and_its_error_is_its_own(
    cluster: Any, here: ray_cluster.Cluster
) -> None:
    results = []
    with pytest.raises(ExpectedError) as failure:
        for each in run_batches(fail, [0, 1, 2], here, 0):
            results.append(each)  # noqa: PERF402 - the error comes after the last
    assert sorted(results) == [0, 2]
    assert (type(failure.value), str(failure.value)) == (ExpectedError, "the reason")


@needs_ray
def test_a_store_that_cannot_be_written_stops_the_work(cluster: Any, here: ray_cluster.Cluster) -> None:
    taken = []

    def jobs() -> Iterator[Any]:
        for job in range(1000):
            taken.append(job)
            yield job if job in (0, 3) else 2

    with pytest.raises(StoreError, match="the disk is full"):
        list(run_batches(fail, jobs(), here, 0))
    assert len(taken) < 20
    assert list(here.store.home.iterdir()) == []


@needs_ray
def test_a_batch_that_kills_every_worker_ends_the_work(
    cluster: Any, here: ray_cluster.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "LOSSES", 1)
    with pytest.raises(WorkerError, match="lost 2 times"):
        list(run_batches(die, [0], here, 0))


def test_a_node_without_the_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"{socket.gethostname()} .* does not see {tmp_path}"):
        ray_cluster.work(fail, 0, Site(tmp_path, Store(tmp_path), "marker", ()))


def test_a_node_with_another_library_is_named(tmp_path: Path) -> None:
    (tmp_path / "marker").touch()
    for name, found in (("numpy", r"\d"), ("no-such-library", "none")):
        with pytest.raises(ClusterError, match=f"expected {name} 0.1 .*, found {found}"):
            ray_cluster.work(fail, 0, Site(tmp_path, Store(tmp_path), "marker", ((name, "0.1"),)))


def test_ray_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"pip install 'spctrl\[ray\]'"):
        connect("auto")


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:{free_port}", "nonsense", "host:port"])
def test_where_no_cluster_is_the_error_says_how_to_start_one(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # taken, but nobody listens
        wanted = address.format(free_port=free.getsockname()[1])
        with pytest.raises(ClusterError, match=f"{wanted}.*ray start --head|expected auto or host:port"):
            connect(wanted)


@needs_ray
@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "another token"),
        ({"RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": "/no/such/file"}, "none that can be read"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE = disabled"),
    ],
)
def test_a_cluster_that_asks_for_a_token_names_what_to_set(
    cluster: Any, variables: dict[str, str | None], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    for address in ("auto", cluster.address):
        with pytest.raises(
            ClusterError, match=rf"RAY_AUTH_MODE = token .* RAY_AUTH_TOKEN .*{found}"
        ) as failure:
            connect(address)
        assert "\n" not in str(failure.value) and "0000" not in str(failure.value)


@needs_ray
@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"])
def test_a_port_of_another_service_is_told_from_a_cluster(
    greeting: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(ray_probe, "ANSWER_TIMEOUT_S", 1.0)

    def answer(service: socket.socket) -> None:
        connections = []
        with contextlib.suppress(OSError):
            while True:
                connections.append(service.accept()[0])
                connections[-1].sendall(greeting)

    with socket.create_server(("127.0.0.1", 0)) as service:
        threading.Thread(target=answer, args=[service], daemon=True).start()
        address = f"127.0.0.1:{service.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"{address}: no Ray head answers there.*ray start --head"):
            connect(address)
    assert [path for path in Path("/proc").glob("[0-9]*/cmdline") if address.encode() in _bytes(path)] == []


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@needs_ray
def test_a_client_address_is_refused_without_its_password() -> None:
    with pytest.raises(ClusterError, match=r"found ray://me:\*{3}@head:10001, .* host:port of") as failure:
        ray_cluster._knock("ray://me:hunter2@head:10001")
    assert "hunter2" not in str(failure.value)


@needs_ray
def test_another_version_of_ray_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1.0\n")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr(ray_probe, "fault_at", lambda address: None)
    with pytest.raises(ClusterError, match=r"started with: Ray: 2\.1\.0\. Install the same versions of Ray"):
        connect("auto")


@needs_ray
def test_work_that_no_node_has_room_for_says_what_it_waits_for(
    cluster: Any,
    here: ray_cluster.Cluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import ray

    monkeypatch.setattr(ray_executor, "PATIENCE_S", 0.5)
    ray_executor._notify_of_no_room.cache_clear()
    with here.join():
        needed = {"num_gpus": 1}
        actor = ray.remote(max_restarts=0, **needed)(ray_executor._Actor).remote()
        greeting = actor.greet.remote()
        threading.Timer(1.5, ray.kill, [actor]).start()
        assert ray_executor._first_done([greeting], needed) == greeting
        assert ray_executor._first_done([ray.put(0)], {"num_cpus": 1})
    assert capsys.readouterr().err.count("waiting for a node of the Ray cluster with 1 GPU: none") == 1


def test_another_kind_is_refused_with_the_known_ones(workspace: Workspace) -> None:
    workspace.configure("executor", kind="slurm")
    done = workspace.run()
    assert done.exit_code not in (0, None)
    assert "slurm" in done.output and "local" in done.output and "ray" in done.output
