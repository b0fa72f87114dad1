"""The order in which an annotation file lists keypoints, against the order of a skeleton.

Legend: K keypoints of the skeleton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spctrl.errors import ExpectedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spctrl.data.skeletons import Skeleton

_SEPARATORS = str.maketrans("", "", "_- ")


class KeypointOrderError(ExpectedError, ValueError):
    """Keypoint names that are not the skeleton's."""


def keypoint_order(names: Sequence[str], skeleton: Skeleton) -> tuple[int, ...]:
    """Position of each of the skeleton's keypoints in a file's list of names.

    ``keypoints[order, :]`` brings a file's (N, 3) keypoints into the skeleton's order.

    Args:
        names: N names of a category entry. Case, ``_``, ``-`` and spaces do not count, and each name may be one of the
            skeleton's aliases.
        skeleton: whose order is wanted.

    Returns:
        K indices. They are 0..K-1 where the list is empty, starts with the skeleton's K names in order, or states them
        in that order.

    Raises:
        KeypointOrderError: the names are neither a permutation of the skeleton's nor an extension of its list.
    """
    K = skeleton.num_keypoints
    unchanged = tuple(range(K))
    if not names:
        return unchanged
    known = {
        _plain(name): i
        for listed in (skeleton.keypoint_names, *skeleton.aliases)
        for i, name in enumerate(listed)
    }
    found = [known.get(_plain(name)) for name in names]
    if found[:K] == list(unchanged) and not any(each in unchanged for each in found[K:]):
        return unchanged
    if len(found) == K and set(found) == set(unchanged):
        position = {keypoint: i for i, keypoint in enumerate(found)}
        return tuple(position[keypoint] for keypoint in unchanged)
    raise KeypointOrderError(
        f"expected the {K} keypoints {', '.join(skeleton.keypoint_names)}, "
        f"found {len(names)}: {', '.join(names)}"
    )


def _plain(name: str) -> str:
    return name.casefold().translate(_SEPARATORS)
