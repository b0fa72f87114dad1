"""The stages that measure the images of one method: what networks find in them, and the metrics.

Networks are slow and metrics cheap, so they are stages of their own: a changed parameter of a metric makes that metric
and the tables anew. What was found of each method lies in a run of its own, whatever else it is compared with.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import luigi

from spctrl.data.datasets import MAX_IMAGE_FILE_BYTES
from spctrl.errors import ExpectedError
from spctrl.fingerprints import without_neutral
from spctrl.store.digests import MISSING, digest, digest_cache
from spctrl.store.provenance import RECORDS, REJECTS
from spctrl.store.runs import Run, struck_out
from tasks import settings
from tasks.dataset.images import HASHED_BETWEEN_LINES, READ_AT_ONCE_BYTES
from tasks.dataset.index import DatasetStage
from tasks.execution.devices import first_device
from tasks.execution.progress import progress
from tasks.experiment.generate.images import IMAGES, GeneratedImages
from tasks.experiment.generate.prompts import prompts_of
from tasks.experiment.generate.samples import MethodStage
from tasks.stage.base import StageTask
from tasks.stage.weights import Weights, weights_at, weights_digest

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from eval.scores import Features, Scores
    from eval.settings import Evaluation, Intervals

POSES, FEATURES, STATISTICS, CLIP_SCORES = "poses.parquet", "features.npz", "statistics.npz", "clip.parquet"
INSTANCES = "instances.parquet"
RANDOM = "random"


class OfEvaluation(luigi.Task):
    """A task of an evaluation; its result depends only on those settings that its parameters name."""

    evaluation = luigi.Parameter(description="an Evaluation of eval.settings, as JSON (evaluation_json)")

    @functools.cached_property
    def how_measured(self) -> Evaluation:
        import msgspec

        from eval.settings import Evaluation

        return msgspec.json.decode(self.evaluation, type=Evaluation)

    def settings_of(self, *names: str) -> dict[str, Any]:
        """Some of the settings as JSON values."""
        import msgspec

        return {name: msgspec.to_builtins(getattr(self.how_measured, name)) for name in names}


def evaluation_json(evaluation: Evaluation) -> str:
    """An evaluation as the parameter ``evaluation`` of the tasks here."""
    import msgspec

    return msgspec.json.encode(evaluation).decode()


class EvaluatedImages(OfEvaluation, MethodStage):
    """The images of a method that can be measured, with their prompts, and what is wrong with the others."""

    stage = "evaluated_images"
    function = "eval.checks:check_images"

    def generated_task(self) -> GeneratedImages:
        # What is missing of other people's images is counted here, together with what is broken.
        tolerant = {"on_bad_record": "quarantine", "max_reject_share": 1.0}
        task: GeneratedImages = self.clone(GeneratedImages, **(tolerant if self.is_external else {}))
        return task

    @property
    def is_external(self) -> bool:
        return self.how.kind == "external"

    def requires(self) -> list[luigi.Task]:
        return [self.index_task(), self.generated_task()]

    def parameters(self) -> dict[str, Any]:
        size = self.how_measured.expected_size_wh(self.how)
        return {"size_wh": None if size is None else list(size), "images_per_pose": self.how.images_per_pose}

    @property
    def folder(self) -> Path:
        return self.generated_task().folder

    def make(self, run: Run) -> dict[str, int]:
        import pyarrow as pa

        from eval.checks import IMAGES_SCHEMA, check_images
        from spctrl.data.records import rejects_table
        from spctrl.io.parquet import read_table

        prompts = self.prompts_task().finished_run()
        generated = read_table(self.generated_task().finished_run().path(IMAGES))
        self.generated_task().files(generated.column("path").to_pylist())  # refuses paths that lead out
        checked = check_images(
            generated.to_pylist(),
            list(prompts_of(prompts)),
            self.folder,
            count=self.how.images_per_pose,
            size_wh=self.how_measured.expected_size_wh(self.how),
        )
        run.write_table(IMAGES, pa.Table.from_pylist(checked.rows, schema=IMAGES_SCHEMA))
        without_prompt = read_table(prompts.path(REJECTS))
        rejects = pa.concat_tables([rejects_table(checked.rejects), without_prompt])
        run.write_table(REJECTS, rejects)
        return {
            "records": len(checked.rows) + len(checked.rejects),
            "made": len(checked.rows),
            "rejected": len(checked.rejects),
            "poses": sum(row["index"] == 0 for row in checked.rows),
            "without_prompt": len(without_prompt),
            "annotated": self.index_task().finished_run().provenance()["counts"]["records"],
        }

    def reject_fault(self, counts: Mapping[str, int]) -> str | None:
        rejected = counts.get("rejected", 0)
        if not counts.get("poses"):
            return f"expected images of {self.how.name}, found none that can be measured"
        prompts = {"records": counts["annotated"], "rejected": counts.get("without_prompt", 0)}
        if fault := super().reject_fault(prompts):
            return fault
        if not rejected or self.how_measured.allow_missing_images:
            return None
        return (
            f"{rejected:,} of {counts['records']:,} images are missing or cannot be used. Complete them, or set "
            "allow_missing_images: true to measure the others, with all numbers marked"
        )

    def weights_note(self) -> str | None:
        return self.generated_task().weights_note()


class OfImages(OfEvaluation, MethodStage):
    """A stage that measures images of one method."""

    def images_task(self) -> EvaluatedImages:
        task: EvaluatedImages = self.clone(EvaluatedImages)
        return task

    def images(self) -> pa.Table:
        """Rows of ``eval.checks.IMAGES_SCHEMA`` with the file of each image as ``file``."""
        from spctrl.io.parquet import read_table

        run, generated = self.images_task().finished_run(), self.images_task().generated_task().finished_run()
        table = read_table(run.path(IMAGES))
        paths = table.column("path").to_pylist()
        files = list(map(str, self.images_task().generated_task().files(paths)))
        listed = read_table(generated.path(IMAGES), columns=["path", "digest"]).to_pydict()
        digests = dict(zip(listed["path"], listed["digest"], strict=True))
        if unknown := set(paths) - digests.keys():
            raise struck_out([run, generated], f"expected images that were generated, found {min(unknown)}")
        found = digest_cache(self.store).file_digests(files)
        changed = [
            file for file, path, digest in zip(files, paths, found, strict=True) if digests[path] != digest
        ]
        if changed:
            raise ExpectedError(
                f"{self.how.name}: expected the images that were listed, found {len(changed)} changed since, such as "
                f"{changed[0]}. Another build or program writes there: run again when it is done"
            )
        return table.append_column("file", [files])

    def first_images(self) -> pa.Table:
        """The same of the first image of each pose."""
        import pyarrow.compute as pc

        table = self.images()
        return table.filter(pc.equal(table.column("index"), 0))

    def random(self) -> list[str]:
        """Names of what has random weights and decided the result."""
        return [self.how.name] if self.images_task().weights_note() == RANDOM else []

    def weights_note(self) -> str | None:
        return RANDOM if self.random() else None

    def notes(self) -> dict[str, Any]:
        return {"random": self.random()}


class WithNetwork(StageTask):
    """A stage that runs a network over images.

    The device is the stage's own while it runs; a stage is small enough to be done again where it was stopped.
    """

    weights_entry: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if settings.executor().device != "cpu":
            self.resources = {"gpu": 1}

    def weights_name(self) -> str:
        """Entry of weights.yaml, or path."""
        raise NotImplementedError

    def run(self) -> None:
        try:
            super().run()
        except ExpectedError as error:
            if str(self.weights_path) in str(error):
                raise
            # The network knows neither its own file nor whose images it sees.
            raise ExpectedError(f"{self.stage} for {self.part}, by {self.weights_path}: {error}") from error

    def weights_task(self) -> Weights:
        from spctrl.weights import known_weights

        name = self.weights_name()
        entry = name if name in known_weights() else self.weights_entry
        return Weights(name=entry, path=str(self.weights_path))

    @property
    def weights_path(self) -> Path:
        return weights_at(self.weights_name())

    def inputs(self) -> dict[str, str] | None:
        found = super().inputs()
        weights = weights_digest(self.store, self.weights_path)
        return None if found is None or weights == MISSING else {**found, "weights": weights}

    def random_network(self) -> list[str]:
        """The network's name, or that of its file or folder, where its weights are random."""
        from spctrl.weights import are_random

        return [Path(self.weights_name()).name] if are_random(self.weights_path) else []


class PredictedPoses(WithNetwork, OfImages):
    """Poses found in the images, in the boxes of the annotated instances."""

    stage = "poses"
    function = "eval.poses:estimate_poses"
    also_reaches: ClassVar[Sequence[str]] = (
        "eval.poses:make_estimator", "eval.poses:annotated_boxes", "eval.poses:detected_boxes"
    )  # fmt: skip
    libraries = ("torch", "transformers")
    weights_entry = "vitpose"

    def weights_name(self) -> str:
        return self.how_measured.pose_weights

    @property
    def detector_path(self) -> Path | None:
        """Weights of the detector, where boxes are detected."""
        pose = self.how_measured.pose
        return weights_at(pose.detector.weights) if pose.boxes == "detected" else None

    def requires(self) -> list[luigi.Task]:
        needed: list[luigi.Task] = [self.index_task(), self.images_task(), self.weights_task()]
        detector = self.detector_path
        return needed if detector is None else [*needed, Weights(name="detector", path=str(detector))]

    def parameters(self) -> dict[str, Any]:
        pose = self.settings_of("pose")["pose"]
        detector = {name: value for name, value in pose["detector"].items() if name != "weights"}
        if self._detector_config_file is not None:
            del detector["config"]  # a file counts by content, as an input
        found = {name: pose[name] for name in pose if name not in ("weights", "environment", "detector")}
        return {**found, "detector": detector if self.detector_path else None}

    @property
    def _detector_config_file(self) -> Path | None:
        """The detector's configuration, where it is a file and not the name of one that mmdet ships."""
        path = Path(self.how_measured.pose.detector.config)
        return path if self.detector_path and path.is_file() else None

    def inputs(self) -> dict[str, str] | None:
        from eval.detector_configs import configuration_files

        found, detector = super().inputs(), self.detector_path
        if found is None or detector is None:
            return found
        digests = {"detector": weights_digest(self.store, detector)}
        if (config := self._detector_config_file) is not None:
            files = digest_cache(self.store).file_digests(list(map(str, configuration_files(config))))
            digests["detector_config"] = MISSING if MISSING in files else digest(*files)
        return None if MISSING in digests.values() else {**found, **digests}

    def random(self) -> list[str]:
        return [*super().random(), *self.random_network()]

    def make(self, run: Run) -> dict[str, int]:
        from eval.instances import poses_table, read_ground_truth
        from eval.poses import annotated_boxes, detected_boxes, estimate_poses, make_estimator, sizes_of
        from spctrl.io.parquet import read_table

        index_run = self.index_task().finished_run()
        index = read_table(index_run.path(RECORDS))
        images, truth, sizes_wh = self.first_images(), read_ground_truth(index), sizes_of(index)
        if unknown := set(images.column("image_id").to_pylist()) - sizes_wh.keys():
            runs = [self.images_task().finished_run(), self.prompts_task().finished_run(), index_run]
            raise struck_out(runs, f"expected images of the index, found {min(unknown)}")
        ids, names = (images.column(name).to_pylist() for name in ("image_id", "file"))
        files = dict(zip(ids, map(Path, names), strict=True))
        pose, device = self.how_measured.pose, first_device(settings.executor().device)
        if self.detector_path is None:
            boxes = annotated_boxes(truth)
        else:
            person = int(truth.category_ids[0])
            boxes = detected_boxes(files, sizes_wh, person, pose, self.detector_path, device)
        estimator = make_estimator(pose, self.weights_path, self.dataset, device)
        with progress(f"{self.stage} {self.part}", len(files), self.set_progress_percentage) as advance:
            poses = estimate_poses(estimator, files, boxes, sizes_wh, advance=advance)
        run.write_table(POSES, poses_table(poses))
        return {"records": len(files), "made": len(poses), "rejected": 0}


class InceptionStage(WithNetwork, OfEvaluation, DatasetStage):
    """Features of images by the Inception network, and their mean and covariance."""

    function = "eval.inception:Inception"
    also_reaches: ClassVar[Sequence[str]] = ("eval.inception:load_inception", "eval.fid:statistics")
    libraries = ("torch", "torch-fidelity")
    weights_entry = "inception"

    def weights_name(self) -> str:
        return self.how_measured.features.weights

    def crop(self) -> str:
        """See ``eval.inception.Inception``."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        return {"resize": self.how_measured.features.resize, "crop": self.crop()}

    def write_features(
        self, run: Run, image_ids: Sequence[int], index: Sequence[int], files: Sequence[str]
    ) -> int:
        import numpy as np

        from eval.fid import save_statistics, statistics
        from eval.inception import load_inception

        network = load_inception(
            self.weights_path, device=first_device(settings.executor().device), **self.parameters()
        )
        values = network.features(files)
        order = np.lexsort((index, image_ids))
        numbers = np.array(index, np.int32)[order]
        with run.create(FEATURES) as path, path.open("wb") as file:
            np.savez(
                file, image_ids=np.array(image_ids, np.int64)[order], index=numbers, values=values[order]
            )
        with run.create(STATISTICS) as path:
            save_statistics(path, statistics(values[order][numbers == 0]))
        return len(files)


class ImageFeatures(InceptionStage, OfImages):
    """Inception features of a method's images; the statistics are of the first image of each pose."""

    stage = "features"

    def requires(self) -> list[luigi.Task]:
        return [self.images_task(), self.weights_task()]

    def crop(self) -> str:
        return "none"  # generated images are square as they are

    def random(self) -> list[str]:
        return [*super().random(), *self.random_network()]

    def make(self, run: Run) -> dict[str, int]:
        images = self.images()
        count = self.write_features(
            run, *(images.column(name).to_pylist() for name in ("image_id", "index", "file"))
        )
        return {"records": count, "made": count, "rejected": 0}


class RealFeatures(InceptionStage):
    """Inception features and statistics of a split's own images."""

    stage = "real_features"

    def requires(self) -> list[luigi.Task]:
        return [self.index_task(), self.weights_task()]

    def crop(self) -> str:
        return str(self.how_measured.features.crop)

    def inputs(self) -> dict[str, str] | None:
        upstream, names = super().inputs(), self.image_paths()
        if upstream is None or names is None:
            return None
        found = digest_cache(self.store).list_digest(
            str(self.root),
            names,
            max_read_bytes=READ_AT_ONCE_BYTES,
            largest_bytes=MAX_IMAGE_FILE_BYTES,
        )
        return None if found is None else {**upstream, "files": found}

    def fill_cache(self) -> None:
        if self.ingredients() is not None:
            return
        paths = [str(self.root / path) for path in self.image_paths() or []]
        title = f"{self.stage} {self.part}: digests"
        with progress(title, len(paths), self.set_progress_percentage) as advance:
            for start in range(0, len(paths), HASHED_BETWEEN_LINES):
                some = paths[start : start + HASHED_BETWEEN_LINES]
                digest_cache(self.store).file_digests(some, largest_bytes=MAX_IMAGE_FILE_BYTES)
                advance(len(some))

    def weights_note(self) -> str | None:
        return RANDOM if self.random_network() else None

    def make(self, run: Run) -> dict[str, int]:
        from spctrl.io.parquet import read_table

        table = read_table(
            self.index_task().finished_run().path(RECORDS),
            columns=["image_id", "file_name"],
        )
        files = list(map(str, self.image_files(table.column("file_name").to_pylist())))
        count = self.write_features(run, table.column("image_id").to_pylist(), [0] * len(files), files)
        return {"records": count, "made": count, "rejected": 0}


class ClipCosines(WithNetwork, OfImages):
    """100 times the cosine of each pose's first image and its prompt."""

    stage = "clip"
    function = "eval.clip_score:clip_score"
    libraries = ("torch", "transformers")
    weights_entry = "clip"

    def weights_name(self) -> str:
        return self.how_measured.clip.weights

    def requires(self) -> list[luigi.Task]:
        return [self.images_task(), self.weights_task()]

    def random(self) -> list[str]:
        return [*super().random(), *self.random_network()]

    def make(self, run: Run) -> dict[str, int]:
        import pyarrow as pa

        from eval.clip_score import clip_score

        images = self.first_images()
        scores = clip_score(
            images.column("file").to_pylist(),
            images.column("prompt").to_pylist(),
            weights=self.weights_path,
            device=first_device(settings.executor().device),
        )
        run.write_table(CLIP_SCORES, pa.table({"image_id": images.column("image_id"), "score": scores}))
        return {"records": len(scores), "made": len(scores), "rejected": 0}


# Metrics


class MetricStage(OfImages):
    """A metric of one method: values and their intervals."""

    libraries: ClassVar[Sequence[str]] = ("numpy", "scipy")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._warnings: list[str] = []

    def sources(self) -> list[StageTask]:
        """What it is computed from."""
        raise NotImplementedError

    def requires(self) -> list[luigi.Task]:
        return list(self.sources())

    def random(self) -> list[str]:
        found = [each for task in self.sources() if isinstance(task, OfImages) for each in task.random()]
        real = [
            each
            for task in self.sources()
            if isinstance(task, RealFeatures)
            for each in task.random_network()
        ]
        return list(dict.fromkeys([*found, *real]))

    def parameters(self) -> dict[str, Any]:
        return {**self.settings_of("intervals"), "definition": self.definition()}

    def definition(self) -> str:
        """What exactly the number and its interval are, for the provenance: the name of a metric says too little."""
        from eval.settings import DEFINITIONS

        return DEFINITIONS[self.stage]

    def notes(self) -> dict[str, Any]:
        return {**super().notes(), "warnings": self._warnings}

    def write(self, run: Run, scores: Scores, warnings: Sequence[str] = ()) -> dict[str, int]:
        from eval.scores import SAMPLES, SCORES, write_scores

        for warning in warnings:
            luigi.task.logger.warning("%s of %s: %s", self.stage, self.how.name, warning)
        self._warnings = list(warnings)
        with run.create(SCORES) as table, run.create(SAMPLES) as samples:
            write_scores(scores, table, samples)
        return {"records": len(scores.image_ids), "made": len(scores.rows), "rejected": 0}


class PoseAp(MetricStage):
    """Pose AP by the COCO protocol, and PCK."""

    stage = "pose_ap"
    function = "eval.scores:pose_scores"

    def poses_task(self) -> PredictedPoses:
        task: PredictedPoses = self.clone(PredictedPoses)
        return task

    def sources(self) -> list[StageTask]:
        return [self.index_task(), self.poses_task()]

    def parameters(self) -> dict[str, Any]:
        (pose_ap,) = self.settings_of("pose_ap").values()
        pose_ap = without_neutral(pose_ap, {"detection_area": "bbox"})
        return {**super().parameters(), "pose_ap": pose_ap, "dataset": self.dataset}

    def make(self, run: Run) -> dict[str, int]:
        import pyarrow as pa

        from eval.instances import read_ground_truth, read_poses
        from eval.scores import pose_scores
        from spctrl.io.parquet import read_table

        index = read_table(self.index_task().finished_run().path(RECORDS))
        truth = read_ground_truth(index)
        scores, oks = pose_scores(
            read_poses(self.poses_task().finished_run().path(POSES)),
            truth,
            self.dataset,
            self.how_measured.intervals,
            self.how_measured.pose_ap,
        )
        counted = ~truth.ignored
        instances = {
            "image_id": truth.image_ids[truth.image_of][counted],
            "annotation_id": truth.annotation_ids[counted],
            "oks": oks[counted],
        }
        run.write_table(INSTANCES, pa.table(instances))
        return self.write(run, scores)


class Distance(MetricStage):
    """A distance between the features of the images of a method and of the real ones."""

    def fake_task(self) -> ImageFeatures:
        task: ImageFeatures = self.clone(ImageFeatures)
        return task

    def real_task(self) -> RealFeatures:
        task: RealFeatures = self.clone(RealFeatures)
        return task

    def sources(self) -> list[StageTask]:
        return [self.fake_task(), self.real_task()]

    def features(self) -> tuple[Features, Features]:
        """Those of the real and of the generated images."""
        return first_features(self.real_task().finished_run()), first_features(
            self.fake_task().finished_run()
        )


class SubsampledDistance(Distance):
    """A distance whose interval comes from subsamples of the images."""

    libraries = ("numpy", "scipy", "threadpoolctl")

    def parameters(self) -> dict[str, Any]:
        return {**super().parameters(), **self.settings_of("fid")}

    @property
    def intervals(self) -> Intervals:
        """The evaluation's, with the number of subsamples."""
        import msgspec

        return msgspec.structs.replace(self.how_measured.intervals, resamples=self.how_measured.fid.resamples)


class Fid(SubsampledDistance):
    """Frechet inception distance."""

    stage = "fid"
    function = "eval.scores:fid_scores"

    def make(self, run: Run) -> dict[str, int]:
        from eval.fid import load_statistics
        from eval.scores import fid_scores

        real, fake = (
            load_statistics(task.finished_run().path(STATISTICS))
            for task in (self.real_task(), self.fake_task())
        )
        return self.write(run, *fid_scores(*self.features(), real, fake, self.intervals))


class FidInfinity(SubsampledDistance):
    """Frechet inception distance, extrapolated to any number of images."""

    stage = "fid_infinity"
    function = "eval.scores:extrapolated_fid_scores"

    def make(self, run: Run) -> dict[str, int]:
        from eval.scores import extrapolated_fid_scores

        return self.write(run, *extrapolated_fid_scores(*self.features(), self.intervals))


class Kid(Distance):
    """Kernel inception distance."""

    stage = "kid"
    function = "eval.scores:kid_scores"

    def parameters(self) -> dict[str, Any]:
        (kid,) = self.settings_of("kid").values()
        if kid["estimator"] == "paired":  # which compares all images at once
            kid = {"estimator": "paired"}
        return {**super().parameters(), "kid": kid}

    def definition(self) -> str:
        from eval.settings import DEFINITIONS

        return DEFINITIONS[f"{self.stage}_{self.how_measured.kid.estimator}"]

    def make(self, run: Run) -> dict[str, int]:
        from eval.scores import kid_scores

        return self.write(
            run, kid_scores(*self.features(), self.how_measured.intervals, self.how_measured.kid)
        )


class ClipScore(MetricStage):
    """Mean CLIP-score."""

    stage = "clip_score"
    function = "eval.scores:mean_scores"

    def sources(self) -> list[StageTask]:
        return [self.clone(ClipCosines)]

    def make(self, run: Run) -> dict[str, int]:
        from eval.scores import mean_scores
        from spctrl.io.parquet import read_table

        found = read_table(self.clone(ClipCosines).finished_run().path(CLIP_SCORES)).to_pydict()
        values = dict(zip(found["image_id"], found["score"], strict=True))
        return self.write(run, mean_scores("CLIP-score", values, self.how_measured.intervals))


class Diversity(MetricStage):
    """Mean distance between the features of two images of a pose."""

    stage = "diversity"
    function = "eval.scores:diversity_scores"

    def sources(self) -> list[StageTask]:
        return [self.clone(ImageFeatures)]

    def make(self, run: Run) -> dict[str, int]:
        from eval.scores import diversity_scores

        found = read_features(self.clone(ImageFeatures).finished_run())
        return self.write(
            run, diversity_scores(found["values"], found["image_ids"], self.how_measured.intervals)
        )


METRICS: Mapping[str, type[MetricStage]] = {
    task.stage: task for task in (PoseAp, Fid, FidInfinity, Kid, ClipScore, Diversity)
}


def read_features(run: Run) -> dict[str, NDArray[Any]]:
    """``image_ids``, ``index`` and ``values`` of a run of an ``InceptionStage``."""
    from spctrl.io.arrays import read_arrays

    return read_arrays(run.path(FEATURES))


def first_features(run: Run) -> Features:
    """Features of the first image of each pose."""
    from eval.scores import Features

    found = read_features(run)
    first = found["index"] == 0
    return Features(found["image_ids"][first], found["values"][first])
