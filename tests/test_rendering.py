"""Index maps and renders, pixel for pixel against a plain transcription of what the released scripts do."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from spctrl.conditions.openpose import STYLES, palette, render_openpose
from spctrl.conditions.png import Canvas
from spctrl.conditions.spatext import render_spatext
from spctrl.data.datasets import AP10K as AP10K_DATASET
from spctrl.data.index import write_index
from spctrl.data.records import Record, records_from_table
from spctrl.data.skeletons import AP10K, HUMANART, Skeleton

REAL = Path(__file__).parents[2] / "shared" / "data" / "ap10k"
Pixels = NDArray[np.uint8]
Rgb = tuple[int, int, int]
Points = NDArray[np.float64]

# The 1-based tables of REFERENCE.md, sections 2 and 4
AP10K_LINKS = "1-2 1-3 2-3 3-4 4-5 4-6 6-7 7-8 4-9 9-10 10-11 5-12 12-13 13-14 5-15 15-16 16-17"
HUMANART_LINKS = "16-14 14-12 17-15 15-13 12-13 6-12 7-13 6-7 6-8 7-9 8-10 9-11 2-3 1-2 1-3 2-4 3-5 4-6 5-7"
WHEEL = [
    [255, 0, 0], [255, 85, 0], [255, 170, 0], [255, 255, 0], [170, 255, 0], [85, 255, 0], [0, 255, 0], [0, 255, 85],
    [0, 255, 170], [0, 255, 255], [0, 170, 255], [0, 85, 255], [0, 0, 255], [85, 0, 255], [170, 0, 255],
    [255, 0, 255], [255, 0, 170], [255, 0, 85],
]  # fmt: skip
SKELETONS = {"ap10k": AP10K, "humanart": HUMANART}
ORIGINAL_LINKS = {
    name: [tuple(int(end) for end in link.split("-")) for link in text.split()]
    for name, text in (("ap10k", AP10K_LINKS), ("humanart", HUMANART_LINKS))
}


def record(keypoints: Points, size_wh: tuple[int, int]) -> Record:
    return Record(1, "1.jpg", size_wh, keypoints, np.zeros((len(keypoints), 4)))


def spatext(
    keypoints: Points, size_wh: tuple[int, int], skeleton: Skeleton, radius: int = 4, half: int = 4
) -> bytes:
    return render_spatext(
        record(keypoints, size_wh), links=skeleton.links, keypoint_radius_px=radius, link_half_width_px=half
    )


def openpose(
    keypoints: Points, size_wh: tuple[int, int], skeleton: Skeleton, style: str = "openpose"
) -> bytes:
    return render_openpose(
        record(keypoints, size_wh),
        style=style,
        keypoint_names=skeleton.keypoint_names,
        links=skeleton.links,
        keypoint_radius_px=4,
        link_half_width_px=4,
    )


def plain_drawing(
    keypoints: Points,
    size_wh: tuple[int, int],
    links: Sequence[tuple[int, int]],
    canvas: Pixels,
    link_colour: Callable[[int], object],
    keypoint_colour: Callable[[int], object],
) -> Pixels:
    """REFERENCE.md section 3, one link and one point at a time."""
    for instance in keypoints:
        for s, (first, second) in enumerate(links):
            ends = instance[[first - 1, second - 1]]
            if not (ends[:, 2] > 0).all():
                continue
            mx, my = np.mean(ends[:, 0]), np.mean(ends[:, 1])
            (x1, y1), (x2, y2) = ends[:, :2].tolist()
            length = ((x1 - x2) ** 2 + (y1 - y2) ** 2) ** 0.5
            angle = math.degrees(math.atan2(y1 - y2, x1 - x2))
            polygon = cv2.ellipse2Poly((int(mx), int(my)), (int(length / 2), 4), int(angle), 0, 360, 1)
            cv2.fillConvexPoly(canvas, polygon, link_colour(s))  # type: ignore[call-overload]
        for k in range(1, len(instance) + 1):
            x, y, v = instance[k - 1]
            if v > 0:
                cv2.circle(canvas, (int(x), int(y)), 4, keypoint_colour(k), -1)  # type: ignore[call-overload]
    return canvas


def plain_map(keypoints: Points, size_wh: tuple[int, int], name: str) -> Pixels:
    canvas = np.zeros((size_wh[1], size_wh[0]), np.uint8)
    return plain_drawing(keypoints, size_wh, ORIGINAL_LINKS[name], canvas, lambda s: 51 + s, lambda k: k)


def plain_render(keypoints: Points, size_wh: tuple[int, int], name: str) -> Pixels:
    """REFERENCE.md section 4, drawn in RGB."""
    links = [link for link, _ in zip(ORIGINAL_LINKS[name], WHEEL, strict=False)]
    return plain_drawing(
        keypoints,
        size_wh,
        links,
        np.zeros((size_wh[1], size_wh[0], 3), np.uint8),
        lambda s: [int(channel * 0.6) for channel in WHEEL[s]],
        lambda k: WHEEL[k - 1],
    )


def decoded(data: bytes) -> Pixels:
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return np.asarray(found, np.uint8)


def rgb(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def random_keypoints(seed: int, size_wh: tuple[int, int], instances: int, whole: bool) -> Points:
    """Points in and around the image; some coincide, some are hidden or not labelled."""
    rng = np.random.default_rng(seed)
    width, height = size_wh
    keypoints = np.empty((instances, 17, 3))
    keypoints[..., 0] = rng.uniform(-0.4 * width, 1.4 * width, (instances, 17))
    keypoints[..., 1] = rng.uniform(-0.4 * height, 1.4 * height, (instances, 17))
    keypoints[..., 2] = rng.choice([0, 1, 2], (instances, 17), p=[0.2, 0.2, 0.6])
    coincident = rng.random((instances, 17)) < 0.15
    keypoints[coincident, :2] = keypoints[:, :1, :2].repeat(17, 1)[coincident]
    return np.round(keypoints) if whole else keypoints


SIZES = [(1, 1), (2, 3), (1, 90), (90, 1), (64, 64), (127, 95), (400, 301), (1025, 768)]


@pytest.mark.parametrize("size_wh", SIZES)
@pytest.mark.parametrize("name", SKELETONS)
@pytest.mark.parametrize("whole", [True, False])
def test_drawings_equal_the_plain_ones(size_wh: tuple[int, int], name: str, whole: bool) -> None:
    drawn = 0
    for seed in range(12):
        keypoints = random_keypoints(seed, size_wh, instances=seed % 4, whole=whole)
        expected = plain_map(keypoints, size_wh, name)
        assert np.array_equal(decoded(spatext(keypoints, size_wh, SKELETONS[name])), expected)
        assert np.array_equal(
            rgb(openpose(keypoints, size_wh, SKELETONS[name])), plain_render(keypoints, size_wh, name)
        )
        drawn += int(expected.any())
    assert drawn


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    keypoints=hnp.arrays(
        np.float64,
        (2, 17, 3),
        elements=st.one_of(st.floats(-60, 120), st.integers(0, 60).map(float), st.just(30.0)),
    ),
    labels=hnp.arrays(np.int64, (2, 17), elements=st.integers(0, 2)),
    size_wh=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    name=st.sampled_from(["ap10k", "humanart"]),
)
def test_any_drawing_equals_the_plain_one(
    keypoints: Points, labels: NDArray[np.int64], size_wh: tuple[int, int], name: str
) -> None:
    keypoints[..., 2] = labels
    assert np.array_equal(
        decoded(spatext(keypoints, size_wh, SKELETONS[name])), plain_map(keypoints, size_wh, name)
    )
    assert np.array_equal(
        rgb(openpose(keypoints, size_wh, SKELETONS[name])), plain_render(keypoints, size_wh, name)
    )


def two_points(
    first: tuple[float, float, float], second: tuple[float, float, float], at: tuple[int, int]
) -> Points:
    keypoints = np.zeros((1, 17, 3))
    keypoints[0, at[0]], keypoints[0, at[1]] = first, second
    return keypoints


def test_the_values_are_the_documented_ones() -> None:
    keypoints = two_points((20, 50, 2), (80, 50, 1), at=(0, 1))
    found = decoded(spatext(keypoints, (100, 100), AP10K))
    assert found.shape == (100, 100)
    assert np.unique(found).tolist() == [0, 1, 2, 51]
    assert (found[50, 20], found[50, 80], found[50, 50]) == (1, 2, 51)
    assert found[46, 50] == found[54, 50] == 51  # half a link's width is 4 pixels
    assert found[45, 50] == found[55, 50] == 0
    assert found[50, 84] == 2  # and so is a keypoint's radius
    assert found[50, 85] == 0


@pytest.mark.parametrize(("name", "links"), [("ap10k", 17), ("humanart", 19)])
def test_all_links_and_keypoints_have_their_own_value(name: str, links: int) -> None:
    found: set[int] = set()
    for s, (first, second) in enumerate(SKELETONS[name].links):
        pixels = decoded(
            spatext(two_points((20, 50, 2), (80, 50, 2), (first, second)), (100, 100), SKELETONS[name])
        )
        assert set(np.unique(pixels).tolist()) == {0, first + 1, second + 1, 51 + s}
        found |= set(np.unique(pixels).tolist())
    assert found == {0, *range(1, 18), *range(51, 51 + links)}


def test_what_is_not_labelled_is_not_drawn() -> None:
    keypoints = random_keypoints(3, (80, 60), 3, whole=True)
    keypoints[..., 2] = 0
    assert not decoded(spatext(keypoints, (80, 60), AP10K)).any()
    assert not rgb(openpose(keypoints, (80, 60), AP10K)).any()
    one_end = two_points((20, 30, 2), (60, 30, 0), at=(0, 1))
    assert np.unique(decoded(spatext(one_end, (80, 60), AP10K))).tolist() == [0, 1]


def test_a_record_without_instances_is_black() -> None:
    nobody = np.empty((0, 17, 3))
    assert decoded(spatext(nobody, (33, 21), AP10K)).tolist() == [[0] * 33] * 21
    assert rgb(openpose(nobody, (33, 21), AP10K)).tolist() == [[[0, 0, 0]] * 33] * 21


def test_later_instances_cover_earlier_ones_and_keypoints_cover_links() -> None:
    first = two_points((20, 50, 2), (80, 50, 2), at=(0, 1))
    second = two_points((50, 20, 2), (50, 80, 2), at=(0, 2))
    found = decoded(spatext(np.concatenate([first, second]), (100, 100), AP10K))
    swapped = decoded(spatext(np.concatenate([second, first]), (100, 100), AP10K))
    assert (found[50, 50], swapped[50, 50]) == (52, 51)
    point_on_link = two_points((20, 50, 2), (80, 50, 2), at=(0, 1))
    point_on_link[0, 16] = (50, 50, 2)
    assert decoded(spatext(point_on_link, (100, 100), AP10K))[50, 50] == 17


@pytest.mark.parametrize(("radius", "half"), [(0, 1), (2, 7), (9, 2)])
def test_the_radius_and_width_are_settings(radius: int, half: int) -> None:
    keypoints = two_points((30, 50, 2), (90, 50, 2), at=(0, 1))
    column = decoded(spatext(keypoints, (120, 100), AP10K, radius, half))[:, 60]
    assert np.flatnonzero(column == 51).tolist() == list(range(50 - half, 50 + half + 1))
    row = decoded(spatext(keypoints, (120, 100), AP10K, radius, half))[50]
    assert (row == 1).sum() == 2 * radius + 1


def test_inputs_are_left_alone() -> None:
    keypoints = random_keypoints(1, (80, 60), 2, whole=False)
    before = keypoints.copy()
    spatext(keypoints, (80, 60), AP10K)
    openpose(keypoints, (80, 60), AP10K)
    assert np.array_equal(keypoints, before)


# The 19th link of HumanArt


def test_the_19th_link_is_in_the_map_and_not_in_the_render() -> None:
    first, second = HUMANART.links[18]
    keypoints = two_points((20, 50, 2), (80, 50, 2), at=(first, second))
    assert decoded(spatext(keypoints, (100, 100), HUMANART))[50, 50] == 69
    assert rgb(openpose(keypoints, (100, 100), HUMANART))[50, 50].tolist() == [0, 0, 0]


def test_the_18th_link_is_in_both() -> None:
    first, second = HUMANART.links[17]
    keypoints = two_points((20, 50, 2), (80, 50, 2), at=(first, second))
    assert decoded(spatext(keypoints, (100, 100), HUMANART))[50, 50] == 68
    expected = [int(0.6 * channel) for channel in WHEEL[17]]
    assert rgb(openpose(keypoints, (100, 100), HUMANART))[50, 50].tolist() == expected


# Styles


@pytest.mark.parametrize("name", SKELETONS)
def test_the_keypoints_style_shows_keypoints_alone(name: str) -> None:
    keypoints = random_keypoints(2, (200, 150), 2, whole=False)
    expected = plain_drawing(
        keypoints, (200, 150), [], np.zeros((150, 200, 3), np.uint8), lambda s: 0, lambda k: WHEEL[k - 1]
    )
    assert np.array_equal(rgb(openpose(keypoints, (200, 150), SKELETONS[name], "keypoints")), expected)
    assert expected.any()


BLUE, GREEN, ORANGE = [51, 153, 255], [0, 255, 0], [255, 128, 0]
# As in mmpose's configs/_base_/datasets/coco.py, keypoint_info and skeleton_info in their order
COCO_KEYPOINTS = [BLUE] * 5 + [GREEN, ORANGE] * 6
COCO_LINKS = [GREEN, GREEN, ORANGE, ORANGE, *[BLUE] * 4, GREEN, ORANGE, GREEN, ORANGE, *[BLUE] * 7]
# ... and of ap10k.py
AP10K_KEYPOINTS = [
    GREEN, ORANGE, *[BLUE] * 5, GREEN, GREEN, ORANGE, GREEN, ORANGE, ORANGE, GREEN, GREEN, GREEN, GREEN,
]  # fmt: skip
AP10K_LINK_COLOURS = [
    *[[0, 0, 255]] * 3, *[[0, 255, 0]] * 2,
    *[[0, 255, 255]] * 3, *[[6, 156, 250]] * 3, *[[0, 255, 255]] * 3, *[[6, 156, 250]] * 3,
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "style", "keypoint_colours", "link_colours"),
    [
        ("humanart", "coco", COCO_KEYPOINTS, COCO_LINKS),
        ("humanart", "mmpose", COCO_KEYPOINTS, COCO_LINKS),
        ("ap10k", "mmpose", AP10K_KEYPOINTS, AP10K_LINK_COLOURS),
    ],
)
def test_other_styles_have_the_colours_of_mmpose(
    name: str, style: str, keypoint_colours: list[list[int]], link_colours: list[list[int]]
) -> None:
    skeleton = SKELETONS[name]
    for s, (first, second) in enumerate(skeleton.links):
        keypoints = two_points((20, 50, 2), (80, 50, 2), at=(first, second))
        found = rgb(openpose(keypoints, (100, 100), skeleton, style))
        assert found[50, 50].tolist() == link_colours[s], skeleton.links[s]
        assert found[50, 20].tolist() == keypoint_colours[first]
        assert found[50, 80].tolist() == keypoint_colours[second]


def test_the_coco_style_tells_an_animals_sides_apart() -> None:
    colours = palette("coco", AP10K.keypoint_names, AP10K.links)[1:18]
    for name, colour in zip(AP10K.keypoint_names, colours, strict=True):
        side = {"left": GREEN, "right": ORANGE}.get(name.split("_")[0], BLUE)
        assert list(colour) == (BLUE if name.endswith(("eye", "nose")) else side)


def test_the_mmpose_style_has_thin_lines_and_small_discs() -> None:
    found = rgb(openpose(two_points((20, 50, 2), (80, 50, 2), at=(0, 1)), (100, 100), AP10K, "mmpose"))
    lit = found.any(axis=-1)
    assert np.flatnonzero(lit[:, 50]).tolist() == [50]
    assert np.flatnonzero(lit[:, 20]).tolist() == list(range(47, 54))


@pytest.mark.parametrize("style", ["coco", "openpose"])
def test_thick_styles_have_the_geometry_of_the_index_map(style: str) -> None:
    keypoints = random_keypoints(4, (200, 150), 2, whole=False)
    lit = rgb(openpose(keypoints, (200, 150), AP10K, style)).any(axis=-1)
    assert np.array_equal(lit, decoded(spatext(keypoints, (200, 150), AP10K)) > 0)


@pytest.mark.parametrize("style", ["", "Openpose", "dwpose"])
def test_an_unknown_style_is_refused_with_the_valid_ones(style: str) -> None:
    with pytest.raises(ValueError, match=f"openpose, keypoints, coco, mmpose, found {style!r}"):
        openpose(np.zeros((1, 17, 3)), (10, 10), AP10K, style)


# Files


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", SKELETONS)
def test_cv2_and_pil_see_the_same_colours(style: str, name: str) -> None:
    data = openpose(random_keypoints(6, (130, 77), 3, whole=False), (130, 77), SKELETONS[name], style)
    by_cv2 = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert by_cv2 is not None
    assert np.array_equal(cv2.cvtColor(by_cv2, cv2.COLOR_BGR2RGB), rgb(data))
    assert rgb(data).any()


@pytest.mark.parametrize("size_wh", SIZES)
def test_files_are_valid_pngs(size_wh: tuple[int, int]) -> None:
    keypoints = random_keypoints(8, size_wh, 2, whole=True)
    for data, mode in ((spatext(keypoints, size_wh, AP10K), "L"), (openpose(keypoints, size_wh, AP10K), "P")):
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode, image.size) == ("PNG", mode, size_wh)
            image.verify()
        with Image.open(io.BytesIO(data)) as image:
            image.load()


@pytest.mark.parametrize("size_wh", SIZES)
def test_any_pixels_survive_the_way_through_a_file(size_wh: tuple[int, int]) -> None:
    canvas = Canvas(size_wh)
    canvas.pixels[:] = np.random.default_rng(0).integers(0, 256, canvas.pixels.shape)
    gray = canvas.to_png()
    colours: list[Rgb] = [(value, 255 - value, value // 2) for value in range(256)]
    assert np.array_equal(decoded(gray), canvas.pixels)
    assert np.array_equal(rgb(canvas.to_png(colours)), np.array(colours, np.uint8)[canvas.pixels])


def test_drawing_twice_gives_the_same_bytes() -> None:
    keypoints = random_keypoints(9, (300, 200), 2, whole=False)
    assert spatext(keypoints, (300, 200), AP10K) == spatext(keypoints, (300, 200), AP10K)
    assert openpose(keypoints, (300, 200), AP10K) == openpose(keypoints, (300, 200), AP10K)


def real_records(folder: Path) -> list[Record]:
    source = REAL / "annotations/ap10k-val-split1.json"
    write_index(source, AP10K_DATASET, "val", folder / "index.parquet", max_pixels=10**8)
    return records_from_table(pq.read_table(folder / "index.parquet"))[::4]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real annotations in {REAL}")
def test_files_of_real_records_are_no_larger_than_those_of_pil(tmp_path: Path) -> None:
    def saved(image: Image.Image) -> int:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.tell()

    sizes = []
    for each in real_records(tmp_path):
        index_map, render = (draw(each.keypoints, each.size_wh, AP10K) for draw in (spatext, openpose))
        sizes.append(
            (
                len(index_map),
                saved(Image.fromarray(decoded(index_map))),
                len(render),
                saved(Image.fromarray(rgb(render))),
            )
        )
    assert len(sizes) > 240
    map_bytes, map_bytes_by_pil, render_bytes, render_bytes_by_pil = np.sum(sizes, axis=0).tolist()
    assert map_bytes <= map_bytes_by_pil
    assert render_bytes <= render_bytes_by_pil


@pytest.mark.parametrize("seed", range(5))
def test_a_coloured_index_map_is_the_drawn_render_to_the_byte(seed: int) -> None:
    size_wh = (97 + seed, 61)
    drawn = record(random_keypoints(seed, size_wh, 2, False), size_wh)
    sizes = {"keypoint_radius_px": 4, "link_half_width_px": 4}
    style = {"style": "openpose", "keypoint_names": AP10K.keypoint_names, "links": AP10K.links}
    index_map = render_spatext(drawn, links=AP10K.links, **sizes)
    assert render_openpose(drawn, index_map, **style, **sizes) == render_openpose(drawn, **style, **sizes)
