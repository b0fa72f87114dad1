"""JSON documents of a store or an export (``spctrl.documents``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spctrl.documents import MAX_DOCUMENT_BYTES, parse_document

if TYPE_CHECKING:
    from tasks.files import Files


def read_document(files: Files, name: str) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: it is not there.
        StoreError: it cannot be read, or is too large.
        ValueError: it is not JSON, nested too deep, or has texts that cannot be encoded.
    """
    return parse_document(files.read(name, max_bytes=MAX_DOCUMENT_BYTES))
