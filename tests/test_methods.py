"""What a method may be, the seeds of its images, and how files of generated images are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from spctrl.configuration import ConfigurationError, read_config
from spctrl.errors import ExpectedError
from spctrl.inference.checkpoints import learned_embeds_file, network_folder
from spctrl.inference.folders import find_images, generated_path, list_images
from spctrl.inference.methods import Generation, Method, Sampler, image_seed, sampler_parameters
from spctrl.storage.files import temporary_name

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "generate").glob("*.yaml"))


def method(**values: Any) -> Method:
    return msgspec.convert({"name": "one", "kind": "spctrl", "checkpoint": "folder", **values}, Method)


def test_the_sampler_is_the_released_one_by_default() -> None:
    sampler = method().sampler
    assert (sampler.steps, sampler.guidance_scale, sampler.conditioning_scale) == (50, 7.5, 1.0)
    assert (sampler.control_guidance_start, sampler.control_guidance_end) == (0.0, 1.0)
    assert sampler.resolution == 512


@pytest.mark.parametrize(
    ("given", "final_sigmas_type", "map_resize"),
    [
        ({}, "zero", "centre"),
        ({"preset": None}, "zero", "centre"),
        ({"preset": "released"}, "sigma_min", "floor"),
        ({"preset": "released", "map_resize": "centre"}, "sigma_min", "centre"),
        ({"preset": "released", "final_sigmas_type": "zero"}, "zero", "floor"),
        ({"map_resize": "floor"}, "zero", "floor"),
    ],
)
def test_a_given_setting_wins_over_the_preset_and_the_preset_over_the_default(
    given: dict[str, Any], final_sigmas_type: str, map_resize: str
) -> None:
    sampler = method(sampler=given).sampler
    assert (sampler.final_sigmas_type, sampler.map_resize) == (final_sigmas_type, map_resize)
    written_out = Sampler(final_sigmas_type=final_sigmas_type, map_resize=map_resize)  # type: ignore[arg-type]
    assert sampler == written_out
    assert sampler_parameters(sampler) == sampler_parameters(written_out)
    assert msgspec.json.decode(msgspec.json.encode(sampler), type=Sampler) == sampler


def test_later_settings_leave_the_fingerprints_of_earlier_images_alone() -> None:
    earlier = {
        "steps": 50,
        "guidance_scale": 7.5,
        "conditioning_scale": 1.0,
        "control_guidance_start": 0.0,
        "control_guidance_end": 1.0,
        "resolution": 512,
        "negative_prompt": "",
        "precision": "auto",
    }
    assert sampler_parameters(Sampler()) == earlier
    assert sampler_parameters(Sampler(final_sigmas_type="zero", map_resize="centre")) == earlier
    assert sampler_parameters(Sampler(preset="released")) == {
        **earlier,
        "final_sigmas_type": "sigma_min",
        "map_resize": "floor",
    }
    # A value that another setting's default happens to be still counts.
    assert sampler_parameters(Sampler(negative_prompt="zero"))["negative_prompt"] == "zero"


def test_the_released_configurations_repeat_the_released_inference() -> None:
    released = [path for path in CONFIGS if path.stem.endswith("_released")]
    assert len(released) == 2
    for path in released:
        for each in read_config(path, Generation).methods:
            assert each.sampler == Sampler(preset="released")


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
        ({"sampler": {"preset": "paper"}}, "paper"),
        ({"sampler": {"map_resize": "nearest"}}, "nearest"),
        ({"sampler": {"final_sigmas_type": None}}, "final_sigmas_type"),
        ({"kind": "humansd"}, "humansd"),
    ],
)
def test_a_method_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        method(**values)


@pytest.mark.parametrize(("name", "num_bytes"), [("m" * 300, 300), ("m" * 201, 201), ("m" + "é" * 100, 201)])
def test_a_name_that_fits_no_folder_is_refused(name: str, num_bytes: int) -> None:
    method: dict[str, Any] = {"kind": "external", "folder": "x"}
    with pytest.raises(ValueError, match=rf"name: expected a name of at most 200 bytes.*found {num_bytes}: "):
        Method(name=name, **method)
    longest = Method(name="m" + "é" * 99, **method).name
    for wrapped in (f"humanart-train-{longest}", f"generated-{longest}", temporary_name(f"{longest}.json")):
        assert len(wrapped.encode()) <= 255


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


def written(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def found(folder: Path, *image_names: str, count: int = 1, others: tuple[str, ...] = ()) -> list[Any]:
    """The images of each pose; ``others`` are poses of the split that are not asked for."""
    images = find_images(folder, image_names, count, split_names=[*image_names, *others])
    return [images[name] for name in image_names]


def test_images_are_found_by_name_and_number(tmp_path: Path) -> None:
    written(tmp_path, "a/b/0.jpg", "a/b/1.PNG", "c.png", "notes.txt", "d/0.webp", "0.JPG", "f/0.JpEg")
    assert list_images(tmp_path) == ["0.JPG", "a/b/0.jpg", "a/b/1.PNG", "c.png", "d/0.webp", "f/0.JpEg"]
    assert found(tmp_path, "a/b", "c", "real_human/dance/d", "e", "0", "f", count=2) == [
        [generated_path("a/b", 0), "a/b/1.PNG"],
        ["c.png", None],
        ["d/0.webp", None],
        [None, None],
        ["0.JPG", None],
        ["f/0.JpEg", None],
    ]


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    folder = written(
        tmp_path / ".mine", "1.jpg", "._1.jpg", ".thumbs/1.jpg", "a/.b/2.jpg", "a/._2.png", ".3.jpg"
    )
    assert list_images(folder) == ["1.jpg"]
    assert found(folder, "1", "x/2", "3") == [["1.jpg"], [None], [None]]


@pytest.mark.parametrize("file", ["1.jpg", "1/0.png", "1.PNG"])
def test_a_file_is_not_taken_for_two_poses(tmp_path: Path, file: str) -> None:
    written(tmp_path, file)
    with pytest.raises(ExpectedError) as error:
        found(tmp_path, "2D/a/1", "real/b/1", "real/b/2")
    message = str(error.value)
    assert f"found 1 ambiguous: {file} fits 2D/a/1 and real/b/1. " in message
    assert "Put each image at <image name>/<i>.jpg, such as 2D/a/1/0.jpg" in message
    # A pose whose images are not asked for may be the one that the file shows.
    with pytest.raises(ExpectedError, match=f"{file} fits 2D/a/1 and real/b/1"):
        found(tmp_path, "2D/a/1", others=("real/b/1",))
    # Where no namesake is asked for, the file does not matter.
    assert found(tmp_path, "real/b/2", others=("2D/a/1", "real/b/1")) == [[None]]


def test_a_file_at_the_path_of_its_pose_is_that_pose_s(tmp_path: Path) -> None:
    both = written(tmp_path / "both", "2D/a/1.jpg", "real/b/1/0.jpg", "1.jpg")
    assert found(both, "2D/a/1", "real/b/1") == [["2D/a/1.jpg"], ["real/b/1/0.jpg"]]
    # One pose has its own file, and the other must not get what may be the first one's.
    one = written(tmp_path / "one", "2D/a/1.jpg", "1.jpg")
    with pytest.raises(ExpectedError, match=r"1\.jpg fits 2D/a/1 and real/b/1"):
        found(one, "2D/a/1", "real/b/1")
    # A flat file that is the own path of one pose is no other's.
    flat = written(tmp_path / "flat", "1.jpg", "2/0.jpg")
    assert found(flat, "1", "a/1", "2", "b/2") == [["1.jpg"], [None], ["2/0.jpg"], [None]]
    # Names that contain each other: the numbered file is that of the shorter one.
    nested = written(tmp_path / "nested", "a/0.jpg")
    assert found(nested, "a", "a/0") == [["a/0.jpg"], [None]]
    assert found(written(nested, "a/0/0.jpg"), "a", "a/0") == [["a/0.jpg"], ["a/0/0.jpg"]]


@pytest.mark.parametrize(
    "files",
    [("1.jpg", "1.png"), ("1/0.jpg", "1.jpg"), ("1.JPG", "1.jpg"), ("1/0.WEBP", "1/0.webp")],
    ids=" ".join,
)
@pytest.mark.parametrize(("pose", "below"), [("1", ""), ("x/1", ""), ("x/1", "x/")])
def test_two_files_for_one_image_are_refused(
    tmp_path: Path, files: tuple[str, str], pose: str, below: str
) -> None:
    written(tmp_path, *(below + file for file in files))
    with pytest.raises(ExpectedError) as error:
        found(tmp_path, pose, "2")
    first, second = (below + file for file in files)
    assert f"{first} and {second} fit image 0 of {pose}. " in str(error.value)


def test_two_files_for_a_later_image_are_refused(tmp_path: Path) -> None:
    written(tmp_path, "1/0.jpg", "1/1.jpg", "1/1.jpeg")
    assert found(tmp_path, "1", count=1) == [["1/0.jpg"]]
    with pytest.raises(ExpectedError, match=r"1/1\.jpeg and 1/1\.jpg fit image 1 of 1\."):
        found(tmp_path, "1", count=2)


def test_all_ambiguous_files_are_one_error(tmp_path: Path) -> None:
    written(tmp_path, *(f"{number}.jpg" for number in range(1500)), "real/2000.jpg", "real/2000.png")
    names = [f"{folder}/{number}" for folder in ("2D", "real") for number in range(1500)]
    with pytest.raises(ExpectedError) as error:
        found(tmp_path, *names, "real/2000")
    message = str(error.value)
    assert "found 1,501 ambiguous: 0.jpg fits 2D/0 and real/0; 1.jpg fits 2D/1 and real/1; 2.jpg" in message
    assert "; 1,498 more. Put" in message
    assert len(message) < 500 and "\n" not in message


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
