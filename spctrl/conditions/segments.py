"""Instance masks as the stage ``segments`` stores them: COCO's compressed run lengths in JSON."""

from __future__ import annotations

from typing import Any

from spctrl.io.documents import parse_document

TYPES = {"annotation_index": int, "size": list, "counts": str, "area": int, "predicted_iou": int | float}


def parse_segments(data: bytes) -> list[dict[str, Any]]:
    """The instances of one image, with the fields of ``TYPES``; run lengths are not checked.

    Raises:
        ValueError: it is no such document.
    """
    found = parse_document(data)
    instances = found.get("instances") if isinstance(found, dict) else None
    if not isinstance(instances, list) or not all(map(_is_instance, instances)):
        raise ValueError(f"expected a list of instances with {', '.join(TYPES)}, found something else")
    return instances


def _is_instance(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(name), kind) and not isinstance(found[name], bool)
        for name, kind in TYPES.items()
    )
