"""A Ray cluster: reaching it, the code that travels to it, and what a worker checks before it works."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from spctrl.errors import ExpectedError
from spctrl.extras import missing_package
from spctrl.output.secrets import masked
from spctrl.storage import StoreError
from spctrl.storage.files import TEMPORARY
from spctrl.store.code_version import copy_code
from tasks.execution.ray import probe as ray_probe

if TYPE_CHECKING:
    from spctrl.store.pack_index import Location
    from spctrl.store.store import Store
    from tasks.execution.worker import ModelBatch

    Locations = dict[str, Location]
    ModelFunction = Callable[[ModelBatch], Locations]

Job = TypeVar("Job")


Result = TypeVar("Result")


VERSION_MISMATCH = "Version mismatch"
"""How Ray begins to say so."""
VERSION_HINT = "Install the same versions of Ray and Python here and on every node"
CLIENT = "ray://"
CONNECT_TIMEOUT_S = 5.0
"""Ray itself tries an address for a long time."""


class ClusterError(ExpectedError):
    """There is no Ray cluster to work on, or not one that fits this build."""


@dataclass(frozen=True)
class Site:
    """What a worker needs besides its batch, and what has to be true where it runs.

    Attributes:
        folder: the build's working folder, which relative paths start from.
        store: with its absolute path, where it is a folder.
        marker: name of a file in the store; a node that sees it shares the store.
        libraries: name and version of each library that decides the output.
    """

    folder: Path
    store: Store
    marker: str
    libraries: tuple[tuple[str, str], ...]


class Cluster(NamedTuple):
    """Where the work goes, and what it needs there.

    Attributes:
        address: ``host:port`` of the cluster's head, or ``auto`` for the cluster that runs on this machine.
        store: which every node has to see.
        libraries: version of each library that decides the output.
    """

    address: str
    store: Store
    libraries: Mapping[str, str]

    @contextmanager
    def join(self) -> Iterator[Site]:
        """Connect; the site's marker is there for as long as the work goes on.

        Raises:
            ClusterError: Ray is not installed, or no cluster can be joined.
            StoreError: the store cannot be written.
        """
        connect(self.address)
        store, marker = self.store.absolute(), f"{TEMPORARY}ray-{uuid.uuid4().hex}"
        store.files.write(marker, b"")
        try:
            yield Site(Path.cwd(), store, marker, tuple(sorted(self.libraries.items())))
        finally:
            store.files.remove([marker])


def connect(address: str) -> None:
    """Join a running cluster, once a process; this machine must be one of its nodes."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"[executor] kind = ray: {missing_package('ray')}, and so on every node; or set kind = local"
        ) from error
    if ray.is_initialized():
        return
    if address != "auto":
        _knock(address)
    if (fault := ray_probe.fault_at(address)) is not None:
        raise _cannot_join(address, fault)
    try:
        with _copy_of_the_code() as folder:
            ray.init(address=address, runtime_env={"working_dir": str(folder)}, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        hint = VERSION_HINT if reason.startswith(VERSION_MISMATCH) else ray_probe.START_HINT
        raise _cannot_join(address, f"{reason}. {hint}") from error


@contextmanager
def _copy_of_the_code() -> Iterator[Path]:
    """A folder of this project's code and nothing else, as Ray sends whole folders."""
    with TemporaryDirectory() as name:
        copy_code(Path(name))
        yield Path(name)


def _knock(address: str) -> None:
    """Find out at once whether anybody listens."""
    if address.startswith(CLIENT):
        raise ClusterError(
            f"expected auto or host:port as [executor] address, found {masked(address)}, which is a Ray client's. "
            "Give host:port of the cluster's head, whose port is 6379 by default, and join this machine to the cluster "
            "with `ray start --address host:port`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"expected auto or host:port as [executor] address, found {masked(address)!r}")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _cannot_join(address, f"{error}. {ray_probe.START_HINT}") from error


def _cannot_join(address: str, fault: str) -> ClusterError:
    return ClusterError(masked(f"cannot join a Ray cluster at [executor] address = {address}: {fault}"))


def work(function: Callable[[Job], Result], job: Job, where: Site) -> Result:
    """What a worker does with a job, once it is sure that it is where the work belongs.

    Raises:
        StoreError: the node does not see the store.
        ClusterError: a library has another version than the build's.
    """
    _check(where)
    return function(job)


def work_on(function: Callable[[Job], Result], job: Sequence[Any], where: Site) -> Result:
    """The same with the one reference of a list to the job."""
    import ray

    (reference,) = job
    return work(function, ray.get(reference), where)


@functools.cache
def _check(where: Site) -> None:
    node = socket.gethostname()
    if not where.store.files.exists(where.marker):
        raise StoreError(
            f"node {node} of the Ray cluster does not see {where.store.files.root}: [paths] store must lie where every "
            "node finds it under the same path or URL, and so must the data and the weights"
        )
    for name, expected in where.libraries:
        if (found := _version(name)) != expected:
            raise ClusterError(
                f"expected {name} {expected} on node {node} of the Ray cluster, as where the build was started, found "
                f"{found or 'none'}: install the same versions everywhere (constraints.txt has those tested together)"
            )
    if where.folder.is_dir():
        os.chdir(where.folder)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
