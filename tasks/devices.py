"""The devices of image models on this machine: one worker process for each."""

from __future__ import annotations

import os
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
        return WorkerDevices("cpu", [{} for _ in devices])
    # Numbers are those of the GPUs that this process sees.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = (
        visible.split(",") if visible else [str(i) for i in range(max(each.index for each in devices) + 1)]
    )
    return WorkerDevices("cuda:0", [{"CUDA_VISIBLE_DEVICES": names[each.index].strip()} for each in devices])
