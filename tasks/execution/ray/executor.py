"""Running a stage's batches on a Ray cluster: tasks for rendering, actors that keep their image model loaded.

Every node sees the store, the raw data and the weights under the paths that the build was given. The project's
code travels with the build, so that workers run what the records' keys were made from; the libraries that decide
the output have to be the build's own versions, which each worker checks.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from tasks.execution import logs
from tasks.execution.executor import collect
from tasks.execution.ray.cluster import Cluster, Job, Result, Site, work, work_on
from tasks.execution.worker_pool import JOBS_WAITING_PER_WORKER, WorkerError

if TYPE_CHECKING:
    from spctrl.store.pack_index import Location
    from tasks.execution.worker import ModelBatch

    Locations = dict[str, Location]
    ModelFunction = Callable[[ModelBatch], Locations]

RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU"}
"""What Ray calls in a node's list what a call asks for."""
PATIENCE_S = 10.0
"""How long nothing is done before it is said that the cluster has no room for the work."""
LOSSES = 10
"""How often a batch is begun again after its worker or node was lost. One that takes them all along is at fault."""


def run_batches(
    function: Callable[[Job], Result], batches: Iterable[Job], cluster: Cluster, workers: int
) -> Iterator[Result]:
    """Results of ``function`` for each batch, in order of completion, made by tasks with one CPU core each.

    Like ``tasks.execution.executor.run_jobs``, but that a lost worker or node costs no more than time.

    Args:
        function: imported by its name where it runs.
        batches: taken only a few ahead of the work.
        cluster: joined when there is anything to do.
        workers: batches that are with the cluster at any time; 0 for what its processors take, as it grows and
            shrinks.

    Raises:
        WorkerError: a batch was lost again and again.
    """
    remaining = iter(batches)
    if not (first := list(itertools.islice(remaining, 1))):
        return
    with cluster.join() as where:
        tasks = _Tasks(function, itertools.chain(first, remaining), where, workers)
        try:
            yield from collect(tasks.outcomes())
        finally:
            tasks.cancel()


def run_model_batches(
    function: ModelFunction, batches: Iterable[ModelBatch], cluster: Cluster, workers: int, device: str
) -> Iterator[Locations]:
    """Results of ``function`` for each batch, in order of completion, made by actors that load the model once.

    There is an actor for each GPU; without GPUs one for each node, with as many processors as the smallest node has.

    Args:
        function: imported by its name where it runs.
        batches: taken as actors become free.
        cluster: joined when there is anything to do.
        workers: the largest number of actors; 0 for what the cluster has room for.
        device: ``auto`` for GPUs if the cluster has some, ``cpu``, or ``cuda:N``: any GPU, which Ray chooses.

    Raises:
        WorkerError: a batch was lost again and again.
    """
    remaining = iter(batches)
    if not (first := list(itertools.islice(remaining, 1))):
        return
    with cluster.join() as where:
        room = _room_for_actors(device)
        placed = (
            replace(each, loading={**each.loading, "device": room.device})
            for each in itertools.chain(first, remaining)
        )
        crew = _Crew(function, placed, where, workers or room.actors, room.resources)
        try:
            yield from collect(crew.outcomes())
        finally:
            crew.dismiss()


class _Tasks(Generic[Job, Result]):
    """Batches that Ray has, a few more than it works on. Ray begins those again that it loses."""

    def __init__(
        self, function: Callable[[Job], Result], batches: Iterator[Job], where: Site, workers: int
    ) -> None:
        import ray

        # Spread, as Ray else fills this node first and is slow to find that another is free.
        remote = ray.remote(num_cpus=1, max_retries=LOSSES, scheduling_strategy="SPREAD")(work_on)
        self._call = functools.partial(remote.remote, function)
        self._batches = batches
        self._where = where
        self._workers = workers
        self._running: set[Any] = set()

    def outcomes(self) -> Iterator[Callable[[], Result]]:
        """For each batch that is done, what gives its result or raises its error."""
        while self._fill():
            ref = _first_done(self._running, {"num_cpus": 1})
            self._running.remove(ref)
            yield functools.partial(_result, ref)

    def cancel(self) -> None:
        import ray

        for ref in self._running:
            ray.cancel(ref)

    def _fill(self) -> bool:
        """Hand over what there is room for; whether anything runs."""
        import ray

        room = self._workers or _processors() * (1 + JOBS_WAITING_PER_WORKER)
        for batch in itertools.islice(self._batches, max(room - len(self._running), 0)):
            # In a list: for a task that takes an object itself, Ray asks for another worker.
            self._running.add(self._call([ray.put(batch)], self._where))
        return bool(self._running)


def _first_done(running: Iterable[Any], resources: Mapping[str, int]) -> Any:
    """The first of some calls that is done; says when no node has what each of them asks for."""
    import ray

    refs = list(running)
    done, _ = ray.wait(refs, num_returns=1, timeout=PATIENCE_S)
    if not done:
        if not any(_has_room(node["Resources"], resources) for node in ray.nodes() if node["Alive"]):
            _notify_of_no_room(tuple(resources.items()))
        done, _ = ray.wait(refs, num_returns=1)
    return done[0]


def _has_room(node: Mapping[str, float], resources: Mapping[str, int]) -> bool:
    """Whether a node that has nothing else to do can take a call."""
    return all(node.get(RESOURCES[name], 0) >= count for name, count in resources.items())


@functools.cache  # once a process
def _notify_of_no_room(resources: Sequence[tuple[str, int]]) -> None:
    wanted = " and ".join(f"{count} {RESOURCES[name]}" for name, count in resources)
    logs.notify(
        f"waiting for a node of the Ray cluster with {wanted}: none of its nodes has that. Add one with `ray start "
        "--address host:port`; or press Ctrl-C, set [executor] device = cpu or kind = local, and run again"
    )


class _Actor:
    """A process that keeps what a function loads."""

    def greet(self) -> None:
        """Answers as soon as the actor has a place."""

    def work(self, *arguments: Any) -> Any:
        return work(*arguments)


class _Attempt(NamedTuple):
    """A batch, or the start of an actor, and how often it failed because the actor or its node was lost."""

    batch: ModelBatch | None
    losses: int = 0

    def after_loss(self, error: Exception) -> _Attempt:
        if self.losses == LOSSES:
            raise _lost_for_good(error)
        return self._replace(losses=self.losses + 1)


class _Crew:
    """Actors, what each is at, and the batches that wait for one.

    Ray could restart actors and repeat their calls; but a call stays with its actor, so that after the loss of a node
    it would wait for another place for that actor while the others are free.
    """

    def __init__(
        self,
        function: ModelFunction,
        batches: Iterator[ModelBatch],
        where: Site,
        size: int,
        resources: Mapping[str, int],
    ) -> None:
        import ray

        self._function = function
        self._where = where
        self._resources = resources
        self._actor = ray.remote(max_restarts=0, **resources)(_Actor)
        self._batches = batches
        self._waiting = deque(_Attempt(batch) for batch in itertools.islice(batches, size))
        self._busy: dict[Any, tuple[Any, _Attempt]] = {}
        for _ in range(len(self._waiting)):
            self._hire(_Attempt(None))

    def outcomes(self) -> Iterator[Callable[[], Locations]]:
        """For each batch that is done, what gives its result or raises its error."""
        import ray

        while self._has_waiting() or any(attempt.batch for _, attempt in self._busy.values()):
            ref = _first_done(self._busy, self._resources)
            actor, attempt = self._busy.pop(ref)
            try:
                ray.get(ref)
            except ray.exceptions.RayTaskError:
                pass  # the batch's error, told below; the actor is well
            except ray.exceptions.RayError as error:
                self._replace(actor, attempt.after_loss(error))
                continue
            if self._has_waiting():
                self._assign(actor, self._waiting.popleft())
            else:
                ray.kill(actor)
            if attempt.batch:
                yield functools.partial(_result, ref)

    def dismiss(self) -> None:
        """Stop all actors, whatever they are at."""
        import ray

        for actor, _ in self._busy.values():
            ray.kill(actor)

    def _has_waiting(self) -> bool:
        """Whether a batch waits; the next one is taken when none does."""
        if not self._waiting:
            self._waiting.extend(_Attempt(batch) for batch in itertools.islice(self._batches, 1))
        return bool(self._waiting)

    def _hire(self, start: _Attempt) -> None:
        actor = self._actor.remote()
        self._busy[actor.greet.remote()] = actor, start

    def _assign(self, actor: Any, attempt: _Attempt) -> None:
        self._busy[actor.work.remote(self._function, attempt.batch, self._where)] = actor, attempt

    def _replace(self, actor: Any, attempt: _Attempt) -> None:
        """Give what a lost actor was at to whoever is free first."""
        import ray

        ray.kill(actor)  # it may only be out of reach
        if attempt.batch:
            self._waiting.append(attempt)
            self._hire(_Attempt(None))
        else:
            self._hire(attempt)


class _Room(NamedTuple):
    """What the cluster offers image models: how many at a time, what each gets, and the device for it."""

    actors: int
    resources: dict[str, int]
    device: str


def _room_for_actors(device: str) -> _Room:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if device.startswith("cuda") or (device == "auto" and gpus):
        return _Room(max(gpus, 1), {"num_gpus": 1}, "cuda:0")  # Ray shows each actor only its own GPU
    processors = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    return _Room(max(len(processors), 1), {"num_cpus": min(processors, default=1)}, "cpu")


def _processors() -> int:
    """Processors of the cluster as it is now; at least one, so that an autoscaler sees that work waits."""
    import ray

    return max(int(ray.cluster_resources().get("CPU", 0)), 1)


def _result(ref: Any) -> Any:
    """What a finished call gave; its own error where it raised one."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise _lost_for_good(error) from error


def _lost_for_good(error: Exception) -> WorkerError:
    return WorkerError(
        f"a batch or its worker was lost {LOSSES + 1} times on the Ray cluster, at last so: {error}. What was finished "
        "stays; see to the cluster, or set kind = local, and run again"
    )
