"""Files of arrays of unknown origin: no code, and no more memory than their size allows."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory import MIB, memory_of

from spctrl.io.arrays import ArraysError, read_arrays


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def npy(shape: str, data: bytes = b"", dtype: str = "'<f8'") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def smaller_size_stated() -> bytes:
    """A bomb whose directory says that it expands to 8 bytes."""
    data = zipped({"a.npy": npy("(12500000,)", bytes(10**8))}, zipfile.ZIP_DEFLATED)
    size = len(npy("(12500000,)", bytes(10**8))).to_bytes(4, "little")
    assert data.count(size) == 2
    return data.replace(size, (200).to_bytes(4, "little"))


BOMBS: dict[str, Callable[[], bytes]] = {
    "deflated": lambda: zipped({"a.npy": npy("(12500000,)", bytes(10**8))}, zipfile.ZIP_DEFLATED),
    "smaller size stated": smaller_size_stated,
    "shape": lambda: zipped({"a.npy": npy("(10**9,)".replace("10**9", "1000000000"))}),
    "negative shape": lambda: zipped({"a.npy": npy("(-1000000000, -1)")}),
    "item": lambda: zipped({"a.npy": npy("(1,)", dtype="'V2000000000'")}),
    "objects": lambda: zipped({"a.npy": npy("(1,)", b"cos\nsystem\n", "'|O'")}),
    "nested objects": lambda: zipped({"a.npy": npy("(1,)", b"", "[('a', '|O')]")}),
    "nested header": lambda: zipped({"a.npy": npy("(" * 5000 + ")" * 5000)}),
    "many": lambda: zipped({f"{i}.npy": npy("(0,)") for i in range(300)}),
    "no array": lambda: zipped({"a.npy": b"text"}),
    "no zip": lambda: b"PK\x03\x04text",
    "empty": lambda: b"",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_file_is_refused_with_little_memory(bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    assert (
        memory_of(lambda: path.write_bytes(BOMBS[bomb]())) >= 0
    )  # in a process of its own: it takes memory to make

    def refuse() -> None:
        with pytest.raises(ArraysError, match=r"a\.npz: expected arrays as numpy's savez writes them: "):
            read_arrays(path)

    assert memory_of(refuse) < 32 * MIB


def test_a_pickle_in_an_array_is_not_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([Harmful(tmp_path / "made")], dtype=object))
    with pytest.raises(ArraysError, match="found objects, which are not read"):
        read_arrays(tmp_path / "a.npz")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_genuine_files_are_read(save: Callable[..., None], tmp_path: Path) -> None:
    arrays = {
        "image_ids": np.arange(100),
        "values": np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32),
        "transposed": np.ones((3, 4)).T,
        "names": np.array(["AP", "größer"]),
        "flag": np.array(True),
        "none": np.empty(0),
    }
    save(tmp_path / "a.npz", **arrays)
    found = read_arrays(tmp_path / "a.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_every_reader_of_arrays_refuses_a_bomb(tmp_path: Path) -> None:
    """Statistics of features, of users too, features of a stage, and resamples of scores."""
    from types import SimpleNamespace

    from eval.fid import FeaturesError, load_statistics
    from eval.scores import SAMPLES, SCORES, SCORES_SCHEMA, read_scores
    from tasks.experiment.evaluate import read_features

    assert memory_of(lambda: (tmp_path / SAMPLES).write_bytes(BOMBS["deflated"]())) >= 0
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([], schema=SCORES_SCHEMA), tmp_path / SCORES)
    run: Any = SimpleNamespace(path=lambda name: tmp_path / SAMPLES)
    with pytest.raises(FeaturesError, match="expected statistics of features"):
        load_statistics(tmp_path / SAMPLES)
    for read in (lambda: read_features(run), lambda: read_scores(tmp_path)):
        with pytest.raises(ArraysError, match="of 100,000,"):
            read()
