"""Pose AP of AP-10K's train and val together, and 1,000 bootstrap resamples of it, against pycocotools.

Both sides start from the annotations and a COCO results list in memory. pycocotools has its index of the annotations
made beforehand. faster-coco-eval runs beside them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common import Report, interleaved, measure, wait_for_calm
from benchmarks.inputs import ap10k_documents, half, merged
from benchmarks.plain import Json
from eval.bootstrap import bootstrap
from eval.pose_ap import METRICS, evaluate, oks_sigmas
from spctrl.data.datasets import AP10K

REPEATS, QUICK_REPEATS = 5, 1
QUICK_IMAGES = 1000
RESAMPLES = 1000
EXACT = 1e-9

OURS, PYCOCOTOOLS, FASTER = "this project", "pycocotools", "faster-coco-eval"


def run(report: Report) -> None:
    documents, real = ap10k_documents()
    document = merged(documents)
    if report.quick:
        document = half(document, QUICK_IMAGES)
    results = jittered(document)
    evaluations: dict[str, Callable[[], Any]] = {
        OURS: lambda: [evaluate(results, document, AP10K).scores[name] for name in METRICS],
        PYCOCOTOOLS: _coco_evaluation(
            "pycocotools.coco", "pycocotools.cocoeval", "COCOeval", document, results
        ),
        FASTER: _coco_evaluation(
            "faster_coco_eval", "faster_coco_eval", "COCOeval_faster", document, results
        ),
    }
    found = {name: np.array(evaluation()[: len(METRICS)]) for name, evaluation in evaluations.items()}
    apart = float(np.abs(found[OURS] - found[PYCOCOTOOLS]).max())
    if apart > EXACT:
        raise RuntimeError(f"AP is {apart:g} apart from pycocotools', expected at most {EXACT:g}")
    repeats = QUICK_REPEATS if report.quick else REPEATS
    costs = interleaved(evaluations, repeats)
    ap = evaluate(results, document, AP10K)
    wait_for_calm()
    size = len(ap.matches.curves.entry_image)
    bootstrapped = measure(lambda: bootstrap(ap.at, len(ap.image_ids), RESAMPLES, size=size))

    base_s = costs[PYCOCOTOOLS].wall_s
    rows = [
        (
            name,
            f"{cost.wall_s:.3f}",
            f"{cost.cpu_s:.3f}",
            f"{base_s / cost.wall_s:.1f}",
            f"{found[name][0]:.12f}",
        )
        for name, cost in costs.items()
    ]
    rows.append(
        (
            f"this project, {RESAMPLES:,} bootstrap resamples",
            f"{bootstrapped.wall_s:.3f}",
            f"{bootstrapped.cpu_s:.3f}",
            f"{base_s / bootstrapped.wall_s:.2f}",
            "",
        )
    )
    report.table(
        f"Pose AP of {len(document['annotations']):,} {'real' if real else 'stand-in'} instances in "
        f"{len(document['images']):,} images, medians of {repeats} turns",
        ("", "wall s", "CPU s", "times pycocotools", "AP"),
        rows,
        f"From annotations and results in memory to the metrics; at most {apart:.1g} apart from pycocotools.",
    )
    report.target("pycocotools / ours, wall time", base_s / costs[OURS].wall_s, at_least=2.5)
    report.target(
        f"{RESAMPLES:,} resamples / one pycocotools evaluation, wall time",
        bootstrapped.wall_s / base_s,
        at_most=1,
    )


def jittered(document: Json) -> list[Json]:
    """A result for each annotation, moved by some share of what the sigmas allow and scored accordingly (seeded)."""
    rng = np.random.default_rng(0)
    results = []
    for annotation in document["annotations"]:
        size = rng.exponential(1.0)
        points = np.array(annotation["keypoints"], float).reshape(-1, 3)
        spread = size * oks_sigmas(AP10K)[:, None] * np.sqrt(annotation["area"])
        points[:, :2] += rng.normal(size=(len(points), 2)) * spread
        results.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "keypoints": points.reshape(-1).tolist(),
                "score": float(np.exp(-size) + rng.normal(0, 0.1)),
            }
        )
    return results


def _coco_evaluation(
    coco_module: str, eval_module: str, eval_class: str, document: Json, results: list[Json]
) -> Callable[[], Any]:
    """An evaluation as both packages' users write it; gives the statistics."""
    import importlib

    COCO = importlib.import_module(coco_module).COCO
    evaluator = getattr(importlib.import_module(eval_module), eval_class)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = document
        truth.createIndex()

    def evaluation() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            predictions = truth.loadRes([dict(each) for each in results])  # it writes into them
            evaluation = evaluator(truth, predictions, "keypoints")
            evaluation.params.kpt_oks_sigmas = oks_sigmas(AP10K)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.stats

    return evaluation
