"""Files of ``torch.save`` that ask for more memory than they take are refused before PyTorch reads them."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
from memory import MIB, memory_of

torch = pytest.importorskip("torch", reason="the models extra is not installed")

from spctrl.weights import TorchFileError, mapped_torch_file, read_torch_file  # noqa: E402

READERS = {"read": read_torch_file, "mapped": mapped_torch_file}
GIB = 2**30
HUGE = b"\x8a\x05" + GIB.to_bytes(5, "little")  # an integer
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x04tQK\x00" + HUGE + b"\x85K\x00\x85\x89ccollections\nOrderedDict\n)RtR"
)
"""A number that looks like 2**30 of them."""


def archive(path: Path, pickled: bytes | None = None, **options: Any) -> None:
    """Write a torch file of 4 numbers, with another pickle or in another kind of archive."""
    plain = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", **options) as target:
        for name in source.namelist():
            is_pickle = pickled is not None and name.endswith("data.pkl")
            target.writestr(name, pickled if is_pickle and pickled else source.read(name))


def refused(path: Path, match: str) -> None:
    for read in READERS.values():
        with pytest.raises(TorchFileError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pickled", "match"),
    [
        (b"c__builtin__\nbytearray\n" + HUGE + b"\x85R", "bytearray"),
        (b"ctorch\nFloatTensor\n" + HUGE + b"\x85R", "torch.FloatTensor"),
        (b"ctorch\nFloatTensor\n" + HUGE + b"\x85\x81", "torch.FloatTensor"),
        (b"ctorch.storage\nUntypedStorage\n" + HUGE + b"\x85R", "not callable"),
        (b"c__builtin__\nset\n" + TENSOR + b"\x85R", "set of a list"),
        (b"ccollections\nOrderedDict\n" + TENSOR + b"\x85R", "OrderedDict of pairs"),
        (b"ccollections\nOrderedDict\n]" + TENSOR + b"a\x85R", "OrderedDict of pairs"),
        (b"ctorch\nSize\n" + TENSOR + b"\x85R", "Size of a list"),
        (b"ctorch\nSize\n" + TENSOR + b"R", "must be an iterable"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R", "latin1"),
        (b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x05\x00\x00\x00V9999\x85R\x85R", "types of numbers"),
        (b"\x96" + GIB.to_bytes(8, "little"), "bytearray|BYTEARRAY8"),
        (TENSOR.replace(b"cpuK\x04", b"cpu" + HUGE), "storages of as many numbers"),
        (
            b"c__builtin__\nset\nq\x00](" + b"".join(b"M" + struct.pack("<H", n) for n in range(9999))
            + b"eq\x01" + 999 * b"h\x00h\x01\x85R0" + b"N",
            "calls with at most",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_call_that_allocates_is_refused(pickled: bytes, match: str, tmp_path: Path) -> None:
    archive(tmp_path / "a.pth", b"\x80\x02" + pickled + b".")
    with (tmp_path / "legacy.pth").open("wb") as file:
        for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(each, file, 2)
        file.write(b"\x80\x02" + pickled + b"." + pickle.dumps(["0"], 2) + bytes(24))

    def refuse() -> None:
        refused(tmp_path / "a.pth", match)
        refused(tmp_path / "legacy.pth", match)

    assert memory_of(refuse) < 64 * MIB


@pytest.mark.parametrize("comment", [b"", b"PK\x05\x06xxxx", b"any"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_is_one_for_pytorch_and_is_not_compressed(
    compression: int, comment: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "a.pth"
    archive(path, compression=compression)
    with zipfile.ZipFile(path, "a") as target:
        target.comment = comment
    if compression == zipfile.ZIP_STORED and not comment:
        assert read_torch_file(path)["a"].tolist() == [0] * 4
    else:
        refused(path, "without a comment" if comment else "not compressed")


def test_two_directories_are_refused(tmp_path: Path) -> None:
    """PyTorch goes where the end of the file says, Python to what lies before it."""
    one, path = tmp_path / "one.pth", tmp_path / "a.pth"
    archive(one, compression=zipfile.ZIP_DEFLATED)
    archive(path)
    path.write_bytes(one.read_bytes() + path.read_bytes())
    refused(path, "a zip directory at the end")


@pytest.mark.parametrize("is_archive", [True, False])
def test_what_torch_saves_is_read(is_archive: bool, tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameter": layer.weight,
        "meta": {"time": "now", "bytes": b"ab", "set": {1, 2}, "complex": 1j, "none": None, "list": [1, (2.5, True)]},
        "counter": collections.Counter("aab"),
        "types": [torch.float16, torch.bfloat16, torch.int64, torch.bool],
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "random": torch.get_rng_state(),
        "half": torch.zeros(2, dtype=torch.bfloat16),
        "view": torch.arange(6).view(2, 3).T,
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=is_archive)
    for read in READERS.values():
        found = read(tmp_path / "a.pth")
        assert found.keys() == content.keys()
        for key in ("meta", "counter", "types", "size", "device"):
            assert found[key] == content[key]
        assert torch.equal(found["view"], content["view"])
        assert torch.equal(found["state_dict"]["weight"], layer.weight)
