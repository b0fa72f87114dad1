"""Entries of an annotation file, decoded one by one; their whole numbers may be written as text, float or boolean."""

from __future__ import annotations

import re
from typing import Generic, TypeVar

import msgspec

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises."""

_WHOLE_FIELDS = frozenset(
    {"id", "image_id", "category_id", "num_keypoints", "iscrowd", "width", "height", "background"}
)
_WHOLE_TEXT = re.compile(r"\s*([+-]?\d{1,19})(?:\.0*)?\s*", re.ASCII)
_LARGEST_EXACT_FLOAT = 2.0**53

Entry = TypeVar("Entry")


class EntryDecoder(Generic[Entry]):
    """Decodes entries of one type.

    Attributes:
        num_converted: entries in which a whole number was written in another way.
    """

    def __init__(self, kind: type[Entry]) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self.num_converted = 0

    def decode(self, entry: msgspec.Raw) -> tuple[Entry, msgspec.Raw]:
        """The entry's fields, and the entry with its whole numbers written as such.

        Raises:
            msgspec.DecodeError, UnicodeDecodeError, RecursionError: it cannot be read.
        """
        try:
            return self._decoder.decode(entry), entry
        except msgspec.ValidationError:
            converted = _with_whole_numbers(entry)
            if converted is None:
                raise
        decoded = self._decoder.decode(converted)
        self.num_converted += 1
        return decoded, converted


def whole_number_in(entry: msgspec.Raw, name: str) -> int | None:
    """The value of a field of an entry that cannot be decoded; None where it is no whole number."""
    try:
        token = msgspec.json.decode(entry, type=dict[str, msgspec.Raw])[name]
        converted = _whole_number(token, name)
        return msgspec.json.decode(token, type=int) if converted is None else converted
    except (*UNREADABLE, KeyError):
        return None


def _with_whole_numbers(entry: msgspec.Raw) -> msgspec.Raw | None:
    """An entry whose ids, sizes and counts are written as whole numbers; None where nothing was to be changed."""
    try:
        fields = msgspec.json.decode(entry, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        return None
    converted = {
        name: msgspec.Raw(b"%d" % number)
        for name in fields.keys() & _WHOLE_FIELDS
        if (number := _whole_number(fields[name], name)) is not None
    }
    return msgspec.Raw(msgspec.json.encode({**fields, **converted})) if converted else None


def _whole_number(token: msgspec.Raw, name: str) -> int | None:
    """The whole number that a text or a float stands for; None for anything else, also for whole numbers."""
    value = msgspec.json.decode(token)
    if isinstance(value, float) and value.is_integer() and abs(value) <= _LARGEST_EXACT_FLOAT:
        return int(value)
    if isinstance(value, str) and (match := _WHOLE_TEXT.fullmatch(value)):
        return int(match[1])
    if name == "iscrowd" and (value is None or isinstance(value, bool)):
        return int(bool(value))
    return None
