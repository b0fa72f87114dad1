"""What a benchmark is: the poses, the methods, and how their images are measured. Read from configs/evaluate/."""

from __future__ import annotations

from typing import Literal

import msgspec

from spctrl.configuration import PathText
from spctrl.inference.methods import Method

DetectionArea = Literal["bbox", "keypoints"]
KidEstimator = Literal["paired", "independent"]
MIN_RESAMPLES = 40
"""With fewer, none is as far out as an interval of 95 % reaches."""
MetricGroup = Literal["pose_ap", "fid", "fid_infinity", "kid", "clip_score", "diversity"]

_BOOTSTRAP = "interval: expanded percentiles of bootstrap resamples of the images"
_SUBSAMPLES = "interval: standard deviation of subsamples that leave out a tenth of the images, rescaled"
DEFINITIONS = {
    "pose_ap": f"COCO keypoint AP, mean over categories; {_BOOTSTRAP}",
    "fid": f"FID at this number of images; {_SUBSAMPLES}",
    "fid_infinity": f"FID extrapolated in 1 / images from halves and all; {_SUBSAMPLES}",
    "kid_paired": f"unbiased for paired sets: no image is compared with that of its own pose; {_BOOTSTRAP}",
    "kid_independent": "torch-fidelity's, mean over subsets, too low for paired sets; "
    f"{_BOOTSTRAP}, of the estimator for paired sets, around the value",
    "clip_score": f"mean over images; {_BOOTSTRAP}",
    "diversity": f"mean over poses; {_BOOTSTRAP}",
}
"""What a number and its interval are, by stage, of KID also by estimator."""


def _check(is_right: bool, expected: str, found: object) -> None:
    if not is_right:
        raise ValueError(f"expected {expected}, found {found}")


class DetectorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A detector of mmdet, in the environment that ``make openmmlab`` builds.

    Attributes:
        config: an mmdet configuration file, or the name of one that mmdet ships.
        weights: its checkpoint: entry of weights.yaml or file.
        labels: classes that count.
        score_threshold: objects of lower scores are left out.
    """

    config: PathText = "faster-rcnn_r50_fpn_1x_coco"
    weights: PathText = "detector"
    labels: list[str] = msgspec.field(default_factory=lambda: ["person"])
    score_threshold: float = 0.3


class PoseSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How poses are estimated; what is None is the dataset's protocol (``eval.pose_estimator.PROTOCOLS``).

    Attributes:
        weights: entry of weights.yaml, folder or file; by default ``vitpose_<dataset>``.
        backend: ``transformers``, or ``mmpose`` in the environment that ``make openmmlab`` builds.
        environment: folder of that environment.
        boxes: ``ground_truth``, or ``detected`` in the generated image. The latter is for HumanArt, gives the people
            counting error too, and no PCK: no keypoint is known to be whose.
        detector: that finds them.
        codec, flip_test, shift_heatmap, expert: instead of the protocol's.
    """

    weights: PathText = ""
    backend: Literal["transformers", "mmpose"] = "transformers"
    environment: PathText = ".venv-openmmlab"
    boxes: Literal["ground_truth", "detected"] = "ground_truth"
    detector: DetectorSettings = DetectorSettings()
    codec: Literal["msra", "udp"] | None = None
    flip_test: bool | None = None
    shift_heatmap: bool | None = None
    expert: int | None = None


class PoseApSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How estimated poses are scored.

    Attributes:
        pck_threshold: of the longer side of the annotated box, within which a keypoint is correct.
        detection_area: of a detection that matches nothing, which decides whether it counts against AP-M or AP-L: that
            of its box (``bbox``), or of the smallest box around its keypoints (``keypoints``).
        resamples: of the intervals of AP and its relatives: 1 s for 1,000 images and 1,000 resamples. PCK and the
            people counting error have those of ``intervals``.
    """

    pck_threshold: float = 0.05
    detection_area: DetectionArea = "bbox"
    resamples: int = 1000

    def __post_init__(self) -> None:
        _check(self.pck_threshold > 0, "pck_threshold above 0", self.pck_threshold)
        _check(
            self.resamples >= MIN_RESAMPLES, f"pose_ap resamples of at least {MIN_RESAMPLES}", self.resamples
        )


class FeatureSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How images become Inception features.

    Attributes:
        weights: entry of weights.yaml or file.
        resize: ``legacy`` or ``clean`` (``eval.inception.Inception``); their values are not comparable.
        crop: of the real images: ``none`` squeezes them, ``square`` takes their centre.
    """

    weights: PathText = "inception"
    resize: Literal["legacy", "clean"] = "legacy"
    crop: Literal["none", "square"] = "none"


class FidSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Frechet inception distance.

    Attributes:
        resamples: subsamples for its interval, of which its extrapolation (``fid_infinity``) takes up to 100. On 2
            cores, 300 take 6 s for 1,000 images; the time grows with the cube of their number.
    """

    resamples: int = 300

    def __post_init__(self) -> None:
        _check(self.resamples >= MIN_RESAMPLES, f"fid resamples of at least {MIN_RESAMPLES}", self.resamples)


class KidSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Kernel inception distance.

    Attributes:
        estimator: ``paired`` leaves out the comparison of a generated image with the real one of its pose, which would
            bias it; ``independent`` is torch-fidelity's, which assumes independent sets, to compare with its values.
        subsets, subset_size: of ``independent``: images are compared in so many random subsets of this size.
    """

    estimator: KidEstimator = "paired"
    subsets: int = 100
    subset_size: int = 500

    def __post_init__(self) -> None:
        _check(self.subsets >= 1 and self.subset_size >= 2, "kid subsets >= 1 and subset_size >= 2", self)


class ClipSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """CLIP-score.

    Attributes:
        weights: entry of weights.yaml or folder; scores of different models are not comparable.
    """

    weights: PathText = "clip"


class Intervals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resampling of the images.

    Attributes:
        resamples: how many; AP and FID, whose resamples take time, have their own numbers.
        level: share of the resamples inside an interval.
        seed: of the resamples; one for all methods, so that their differences are paired.
    """

    resamples: int = 10_000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.resamples >= MIN_RESAMPLES, f"resamples of at least {MIN_RESAMPLES}", self.resamples)
        _check(0 < self.level < 1, "a level between 0 and 1", self.level)


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of configs/evaluate/.

    Attributes:
        dataset, split: whose poses.
        methods: that are compared; each as in configs/generate/.
        metrics: what is measured. Diversity is only of methods with several images of each pose; all other numbers are
            of the first image of each pose.
        allow_missing_images: measure the images that are there, where some are missing, broken or of the wrong size.
            The instances of the others count as missed, and all numbers are marked.
        image_size_wh: width and height in pixels that all generated images must have. By default it is the sampler's
            resolution, and free for images of others.
        num_cases: best and worst cases in the report, so many of each.
        reference: name of the method with which the others are compared. By default all pairs are, and a difference has
            to be larger to show.
    """

    dataset: Literal["ap10k", "humanart"]
    methods: list[Method]
    split: Literal["train", "val", "test"] = "val"
    metrics: list[MetricGroup] = msgspec.field(
        default_factory=lambda: ["pose_ap", "fid", "fid_infinity", "kid", "clip_score", "diversity"]
    )
    pose: PoseSettings = PoseSettings()
    pose_ap: PoseApSettings = PoseApSettings()
    features: FeatureSettings = FeatureSettings()
    fid: FidSettings = FidSettings()
    kid: KidSettings = KidSettings()
    clip: ClipSettings = ClipSettings()
    intervals: Intervals = Intervals()
    allow_missing_images: bool = False
    image_size_wh: tuple[int, int] | None = None
    num_cases: int = 4
    reference: str = ""

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        _check(len(set(names)) == len(names) > 0, "methods: at least one, with different names", names)
        _check(
            len(set(self.metrics)) == len(self.metrics) > 0, "metrics: at least one, each once", self.metrics
        )
        _check(
            self.pose.boxes == "ground_truth" or self.dataset == "humanart",
            "pose: boxes: ground_truth, since a detected animal has no species",
            self.pose.boxes,
        )
        _check(self.num_cases >= 1, "num_cases of at least 1", self.num_cases)
        _check(self.reference in ("", *names), f"reference: one of the methods, {names}", self.reference)

    @property
    def pose_weights(self) -> str:
        """Entry of weights.yaml or path of the pose estimator's weights."""
        return self.pose.weights or f"vitpose_{self.dataset}"

    def expected_size_wh(self, method: Method) -> tuple[int, int] | None:
        """Width and height that a method's images must have; None where any will do."""
        if self.image_size_wh is not None:
            return self.image_size_wh
        return None if method.kind == "external" else (method.sampler.resolution, method.sampler.resolution)
