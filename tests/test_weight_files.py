"""Which files of a folder count as a network's weights, and that all genuine layouts load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the models extra is not installed")

from spctrl.io.network_size import MAX_NUMBER, largest, tensor_shapes  # noqa: E402
from spctrl.models import stable_diffusion, tiny  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "sd"
    tiny.build_stable_diffusion(path)
    return path


def sharded(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1


def pickled(model: Any, folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.unlink()
    is_text = (folder.name == "text_encoder") + 0
    torch.save(model.state_dict(), folder / ("diffusion_pytorch_model.bin", "pytorch_model.bin")[is_text])


def beside_others(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, variant="fp16")
    for name in ("training_args.bin", "optimizer.bin", "aaa.safetensors"):
        (folder / name).write_bytes(b"of another kind")


def with_position_ids(model: Any, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    if folder.name == "text_encoder":
        state = load_file(folder / "model.safetensors")
        prefix = "text_model." if any(key.startswith("text_model.") for key in state) else ""
        state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [sharded, pickled, beside_others, with_position_ids])
@pytest.mark.parametrize(
    ("part", "load"),
    [("unet", stable_diffusion.load_unet), ("text_encoder", stable_diffusion.load_text_encoder)],
)
def test_genuine_layouts_load(
    change: Callable[[Any, Path], None], part: str, load: Callable[[Path], Any], folder: Path, tmp_path: Path
) -> None:
    expected = load(folder)
    shutil.copytree(folder / part, tmp_path / part)
    if change is sharded:
        for path in (tmp_path / part).glob("*.safetensors"):
            path.unlink()
    change(expected, tmp_path / part)
    found = load(tmp_path).state_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("shards", [{}, {"a": "../b.safetensors"}, [1]])
def test_an_index_names_files_beside_it(shards: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: expected a weight_map"):
        tensor_shapes(tmp_path)


def test_only_numbers_in_files_that_are_opened_count(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(10**9, 0)}, tmp_path / "model.safetensors")
    save_file({"b": torch.zeros(2 * MAX_NUMBER)}, tmp_path / "other.safetensors")
    assert tensor_shapes(tmp_path) == {"a": (10**9, 0)}
    assert largest(tensor_shapes(tmp_path)) == MAX_NUMBER
