"""Evaluation of methods, and the paper's table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import luigi

from spctrl.output.terminal import say, say_text
from spctrl.paths import config_name
from tasks.experiment.benchmark import PAGE, BenchmarkReport, Tables
from tasks.experiment.evaluate import evaluation_json
from tasks.parameters import PathParameter
from tasks.stage.rejects import MeetsBadRecords

if TYPE_CHECKING:
    from eval.settings import Evaluation
    from tasks.experiment.evaluate import MetricStage


class Evaluate(MeetsBadRecords, luigi.WrapperTask):
    """The metrics of the methods of a file; what a method lacks of training and images is made first.

    ``luigi --module pipelines Evaluate --config configs/evaluate/ap10k.yaml``
    """

    config = PathParameter(description="a file of configs/evaluate/")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.how = _read(Path(self.config))

    def tables_task(self) -> Tables:
        task: Tables = self.clone(
            Tables, name=config_name(Path(self.config)), evaluation=evaluation_json(self.how)
        )
        return task

    def metric_tasks(self) -> Iterator[MetricStage]:
        tables = self.tables_task()
        for method in tables.methods():
            yield from tables.metrics_of(method).values()

    def requires(self) -> list[luigi.Task]:
        return list(self.metric_tasks())

    def run(self) -> None:
        from eval.scores import SCORES
        from eval.tables import METRIC, printed
        from spctrl.io.parquet import read_table

        for task in self.metric_tasks():
            for row in read_table(task.finished_run().path(SCORES)).to_pylist():
                if not row["kind"]:
                    metric = METRIC[row["metric"]]
                    numbers = [printed(metric.scale * row[name], metric) for name in ("value", "low", "high")]
                    mark = "  (RANDOM WEIGHTS)" if task.weights_note() == "random" else ""
                    say(f"{task.how.name}: {metric.title} {numbers[0]} [{numbers[1]}, {numbers[2]}]{mark}")


class Benchmark(Evaluate):
    """The paper's table of the methods of a file, and a report; what they lack is made first.

    ``luigi --module pipelines Benchmark --config configs/evaluate/ap10k.yaml``
    """

    def report_task(self) -> BenchmarkReport:
        task: BenchmarkReport = self.clone(
            BenchmarkReport, name=config_name(Path(self.config)), evaluation=evaluation_json(self.how)
        )
        return task

    def requires(self) -> list[luigi.Task]:
        return [self.tables_task(), self.report_task()]

    def run(self) -> None:
        from eval.tables import to_markdown

        tables = self.tables_task()
        say_text(to_markdown(tables.table, intervals=False))
        say(f"Report: {tables.folder / PAGE}", "Tables: the files beside it")


def _read(path: Path) -> Evaluation:
    from eval.settings import Evaluation
    from spctrl.configuration import read_config

    return read_config(path, Evaluation)
