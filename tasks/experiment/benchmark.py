"""The stages that compare all methods of an evaluation: the tables and the report."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import luigi

from spctrl.output.secrets import without_secrets
from spctrl.storage import Folder, is_url
from spctrl.storage.files import exclusive
from spctrl.store.code_version import ROOT
from spctrl.store.digests import digest_cache
from spctrl.store.provenance import RECORDS
from spctrl.store.runs import PROVENANCE, Run, struck_out
from tasks import settings
from tasks.dataset.export import LOCK
from tasks.dataset.views import RenderedView, ViewStage
from tasks.execution import logs
from tasks.experiment.evaluate import (
    INSTANCES,
    METRICS,
    POSES,
    EvaluatedImages,
    MetricStage,
    OfEvaluation,
    PoseAp,
)
from tasks.experiment.generate.samples import method_json
from tasks.settings import LEDGERS

if TYPE_CHECKING:
    from eval.report import Case, MethodView
    from eval.scores import Scores
    from eval.tables import MethodScores, Table

TABLE, TABLE_PARQUET = "table.md", "table.parquet"
PAGE, GRID_PNG, GRID_PDF = "report.html", "grid.png", "grid.pdf"
STORE_OF_RUN = "../../../.."
"""The store from a run, ``runs/<stage>/<part>/<fingerprint>/``."""
TEMPLATES = ("eval/templates/benchmark.html.j2", "spctrl/templates/style.css.j2")


class OfMethods(OfEvaluation, ViewStage):
    """A stage that compares all methods of an evaluation; its view is a folder with its files."""

    reads_several_parts = True

    name = luigi.Parameter(description="of the benchmark: that of its file")

    @property
    def part(self) -> str:
        return str(self.name)

    @property
    def folder(self) -> Path:
        """Where users look for the files."""
        return settings.export_folder("Benchmark") / f"benchmark-{self.name}"

    def metrics_of(self, method: str) -> dict[str, MetricStage]:
        """The metrics of a method, by name."""
        how = self.how_measured
        several = next(each for each in how.methods if each.name == method).images_per_pose > 1
        return {
            metric: self._of_method(METRICS[metric], method)
            for metric in how.metrics
            if metric != "diversity" or several
        }

    def images_of(self, method: str) -> EvaluatedImages:
        task: EvaluatedImages = self._of_method(EvaluatedImages, method)
        return task

    def _of_method(self, stage: type[Any], name: str) -> Any:
        method = next(each for each in self.how_measured.methods if each.name == name)
        return self.clone(
            stage,
            dataset=self.how_measured.dataset,
            split=self.how_measured.split,
            method=method_json(method),
        )

    def methods(self) -> list[str]:
        return [method.name for method in self.how_measured.methods]

    @property
    def view_address(self) -> str:
        return str(self.folder)

    @property
    def _view(self) -> RenderedView:
        return RenderedView(Folder(self.folder, LEDGERS), f"{LEDGERS}/{self.stage}.json")

    def view_lock(self) -> AbstractContextManager[None]:
        return exclusive(self.folder / LOCK, f"writing to {self.folder}", logs.notify)

    def has_view(self, run: Run) -> bool:
        return self._view.is_of(run, digest_cache(self.store))

    def write_view(self, run: Run) -> None:
        address = without_secrets(self.store.files.address)
        store = address if is_url(address) else os.path.relpath(address, self.folder.absolute())
        self._view.write(run, self.render(store))

    def render(self, store: str) -> dict[str, bytes]:
        """The files by name.

        Args:
            store: path of the store from where the files will lie, or its URL; for links to provenances.
        """
        raise NotImplementedError

    def render_into(self, run: Run) -> int:
        """Write the files into a run; returns how many."""
        files = self.render(STORE_OF_RUN)
        for name, data in files.items():
            run.write(name, data)
        return len(files)


class Tables(OfMethods):
    """The paper's table as Markdown, LaTeX, CSV, JSON and Parquet."""

    stage = "tables"
    function = "eval.tables:build_table"
    also_reaches: ClassVar[Sequence[str]] = (
        "eval.tables:FORMATS", "eval.tables:to_markdown", "eval.tables:to_arrow",
        "eval.differences:differences",
    )  # fmt: skip

    def requires(self) -> list[luigi.Task]:
        return [
            task
            for method in self.methods()
            for task in (self.images_of(method), *self.metrics_of(method).values())
        ]

    def parameters(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "methods": self.methods(),
            "dataset": self.how_measured.dataset,
            "split": self.how_measured.split,
            "reference": self.how_measured.reference,
        }

    def make(self, run: Run) -> dict[str, int]:
        self.render_into(run)
        return {"records": len(self.table.measured), "made": len(self.table.cells), "rejected": 0}

    def render(self, store: str) -> dict[str, bytes]:
        from eval.tables import FORMATS, to_arrow, to_markdown
        from spctrl.io.parquet import parquet_bytes

        files = {name: write(self.table).encode() for name, write in FORMATS.items()}
        files[TABLE] = to_markdown(self.table, store=store).encode()
        files[TABLE_PARQUET] = parquet_bytes(to_arrow(self.table))
        return files

    @functools.cached_property
    def table(self) -> Table:
        """What the finished metrics found, beside the reported numbers."""
        from eval.differences import differences
        from eval.tables import METRIC, build_table

        found = {method: dict(self._scores_of(method)) for method in self.methods()}
        level = self.how_measured.intervals.level
        compared = []
        for metric in METRIC:
            of_methods = {
                method: scores
                for method, tasks in found.items()
                for scores in tasks.values()
                if metric in scores.samples
            }
            compared += differences(metric, of_methods, level, self.how_measured.reference)
        return build_table(
            str(self.name),
            self.how_measured.dataset,
            self.how_measured.split,
            settings.dataset_of(self.how_measured.dataset).title,
            [self._method_scores(method, scores) for method, scores in found.items()],
            level=level,
            differences=compared,
        )

    def _scores_of(self, method: str) -> Iterator[tuple[MetricStage, Scores]]:
        from eval.scores import read_scores

        for task in self.metrics_of(method).values():
            yield task, read_scores(task.finished_run().folder)

    def _method_scores(self, method: str, found: Mapping[MetricStage, Scores]) -> MethodScores:
        from eval.tables import MethodScores

        counts = self.images_of(method).finished_run().provenance()["counts"]
        provenance, random = {}, {}
        for task, scores in found.items():
            run = task.finished_run()
            for metric in scores.samples:
                provenance[metric] = run.name(PROVENANCE)
                random[metric] = run.provenance()["random"]
        return MethodScores(
            method=method,
            scores=[row for scores in found.values() for row in scores.rows],
            provenance=provenance,
            random=random,
            num_images=counts["poses"],
            num_annotated=counts["annotated"],
            detection_area=self.how_measured.pose_ap.detection_area,
            kid_estimator=self.how_measured.kid.estimator,
        )


class BenchmarkReport(OfMethods):
    """The benchmark as one HTML page, with its best and worst cases, which are also a figure for the paper."""

    stage = "benchmark_report"
    function = "eval.report.page:render_benchmark"
    also_reaches: ClassVar[Sequence[str]] = (
        "eval.report.cases:choose_cases", "eval.report.cases:draw_case", "eval.report.grid:render_grid"
    )  # fmt: skip
    libraries = ("jinja2", "matplotlib", "opencv-python-headless")

    def tables_task(self) -> Tables:
        task: Tables = self.clone(Tables)
        return task

    def requires(self) -> list[luigi.Task]:
        return [self.tables_task(), *self.tables_task().requires()]

    def parameters(self) -> dict[str, Any]:
        templates = digest_cache(self.store).file_digests([str(ROOT / each) for each in TEMPLATES])
        return {**self.settings_of("num_cases"), "templates": templates}

    def make(self, run: Run) -> dict[str, int]:
        return {"records": len(self._cases), "made": self.render_into(run), "rejected": 0}

    def render(self, store: str) -> dict[str, bytes]:
        from eval.report import render_benchmark

        page = render_benchmark(
            self.tables_task().table,
            self._cases,
            store=store,
            warnings=list(self._warnings()),
            made_at=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        )
        return {PAGE: page.encode(), **self._grid}

    @functools.cached_property
    def _cases(self) -> list[Case]:
        from eval.report import choose_cases, draw_case

        views = [self._method_view(each) for each in self.methods() if "pose_ap" in self.how_measured.metrics]
        if not views:
            return []
        rows, root = self._annotated(views[0]), settings.dataset_root(self.how_measured.dataset)
        cases = choose_cases([view.oks for view in views], self.how_measured.num_cases)
        if unknown := {case.image_id for case in cases} - rows.keys():
            scored = [self._of_method(PoseAp, view.method).finished_run() for view in views]
            raise struck_out(scored, f"expected images of the index, found {min(unknown)}")
        return [
            draw_case(rows[case.image_id], case, views, dataset=self.how_measured.dataset, root=root)
            for case in cases
        ]

    @functools.cached_property
    def _grid(self) -> dict[str, bytes]:
        """The cases as a figure."""
        from eval.report import render_grid

        return dict(zip((GRID_PNG, GRID_PDF), render_grid(self._cases), strict=True)) if self._cases else {}

    def _annotated(self, view: MethodView) -> dict[int, dict[str, Any]]:
        """Rows of the index by image id."""
        from spctrl.io.parquet import read_table

        index = self.images_of(view.method).index_task().finished_run()
        rows = read_table(index.path(RECORDS)).to_pylist()
        return {row["image_id"]: row for row in rows}

    def _method_view(self, method: str) -> MethodView:
        from eval.instances import read_poses
        from eval.report import MethodView
        from spctrl.io.parquet import read_table

        scored: PoseAp = self._of_method(PoseAp, method)
        images = scored.first_images().to_pylist()
        oks: dict[int, list[float]] = {row["image_id"]: [] for row in images}
        for row in read_table(scored.finished_run().path(INSTANCES)).to_pylist():
            if row["image_id"] in oks:  # a missing image is no case to look at
                oks[row["image_id"]].append(row["oks"])
        return MethodView(
            method=method,
            files={row["image_id"]: Path(row["file"]) for row in images},
            prompts={row["image_id"]: row["prompt"] for row in images},
            poses=read_poses(scored.poses_task().finished_run().path(POSES)),
            oks={image_id: sum(values) / len(values) for image_id, values in oks.items() if values},
        )

    def _warnings(self) -> Iterator[str]:
        """What the metrics had to say, each once, with the methods that it concerns."""
        concerned: dict[tuple[str, str], list[str]] = {}
        for method in self.methods():
            for name, task in self.metrics_of(method).items():
                for warning in task.finished_run().provenance().get("warnings", []):
                    concerned.setdefault((name, warning), []).append(method)
        for (name, warning), methods in concerned.items():
            yield f"{name} of {', '.join(methods)}: {warning}"
