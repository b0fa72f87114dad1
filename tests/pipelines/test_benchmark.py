"""Benchmarks of small folders of images: what is done again, what is refused, and what the tables say of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tampering import tamper

for _package in ("torch", "transformers", "torch_fidelity", "matplotlib"):
    pytest.importorskip(_package, reason="the eval extra is not installed")

if TYPE_CHECKING:
    from conftest import Build, Workspace

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_models")]
IMAGES = 8
METRICS = {"pose_ap", "fid", "fid_infinity", "kid", "clip_score"}
TOGETHER = {"tables", "benchmark_report"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import eval.tiny
    import eval.vitpose.tiny

    folder = tmp_path_factory.mktemp("weights")
    for module in (eval.tiny, eval.vitpose.tiny):
        list(module.write_tiny_weights(folder))
    return folder


@pytest.fixture
def measuring(workspace: Workspace, weights: Path) -> Workspace:
    """A workspace with two folders of someone's images: the real ones, and noise."""
    workspace.configure("paths", weights=weights)
    workspace.configure("executor", device="cpu")
    generator = np.random.default_rng(0)
    for file in sorted((workspace.data / "AP-10K" / "data").glob("*.jpg")):
        for name in ("real", "noise"):
            (workspace.folder / name / file.stem).mkdir(parents=True)
        shutil.copyfile(file, workspace.folder / "real" / file.stem / "0.jpg")
        noise = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(workspace.folder / "noise" / file.stem / "0.jpg")
    return workspace


def benchmark(
    workspace: Workspace,
    methods: tuple[str, ...] = ("real", "noise"),
    method_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> Build:
    content: dict[str, Any] = {
        "dataset": "ap10k",
        "methods": [
            {
                "name": name,
                "kind": "external",
                "folder": str(workspace.folder / name),
                **(method_settings or {}),
            }
            for name in methods
        ],
        "pose": {"weights": "vitpose"},
        "pose_ap": {"resamples": 50},
        "fid": {"resamples": 40},
        "intervals": {"resamples": 50},
        "num_cases": 1,
        **settings,
    }
    path = workspace.folder / "tiny.yaml"
    path.write_bytes(msgspec.yaml.encode(content))
    return workspace.build("Benchmark", config=str(path))


def files(workspace: Workspace) -> Path:
    return workspace.exports / "benchmark-tiny"


def rows(workspace: Workspace, **which: Any) -> list[dict[str, Any]]:
    table = pq.read_table(files(workspace) / "table.parquet", partitioning=None).to_pylist()
    return [row for row in table if all(row[name] == value for name, value in which.items())]


def value(workspace: Workspace, method: str, metric: str) -> float:
    (row,) = rows(workspace, method=method, metric=metric, source="measured", kind="")
    return float(row["value"])


def provenance_of(workspace: Workspace, metric: str) -> dict[str, Any]:
    (row,) = rows(workspace, method="real", metric=metric, source="measured", kind="")
    return dict(json.loads((workspace.store / row["provenance"]).read_bytes()))


def first_file(workspace: Workspace, method: str) -> Path:
    return sorted((workspace.folder / method).glob("*/0.jpg"))[-1]


def names_of_validation(workspace: Workspace) -> list[str]:
    content = json.loads(workspace.annotation_path("ap10k", "val").read_bytes())
    return [Path(image["file_name"]).stem for image in content["images"]]


def test_only_what_a_change_concerns_is_done_again(measuring: Workspace) -> None:
    built = benchmark(measuring)
    assert built.succeeded, built.errors
    assert built.stages >= METRICS | TOGETHER
    assert built.counted("poses", "records") == 2 * IMAGES
    assert {path.name for path in files(measuring).iterdir() if path.is_file()} == {
        "table.csv", "table.json", "table.md", "table.parquet", "table.tex", "table-all.tex", "table-intervals.tex",
        "report.html", "grid.png", "grid.pdf",
    }  # fmt: skip

    # The numbers are those of the functions, and nobody can take them for real ones.
    assert abs(value(measuring, "real", "FID")) < 1e-3
    assert value(measuring, "noise", "FID") > 1
    for row in rows(measuring, source="measured"):
        assert row["weights"] == "random" and row["partial"]
        assert "RANDOM WEIGHTS" in row["note"] and f"{IMAGES} of 995 images" in row["note"]
        provenance = json.loads((measuring.store / row["provenance"]).read_bytes())
        assert provenance["weights"] == "random"
        assert row["low"] is None or row["low"] <= row["value"] + 1e-9
    table = (files(measuring) / "table.md").read_text()
    assert "<sup>RPS</sup>" in table, "also of few images"
    for metric, definition in (
        ("KID", "unbiased for paired sets"),
        ("FID", "FID at this number of images"),
        ("AP", "COCO keypoint AP"),
        ("CLIP-score", "mean over images"),
    ):
        found = provenance_of(measuring, metric)["parameters"]["definition"]
        assert found.startswith(definition) and "interval: " in found
    (extrapolated,) = rows(measuring, method="real", metric="FID-infinity", source="measured")
    assert extrapolated["value"] is None and "fewer than 10 images" in extrapolated["note"]
    species = rows(measuring, kind="species")
    assert species and all(row["low"] is None for row in species if row["based_on"] < 5)
    assert all("no interval of fewer than 5 images" in row["note"] for row in species if row["low"] is None)
    links = [part.split(")")[0] for part in table.split("](")[1:]]
    assert len(links) > 10 and all((files(measuring) / link).is_file() for link in links)

    # Nothing changed, so nothing is done; a changed metric is done again with the tables, and nothing else is.
    assert benchmark(measuring).committed == {}
    changed = benchmark(measuring, kid={"estimator": "independent", "subsets": 5, "subset_size": 5})
    assert changed.stages == {"kid"} | TOGETHER
    assert "torch-fidelity's, for independent sets" in (files(measuring) / "table.md").read_text()
    assert provenance_of(measuring, "KID")["parameters"]["definition"].startswith("torch-fidelity's")
    changed = benchmark(measuring, pose_ap={"pck_threshold": 0.1, "resamples": 50})
    assert changed.stages == {"pose_ap"} | TOGETHER
    changed = benchmark(measuring, reference="noise")
    assert changed.stages == TOGETHER
    shown_again = benchmark(measuring)
    assert shown_again.committed == {}, "an old setting is found again"
    assert {"Tables", "BenchmarkReport"} <= set(shown_again.started)

    # One image of one method changed: only that method is measured again.
    Image.new("RGB", (64, 64), "red").save(
        measuring.folder / "noise" / names_of_validation(measuring)[0] / "0.jpg"
    )
    changed = benchmark(measuring)
    assert {part for _, part in changed.committed} == {"ap10k-val-noise", "tiny"}
    assert "real_features" not in changed.stages

    # A table that somebody changed by hand is put right.
    (files(measuring) / "table.csv").write_text("mine")
    assert benchmark(measuring).committed == {}
    assert (files(measuring) / "table.csv").read_text() != "mine"


@pytest.fixture
def fast() -> Iterator[dict[str, Any]]:
    """Settings of an evaluation that needs no large network."""
    yield {"methods": ("real",), "metrics": ["pose_ap"]}


def test_missing_broken_and_wrongly_sized_images_stop_it_unless_allowed(
    measuring: Workspace, fast: dict[str, Any]
) -> None:
    gone, broken, small = (
        measuring.folder / "real" / name / "0.jpg" for name in names_of_validation(measuring)[:3]
    )
    gone.unlink()
    broken.write_bytes(broken.read_bytes()[:200])
    refused = benchmark(measuring, **fast)
    assert not refused.succeeded
    (error,) = refused.errors
    assert "2 of 8 images are missing or cannot be used" in error
    assert "allow_missing_images: true" in error
    assert str(broken) in error and "missing_image" in error and "broken_image" in error

    allowed = benchmark(measuring, **fast, allow_missing_images=True)
    assert allowed.succeeded, allowed.errors
    (row,) = rows(measuring, metric="AP", source="measured", kind="")
    assert row["images"] == IMAGES - 2 and row["partial"]
    assert "6 of 995 images" in row["note"]

    # Stricter again: what was allowed before does not count as done.
    assert not benchmark(measuring, **fast).succeeded

    Image.new("RGB", (32, 32)).save(small)
    sized = benchmark(measuring, **fast, image_size_wh=[64, 64])
    assert not sized.succeeded
    assert any(
        "wrong_size (6)" in error and "expected 64 x 64 pixels, found" in error for error in sized.errors
    )


def test_a_file_that_fits_two_poses_stops_the_evaluation_before_anything_is_measured(
    measuring: Workspace, fast: dict[str, Any]
) -> None:
    theirs, shared = measuring.folder / "theirs", "shared"
    with measuring.edit_annotations("humanart", "val") as content:
        first, second, *others = content["images"]
        for image in (first, second):
            old = measuring.data / image["file_name"]
            image["file_name"] = str(Path(image["file_name"]).parent / f"{shared}{old.suffix}")
            old.rename(measuring.data / image["file_name"])
    names = [
        str(Path(image["file_name"]).relative_to("HumanArt/images").with_suffix(""))
        for image in (first, second, *others)
    ]
    theirs.mkdir()
    for image, name in zip((first, second, *others), names, strict=True):
        Image.new("RGB", (image["width"], image["height"])).save(theirs / f"{Path(name).name}.PNG")

    def evaluate() -> Build:
        path = measuring.folder / "theirs.yaml"
        method = {"name": "theirs", "kind": "external", "folder": str(theirs)}
        settings = {**fast, "dataset": "humanart", "methods": [method], "allow_missing_images": True}
        path.write_bytes(msgspec.yaml.encode({"pose": {"weights": "vitpose"}, **settings}))
        return measuring.run("--config", str(path), family="Evaluate")

    refused = evaluate()
    assert refused.exit_code == 30
    (line,) = (line for line in refused.output.splitlines() if line.startswith("ERROR: "))
    assert f"1 ambiguous: {shared}.PNG fits {names[0]} and {names[1]}. Put each image at" in line
    assert "humanart-val-theirs" in line and str(theirs) in line
    assert "Traceback" not in refused.output
    assert refused.stages == {"index", "prompts"}

    for name in names[:2]:
        (theirs / name).mkdir(parents=True)
        shutil.copyfile(theirs / f"{shared}.PNG", theirs / name / "0.PNG")
    built = evaluate()
    assert built.exit_code == 0, built.output
    assert built.counted("generate", "made") == IMAGES


def test_images_without_a_prompt_are_set_aside_as_other_bad_records_are(
    measuring: Workspace, fast: dict[str, Any]
) -> None:
    """The templates need the background, which one image does not have."""
    templates = measuring.folder / "prompts.yaml"
    template = "{category} {keypoints} in the {background}"
    templates.write_text(json.dumps({"training": [template], "evaluation": [template]}))
    with measuring.edit_annotations("ap10k", "val") as content:
        for position, image in enumerate(content["images"]):
            image["background"] = 1 if position else None
    refused = benchmark(measuring, **fast, method_settings={"templates": str(templates)})
    assert not refused.succeeded
    (error,) = refused.errors
    assert f"1 of {IMAGES} records cannot be used, more than max_reject_share" in error
    assert "template without background" in error and "found none in" not in error

    measuring.configure("build", max_reject_share=0.5)
    allowed = benchmark(measuring, **fast, method_settings={"templates": str(templates)})
    assert allowed.succeeded, allowed.errors
    (row,) = rows(measuring, metric="AP", source="measured", kind="")
    assert row["images"] == IMAGES - 1 and f"{IMAGES - 1} of 995 images" in row["note"]


def test_images_that_change_while_they_are_measured_or_lead_out_are_refused(
    measuring: Workspace, fast: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import eval.checks

    check = eval.checks.check_images
    file = measuring.folder / "real" / names_of_validation(measuring)[0] / "0.jpg"

    def check_and_change(*given: Any, **options: Any) -> eval.checks.Checked:
        found = check(*given, **options)
        Image.new("RGB", (64, 64), "red").save(file)
        return found

    monkeypatch.setattr(eval.checks, "check_images", check_and_change)
    failed = benchmark(measuring, **fast)
    assert not failed.succeeded
    (error,) = failed.errors
    assert f"real: expected the images that were listed, found 1 changed since, such as {file}" in error
    monkeypatch.undo()
    again = benchmark(measuring, **fast)
    assert again.succeeded, again.errors

    # A store that lists an image elsewhere, with a digest that fits.
    tamper(measuring.store, "generate", "images.parquet", lambda rows: rows[0].update(path="../secret.png"))
    shutil.rmtree(measuring.store / "runs/evaluated_images")
    tampered = benchmark(measuring, **fast)
    assert not tampered.succeeded
    assert any("'../secret.png', which leads out of it" in each for each in tampered.errors), tampered.errors


def test_networks_that_do_not_fit_are_named(
    measuring: Workspace, weights: Path, fast: dict[str, Any]
) -> None:
    wrong = benchmark(measuring, **fast, pose={"weights": str(weights / "clip-vit-large-patch14")})
    assert not wrong.succeeded
    assert any("clip-vit-large-patch14" in error and "vitpose" in error.lower() for error in wrong.errors)
    nowhere = benchmark(measuring, **fast, pose={"weights": str(weights / "nowhere")})
    assert not nowhere.succeeded


def test_numbers_that_are_not_finite_are_told_with_the_weights_that_made_them(
    measuring: Workspace, weights: Path, fast: dict[str, Any]
) -> None:
    import torch

    (good,) = weights.glob("td-hm_ViTPose-huge*.pth")
    content = torch.load(good, weights_only=True)
    content["state_dict"]["head.final_layer.bias"][:] = float("nan")
    broken = measuring.folder / "broken.pth"
    torch.save(content, broken)
    failed = benchmark(measuring, **fast, pose={"weights": str(broken)})
    assert not failed.succeeded
    (error,) = failed.errors
    assert f"poses for ap10k-val-real, by {broken}: expected finite heatmaps" in error


def test_configurations_that_cannot_be_are_refused(measuring: Workspace, fast: dict[str, Any]) -> None:
    from spctrl.configuration import ConfigurationError

    with pytest.raises(ConfigurationError, match="did you mean metrics"):
        benchmark(measuring, methods=("real",), metric=["fid"])
    with pytest.raises(ConfigurationError, match="with different names"):
        benchmark(measuring, methods=("real", "real"))
    with pytest.raises(ConfigurationError, match="subset_size >= 2"):
        benchmark(measuring, **fast, kid={"subset_size": 1})


@pytest.mark.parametrize("name", ["ap10k", "humanart", "smoke"])
def test_the_shipped_benchmarks_can_be_read(name: str) -> None:
    from eval.settings import Evaluation
    from spctrl.configuration import read_config

    folder = Path(__file__).parents[2]
    how = read_config(folder / "configs" / "evaluate" / f"{name}.yaml", Evaluation)
    for method in how.methods:
        assert not method.train or (folder / method.train).is_file()
