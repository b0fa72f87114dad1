"""What all image models share: batches, devices, and running out of memory.

A model works in three steps. ``decode`` and ``encode`` are the processor's and run in threads beside ``infer``,
which is the device's, so that neither waits for the other.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from spctrl.data.records import RecordError

if TYPE_CHECKING:
    import torch

    from spctrl.data.records import Record

Decoded = TypeVar("Decoded")
Output = TypeVar("Output")

Result = bytes | tuple[str, str]
"""An artifact, or why there is none: a reject code and a sentence."""

THREADS = 4
BATCHES_AHEAD = 2


class ImageModel(Protocol[Decoded, Output]):
    """A model that makes one artifact of each record and its image."""

    def decode(self, record: Record, *data: bytes) -> Decoded:
        """The model's input, on the processor: of the image file, or of what else the model reads.

        Raises:
            RecordError: the image cannot be used.
        """
        ...

    def batch_key(self, decoded: Decoded) -> Hashable:
        """Inputs share a batch where this is equal, such as their shape."""
        ...

    def infer(self, batch: Sequence[Decoded]) -> Sequence[Output]:
        """The model's outputs, back on the processor."""
        ...

    def encode(self, record: Record, decoded: Decoded, output: Output) -> bytes:
        """The artifact.

        Raises:
            RecordError: the output cannot be used (empty, not finite).
        """
        ...


def run_model(
    model: ImageModel[Any, Any], work: Iterable[tuple[Record, *tuple[bytes, ...]]], *, batch_size: int
) -> Iterator[Result]:
    """Results of a model for records and their files, such as their images, in their order.

    A batch that does not fit into the device's memory is halved and tried again, down to single images. Records are
    decoded a few batches ahead, and artifacts encoded behind, while the device works.

    Raises:
        RuntimeError: a single image does not fit into the device's memory.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        waiting: deque[list[tuple[Record, Future[Any]]]] = deque()
        encoding: deque[list[Future[Result]]] = deque()
        for batch in itertools.chain(_batched(work, batch_size), itertools.repeat((), BATCHES_AHEAD)):
            waiting.append([(record, threads.submit(model.decode, record, *data)) for record, *data in batch])
            if len(waiting) <= BATCHES_AHEAD:
                continue
            encoding.append(_infer_and_encode(model, waiting.popleft(), threads))
            if len(encoding) > BATCHES_AHEAD:
                yield from (future.result() for future in encoding.popleft())
        for futures in encoding:
            yield from (future.result() for future in futures)


def _infer_and_encode(
    model: ImageModel[Any, Any], batch: Sequence[tuple[Record, Future[Any]]], threads: ThreadPoolExecutor
) -> list[Future[Result]]:
    """Futures of a batch's results, in its order; inputs are grouped by what may share a pass."""
    results: list[Future[Result]] = [Future() for _ in batch]
    groups: dict[Hashable, list[tuple[int, Any]]] = {}
    for position, (_, future) in enumerate(batch):
        try:
            decoded = future.result()
        except RecordError as error:
            results[position].set_result((error.code, error.message))
            continue
        groups.setdefault(model.batch_key(decoded), []).append((position, decoded))
    for group in groups.values():
        outputs = infer_halving(model, [decoded for _, decoded in group])
        for (position, decoded), output in zip(group, outputs, strict=True):
            results[position] = threads.submit(_encode, model, batch[position][0], decoded, output)
    return results


def _encode(model: ImageModel[Any, Any], record: Record, decoded: Any, output: Any) -> Result:
    try:
        return model.encode(record, decoded, output)
    except RecordError as error:
        return error.code, error.message


def infer_halving(model: ImageModel[Any, Output], batch: Sequence[Any]) -> list[Output]:
    """``model.infer``, with a batch that is too large for the device cut in two.

    Raises:
        RuntimeError: a single image is too large.
    """
    import torch

    try:
        return list(model.infer(batch))
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise RuntimeError(
                f"one image alone does not fit into the device's memory: {error}. Use a smaller model, or device = cpu"
            ) from error
    # Outside the except block: the exception keeps the failed pass's tensors alive.
    torch.cuda.empty_cache()
    half = len(batch) // 2
    return infer_halving(model, batch[:half]) + infer_halving(model, batch[half:])


def choose_devices(setting: str) -> list[torch.device]:
    """The devices for ``auto`` (all GPUs, or the CPU where there is none), ``cpu``, ``cuda:N`` or ``cuda:N,M``.

    Raises:
        ValueError: there is no such device, or one is named twice; names those there are.
    """
    import torch

    there = [str(i) for i in range(torch.cuda.device_count())]
    if setting == "cpu" or (setting == "auto" and not there):
        return [torch.device("cpu")]
    kind, _, numbers = setting.partition(":")
    chosen = there if setting == "auto" else numbers.split(",")
    is_repeated = len(set(chosen)) < len(chosen)
    if setting != "auto" and (kind != "cuda" or is_repeated or not set(chosen) <= set(there)):
        known = ", ".join(["auto", "cpu", *(f"cuda:{i}" for i in there)])
        several = " or several GPUs, as in cuda:0,1" if there[1:] else ""
        raise ValueError(f"expected a device among {known}{several}, found {setting!r}")
    return [torch.device("cuda", int(number)) for number in chosen]


def choose_device(setting: str) -> torch.device:
    """The device for ``auto`` (a GPU if there is one), ``cpu`` or ``cuda:N``.

    Raises:
        ValueError: there is no such device, or several are named; names those there are.
    """
    devices = choose_devices(setting)
    if setting != "auto" and devices[1:]:
        raise ValueError(f"expected one device, found {setting!r}")
    return devices[0]


def mixed_precision(device: torch.device) -> torch.autocast:
    """Half precision for a GPU's matrix units, float32 on a processor."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def _batched(items: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk
