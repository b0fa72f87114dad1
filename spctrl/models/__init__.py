"""SP-Ctrl's networks: the spatial-text embedding, the ControlNet that it feeds, keypoint tokens, attention maps.

Importing this package loads no torch; its classes are loaded when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spctrl.models.controlnet import SpCtrlControlNetModel
    from spctrl.models.embedding import SpatextEmbedding

__all__ = ["SpCtrlControlNetModel", "SpatextEmbedding"]


def __getattr__(name: str) -> Any:
    if name == "SpatextEmbedding":
        from spctrl.models.embedding import SpatextEmbedding

        return SpatextEmbedding
    if name == "SpCtrlControlNetModel":
        from spctrl.models.controlnet import SpCtrlControlNetModel

        return SpCtrlControlNetModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
