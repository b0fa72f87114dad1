"""Packs: many small artifacts in one file that other tools open.

Tar packs hold files, such as ``<key>.png``. Safetensors packs hold latents, which a loader maps into memory.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

TAR, SAFETENSORS = ".tar", ".safetensors"
LATENT_CHANNELS = 8
"""Mean and log variance of Stable Diffusion's four channels."""
MAX_ARTIFACT_BYTES = 2**29
"""Of the largest image that a stage makes, many times over."""

Place = tuple[int, int]
"""Offset and size in bytes."""


def container_of(suffix: str) -> str:
    """The kind of pack for artifacts of a suffix."""
    return SAFETENSORS if suffix == SAFETENSORS else TAR


def write_container(suffix: str, artifacts: Sequence[tuple[str, bytes]]) -> tuple[bytes, list[Place]]:
    """A pack of (key, artifact) pairs, and where in it each artifact lies."""
    return (_safetensors if container_of(suffix) == SAFETENSORS else _tar)(suffix, artifacts)


def container_size(container: str, places: Iterable[Place]) -> int:
    """Size of the whole pack that holds artifacts at these places."""
    end = max((offset + size for offset, size in places), default=0)
    if container == SAFETENSORS:
        return end
    # Tar pads members to blocks, closes with two empty ones, and pads that to a record.
    blocks = -(-end // tarfile.BLOCKSIZE) + 2
    return -(-blocks * tarfile.BLOCKSIZE // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def suffix_in(pack: Path) -> str:
    """Suffix of a pack's artifacts; empty where it holds none."""
    if pack.suffix == SAFETENSORS:
        return SAFETENSORS
    with pack.open(
        "rb"
    ) as file:  # not tarfile.open: it decompresses, and reads the long names of other kinds of tar
        header = file.read(tarfile.BLOCKSIZE)
    try:
        return Path(tarfile.TarInfo.frombuf(header, "utf-8", "strict").name).suffix
    except (tarfile.HeaderError, UnicodeDecodeError):  # the empty block at the end, or damage
        return ""


def _tar(suffix: str, artifacts: Sequence[tuple[str, bytes]]) -> tuple[bytes, list[Place]]:
    buffer = io.BytesIO()
    places = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, data in artifacts:
            member = tarfile.TarInfo(f"{key}{suffix}")
            member.size = len(data)
            places.append((tar.offset + tarfile.BLOCKSIZE, len(data)))
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue(), places


def _safetensors(suffix: str, artifacts: Sequence[tuple[str, bytes]]) -> tuple[bytes, list[Place]]:
    """Artifacts are square latents: (8, side, side) float16, little-endian, in C order."""
    import numpy as np
    from safetensors.numpy import save

    tensors = {}
    for key, data in artifacts:
        values = np.frombuffer(data, "<f2")
        side = math.isqrt(len(values) // LATENT_CHANNELS)
        tensors[key] = values.reshape(LATENT_CHANNELS, side, side)
    packed = save(tensors)
    data_start = 8 + int.from_bytes(packed[:8], "little")
    header = json.loads(packed[8:data_start])
    offsets = [header[key]["data_offsets"] for key, _ in artifacts]
    return packed, [(data_start + first, last - first) for first, last in offsets]
