"""JSON documents that may come from anywhere: small, shallow and encodable, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_DOCUMENT_BYTES = 2**24
"""Names of 200,000 packs fit; decoded, the worst that fits takes some 25 times as much."""
MAX_CONTAINERS = 2**16
"""Lists and objects take far more memory and time than their text."""
MAX_DEPTH = 64
"""Of lists and objects in each other; whoever prints or compares them walks down."""


def read_document_file(path: Path, max_bytes: int) -> Any:
    """The content of a JSON file on this machine.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, no regular file, or as in ``parse_document``.
    """
    if path.exists() and not path.is_file():
        raise ValueError("expected a file, found something else")  # a pipe would never end
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"expected at most {max_bytes:,} bytes, found more")
    return parse_document(data)


def parse_document(data: bytes) -> Any:
    """The content of a JSON file's bytes.

    Raises:
        ValueError: it is not JSON, nested too deep, or has texts that cannot be encoded.
    """
    if (containers := data.count(b"[") + data.count(b"{")) > MAX_CONTAINERS:
        raise ValueError(f"expected at most {MAX_CONTAINERS:,} lists and objects, found {containers:,}")
    try:
        found = json.loads(data.decode())  # json would also take UTF-16, and bytes that are no text
    except RecursionError:
        raise ValueError(f"expected at most {MAX_DEPTH} levels of nesting, found more") from None
    _check_depth(found)
    if b"\\ud" in data.lower():
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text: UnicodeEncodeError
    return found


def _check_depth(found: Any) -> None:
    level = [found]
    for _ in range(MAX_DEPTH):
        level = [
            each
            for outer in level
            if isinstance(outer, dict | list)
            for each in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"expected at most {MAX_DEPTH} levels of nesting, found more")
