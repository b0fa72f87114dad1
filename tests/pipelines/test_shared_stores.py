"""Two users of one store, with everything else at other paths: the second one makes nothing, and gets all files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from conftest import Workspace, _luigi_settings
from PIL import Image
from processes import HANG_S
from tampering import correct_provenance, run_folder

for _package in ("torch", "transformers", "diffusers", "accelerate", "matplotlib"):
    pytest.importorskip(_package, reason="the models or eval extra is not installed")

if TYPE_CHECKING:
    from conftest import Build

    from tasks.stage.base import StageTask

pytestmark = pytest.mark.usefixtures("forked_models")
SMOKE = Path(__file__).parents[2] / "configs" / "train" / "smoke.yaml"
TEMPLATES = {"training": ["{category} {keypoints}"], "evaluation": ["{category} {keypoints}"]}
OF_ONE_METHOD = {"generate", "evaluated_images", "poses", "pose_ap"}
TOGETHER = {"tables", "benchmark_report"}
LUIGIS_WARNINGS = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of config_path
IMAGES = 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import eval.vitpose.tiny
    from spctrl.models import tiny

    folder = tmp_path_factory.mktemp("weights")
    list(eval.vitpose.tiny.write_tiny_weights(folder))
    tiny.build_stable_diffusion(folder / "stable-diffusion-v1-5")
    return folder


@pytest.fixture
def first(workspace: Workspace, weights: Path) -> Workspace:
    """The user whose folder has the store; ``theirs`` are images that someone else's code made."""
    write_files(workspace, weights)
    for file in sorted((workspace.data / "AP-10K" / "data").glob("*.jpg")):
        (workspace.folder / "theirs" / file.stem).mkdir(parents=True)
        shutil.copyfile(file, workspace.folder / "theirs" / file.stem / "0.jpg")
    return workspace


@pytest.fixture
def second(first: Workspace, weights: Path, tmp_path: Path) -> Workspace:
    """A user with copies of all files elsewhere, who has the store mounted elsewhere, too."""
    shutil.copytree(first.data, tmp_path / "second" / "data")
    shutil.copytree(weights, tmp_path / "second" / "networks")
    made = Workspace(tmp_path / "second" / "work", tmp_path / "second" / "data")
    made.store = made.folder / "mounted"
    made.store.symlink_to(first.store)
    made.configure("paths", store=made.store)
    made.configure("build", **first.settings["build"])
    write_files(made, tmp_path / "second" / "networks")
    shutil.copytree(first.folder / "theirs", made.folder / "theirs")
    return made


def write_files(workspace: Workspace, weights: Path) -> None:
    """The settings and files that a benchmark takes besides images."""
    workspace.configure("paths", weights=weights)
    workspace.configure("executor", device="cpu")
    training = {**msgspec.yaml.decode(SMOKE.read_bytes()), "use_cached_latents": False, "max_train_steps": 1}
    training |= {"prompt_templates": str(workspace.folder / "prompts.yaml")}
    training |= {"pretrained_model_name_or_path": str(weights / "stable-diffusion-v1-5")}
    (workspace.folder / "train.yaml").write_bytes(msgspec.yaml.encode(training))
    (workspace.folder / "prompts.yaml").write_text(json.dumps(TEMPLATES))


def trained(workspace: Workspace) -> dict[str, Any]:
    folder = workspace.folder
    sampler = {"steps": 1, "resolution": 64}
    paths = {"train": str(folder / "train.yaml"), "templates": str(folder / "prompts.yaml")}
    return {"name": "trained", "kind": "spctrl", "sampler": sampler, **paths}


def external(folder: str) -> dict[str, Any]:
    return {"name": "theirs", "kind": "external", "folder": folder}


def config_file(workspace: Workspace, *methods: dict[str, Any], **settings: Any) -> Path:
    path = workspace.folder / "tiny.yaml"
    path.write_bytes(msgspec.yaml.encode({"dataset": "ap10k", "methods": methods, **settings}))
    return path


def benchmark_file(workspace: Workspace, *methods: dict[str, Any], **settings: Any) -> Path:
    measured = {"pose": {"weights": "vitpose"}, "metrics": ["pose_ap"], "intervals": {"resamples": 40}}
    return config_file(workspace, *methods, **{**measured, **settings})


def built(
    workspace: Workspace, config: Path | str = "", family: str = "Benchmark", **parameters: Any
) -> Build:
    """A build that must succeed: of a benchmark or another target, or without a configuration of the dataset."""
    build = workspace.build(family, config=str(config), **parameters) if config else workspace.build()
    assert build.succeeded, build.errors
    return build


def tables(workspace: Workspace) -> dict[str, bytes]:
    """Files of the tables and the figure by name, but for those with links."""
    files = (workspace.exports / "benchmark-tiny").iterdir()
    return {
        each.name: each.read_bytes()
        for each in files
        if each.is_file() and each.suffix not in (".md", ".html")
    }


def generated(workspace: Workspace) -> dict[str, bytes]:
    """Contents of the trained method's images and their list, by path."""
    folder = workspace.exports / "generated-trained" / "ap10k-val"
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@contextmanager
def methods(workspace: Workspace, *given: dict[str, Any]) -> Iterator[list[StageTask]]:
    """The tasks of ``Generate`` as a build in this workspace has them."""
    path = config_file(workspace, *given)
    with _luigi_settings(workspace.settings_file()):
        import pipelines

        yield pipelines.Generate(config=str(path)).requires()


def fingerprint(workspace: Workspace, method: dict[str, Any]) -> str:
    with methods(workspace, method) as (task,):
        return task.made_from().fingerprint


def reasons(workspace: Workspace, goal: str, **parameters: str) -> dict[str, tuple[str, ...]]:
    """Why stages would run, by stage."""
    from tasks.stage.status import statuses

    with _luigi_settings(workspace.settings_file()):
        import pipelines

        found = list(statuses(getattr(pipelines, goal)(**parameters)))
    return {each.task.stage: each.reasons for each in found if each.reasons}


def as_an_earlier_version_left_it(run: Path) -> None:
    """Have a run of images lie under other parameters, with the address of a folder among them."""
    provenance = json.loads((run / "provenance.json").read_bytes())
    provenance["parameters"]["folder"] = "/home/first/images"
    (run / "provenance.json").write_text(json.dumps(provenance))
    run.rename(run.with_name("0" * 32))


@pytest.mark.slow
@LUIGIS_WARNINGS
def test_a_second_user_trains_and_generates_nothing_and_gets_all_images(
    first: Workspace, second: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = built(first, config_file(first, trained(first)), family="Generate")
    assert made.stages >= {"train", "samples", "generate"}

    # Everything lies elsewhere, and is written in another way.
    monkeypatch.chdir(second.folder)
    config_file(second, {**trained(second), "train": "train.yaml", "templates": "../work/prompts.yaml"})
    again = built(second, "tiny.yaml", family="Generate")
    assert (again.committed, again.worked) == ({}, {})
    images = generated(second)
    assert images == generated(first) and len(images) == IMAGES + 1

    # The images of one come back without those of the other.
    for user in (first, second):
        shutil.rmtree(user.exports)
    restored = built(second, "tiny.yaml", family="Generate")
    assert (restored.committed, restored.worked) == ({}, {})
    assert generated(second) == images

    # Runs of an earlier version, whose parameters named the folder, are not current; their images are.
    (run,) = first.store.glob("runs/generate/ap10k-val-trained/*")
    as_an_earlier_version_left_it(run)
    assert reasons(second, "Generate", config="tiny.yaml") == {
        "generate": ("parameter folder no longer counts; it was /home/first/images",)
    }
    upgraded = built(second, "tiny.yaml", family="Generate")
    assert (upgraded.stages, upgraded.worked) == ({"generate"}, {})
    assert generated(second) == images


@pytest.mark.slow
@LUIGIS_WARNINGS
def test_a_second_user_measures_nothing_and_gets_all_tables(
    first: Workspace, second: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = built(first, benchmark_file(first, external(str(first.folder / "theirs"))))
    assert made.stages >= OF_ONE_METHOD | TOGETHER

    (second.folder / "theirs").rename(second.folder / "moved")
    monkeypatch.chdir(second.folder)
    benchmark_file(second, external("moved/"))
    again = built(second, "tiny.yaml")
    assert (again.committed, again.worked) == ({}, {})
    assert tables(first) == tables(second) != {}
    for user in (first, second):
        folder = user.exports / "benchmark-tiny"
        links = [part.split(")")[0] for part in (folder / "table.md").read_text().split("](")[1:]]
        assert links and all((folder / link).is_file() for link in links)

    # Neither undoes what the other did, and the tables of one come back without those of the other.
    assert built(first, first.folder / "tiny.yaml").started == []
    shutil.rmtree(first.exports)
    table = second.exports / "benchmark-tiny" / "table.md"
    before = table.read_text()
    table.write_text("theirs")
    assert reasons(second, "Benchmark", config="tiny.yaml")["tables"] == (
        f"{second.exports}/benchmark-tiny is missing or out of date",
    )
    assert built(second, "tiny.yaml").committed == {}
    assert table.read_text() == before

    # A changed image is measured again, for whoever changed it.
    (image, *_) = sorted((second.folder / "moved").glob("*/0.jpg"))
    Image.new("RGB", (64, 64), "red").save(image)
    assert built(second, "tiny.yaml").stages == OF_ONE_METHOD | TOGETHER
    shown_again = built(first, first.folder / "tiny.yaml")
    assert (shown_again.committed, shown_again.worked) == ({}, {})


@pytest.mark.slow
def test_two_users_who_measure_at_once_get_the_same_tables(first: Workspace, second: Workspace) -> None:
    configs = [benchmark_file(user, external(str(user.folder / "theirs"))) for user in (first, second)]
    builds = [
        user.start("--config", str(config), family="Benchmark")
        for user, config in zip((first, second), configs, strict=True)
    ]
    outputs = [build.communicate(timeout=HANG_S)[0] for build in builds]
    assert [build.returncode for build in builds] == [0, 0], "\n".join(outputs)
    assert tables(first) == tables(second) != {}
    assert first.faults() == []
    for user, config in zip((first, second), configs, strict=True):
        assert built(user, config).started == []


def test_pages_are_rendered_for_each_user_and_never_copied_from_the_store(
    first: Workspace, second: Workspace
) -> None:
    built(first)
    page = run_folder(first.store, "report") / "report.html"
    page.write_text("<script>steal()</script>")
    correct_provenance(page)
    again = built(second)
    assert again.succeeded and "report" not in again.stages
    assert "steal" not in (second.exports / "report.html").read_text()


@LUIGIS_WARNINGS
def test_a_dataset_is_exported_for_each_user_and_built_once(first: Workspace, second: Workspace) -> None:
    built(first)
    assert reasons(second, "BuildDataset") == {
        "export": (f"{second.exports}/AP-10K_triplet is missing or out of date",),
        "report": (f"{second.exports}/report.html is missing or out of date",),
    }
    again = built(second)
    assert (again.stages, again.worked) == ({"export"}, {})
    assert second.exported() == first.exported()
    for user in (first, second):
        assert built(user).started == []

    # What one of them changes is built again, and is not the other's.
    (image, *_) = sorted((second.data / "AP-10K" / "data").iterdir())
    Image.new("RGB", Image.open(image).size, "red").save(image)
    assert built(second).worked == {"images": 1}
    assert built(first).started == []


def test_paths_in_methods_count_by_content(first: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(first.folder)
    monkeypatch.setenv("HOME", str(first.folder))
    (first.folder / "link").symlink_to(first.folder / "theirs")
    (first.folder / "sub").mkdir()
    shutil.copyfile(first.folder / "prompts.yaml", first.folder / "sub" / "other.yaml")
    absolute = str(first.folder / "theirs")
    folders = [absolute, "theirs", "theirs/", "./sub/../theirs", "link", "~/theirs", "$HOME/theirs//"]
    templates = [str(first.folder / "prompts.yaml"), "prompts.yaml", "~/sub/other.yaml"]
    found = {fingerprint(first, external(folder)) for folder in folders}
    assert len(found) == 1
    with_templates = {fingerprint(first, {**external("theirs"), "templates": each}) for each in templates}
    assert len(with_templates) == 1 and with_templates.isdisjoint(found)

    # The name is that of the results' folder, and no ingredient.
    assert fingerprint(first, {**external("theirs"), "name": "ours"}) in found

    (first.folder / "prompts.yaml").write_text(json.dumps({**TEMPLATES, "evaluation": ["{keypoints}"]}))
    assert fingerprint(first, {**external("theirs"), "templates": "prompts.yaml"}) not in with_templates
    (image, *_) = sorted((first.folder / "theirs").glob("*/0.jpg"))
    Image.new("RGB", (64, 64), "red").save(image)
    changed = fingerprint(first, external("theirs"))
    assert changed not in found
    image.rename(image.with_name("1.jpg"))
    assert fingerprint(first, external("theirs")) not in {*found, changed}


def test_paths_of_a_training_count_by_content(
    first: Workspace, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.experiment.train import Train

    monkeypatch.chdir(first.folder)
    monkeypatch.setenv("HOME", str(first.folder))
    (first.folder / "networks").symlink_to(weights)
    (first.folder / "embeddings.npy").write_bytes(b"any")

    def planned(**settings: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Parameters, and digests of the files that count."""
        from tasks.stage.weights import weights_digest

        plain = {**msgspec.yaml.decode(SMOKE.read_bytes()), "use_cached_latents": False, **settings}
        Path("training.yaml").write_bytes(msgspec.yaml.encode(plain))
        with _luigi_settings(first.settings_file()):
            task = Train(config="training.yaml")
            digests = {name: weights_digest(task.store, path) for name, path in task._files().items()}
            return task.parameters(), digests

    plain = planned()
    assert plain[0]["settings"]["pretrained_model_name_or_path"] == "stable_diffusion"
    for network in (
        weights / "stable-diffusion-v1-5",
        "networks/stable-diffusion-v1-5/",
        "~/networks/stable-diffusion-v1-5",
    ):
        assert (
            planned(pretrained_model_name_or_path=str(network), output_dir="out", logging_dir="elsewhere")
            == plain
        )
    templates = {planned(prompt_templates=each)[1]["prompts"] for each in ("prompts.yaml", "~/prompts.yaml")}
    assert len(templates) == 1 and plain[1]["prompts"] not in templates
    parameters, files = planned(spatext_init_emb="embeddings.npy")
    assert parameters == plain[0] and files.keys() - plain[1].keys() == {"keypoint_embeddings"}
    parameters, files = planned(controlnet_model_name_or_path="networks/start")
    assert parameters == plain[0] and files.keys() - plain[1].keys() == {"start"}
    assert planned(seed=1)[0] != plain[0]


def test_a_detectors_configuration_counts_by_content(
    first: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(first.folder)
    Path("detector.pth").write_bytes(b"weights")
    Path("mine.py").write_text("scale = 1")

    def fingerprint_with(config: str) -> str:
        pose = {"weights": "vitpose", "boxes": "detected"}
        detector = {"config": config, "weights": "detector.pth"}
        settings = {"dataset": "humanart", "pose": {**pose, "detector": detector}}
        path = benchmark_file(first, external("theirs"), **settings)
        with _luigi_settings(first.settings_file()):
            import pipelines

            tables_task = pipelines.Evaluate(config=str(path)).tables_task()
            scored = tables_task.metrics_of("theirs")["pose_ap"]
            return scored.poses_task().made_from().fingerprint  # type: ignore[attr-defined, no-any-return]

    found = fingerprint_with("mine.py")
    assert fingerprint_with(str(first.folder / "mine.py")) == found
    names = {fingerprint_with(name) for name in ("one_that_mmdet_ships", "another")}
    assert len(names | {found}) == 3
    Path("mine.py").write_text("scale = 2")
    assert fingerprint_with("mine.py") != found

    # So do the files that it is based on, wherever they lie.
    Path("base").mkdir()
    Path("base/run.json").write_text('{"_base_": "deep.yaml"}')
    Path("base/deep.yaml").write_text("threshold: 1")
    Path("base/head.py").write_text("heads = 1")
    Path("mine.py").write_text(
        "_base_ = ['./base/run.json', 'mmdet::shipped.py']\nwith read_base():\n    from .base.head import *\n"
    )
    based = fingerprint_with("mine.py")
    shutil.copytree(first.folder / "base", first.folder / "copy" / "base")
    shutil.copyfile("mine.py", "copy/mine.py")
    assert fingerprint_with("copy/mine.py") == based
    for name, text in {"deep.yaml": "threshold: 2", "head.py": "heads = 2", "run.json": "{}"}.items():
        before = fingerprint_with("mine.py")
        Path("base", name).write_text(text)
        assert fingerprint_with("mine.py") != before


def test_a_build_that_is_stricter_leaves_the_run_of_others_as_it_was(
    first: Workspace, second: Workspace
) -> None:
    for workspace in (first, second):
        (image, *_) = sorted((workspace.folder / "theirs").glob("*/0.jpg"))
        image.unlink()
    theirs = external(str(first.folder / "theirs"))
    built(first, config_file(first, theirs, split="train"), "Generate", max_reject_share=1.0)
    runs = {path: path.read_bytes() for path in first.store.glob("runs/generate/**/*") if path.is_file()}

    shutil.move(second.folder / "theirs", second.folder / "moved")
    config = config_file(second, external(str(second.folder / "moved")), split="train")
    build = second.build("Generate", config=str(config), max_reject_share=0.0)
    assert not build.succeeded
    assert any("1 of 8 records" in error and "moved" in error for error in build.errors), build.errors
    assert {path: path.read_bytes() for path in runs} == runs
    assert first.faults() == []


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_exported_images_follow_a_dataset_that_moves(first: Workspace, link: str) -> None:
    shutil.copytree(first.data, first.folder / "data")
    first.configure("export", link=link)
    first.configure("build", datasets=["ap10k"], splits=["train"])
    first.configure("paths", data=first.folder / "data")
    built(first)
    assert built(first).committed == {}
    (exported, *_) = sorted(first.exports.glob("AP-10K_triplet/data/*.jpg"))

    shutil.copytree(first.folder / "data", first.folder / "data2")
    for path in (first.folder / "data").glob("**/*.jpg"):  # by now another user's
        path.write_bytes(b"another image")
    first.configure("paths", data=first.folder / "data2")
    built(first)
    source = next((first.folder / "data2" / "AP-10K").glob(f"**/{exported.name}"))
    assert exported.samefile(source)
    assert first.faults() == []
