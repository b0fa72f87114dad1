"""Training of SP-Ctrl and of the baselines it is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spctrl.training.dataset import SpCtrlDataset

__all__ = ["SpCtrlDataset"]


def __getattr__(name: str) -> Any:
    """The dataset needs torch, which the configuration of a run must not wait for."""
    if name == "SpCtrlDataset":
        from spctrl.training.dataset import SpCtrlDataset

        return SpCtrlDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
