"""What a method may be, the seeds of its images, and how files of generated images are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from spctrl.configuration import ConfigurationError, read_config
from spctrl.inference.checkpoints import learned_embeds_file, network_folder
from spctrl.inference.folders import find_images, generated_path, list_images
from spctrl.inference.methods import Generation, Method, Sampler, image_seed

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "generate").glob("*.yaml"))


def method(**values: Any) -> Method:
    return msgspec.convert({"name": "one", "kind": "spctrl", "checkpoint": "folder", **values}, Method)


def test_the_sampler_is_the_released_one_by_default() -> None:
    sampler = method().sampler
    assert (sampler.steps, sampler.guidance_scale, sampler.conditioning_scale) == (50, 7.5, 1.0)
    assert (sampler.control_guidance_start, sampler.control_guidance_end) == (0.0, 1.0)
    assert sampler.resolution == 512


def test_an_index_map_is_the_condition_of_sp_ctrl() -> None:
    assert method().condition == "spatext"
    assert method(kind="external", checkpoint="", folder="images").condition is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "../up"}, "name"),
        ({"name": ""}, "name"),
        ({"checkpoint": ""}, "needs checkpoint or train, found none"),
        ({"train": "configs/train/x.yaml"}, "found checkpoint and train"),
        ({"kind": "external"}, "needs folder, found checkpoint"),
        ({"kind": "controlnet"}, "needs as condition openpose or mask"),
        ({"kind": "controlnet", "condition": "spatext"}, "found spatext"),
        ({"condition": "openpose"}, "found openpose"),
        ({"images_per_pose": 0}, "images_per_pose"),
        ({"sampler": {"resolution": 100}}, "multiple of 8"),
        ({"sampler": {"steps": 0}}, "steps"),
        ({"sampler": {"control_guidance_start": 0.5, "control_guidance_end": 0.5}}, "start < end"),
        (
            {"kind": "t2i_adapter", "condition": "mask", "sampler": {"control_guidance_end": 0.5}},
            "acts in all steps",
        ),
        ({"sampler": {"stepps": 3}}, "stepps"),
        ({"kind": "humansd"}, "humansd"),
    ],
)
def test_a_method_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        method(**values)


def test_methods_of_one_file_have_different_names(tmp_path: Path) -> None:
    one = {"name": "one", "kind": "external", "folder": "x"}
    path = tmp_path / "twice.yaml"
    path.write_bytes(msgspec.yaml.encode({"dataset": "ap10k", "methods": [one, one]}))
    with pytest.raises(ConfigurationError, match="different names"):
        read_config(path, Generation)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_in_the_repository_are_valid(path: Path) -> None:
    for each in read_config(path, Generation).methods:
        assert not each.train or (path.parents[2] / each.train).is_file()


def test_there_are_configurations() -> None:
    assert CONFIGS


def test_seeds_are_the_same_everywhere() -> None:
    assert image_seed(0, 1996, 0) == 6532091051264660871
    seeds = {image_seed(seed, i, k) for seed in range(3) for i in range(100) for k in range(3)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_sampler_settings_survive_json() -> None:
    one = method(sampler={"steps": 3})
    assert msgspec.json.decode(msgspec.json.encode(one), type=Method) == one
    assert one.sampler == Sampler(steps=3)
    assert hash(one) == hash(method(sampler={"steps": 3}))


def test_images_are_found_by_name_and_number(tmp_path: Path) -> None:
    for name in ("a/b/0.jpg", "a/b/1.PNG", "c.png", "notes.txt", "d/0.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths = list_images(tmp_path)
    assert paths == ["a/b/0.jpg", "a/b/1.PNG", "c.png", "d/0.webp"]
    assert find_images(paths, "a/b", 1) == [generated_path("a/b", 0)]
    assert find_images(paths, "c", 2) == ["c.png", None]
    assert find_images(paths, "real_human/dance/d", 1) == ["d/0.webp"]
    assert find_images(paths, "e", 1) == [None]


@pytest.mark.parametrize("inner", ["", "controlnet", "adapter"])
def test_a_checkpoint_is_the_networks_folder_or_the_one_around_it(tmp_path: Path, inner: str) -> None:
    network = tmp_path / "checkpoint" / inner
    network.mkdir(parents=True)
    (network / "config.json").touch()
    assert network_folder(tmp_path / "checkpoint") == network
    assert learned_embeds_file(tmp_path / "checkpoint") is None
    (network.parent / "learned_embeds.bin").touch()
    assert learned_embeds_file(tmp_path / "checkpoint") == network.parent / "learned_embeds.bin"
    assert learned_embeds_file(network) == network.parent / "learned_embeds.bin"
