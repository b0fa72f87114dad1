"""Skeletons as data: keypoint names, 0-based links, flip pairs and OKS sigmas.

AP-10K and COCO define the keypoints; the links are those that SP-Ctrl's index maps draw, in drawing order.
The HumanArt links are COCO's (19 over 17 points), not the 23 over 21 points of HumanArt's own category entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """K keypoints and the links between them.

    Attributes:
        keypoint_names: K names, in the order of the annotation's keypoint list.
        links: pairs of 0-based keypoint indices, in drawing order.
        flip_pairs: pairs of 0-based indices that change places when the image is mirrored.
        oks_sigmas: K per-keypoint constants of the object keypoint similarity, relative to the object's
            scale.
        aliases: further lists of K names, in the same order, under which files may state the keypoints.
    """

    keypoint_names: tuple[str, ...]
    links: tuple[tuple[int, int], ...]
    flip_pairs: tuple[tuple[int, int], ...]
    oks_sigmas: tuple[float, ...]
    aliases: tuple[tuple[str, ...], ...] = ()

    @property
    def num_keypoints(self) -> int:
        return len(self.keypoint_names)

    @property
    def placeholders(self) -> tuple[str, ...]:
        """K words that stand for the keypoints in prompts, such as ``<left-eye>``: tokens of their own."""
        return tuple(f"<{name.replace('_', '-')}>" for name in self.keypoint_names)


AP10K = Skeleton(
    keypoint_names=(
        "left_eye", "right_eye", "nose", "neck", "root_of_tail",
        "left_shoulder", "left_elbow", "left_front_paw", "right_shoulder", "right_elbow", "right_front_paw",
        "left_hip", "left_knee", "left_back_paw", "right_hip", "right_knee", "right_back_paw",
    ),
    links=(
        (0, 1), (0, 2), (1, 2), (2, 3), (3, 4), (3, 5), (5, 6), (6, 7), (3, 8), (8, 9), (9, 10),
        (4, 11), (11, 12), (12, 13), (4, 14), (14, 15), (15, 16),
    ),
    flip_pairs=((0, 1), (5, 8), (6, 9), (7, 10), (11, 14), (12, 15), (13, 16)),
    oks_sigmas=(
        0.025, 0.025, 0.026, 0.035, 0.035, 0.079, 0.072, 0.062, 0.079, 0.072, 0.062,
        0.107, 0.087, 0.089, 0.107, 0.087, 0.089,
    ),
    aliases=(
        (  # mmpose's
            "L_Eye", "R_Eye", "Nose", "Neck", "Root of tail",
            "L_Shoulder", "L_Elbow", "L_F_Paw", "R_Shoulder", "R_Elbow", "R_F_Paw",
            "L_Hip", "L_Knee", "L_B_Paw", "R_Hip", "R_Knee", "R_B_Paw",
        ),
    ),
)  # fmt: skip

HUMANART = Skeleton(
    keypoint_names=(
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
        "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip",
        "left_knee", "right_knee", "left_ankle", "right_ankle",
    ),
    links=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
        (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
    flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
    oks_sigmas=(
        0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062,
        0.107, 0.107, 0.087, 0.087, 0.089, 0.089,
    ),
)  # fmt: skip
