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
_EXACT_FLOATS = 2.0**53
"""Smaller ones stand for one whole number each."""

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
        return whole_number(msgspec.json.decode(token), name)
    except (*UNREADABLE, KeyError):
        return None


def _with_whole_numbers(entry: msgspec.Raw) -> msgspec.Raw | None:
    """An entry whose ids, sizes and counts are written as whole numbers; None where nothing was to be changed."""
    try:
        fields = msgspec.json.decode(entry, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        return None
    converted = {}
    for name in fields.keys() & _WHOLE_FIELDS:
        value = msgspec.json.decode(fields[name])
        number = whole_number(value, name)
        if number is not None and type(value) is not int:
            converted[name] = msgspec.Raw(b"%d" % number)
    return msgspec.Raw(msgspec.json.encode({**fields, **converted})) if converted else None


def whole_number(value: object, name: str) -> int | None:
    """The whole number that a JSON value stands for; None where it is none.

    Args:
        value: a number, a text of digits (also with a fraction of zeros), or of ``iscrowd`` a boolean or null.
        name: of the field.
    """
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_FLOATS:
        return int(value)
    if isinstance(value, str) and (match := _WHOLE_TEXT.fullmatch(value)):
        return int(match[1])
    if name == "iscrowd" and (value is None or isinstance(value, bool)):
        return int(bool(value))
    return None
