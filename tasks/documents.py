"""JSON documents of a store or an export, which may come from anywhere: small, shallow and encodable, or refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.files import Files

MAX_DOCUMENT_BYTES = 2**24
"""Names of 200,000 packs fit; decoded, the worst that fits takes some 25 times as much."""
MAX_CONTAINERS = 2**16
"""Lists and objects take far more memory and time than their text."""
MAX_DEPTH = 64
"""Of lists and objects in each other; whoever prints or compares them walks down."""


def read_document(files: Files, name: str) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: it is not there.
        StoreError: it cannot be read, or is too large.
        ValueError: it is not JSON, nested too deep, or has texts that cannot be encoded.
    """
    return parse_document(files.read(name, max_bytes=MAX_DOCUMENT_BYTES))


def parse_document(data: bytes) -> Any:
    """The same of a file's bytes."""
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
