"""The devices of image models on this machine: one worker process for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from spctrl.errors import ExpectedError


class WorkerDevices(NamedTuple):
    """How workers come to a device each.

    Attributes:
        device: what each of them calls its own.
        environments: environment variables of each worker.
    """

    device: str
    environments: list[dict[str, str]]


def devices_of_workers(setting: str) -> WorkerDevices:
    """A worker for each device of ``[executor] device``. A worker sees no GPU but its own.

    Raises:
        ExpectedError: there is no such device.
    """
    if setting == "cpu":  # without importing torch
        return WorkerDevices("cpu", [{}])
    from spctrl.image_models.base import choose_devices

    try:
        devices = choose_devices(setting)
    except ValueError as error:
        raise ExpectedError(f"[executor] device: {error}") from None
    if devices[0].type == "cpu":
        return WorkerDevices("cpu", [{}])
    return WorkerDevices("cuda:0", [gpu_environment([str(each.index)]) for each in devices])


def gpu_environment(numbers: Sequence[str]) -> dict[str, str]:
    """Environment variables of a process that sees some of the GPUs that this process sees, by their numbers here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = dict(enumerate(visible.split(","))) if visible else {}
    chosen = [names.get(int(each), each).strip() if each.isdecimal() else each for each in numbers]
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}


def first_device(setting: str) -> str:
    """Of ``[executor] device``, for what uses one device only."""
    return setting.partition(",")[0]
