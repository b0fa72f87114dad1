"""The benchmark tables: reported beside measured numbers, ranks, marks, and that all formats say the same."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the models extra is not installed")

from eval.differences import Difference, differences
from eval.report.page import render_benchmark
from eval.scores import Score, Scores, mean_scores
from eval.settings import Intervals
from eval.tables import (
    METRIC,
    REPORTED,
    ROWS_SCHEMA,
    MethodScores,
    Table,
    build_table,
    latex_text,
    to_arrow,
    to_csv,
    to_json,
    to_latex,
    to_markdown,
)

WHOLE = 995
NO_INTERVAL = "no interval of fewer than 5 images"


def measured(
    method: str, ap: float, fid: float, *, random: tuple[str, ...] = (), images: int = WHOLE
) -> MethodScores:
    scores = [
        Score("AP", "", "", ap, ap - 0.02, ap + 0.02, images),
        Score("AP", "species", "cat|dog", ap / 2, math.nan, math.nan, 3, True, reason=NO_INTERVAL),
        Score("FID", "", "", fid, fid - 1, fid + 1, images),
    ]
    return MethodScores(
        method=method,
        scores=scores,
        provenance={"AP": f"runs/pose_ap/{method}/1/provenance.json", "FID": f"runs/fid/{method}/2/p.json"},
        random={"AP": random},
        num_images=images,
        num_annotated=images,
    )


def make(*methods: MethodScores, dataset: str = "ap10k", split: str = "val", **options: Any) -> Table:
    return build_table("test", dataset, split, dataset.upper(), methods, level=0.95, **options)


def row_of(text: str, method: str) -> str:
    return next(line for line in text.splitlines() if line.lstrip("| ").startswith(method))


def test_rows_come_in_the_papers_order_measured_beside_reported() -> None:
    table = make(measured("mine", 0.5, 20), measured("spctrl", 0.55, 18), measured("controlnet", 0.45, 19))
    assert table.methods == ("T2I-Adapter", "ControlNet", "SP-Ctrl", "mine")
    text = to_markdown(table, store="../store")
    assert "pose mAP ↑ measured | pose mAP ↑ reported | FID ↓ measured" in text
    row = row_of(text, "SP-Ctrl")
    assert "**[55.00](../store/runs/pose_ap/spctrl/1/provenance.json)** [53.00, 57.00]" in row
    assert "| **55.63** |" in row and "| **18.52** |" in row and "| 23.86 |" in row
    assert row_of(text, "T2I-Adapter").startswith("| T2I-Adapter | – | <u>48.16</u> | – | 27.29 |")


def test_two_spellings_of_a_name_stay_two_rows() -> None:
    table = make(measured("SP-Ctrl2", 0.5, 20), measured("spctrl", 0.4, 18), measured("sp_ctrl", 0.3, 19))
    assert table.methods == ("T2I-Adapter", "ControlNet", "SP-Ctrl", "SP-Ctrl2", "spctrl", "sp_ctrl")
    values = [table.cells[method, "AP", "measured"].value for method in table.methods[3:]]
    assert values == pytest.approx([50, 40, 30])


def test_best_and_second_follow_the_printed_numbers() -> None:
    table = make(measured("a", 0.50001, 10), measured("b", 0.5, 30), measured("c", 0.3, 20))
    ranks = {
        (method, metric): rank
        for (method, metric, source), rank in table.ranks().items()
        if source == "measured"
    }
    assert ranks == {
        ("a", "AP"): 1, ("b", "AP"): 1, ("c", "AP"): 2, ("a", "FID"): 1, ("c", "FID"): 2
    }  # fmt: skip
    latex = to_latex(table)
    assert r"a & \textbf{50.00} & -- & \textbf{10.00}" in latex
    assert r"c & \underline{30.00} & -- & \underline{20.00}" in latex
    alone = make(measured("a", 0.5, 10), split="test")
    assert alone.ranks() == {}, "the only number of a column is not the best one"
    equal = make(measured("a", 0.5, 10), measured("b", 0.5, 11), split="test")
    assert {metric for _, metric, _ in equal.ranks()} == {"FID"}, "nor is one of equals"


def test_the_doubtful_row_is_carried_with_a_footnote_and_never_best() -> None:
    table = make(dataset="humanart")
    assert REPORTED["humanart"]["SP-Ctrl"] == (29.30, 25.94, 9.11)
    latex = to_latex(table)
    assert r"SP-Ctrl & 29.30\textsuperscript{D} & 25.94\textsuperscript{D} & 9.11\textsuperscript{D}" in latex
    assert r"ControlNet & 45.26 & \textbf{26.69}" in latex
    assert "looks misprinted" in latex and "looks misprinted" in to_markdown(table)
    notes = [row["note"] for row in to_arrow(table).to_pylist() if row["method"] == "SP-Ctrl"]
    assert len(notes) == 3 and all("misprinted" in note for note in notes)
    assert "D" not in make(dataset="ap10k").notes


def test_other_splits_have_no_reported_numbers() -> None:
    assert make(split="test").methods == ()
    assert {source for _, source in make(measured("x", 0.1, 2), split="test").columns} == {"measured"}


def test_random_weights_are_marked_everywhere_and_never_best() -> None:
    table = make(measured("x", 0.9, 5, random=("x", "vitpose")), measured("y", 0.5, 9), measured("z", 0.4, 9))
    assert ("x", "AP", "measured") not in table.ranks()
    assert table.ranks()["y", "AP", "measured"] == 1
    markdown, latex = to_markdown(table), to_latex(table)
    assert "90.00<sup>R</sup>" in row_of(markdown, "x")
    assert r"90.00\textsuperscript{R}" in latex
    for text in (markdown, latex, to_csv(table), to_json(table)):
        assert "RANDOM WEIGHTS (vitpose, x): this number means nothing" in text
    rows = [row for row in to_arrow(table).to_pylist() if row["source"] == "measured"]
    assert {row["weights"] for row in rows if (row["method"], row["metric"]) == ("x", "AP")} == {"random"}
    assert {row["weights"] for row in rows if row["method"] == "y"} == {"real"}
    assert "5.00" in row_of(markdown, "x") and "5.00<sup>R" not in markdown, "FID had no random weights"


def test_another_area_of_detections_is_marked_where_it_matters() -> None:
    def scored(method: str, **options: Any) -> MethodScores:
        of_areas = [Score(name, "", "", 0.5, 0.4, 0.6, 99) for name in ("AP-M", "AP-L")]
        found = measured(method, 0.5, 20)
        provenance = {**found.provenance, "AP-M": "m.json", "AP-L": "l.json"}
        return replace(found, scores=[*found.scores, *of_areas], provenance=provenance, **options)

    table = make(scored("SP-Ctrl", detection_area="keypoints"))
    marks = {metric: cell.marks for (_, metric, source), cell in table.cells.items() if source == "measured"}
    assert marks == {"AP": "", "FID": "", "AP-M": "A", "AP-L": "A"}
    assert "keypoints' extent" in table.notes["A"]
    assert "keypoints' extent" in to_markdown(table)
    rows = [row for row in to_arrow(table).to_pylist() if row["source"] == "measured" and not row["kind"]]
    notes = {row["metric"]: row["note"] for row in rows}
    assert notes["AP-L"] == table.notes["A"] and notes["AP"] is None
    assert "A" not in make(scored("SP-Ctrl")).notes


def test_a_part_of_the_split_is_marked_even_where_the_annotations_are_cut() -> None:
    whole, part = measured("whole", 0.5, 9), measured("part", 0.6, 8, images=12)
    table = make(whole, part)
    assert "PART OF THE SPLIT (part: 12 of 995 images)" in table.notes["P"]
    assert r"part & \textbf{60.00}\textsuperscript{P}" in to_latex(table)
    assert r"whole & \underline{50.00} &" in to_latex(table)
    flags = {
        row["method"]: row["partial"] for row in to_arrow(table).to_pylist() if row["partial"] is not None
    }
    assert flags == {"whole": False, "part": True}


def test_a_split_of_unknown_size_says_how_many_images_it_has() -> None:
    table = make(measured("cut", 0.6, 8, images=12), dataset="humanart")
    for text in (to_markdown(table), to_latex(table), to_json(table)):
        assert "the annotations have 12 images; see that these are the whole split" in text
    assert "N" not in make(dataset="humanart").notes and "N" not in make(measured("x", 0.6, 8)).notes


def test_all_formats_hold_the_same_numbers() -> None:
    gap = Difference("AP", "a", "b", 0.1, -0.02, 0.3, 3)
    table = make(measured("a", 0.5, 10), measured("b", 0.4, 11), differences=[gap])
    arrow = to_arrow(table).to_pylist()
    from_csv = list(csv.DictReader(io.StringIO(to_csv(table))))
    from_json = json.loads(to_json(table))
    assert len(arrow) == len(from_csv) == len(from_json["numbers"]) == 9 + 6
    assert list(from_csv[0]) == ROWS_SCHEMA.names
    for a, b, c in zip(arrow, from_csv, from_json["numbers"], strict=True):
        assert float(b["value"]) == a["value"] == c["value"]
        assert a["provenance"] == (b["provenance"] or None) == c.get("provenance")
    group = next(row for row in arrow if row["kind"] == "species")
    assert group["group"] == "cat|dog" and group["value"] == 25 and group["low"] is None
    assert from_json["differences"] == [
        {
            "metric": "AP",
            "method": "a",
            "other": "b",
            "value": 10.0,
            "low": -2.0,
            "high": 30.0,
            "pairs": 3,
            "reason": "",
            "differ": False,
        }
    ]


def test_latex_is_escaped_and_shaped() -> None:
    table = make(measured("A_1 & B", 0.5, 10))
    latex = to_latex(table, intervals=True)
    assert r"A\_1 \& B & 50.00 {\scriptsize [48.00, 52.00]}" in latex
    assert latex.count(r"\toprule") == latex.count(r"\midrule") == latex.count(r"\bottomrule") == 1
    body = [line for line in latex.splitlines() if line.endswith(r"\\") and "&" in line][1:]
    columns = latex.split(r"\begin{tabular}{l")[1].split("}")[0].count("r")
    assert {line.replace(r"\&", "").count("&") for line in body} == {columns}
    assert "scriptsize [" not in to_latex(table)
    assert (
        latex_text("50% of #1 {~^\\}")
        == r"50\% of \#1 \{\textasciitilde{}\textasciicircum{}\textbackslash{}\}"
    )


def test_latex_of_negative_numbers_and_of_odd_names_of_benchmarks() -> None:
    table = build_table("a_b #1 50%&", "ap10k", "val", "AP-10K", [measured("x", -0.01, 10)], level=0.95)
    latex = to_latex(table, intervals=True)
    assert r"x & $-$1.00 {\scriptsize [$-$3.00, 1.00]}" in latex
    assert r"\label{tab:a-b-1-50-}" in latex


@pytest.mark.parametrize("source", ["pose AP", "FID"])
def test_a_metric_without_a_value_says_why_in_every_format(source: str) -> None:
    reason = "all 40 instances are crowds or have no labelled keypoint"
    metric = "AP" if source == "pose AP" else "FID"
    empty = measured("empty", 0.5, 10)
    rest = [score for score in empty.scores if score.metric != metric]
    empty.scores[:] = [Score(metric, "", "", math.nan, math.nan, math.nan, 0, reason=reason), *rest]  # type: ignore[index]
    for methods in ((empty,), (empty, measured("full", 0.4, 9))):
        table = make(*methods, split="test")
        assert metric in {each.name for each, _ in table.columns}
        for text in (to_markdown(table), to_latex(table), to_csv(table), to_json(table)):
            assert f"not computed: {reason}" in text
        page = render_benchmark(table, [], store="", made_at="now")
        assert f"not computed: {reason}" in page
        assert ("empty", metric, "measured") not in table.ranks()


def test_methods_without_a_value_have_no_difference() -> None:
    scores = [
        mean_scores("CLIP-score", {1: value, 2: value}, Intervals(resamples=40)) for value in (1.0, math.nan)
    ]
    assert differences("CLIP-score", dict(zip("ab", scores, strict=True)), 0.95) == []
    assert scores[1].rows[0].reason == "its value is not a number"


def test_links_lead_to_stores_with_any_name() -> None:
    row = row_of(to_markdown(make(measured("x", 0.5, 10)), store="../my (new) store #1"), "x")
    assert "[50.00](../my%20%28new%29%20store%20%231/runs/pose_ap/x/1/provenance.json)" in row


def test_a_number_that_is_not_computed_is_not_of_few_images() -> None:
    empty = measured("x", 0.5, 10)
    empty.scores[0] = Score("AP", "", "", math.nan, math.nan, math.nan, 0, reason="no instance")  # type: ignore[index]
    assert make(empty).cells["x", "AP", "measured"].marks == "" and "S" not in make(empty).notes


def few(images: int, low: float = 0.4, high: float = 0.6) -> MethodScores:
    """Scores of so few images that they are marked."""
    reason = "" if high == high else NO_INTERVAL
    return MethodScores(
        method="few",
        scores=[Score("AP", "", "", 0.5, low, high, images, images < 10, reason=reason)],
        provenance={"AP": "runs/pose_ap/few/1/provenance.json"},
        random={},
        num_images=WHOLE,
        num_annotated=WHOLE,
    )


@pytest.mark.parametrize(("images", "marked"), [(4, True), (9, True), (10, False)])
def test_numbers_of_few_images_are_marked_in_every_format(images: int, marked: bool) -> None:
    none = images < 5
    table = make(few(images, *((math.nan, math.nan) if none else (0.4, 0.6))))
    note = "FEW IMAGES (fewer than 10, or than 5 of each species on average): neither such a number"
    texts = (
        to_markdown(table), to_latex(table, intervals=True), to_csv(table), to_json(table),
        render_benchmark(table, [], store="", made_at="now"),
    )  # fmt: skip
    for text in texts:
        assert (note in text) == marked
        assert (NO_INTERVAL in text) == none
        assert "not computed" not in text
    assert ("<sup>S</sup>" in texts[0]) == marked
    (row,) = (row for row in to_arrow(table).to_pylist() if row["source"] == "measured")
    assert row["based_on"] == images and row["images"] == WHOLE and row["value"] == 50


def test_what_is_printed_as_kid_and_fid_and_ap_is_said_below_the_table() -> None:
    assert "FID depends on the number of images" in to_markdown(make(measured("x", 0.5, 10)))
    assert "K" not in make(measured("x", 0.5, 10)).notes
    scores = [Score("KID", "", "", 0.01, 0.005, 0.015, WHOLE)]
    for estimator, said in (
        ("paired", "leaves out the comparison"),
        ("independent", "torch-fidelity's, for indep"),
    ):
        kid = MethodScores(
            method="x", scores=scores, provenance={"KID": "p"}, random={}, num_images=WHOLE, num_annotated=WHOLE,
            kid_estimator=estimator,  # type: ignore[arg-type]
        )  # fmt: skip
        assert said in to_markdown(make(kid)) and said in to_latex(make(kid), metrics=["KID"])
        assert said not in to_latex(make(kid)), "whose columns are without KID"
    infinity = MethodScores(
        method="x", scores=[Score("FID-infinity", "", "", 9, 8, 10, WHOLE)], provenance={"FID-infinity": "p"},
        random={}, num_images=WHOLE, num_annotated=WHOLE,
    )  # fmt: skip
    assert "a part of the bias may remain" in to_markdown(make(infinity))
    latex = to_latex(make(infinity), metrics=["FID-infinity"])
    assert "a part of the bias may remain" in latex and r"FID$\infty$" in latex and "∞" not in latex
    species = measured("x", 0.5, 10)
    assert "M" not in make(species).notes, "a single species"
    species.scores.append(Score("AP", "species", "fox", 0.5, 0.4, 0.6, 20))  # type: ignore[attr-defined]
    assert "AP is a mean over 2 species" in to_markdown(make(species))


def test_markdown_survives_names_with_bars() -> None:
    row = row_of(to_markdown(make(measured("a|b", 0.5, 10))), "a")
    assert row.startswith(r"| a\|b | ")


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-1+1", "@SUM(A1)", "\t=1"])
def test_no_name_of_a_species_is_a_formula_in_a_spreadsheet(name: str) -> None:
    scores = measured("x", 0.5, 10)
    scores.scores.append(Score("AP", "species", name, -0.5, math.nan, math.nan, 3))
    (row,) = (
        row for row in csv.DictReader(io.StringIO(to_csv(make(scores)), newline="")) if name in row["group"]
    )
    assert row["group"] == f"'{name}"
    assert row["value"] == "-50.0", "numbers stay numbers"


def test_no_name_of_a_species_ends_a_row() -> None:
    scores = measured("x", 0.5, 10)
    scores.scores.append(Score("AP", "species", 'fox"\n\r=1,2', 0.5, math.nan, math.nan, 3))
    text = to_csv(make(scores))
    assert "\r" not in text
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["group"] for row in rows if row["kind"]] == ["cat|dog", 'fox"\n =1,2']


def test_differences_are_paired_and_need_the_same_images() -> None:
    intervals = Intervals(resamples=200)
    noise = np.random.default_rng(0).normal(size=60)
    first = mean_scores("CLIP-score", {i: float(20 + 5 * noise[i]) for i in range(60)}, intervals)
    second = mean_scores("CLIP-score", {i: float(19.9 + 5 * noise[i]) for i in range(60)}, intervals)
    (gap,) = differences("CLIP-score", {"a": first, "b": second}, 0.95)
    assert gap.value == pytest.approx(0.1)
    assert gap.low == pytest.approx(0.1) and gap.high == pytest.approx(0.1), "what both share cancels"
    wide = first.rows[0]
    assert wide.high - wide.low > 1
    other = Scores(rows=second.rows, samples=second.samples, image_ids=second.image_ids + 1)
    assert differences("CLIP-score", {"a": first, "b": other}, 0.95) == []


def test_scales_are_stated() -> None:
    assert METRIC["KID"].title == "KID × 1,000" and METRIC["KID"].scale == 1000
    assert METRIC["AP"].scale == 100
