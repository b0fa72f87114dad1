"""Generating images from poses: the pipeline, what a method is, and the tools that look at one pose at a time.

Importing this package loads no torch; ``SpCtrlPipeline`` is loaded when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spctrl.inference.pipeline import SpCtrlPipeline

__all__ = ["SpCtrlPipeline"]


def __getattr__(name: str) -> Any:
    if name == "SpCtrlPipeline":
        from spctrl.inference.pipeline import SpCtrlPipeline

        return SpCtrlPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
