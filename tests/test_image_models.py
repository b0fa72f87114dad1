"""What all image models share: batches in order, rejects, and a device whose memory is short."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models extra is not installed")

from spctrl.data.records import Record, RecordError  # noqa: E402
from spctrl.image_models.base import (  # noqa: E402
    choose_device,
    choose_devices,
    infer_halving,
    run_model,
)


class Doubling:
    """A model that doubles a number, in batches of at most ``fits``, and cannot use some of its inputs."""

    def __init__(self, fits: int) -> None:
        self.fits = fits
        self.passes: list[int] = []

    def decode(self, record: Record, data: bytes) -> int:
        if data == b"broken":
            raise RecordError("bad_image", "broken")
        return int(data)

    def batch_key(self, decoded: int) -> int:
        return decoded % 2

    def infer(self, batch: Sequence[int]) -> list[int]:
        if len(batch) > self.fits:
            raise torch.OutOfMemoryError("too much")
        self.passes.append(len(batch))
        return [2 * number for number in batch]

    def encode(self, record: Record, decoded: int, output: int) -> bytes:
        if output == 26:
            raise RecordError("not_finite", "unlucky")
        return str(output).encode()


def work(count: int) -> list[tuple[Record, bytes]]:
    empty = np.zeros((0, 17, 3)), np.zeros((0, 4))
    return [
        (Record(i, f"{i}.jpg", (1, 1), *empty), b"broken" if i == 5 else str(i).encode())
        for i in range(count)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
@pytest.mark.parametrize("fits", [1, 2, 100])
def test_results_keep_their_order_whatever_the_batches(batch_size: int, fits: int) -> None:
    results = list(run_model(Doubling(fits), work(20), batch_size=batch_size))
    expected: list[object] = [str(2 * i).encode() for i in range(20)]
    expected[5], expected[13] = ("bad_image", "broken"), ("not_finite", "unlucky")
    assert results == expected


def test_a_batch_that_does_not_fit_is_halved() -> None:
    model = Doubling(fits=3)
    assert infer_halving(model, list(range(10))) == [2 * i for i in range(10)]
    assert max(model.passes) <= 3


def test_one_image_that_does_not_fit_is_an_error_with_advice() -> None:
    with pytest.raises(RuntimeError, match="smaller model"):
        infer_halving(Doubling(fits=0), [1])


def test_a_device_that_is_not_there_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="auto, cpu"):
        choose_device("cuda:99")


@pytest.mark.parametrize(
    ("gpus", "setting", "expected"),
    [
        (0, "auto", ["cpu"]),
        (3, "cpu", ["cpu"]),
        (1, "auto", ["cuda:0"]),
        (3, "auto", ["cuda:0", "cuda:1", "cuda:2"]),
        (3, "cuda:1", ["cuda:1"]),
        (12, "cuda:11,0", ["cuda:11", "cuda:0"]),
    ],
)
def test_devices(gpus: int, setting: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert [str(device) for device in choose_devices(setting)] == expected
    if setting == "auto" or len(expected) == 1:
        assert str(choose_device(setting)) == expected[0]
        return
    with pytest.raises(ValueError, match="expected one device, found 'cuda:11,0'"):
        choose_device(setting)


@pytest.mark.parametrize(
    ("gpus", "setting"),
    [(0, "cuda:0"), (2, "cuda:2"), (2, "cuda:0,2"), (2, "cuda:0,0"), (2, "cuda:"), (2, "cuda"), (2, "0,1"),
     (2, "cuda:0,"), (2, "cuda:-1"), (2, "auto:0"), (2, "gpu"), (2, "")],
)  # fmt: skip
def test_devices_that_cannot_be(gpus: int, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    several = " or several GPUs, as in cuda:0,1" if gpus else ""
    known = ", ".join(["auto", "cpu", *(f"cuda:{i}" for i in range(gpus))])
    with pytest.raises(ValueError, match=f"^expected a device among {known}{several}, found {setting!r}$"):
        choose_devices(setting)
