"""Changes to inputs that keep enough of their form to get past the first check.

Each takes bytes and a source of chance and gives bytes; what it cannot parse it treats as plain bytes.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from random import Random
from typing import Any

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 32_767, 32_768, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1)
JSON_TOKENS = (
    "NaN", "-Infinity", "1e999", "-0", "1.5", "9" * 400, "9" * 5000, '"\\ud800"', '"\\u0000"', '"../../x"',
    '"/etc/passwd"', '"a\\nb"', '"' + "x" * 300 + '"', '"\u202e\\\\gpj"', "[" * 3000 + "]" * 3000, "null", "true",
    "[]", "{}", str(2**31), str(2**63), str(-(2**63) - 1), '"=cmd"', '"<script>"',
)  # fmt: skip
YAML_TOKENS = (
    *"[]{}:,&*!|>-?#%@`\"'\n\t ~=", "<<: ", "- ", ": ", "&a ", "*a", "!!int ", "!!binary ", "!!timestamp ",
    "!!python/object/apply:os.system ", "---\n", "? ", "null", ".nan", ".inf", "1e999", "0x", "0b_", "9" * 5000,
    "2001-99-99", "1:99:99", "\x00", "\ufeff", "\u2028", "../../etc/passwd", "{category.__class__}", "{0!r}", "{{",
)  # fmt: skip
PICKLE_TOKENS = (
    b"cos\nsystem\n", b"c__builtin__\neval\n", b"c__builtin__\ngetattr\n", b"cposix\nsystem\n",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nHalfStorage\n",
    b"(", b"t", b"R", b"o", b"b", b"Q", b"\x86", b"\x93", b"\x81",
    b"\x8a\x05\x00\x00\x00\x00\x7f", b"J\xff\xff\xff\x7f", b"]", b"}", b"q\x00", b"h\x00", b".",
)  # fmt: skip


def mutate_bytes(data: bytes, chance: Random) -> bytes:
    """Some bytes flipped, cut out, doubled, or overwritten with numbers that mean trouble."""
    found = bytearray(data or b"\0")
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        start = chance.randrange(len(found) + 1)
        stop = min(len(found), start + chance.choice((1, 2, 4, 16, 256)))
        match chance.randrange(5):
            case 0:
                found[start:stop] = bytes(chance.randrange(256) for _ in range(stop - start))
            case 1:
                del found[start:stop]
            case 2:
                found[start:start] = found[start:stop] * chance.choice((1, 1, 2, 50))
            case _:
                number, form = chance.choice(NUMBERS), chance.choice(("<I", ">I", "<H", ">H", "B"))
                packed = struct.pack(form, number % 256 ** struct.calcsize(form))
                found[start : start + len(packed)] = packed
    return bytes(found)


def mutate_text(data: bytes, chance: Random, tokens: tuple[str, ...]) -> bytes:
    """Some stretches cut out, doubled or replaced by tokens that mean something to the reader."""
    for _ in range(chance.randint(1, 5)):
        start = chance.randrange(len(data) + 1)
        stop = min(len(data), start + chance.choice((0, 1, 2, 5, 20, 200)))
        token = chance.choice(tokens).encode("utf-8", "surrogatepass")
        between = chance.choice((b"", data[start:stop] * 2, token, token))
        data = data[:start] + between + data[stop:]
    return data


def mutate_yaml(data: bytes, chance: Random) -> bytes:
    """The text behind the first byte, which says what the text is."""
    return data[:1] + mutate_text(data[1:], chance, YAML_TOKENS)


def mutate_json(data: bytes, chance: Random) -> bytes:
    """A JSON value with some of its parts removed, repeated, moved or replaced."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_text(data, chance, JSON_TOKENS)
    tokens: dict[str, str] = {}
    for _ in range(chance.randint(1, 4)):
        places = list(_places(value, chance))
        if places:
            container, key = chance.choice(places)
            _edit(container, key, chance, tokens)
    try:
        text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    except (ValueError, RecursionError):
        return mutate_text(data, chance, JSON_TOKENS)
    for name, token in tokens.items():
        text = text.replace(f'"{name}"', token)
    found = text.encode("utf-8", "surrogatepass")
    return mutate_text(found, chance, JSON_TOKENS) if chance.random() < 0.1 else found


def _places(value: Any, chance: Random) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a value, of long lists only some."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            keys: list[Any] = list(each)
        elif isinstance(each, list):
            keys = list(range(len(each)))
        else:
            continue
        for key in keys if len(keys) <= 20 else chance.sample(keys, 20):
            yield each, key
            waiting.append(each[key])


def _edit(container: Any, key: Any, chance: Random, tokens: dict[str, str]) -> None:
    if not (key in container if isinstance(container, dict) else key < len(container)):
        return  # an earlier edit removed it
    match chance.randrange(7):
        case 0:
            del container[key]
        case 1 if isinstance(container, list):
            copies = [copy.deepcopy(container[key]) for _ in range(chance.choice((1, 1, 2, 100)))]
            container[key:key] = copies
        case 2 if isinstance(container, dict):
            container[chance.choice([*container, "id", "image_id", "keypoints_21", "z"])] = container.pop(key)
        case 3:
            container[key] = [container[key]]
        case 4 if isinstance(container[key], int | float):
            container[key] += chance.choice((-1, 1, 0.5, -1000, 10**6, 2**31, 2**63))
        case _:
            name = f"token {len(tokens)}"
            tokens[name] = chance.choice(JSON_TOKENS)
            container[key] = name


def mutate_image(data: bytes, chance: Random) -> bytes:
    """An image file; the parts of a PNG keep right checksums, without which nothing of them would be read."""
    if not data.startswith(PNG_SIGNATURE) or chance.random() < 0.1:
        return mutate_bytes(data, chance)
    chunks = list(_png_chunks(data))
    for _ in range(chance.randint(1, 3)):
        if not chunks:
            break
        at = chance.randrange(len(chunks))
        kind, body = chunks[at]
        match chance.randrange(7):
            case 0:
                chunks[at] = kind, mutate_bytes(body, chance)
            case 1 if kind == b"IHDR" and len(body) >= 8:
                size = struct.pack(">II", chance.choice(NUMBERS), chance.choice(NUMBERS))
                chunks.insert(chance.choice((at, at, len(chunks) - 1)), (kind, size + body[8:]))
            case 2:
                chunks.insert(chance.randrange(len(chunks) + 1), (kind, body))
            case 3:
                del chunks[at]
            case 4:
                chunks[at] = chance.choice((b"tRNS", b"PLTE", b"acTL", b"fcTL", b"fdAT", b"IDAT")), body
            case 5 if kind in (b"IDAT", b"fdAT"):
                zeros = compressed_zeros(chance.choice((1, 10_000, 20_000_000)))
                chunks[at] = kind, zeros if chance.random() < 0.5 else body + zeros
            case _:
                bomb = compressed_zeros(20_000_000)
                inserted = chance.choice(
                    [(b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb),
                     (b"acTL", struct.pack(">II", chance.choice(NUMBERS), 0)), (b"eXIf", chance.randbytes(40))]
                )  # fmt: skip
                chunks.insert(chance.randint(1, len(chunks)), inserted)
    return PNG_SIGNATURE + b"".join(png_chunk(*each) for each in chunks)


@functools.cache
def compressed_zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 9)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """A part of a PNG file, with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 12 + length


def mutate_pickle(data: bytes, chance: Random) -> bytes:
    """A file of ``torch.save``: the pickle in its archive, which is packed again with right checksums."""
    if not data.startswith(b"PK") or chance.random() < 0.1:
        return _with_pickle_tokens(data, chance)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, zlib.error):
        return _with_pickle_tokens(data, chance)
    if members:
        # Mostly the pickle itself, which is the first of an archive.
        name = next(iter(members)) if chance.random() < 0.8 else chance.choice(list(members))
        members[name] = _with_pickle_tokens(members[name], chance)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    return packed.getvalue()


def _with_pickle_tokens(data: bytes, chance: Random) -> bytes:
    if chance.random() < 0.5:
        return mutate_bytes(data, chance)
    start = chance.randrange(len(data) + 1)
    return data[:start] + chance.choice(PICKLE_TOKENS) + data[start + chance.choice((0, 0, 1, 4)) :]
