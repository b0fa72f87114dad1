"""Whether a file's bytes are UTF-8, and what to do where they are not."""

from __future__ import annotations

import codecs

_DECODED_AT_ONCE = 2**20
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CONTEXT, _LOOKED_AT = 20, 1024


def utf8_fault(data: bytes) -> str | None:
    """Why bytes are no text in UTF-8, as part of an error message; None where they are.

    Args:
        data: content of a file that is expected to be text.
    """
    is_utf16 = data.startswith(_UTF16_MARKS) or data[:2].count(0) == 1
    position = 0 if is_utf16 else _first_invalid_byte(data)
    if position is None:
        return None
    if is_utf16:
        advice = "Convert the file, such as by iconv -f UTF-16 -t UTF-8"
    elif b"\0" in data[:_LOOKED_AT]:
        advice = "Is the file text, and not compressed?"
    else:
        advice = "Convert the file to UTF-8; if it is in Latin-1, by iconv -f LATIN1 -t UTF-8"
    return f"expected text in UTF-8, found other bytes at {location(data, position)}. {advice}"


def location(data: bytes, position: int) -> str:
    """Line and byte of a position in a file's bytes, with what is around it."""
    line = data.count(b"\n", 0, position) + 1
    around = data[max(0, position - _CONTEXT) : position + _CONTEXT]
    return f"line {line}, byte {position}, near {around!r}"


def _first_invalid_byte(data: bytes) -> int | None:
    if data.isascii():
        return None
    decoder = codecs.getincrementaldecoder("utf-8")()
    # In parts: the text of a whole file may take four times its bytes.
    for start in range(0, len(data), _DECODED_AT_ONCE):
        pending = len(decoder.getstate()[0])
        stop = start + _DECODED_AT_ONCE
        try:
            decoder.decode(data[start:stop], final=stop >= len(data))
        except UnicodeDecodeError as error:
            return start - pending + error.start
    return None
