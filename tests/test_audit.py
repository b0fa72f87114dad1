"""The audit's numbers on small tables made by hand; its near-duplicate search against brute force."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest

from spctrl.audit import SplitTables, audit_split, find_leakage, leakage
from spctrl.audit.counts import histogram
from spctrl.audit.leakage import NEAR_DISTANCE, near_hash_pairs, parse_hash
from spctrl.data.records import RECORD_SCHEMA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

CONDITIONS = ("spatext", "openpose")
MANIFEST_SCHEMA = pa.schema(
    [
        *RECORD_SCHEMA,
        *(pa.field(name, pa.string()) for name in ("image_path", "image_digest", "image_phash")),
        *(
            pa.field(f"{name}_{part}", pa.string())
            for name in CONDITIONS
            for part in ("path", "key", "digest")
        ),
    ]
)
REJECT_SCHEMA = pa.schema(
    [
        ("stage", pa.string()),
        ("image_id", pa.int64()),
        ("annotation_id", pa.int64()),
        ("file_name", pa.string()),
        ("code", pa.string()),
        ("message", pa.string()),
    ]
)


def instance(
    category: str, labelled: Sequence[int], size: tuple[float, float] = (100.0, 100.0), k: int = 17
) -> dict[str, Any]:
    keypoints = [[10.0, 10.0, 2.0] if i in labelled else [0.0, 0.0, 0.0] for i in range(k)]
    return {"category": category, "bbox_xywh": [0.0, 0.0, *size], "keypoints": keypoints}


def row(image_id: int, instances: Sequence[dict[str, Any]] = (), **values: Any) -> dict[str, Any]:
    name = f"{image_id:012d}.jpg"
    return {
        "image_id": image_id,
        "file_name": name,
        "width": 200,
        "height": 100,
        "instances": list(instances),
        **values,
    }


def tables(
    rows: Sequence[dict[str, Any]],
    *,
    split: str = "train",
    dataset: str = "ap10k",
    rejects: Sequence[dict[str, Any]] = (),
) -> SplitTables:
    return SplitTables(
        dataset=dataset,
        title=dataset,
        split=split,
        manifest=pa.Table.from_pylist(list(rows), schema=MANIFEST_SCHEMA),
        rejects=pa.Table.from_pylist(list(rejects), schema=REJECT_SCHEMA),
        conditions=CONDITIONS,
        read_image=lambda _: None,
        read_condition=lambda _, __: None,
    )


@pytest.fixture
def small() -> SplitTables:
    return tables(
        [
            row(1, [instance("dog", [0, 1, 2]), instance("dog", [0]), instance("cat", [])], captions=["a"],
                background=1, background_name="grass", image_path="1.jpg", spatext_key="k"),
            row(2, [instance("cat", [0, 16], (20.0, 20.0))], captions=[], background=9, spatext_key="k",
                width=3000),
            row(3, [], background=1, background_name="grass", openpose_key="k", height=400),
        ],
        rejects=[
            {"stage": "index", "image_id": 7, "code": "a", "message": "first"},
            {"stage": "mask", "image_id": 8, "code": "a", "message": None},
            {"stage": "index", "image_id": 9, "code": "b", "message": "second"},
            {"stage": "index", "image_id": None, "code": "b", "message": "third"},
        ],
    )  # fmt: skip


def test_counts_of_a_small_split(small: SplitTables) -> None:
    result = audit_split(small)
    assert (result.num_images, result.num_images_on_disk, result.num_captioned) == (3, 1, 1)
    assert (result.num_instances, result.num_labelled_keypoints) == (4, 6)
    assert result.num_conditions == {"spatext": 2, "openpose": 1}
    assert result.grouping == "species"
    assert result.categories == {"cat": (2, 2), "dog": (1, 2)}
    assert result.backgrounds == {"grass": (2, 3), "9": (1, 1)}


def test_visibility_counts_instances_with_a_label(small: SplitTables) -> None:
    labelled = audit_split(small).num_labelled
    assert list(labelled)[:3] == ["left_eye", "right_eye", "nose"]
    assert list(labelled.values()) == [3, 1, 1, *[0] * 13, 1]


def test_sizes(small: SplitTables) -> None:
    result = audit_split(small)
    assert result.coco_sizes == (1, 0, 3)
    assert result.histograms["instances_per_image"].counts == (1, 1, 0, 1, 0, 0, 0, 0, 0)
    long_side = result.histograms["long_side"]
    assert (long_side.counts[2], long_side.counts[4], long_side.counts[-1]) == (1, 1, 1)
    assert long_side.quantiles[::2] == (200, 400, 3000)
    # sqrt(100 * 100 / (200 * 100)) = 0.707 three times, sqrt(20 * 20 / (3000 * 100)) = 0.037 once.
    instance_size = result.histograms["instance_size"]
    assert (instance_size.counts[14], instance_size.counts[0], sum(instance_size.counts)) == (3, 1, 4)


def test_images_without_size_are_not_measured() -> None:
    rows = [row(1, [instance("dog", [])], width=None), row(2, [instance("dog", [])], height=0)]
    histograms = audit_split(tables(rows)).histograms
    assert [sum(histograms[name].counts) for name in ("long_side", "aspect_ratio", "instance_size")] == [
        1,
        0,
        0,
    ]


def test_rejects_are_grouped_by_stage_and_reason(small: SplitTables) -> None:
    result = audit_split(small)
    assert {reason: table.column("message").to_pylist() for reason, table in result.rejects.items()} == {
        ("index", "a"): ["first"],
        ("mask", "a"): [None],
        ("index", "b"): ["second", "third"],
    }
    assert result.num_rejects == 4


def test_scenarios_count_images() -> None:
    rows = [
        row(1, [instance("person", [0]), instance("person", [0])], category="mural"),
        row(2, [], category="mural"),
        row(3, [instance("person", [0])], category="sketch"),
    ]
    result = audit_split(tables(rows, dataset="humanart"))
    assert result.grouping == "scenario"
    assert result.categories == {"mural": (2, 2), "sketch": (1, 1)}
    assert result.backgrounds == {}


def test_an_empty_split_has_zeros_and_no_quantiles() -> None:
    result = audit_split(tables([]))
    assert (result.num_images, result.num_instances, result.categories, result.rejects) == (0, 0, {}, {})
    assert result.histograms["long_side"].quantiles == (None,) * 5
    assert list(result.num_labelled.values()) == [0] * 17


def test_a_slice_of_a_table_is_audited_as_such(small: SplitTables) -> None:
    result = audit_split(replace(small, manifest=small.manifest.slice(1, 2)))
    assert result.categories == {"cat": (1, 1)}
    assert list(result.num_labelled.values()) == [1, *[0] * 15, 1]


def test_several_chunks_are_one_table(small: SplitTables) -> None:
    twice = replace(small, manifest=pa.concat_tables([small.manifest, small.manifest]))
    assert audit_split(twice).num_instances == 8
    assert audit_split(twice).num_labelled["left_eye"] == 6


def test_errors_name_what_is_wrong(small: SplitTables) -> None:
    with pytest.raises(
        ValueError, match="ap10k train: expected 17 keypoints per instance, found \\[3, 17\\]"
    ):
        audit_split(tables([row(1, [instance("dog", [0]), instance("dog", [0], k=3)])]))
    with pytest.raises(ValueError, match="manifest of ap10k train: expected the columns openpose_key, found"):
        replace(small, manifest=small.manifest.drop_columns(["openpose_key"]))
    with pytest.raises(ValueError, match="rejects of ap10k train: expected the columns stage"):
        replace(small, rejects=small.rejects.drop_columns(["stage"]))
    with pytest.raises(
        ValueError, match="expected 16 hexadecimal digits, found 'xyz' in the manifest of ap10k val"
    ):
        find_leakage(
            [tables([row(1, image_phash="0" * 16)]), tables([row(1, image_phash="xyz")], split="val")]
        )
    with pytest.raises(ValueError, match="expected a dataset among ap10k, humanart, found 'fish'"):
        tables([], dataset="fish")


def test_histogram_clips_to_the_end_bins_and_skips_nan() -> None:
    result = histogram(np.array([-5.0, 0.5, 1.5, 99.0, np.nan]), (0, 1, 2))
    assert result.counts == (2, 2)
    assert (result.quantiles[0], result.quantiles[-1]) == (-5.0, 99.0)


def test_hashes_are_read_as_hexadecimal() -> None:
    assert [parse_hash(text, "x") for text in ("0000000000000001", "ffffffffffffffFF")] == [1, 2**64 - 1]


def test_leaks_between_splits() -> None:
    base = 0x0123456789ABCDEF
    train = tables(
        [
            row(1, image_digest="same", image_phash=f"{base:016x}"),
            row(
                2, image_digest="same", image_phash=f"{base:016x}"
            ),  # a copy inside a split is the same content
            row(3, image_digest="t3", image_phash=f"{base ^ 1 << 63:016x}"),
            row(4, image_digest="t4", image_phash=f"{base ^ 2**64 - 1:016x}"),
            row(5),
        ]
    )
    val = tables(
        [
            row(11, image_digest="same", image_phash=f"{base:016x}"),
            row(12, image_digest="v12", image_phash=f"{base ^ 0b1111:016x}"),
            row(13, image_digest="v13", image_phash=f"{base ^ 0b11111 << 30:016x}"),
        ],
        split="val",
    )
    found = find_leakage([train, val])
    (pair,) = found.pairs
    assert (pair.a, pair.b) == (0, 1)
    assert pair.same == ((0, 0, 0),)
    # Image 3 is one bit from the shared file and five from image 12; image 13 is five bits from everything.
    assert pair.near == ((2, 0, 1), (0, 1, 4))
    assert (pair.num_same, pair.num_near) == (found.num_same, found.num_near) == (1, 2)
    assert (found.num_images, found.num_without_digest, found.num_without_hash) == (8, 1, 1)


def test_one_split_cannot_leak() -> None:
    assert find_leakage([tables([row(1, image_digest="a", image_phash="0" * 16)])]).pairs == ()


def test_images_without_hash_do_not_match_each_other() -> None:
    (pair,) = find_leakage([tables([row(1), row(2)]), tables([row(1), row(2)], split="val")]).pairs
    assert (pair.num_same, pair.num_near) == (0, 0)


def test_many_shared_files_do_not_hide_the_near_ones() -> None:
    def split(name: str, extra: dict[str, Any]) -> SplitTables:
        shared = [
            row(i, image_digest=f"d{i}", image_phash=f"{i * 0x9E3779B97F4A7C15 % 2**64:016x}")
            for i in range(1, 60)
        ]
        return tables([*shared, extra], split=name)

    train = split("train", row(100, image_digest="t", image_phash="ffffffff00000000"))
    val = split("val", row(200, image_digest="v", image_phash="ffffffff00000001"))
    (pair,) = find_leakage([train, val], max_pairs=3).pairs
    assert (pair.num_same, len(pair.same)) == (59, 3)
    assert (pair.num_near, pair.near) == (1, ((59, 59, 1),))


def test_the_list_is_shared_among_the_splits() -> None:
    rows = [row(i, image_digest=f"d{i}", image_phash="0" * 16) for i in range(5)]
    splits = [tables(rows, split=name) for name in ("train", "val", "test")]
    for max_pairs, listed in ((12, 4), (5, 1), (1, 1)):
        found = find_leakage(splits, max_pairs=max_pairs)
        assert [(pair.a, pair.b) for pair in found.pairs] == [(0, 1), (0, 2), (1, 2)]
        assert {len(leaks) for pair in found.pairs for leaks in (pair.same, pair.near)} == {listed}


def near(
    a: NDArray[np.uint64], b: NDArray[np.uint64], limit: int = 10**6
) -> tuple[int, list[tuple[int, int, int]]]:
    """The count and the (index, index, distance) of near pairs, each hash being that of one image."""
    count, pairs = near_hash_pairs(a, b, np.ones(len(a), np.int64), np.ones(len(b), np.int64), limit)
    return count, [tuple(pair) for pair in pairs.tolist()]


@pytest.mark.parametrize("num_bits", [8, 24, 64])
def test_near_pairs_equal_brute_force(num_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small blocks, so that borders between blocks are crossed.
    monkeypatch.setattr(leakage, "PAIRS_PER_BLOCK", 970)
    rng = np.random.default_rng(num_bits)
    a = rng.integers(0, 2**num_bits, 150, dtype=np.uint64)
    flips = rng.integers(0, 64, (60, 6))
    copies = a[:60].copy()
    for i, bits in enumerate(flips):
        for bit in bits[: i % 7]:
            copies[i] ^= np.uint64(1) << np.uint64(bit)
    b = np.concatenate([copies, rng.integers(0, 2**num_bits, 40, dtype=np.uint64)])
    expected = [
        (i, j, (x ^ y).bit_count())
        for i, x in enumerate(a.tolist())
        for j, y in enumerate(b.tolist())
        if (x ^ y).bit_count() <= NEAR_DISTANCE
    ]
    expected.sort(key=lambda pair: (pair[2], pair[0], pair[1]))
    assert len(expected) > 5
    assert near(a, b) == (len(expected), expected)
    assert near(a, b, limit=5) == (len(expected), expected[:5])


def test_weights_multiply_in_the_count() -> None:
    hashes = np.array([0, 2**40 - 1], dtype=np.uint64)
    count, pairs = near_hash_pairs(hashes, hashes[:1], np.array([30_000, 1]), np.array([20_000]), 10)
    assert (count, pairs.tolist()) == (600_000_000, [[0, 0, 0]])


def test_no_hashes_give_no_pairs() -> None:
    none = np.empty(0, dtype=np.uint64)
    assert near(none, none) == near(none, np.zeros(3, dtype=np.uint64)) == (0, [])


def test_alike_hashes_stay_in_bounded_memory() -> None:
    """Hashes that are nearly all alike, as those of blank pages, are compared in blocks and are all found."""
    blank = np.arange(4096, dtype=np.uint64)  # differ in 12 bits only
    tracemalloc.start()
    try:
        count, pairs = near(blank, blank, limit=10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Each hash has C(12,0) + ... + C(12,4) = 794 others within 4 bits, itself included.
    assert count == 4096 * 794
    assert pairs == [(i, i, 0) for i in range(10)]
    assert peak < 64_000_000


def test_identical_blank_images_are_one_hash() -> None:
    rows = [row(i, image_digest=f"t{i}", image_phash="0" * 16) for i in range(300)]
    others = [row(i, image_digest=f"v{i}", image_phash="0" * 16) for i in range(200)]
    (pair,) = find_leakage([tables(rows), tables(others, split="val")], max_pairs=4).pairs
    assert (pair.num_same, pair.num_near, len(pair.near)) == (0, 60_000, 4)
