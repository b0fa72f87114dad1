"""Keypoints are read in the order that the file states, whatever its spelling."""

from __future__ import annotations

import numpy as np
import pytest

from spctrl.data.annotations.keypoint_order import KeypointOrderError, keypoint_order
from spctrl.data.skeletons import AP10K, HUMANART, Skeleton

UNCHANGED = tuple(range(17))
FINGERS_AND_TOES = ("left_finger", "right_finger", "left_toe", "right_toe")
MMPOSE_AP10K = AP10K.aliases[0]


def spelt(names: tuple[str, ...], seed: int) -> list[str]:
    separator = ("-", " ", "", "__")[seed % 4]
    return [name.replace("_", separator).title() if seed % 2 else name.upper() for name in names]


@pytest.mark.parametrize("skeleton", [AP10K, HUMANART])
@pytest.mark.parametrize("seed", range(6))
def test_any_order_and_spelling_is_found_by_name(skeleton: Skeleton, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(17)
    names = np.array(spelt(skeleton.keypoint_names, seed))[shuffled].tolist()
    keypoints = generator.uniform(size=(17, 3))
    order = keypoint_order(names, skeleton)
    assert np.array_equal(keypoints[shuffled][list(order)], keypoints)


@pytest.mark.parametrize(
    ("names", "skeleton"),
    [
        ((), AP10K),
        (AP10K.keypoint_names, AP10K),
        (MMPOSE_AP10K, AP10K),
        ((*MMPOSE_AP10K[:5], *AP10K.keypoint_names[5:]), AP10K),
        (HUMANART.keypoint_names + FINGERS_AND_TOES, HUMANART),
        ((*AP10K.keypoint_names, "tip_of_tail"), AP10K),
    ],
)
def test_the_skeletons_own_order_stays(names: tuple[str, ...], skeleton: Skeleton) -> None:
    assert keypoint_order(names, skeleton) == UNCHANGED


def test_aliases_may_come_in_any_order() -> None:
    assert keypoint_order(MMPOSE_AP10K[::-1], AP10K) == UNCHANGED[::-1]


OTHERS = {
    "another dataset's": HUMANART.keypoint_names,
    "too few": AP10K.keypoint_names[:-1],
    "one name twice": (*AP10K.keypoint_names[:-1], "nose"),
    "one name more, twice": (*AP10K.keypoint_names, "nose"),
    "one name more, first": ("tip_of_tail", *AP10K.keypoint_names),
    "one name more, shuffled": (*AP10K.keypoint_names[::-1], "tip_of_tail"),
    "one unknown name": (*AP10K.keypoint_names[:-1], "right_back_hoof"),
    "a single name": ("nose",),
}


@pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS)
def test_other_keypoints_are_refused_with_both_lists(names: tuple[str, ...]) -> None:
    with pytest.raises(KeypointOrderError) as caught:
        keypoint_order(names, AP10K)
    for listed in (AP10K.keypoint_names, names):
        assert ", ".join(listed) in str(caught.value)
