"""The benchmark page and its cases: what they show, escape and load."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="the models extra is not installed")
pytest.importorskip("matplotlib", reason="the eval extra is not installed")

from eval.differences import Difference
from eval.instances import Poses
from eval.report import MethodView, choose_cases, draw_case, render_benchmark, render_grid
from eval.report.cases import Chosen
from eval.scores import Score
from eval.tables import MethodScores, Table, build_table

HOSTILE = "<script>alert(1)</script>\"'&"
SIZE_WH = (200, 100)


def scores(method: str, value: float, random: tuple[str, ...] = ()) -> MethodScores:
    rows = [
        Score("AP", "", "", value, value - 0.1, value + 0.1, 995),
        *(Score("AP", "species", name, value, value, value, 20) for name in ("cat", f"dog{HOSTILE}")),
        Score("AP", "species", "absent", math.nan, math.nan, math.nan, 0),
        Score(
            "AP",
            "species",
            "rare",
            value,
            math.nan,
            math.nan,
            3,
            True,
            reason="no interval of fewer than 5 images",
        ),
        Score("AP", "species", "seldom", value, 0.1, 0.9, 8, True),
        *(Score("AP", "oks_threshold", f"{t:.2f}", 1 - t, 0, 1, 995) for t in (0.5, 0.55, 0.6)),
        Score("PCK", "", "", value, value, value, 995),
        Score("PCK", "keypoint", "left_eye", value, 0.1, 0.9, 995),
    ]
    provenance = dict.fromkeys(("AP", "PCK"), f"runs/pose_ap/{method}/f/provenance.json")
    return MethodScores(
        method=method,
        scores=rows,
        provenance=provenance,
        random={"AP": random},
        num_images=995,
        num_annotated=995,
    )


def make_table(*methods: MethodScores) -> Table:
    gap = (
        [Difference("AP", methods[0].method, methods[-1].method, 0.2, 0.1, 0.3, 1)]
        if len(methods) > 1
        else []
    )
    return build_table("test", "ap10k", "val", f"AP-10K{HOSTILE}", methods, level=0.95, differences=gap)


def view(
    folder: Path, name: str, image_id: int = 1, *, shift: float = 0, size_wh: tuple[int, int] = (64, 64)
) -> MethodView:
    path = folder / f"{name}.jpg"
    Image.new("RGB", size_wh, (200, 200, 200)).save(path)
    keypoints = np.full((1, 17, 2), 50.0 + shift)
    keypoints[0, :, 0] = np.linspace(10, 190, 17)
    return MethodView(
        method=name,
        files={image_id: path},
        prompts={image_id: f"a cat {HOSTILE}"},
        poses=Poses(
            image_ids=np.array([image_id]),
            category_ids=np.array([1]),
            annotation_ids=np.array([1]),
            bboxes_xywh=np.array([[0.0, 0, *SIZE_WH]]),
            bbox_scores=np.ones(1),
            keypoints=keypoints,
            keypoint_scores=np.ones((1, 17)),
        ),
        oks={image_id: 0.5},
    )


def record(file_name: str = "real.jpg") -> dict[str, Any]:
    keypoints = [[10.0 + 10 * i, 50.0, 2.0] for i in range(17)]
    return {
        "image_id": 1, "file_name": file_name, "width": SIZE_WH[0], "height": SIZE_WH[1],
        "instances": [{"keypoints": keypoints}],
    }  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    Image.new("RGB", SIZE_WH, (10, 200, 10)).save(tmp_path / "data" / "real.jpg")
    return tmp_path


def test_the_page_shows_everything_and_loads_nothing(root: Path) -> None:
    views = [view(root, "one"), view(root, "two")]
    cases = [
        draw_case(record(), Chosen(1, kind, 0.5), views, dataset="ap10k", root=root)
        for kind in ("best", "worst")
    ]
    table = make_table(scores("one", 0.6, random=("one",)), scores("two", 0.4))
    page = render_benchmark(table, cases, store="../store", made_at="today", warnings=[HOSTILE])
    for heading in ("table", "differences", "thresholds", "species", "keypoints", "cases"):
        assert f'href="#{heading}"' in page and f'id="{heading}"' in page
    assert "RANDOM WEIGHTS (one)" in page
    assert '<a href="../store/runs/pose_ap/two/f/provenance.json">40.00</a>' in page
    assert "<script" not in page and "&lt;script&gt;" in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("#", "data:image/webp;base64,", "../store/runs/")) for link in links)
    assert "default-src 'none'" in page and "url(" not in page
    assert page.count("<img ") == 2 * 4
    assert page.count("<polyline") == 2
    assert "absent" not in page, "a species without instances has no row"
    assert page.count('<sup>S</sup> <span class="short">[no interval]</span>') == 2
    assert page.count('<sup>S</sup> <span class="short">[10, 90]</span>') == 2
    assert not re.search(r"\bnan\b", page)
    assert '<th scope="col" class="num">pairs</th>' in page


def test_a_page_without_poses_has_no_empty_sections() -> None:
    only = MethodScores(
        method="x", scores=[Score("FID", "", "", 9, 8, 10, 995)], provenance={"FID": "runs/fid/x/1/provenance.json"},
        random={}, num_images=995, num_annotated=995,
    )  # fmt: skip
    page = render_benchmark(make_table(only), [], store="s", made_at="today")
    for heading in ("thresholds", "species", "keypoints", "cases", "differences"):
        assert f'id="{heading}"' not in page
    assert "9.00" in page


def test_best_and_worst_cases() -> None:
    first = {i: i / 10 for i in range(10)}
    second = {**first, 9: 0.0, 3: 1.0}
    del second[5]
    chosen = choose_cases([first, second], 2)
    assert [(each.image_id, each.kind) for each in chosen] == [
        (8, "best"), (7, "best"), (1, "worst"), (0, "worst")
    ]  # fmt: skip
    assert chosen[0].oks == pytest.approx(0.8)
    few = choose_cases([{1: 0.9, 2: 0.1, 3: 0.5}], 4)
    assert [each.image_id for each in few] == [1, 3, 2], "no case is both"
    assert [each.kind for each in few] == ["best", "best", "worst"]
    assert [each.image_id for each in choose_cases([{1: 0.9}], 4)] == [1]


def test_the_skeleton_lies_where_the_pose_was_found(root: Path) -> None:
    case = draw_case(
        record(), Chosen(1, "best", 0.5), [view(root, "m", size_wh=(100, 100))], dataset="ap10k", root=root
    )
    condition, real, drawn = (panel.picture for panel in case.panels)
    assert condition is not None and real is not None and drawn is not None
    assert (
        condition.shape[:2] == (100, 200) and real.shape[:2] == (160, 320) and drawn.shape[:2] == (320, 320)
    )
    # Annotated at y = 50 of 100: the middle of every picture, whatever its own size.
    background = (200 * 0.6, 200 * 0.6, 200 * 0.6)
    rows = np.flatnonzero((np.abs(drawn.astype(int) - background) > 20).any(axis=(1, 2)))
    assert abs(rows.mean() - 160) < 6
    columns = np.flatnonzero((np.abs(drawn[160].astype(int) - background) > 20).any(axis=1))
    assert columns.min() < 20 and columns.max() > 300
    assert (condition[50] > 60).any() and not (condition[20] > 60).any()


def test_an_image_that_cannot_be_read_is_a_gap_and_not_an_error(root: Path) -> None:
    gone = view(root, "gone")
    (root / "gone.jpg").unlink()
    with (root / "gone.jpg").open("wb") as file:
        file.truncate(2**40)  # sparse, and larger than any memory
    case = draw_case(record("nowhere.jpg"), Chosen(1, "best", 0.5), [gone], dataset="ap10k", root=root)
    assert [panel.picture is None for panel in case.panels] == [False, True, True]
    page = render_benchmark(make_table(scores("gone", 0.4)), [case], store="s", made_at="today")
    assert page.count("no image</span>") == 2
    png, pdf = render_grid([case])
    assert png.startswith(b"\x89PNG") and pdf.startswith(b"%PDF")


def test_the_grid_is_a_figure_and_the_same_each_time(root: Path) -> None:
    views = [view(root, "one"), view(root, "two")]
    cases = [draw_case(record(), Chosen(1, "best", 0.5), views, dataset="ap10k", root=root)] * 2
    png, pdf = render_grid(cases)
    assert render_grid(cases) == (png, pdf)
    with Image.open(io.BytesIO(png)) as image:
        assert image.size[0] > 1000
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    green = (np.abs(pixels.astype(int) - (10, 200, 10)) < 12).all(axis=-1)
    assert green.mean() > 0.03, "the real image is in the grid, in its own colours"
