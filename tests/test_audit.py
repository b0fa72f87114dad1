"""The audit's numbers on small tables made by hand; its near-duplicate search against brute force."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest

from spctrl import audit
from spctrl.audit import (
    CocoSizes,
    GroupCount,
    SplitTables,
    audit_split,
    find_leakage,
    group_rejects,
    histogram,
    near_hash_pairs,
    parse_hashes,
    primary_categories,
)
from spctrl.records import RECORD_SCHEMA

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
    assert result.num_conditions == (("spatext", 2), ("openpose", 1))
    assert result.grouping == "species"
    assert result.categories == (GroupCount("cat", 2, 2), GroupCount("dog", 1, 2))
    assert result.backgrounds == (GroupCount("grass", 2, 3), GroupCount("9", 1, 1))


def test_visibility_is_the_share_of_instances_with_a_label(small: SplitTables) -> None:
    visibility = audit_split(small).visibility
    assert visibility.names[:3] == ("left_eye", "right_eye", "nose")
    assert visibility.shares == (0.75, 0.25, 0.25, *[0.0] * 13, 0.25)


def test_sizes(small: SplitTables) -> None:
    result = audit_split(small)
    assert result.coco_sizes == CocoSizes(small=1, medium=0, large=3)
    assert result.instances_per_image.counts == (1, 1, 0, 1, 0, 0, 0, 0, 0)
    assert (result.long_side.counts[2], result.long_side.counts[4], result.long_side.counts[-1]) == (1, 1, 1)
    assert (result.long_side.minimum, result.long_side.median, result.long_side.maximum) == (200, 400, 3000)
    # sqrt(100 * 100 / (200 * 100)) = 0.707 three times, sqrt(20 * 20 / (3000 * 100)) = 0.037 once.
    assert (result.instance_size.counts[14], result.instance_size.counts[0], result.instance_size.total) == (
        3,
        1,
        4,
    )


def test_rejects_are_grouped_by_stage_and_reason(small: SplitTables) -> None:
    groups = audit_split(small, max_examples=1).rejects
    assert [(group.stage, group.code, group.count) for group in groups] == [
        ("index", "b", 2), ("index", "a", 1), ("mask", "a", 1),
    ]  # fmt: skip
    assert [[example.message for example in group.examples] for group in groups] == [
        ["second"],
        ["first"],
        [""],
    ]
    assert audit_split(small).num_rejects == 4
    assert group_rejects(small.rejects.slice(0, 0)) == ()


def test_scenarios_count_images() -> None:
    rows = [
        row(1, [instance("person", [0]), instance("person", [0])], category="mural"),
        row(2, [], category="mural"),
        row(3, [instance("person", [0])], category="sketch"),
    ]
    result = audit_split(tables(rows, dataset="humanart"))
    assert result.grouping == "scenario"
    assert result.categories == (GroupCount("mural", 2, 2), GroupCount("sketch", 1, 1))
    assert result.backgrounds == ()


def test_an_empty_split_has_zeros_and_no_quantiles() -> None:
    result = audit_split(tables([]))
    assert (result.num_images, result.num_instances, result.categories, result.rejects) == (0, 0, (), ())
    assert result.long_side.median is None
    assert result.visibility.shares == (None,) * 17


def test_a_slice_of_a_table_is_audited_as_such(small: SplitTables) -> None:
    result = audit_split(replace(small, manifest=small.manifest.slice(1, 2)))
    assert result.categories == (GroupCount("cat", 1, 1),)
    assert result.visibility.labelled == (1, *[0] * 15, 1)


def test_several_chunks_are_one_table(small: SplitTables) -> None:
    twice = replace(small, manifest=pa.concat_tables([small.manifest, small.manifest]))
    assert audit_split(twice).num_instances == 8
    assert audit_split(twice).visibility.labelled[0] == 6


def test_unknown_datasets_have_numbered_keypoints() -> None:
    result = audit_split(tables([row(1, [instance("fish", [1], k=3)])], dataset="fish"))
    assert result.visibility.names == ("keypoint 1", "keypoint 2", "keypoint 3")
    assert result.visibility.labelled == (0, 1, 0)


def test_errors_name_what_is_wrong(small: SplitTables) -> None:
    with pytest.raises(
        ValueError, match="ap10k train: expected 17 keypoints per instance, found \\[3, 17\\]"
    ):
        audit_split(tables([row(1, [instance("dog", [0]), instance("dog", [0], k=3)])]))
    with pytest.raises(ValueError, match="manifest of ap10k train: expected the columns openpose_key, found"):
        audit_split(replace(small, manifest=small.manifest.drop_columns(["openpose_key"])))
    with pytest.raises(ValueError, match="rejects of ap10k train: expected the columns stage"):
        audit_split(replace(small, rejects=small.rejects.drop_columns(["stage"])))
    with pytest.raises(
        ValueError, match="expected 16 hexadecimal digits, found 'xyz' in the manifest of ap10k val"
    ):
        find_leakage(
            [tables([row(1, image_phash="0" * 16)]), tables([row(1, image_phash="xyz")], split="val")]
        )
    with pytest.raises(ValueError, match="expected 0 to 63 bits"):
        near_hash_pairs(np.zeros(1, np.uint64), np.zeros(1, np.uint64), max_distance=64)


def test_primary_category_is_the_scenario_or_the_first_species(small: SplitTables) -> None:
    assert primary_categories(small.manifest).to_pylist() == ["dog", "cat", None]
    scenario = tables([row(1, [instance("person", [])], category="mural")])
    assert primary_categories(scenario.manifest).to_pylist() == ["mural"]


def test_histogram_clips_to_the_end_bins_and_skips_nan() -> None:
    result = histogram(np.array([-5.0, 0.5, 1.5, 99.0, np.nan]), (0, 1, 2))
    assert result.counts == (2, 2)
    assert (result.minimum, result.maximum) == (-5.0, 99.0)


def test_parse_hashes_reads_big_endian_hex() -> None:
    assert parse_hashes(pa.array(["0000000000000001", "ffffffffffffffFF"]), "x").tolist() == [1, 2**64 - 1]
    assert len(parse_hashes(pa.array([], pa.string()), "x")) == 0


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
    leakage = find_leakage([train, val])
    (pair,) = leakage.pairs
    assert (pair.split_a, pair.split_b) == ("train", "val")
    assert [(leak.first.image_id, leak.second.image_id) for leak in pair.same] == [(1, 11)]
    # Image 3 is one bit from the shared file and five from image 12; image 13 is five bits from everything.
    assert [(leak.first.image_id, leak.second.image_id, leak.distance) for leak in pair.near] == [
        (3, 11, 1),
        (1, 12, 4),
    ]
    assert (pair.num_same, pair.num_near) == (1, 2)
    assert (leakage.num_images, leakage.num_without_digest, leakage.num_without_hash) == (8, 1, 1)
    assert pair.near[0].first.file_name == "000000000003.jpg"


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
    assert (pair.num_near, [(leak.first.image_id, leak.second.image_id) for leak in pair.near]) == (
        1,
        [(100, 200)],
    )


def brute_force(a: NDArray[np.uint64], b: NDArray[np.uint64], max_distance: int) -> set[tuple[int, int, int]]:
    distances = np.bitwise_count(a[:, None] ^ b[None, :])
    return {(int(i), int(j), int(distances[i, j])) for i, j in np.argwhere(distances <= max_distance)}


@pytest.mark.parametrize("max_distance", [0, 1, 4, 7])
@pytest.mark.parametrize("num_bits", [8, 24, 64])
def test_near_pairs_equal_brute_force(
    max_distance: int, num_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small blocks, so that borders between blocks are crossed.
    monkeypatch.setattr(audit, "PAIRS_PER_BLOCK", 97)
    rng = np.random.default_rng(num_bits + max_distance)
    a = rng.integers(0, 2**num_bits, 150, dtype=np.uint64)
    flips = rng.integers(0, 64, (60, 6))
    copies = a[:60].copy()
    for i, bits in enumerate(flips):
        for bit in bits[: i % 7]:
            copies[i] ^= np.uint64(1) << np.uint64(bit)
    b = np.concatenate([copies, rng.integers(0, 2**num_bits, 40, dtype=np.uint64)])
    expected = brute_force(a, b, max_distance)
    found = near_hash_pairs(a, b, max_distance=max_distance, limit=10**6)
    pairs = list(zip(found.index_a.tolist(), found.index_b.tolist(), found.distances.tolist(), strict=True))
    assert len(expected) > 0
    assert set(pairs) == expected
    assert found.count == len(pairs) == len(expected)
    assert pairs == sorted(pairs, key=lambda pair: (pair[2], pair[0], pair[1]))
    assert pairs[:5] == list(
        zip(
            *(x.tolist() for x in _arrays(near_hash_pairs(a, b, max_distance=max_distance, limit=5))),
            strict=True,
        )
    )


def _arrays(found: audit.NearHashPairs) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    return found.index_a, found.index_b, found.distances


def test_weights_multiply_in_the_count() -> None:
    hashes = np.array([0, 2**40 - 1], dtype=np.uint64)
    found = near_hash_pairs(hashes, hashes[:1], weights_a=np.array([30_000, 1]), weights_b=np.array([20_000]))
    assert (found.count, len(found.distances)) == (600_000_000, 1)


def test_no_hashes_give_no_pairs() -> None:
    none = np.empty(0, dtype=np.uint64)
    assert near_hash_pairs(none, none).count == 0
    assert near_hash_pairs(none, np.zeros(3, dtype=np.uint64)).count == 0


def test_giant_buckets_stay_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes that share most bands, as nearly blank pages have, are compared in blocks and are all found."""
    largest = 0
    direct_hits = audit._direct_hits

    def watched(*arguments: Any) -> Any:
        nonlocal largest
        for hit in direct_hits(*arguments):
            largest = max(largest, len(hit[0]))
            yield hit

    monkeypatch.setattr(audit, "_direct_hits", watched)
    blank = np.arange(4096, dtype=np.uint64)  # differ in 12 bits only
    found = near_hash_pairs(blank, blank, limit=10)
    # Each hash has C(12,0) + ... + C(12,4) = 794 others within 4 bits, itself included.
    assert found.count == 4096 * 794
    assert 0 < largest <= audit.PAIRS_PER_BLOCK
    assert found.distances.tolist() == [0] * 10


def test_identical_blank_images_are_one_hash() -> None:
    rows = [row(i, image_digest=f"t{i}", image_phash="0" * 16) for i in range(300)]
    others = [row(i, image_digest=f"v{i}", image_phash="0" * 16) for i in range(200)]
    (pair,) = find_leakage([tables(rows), tables(others, split="val")], max_pairs=4).pairs
    assert (pair.num_same, pair.num_near, len(pair.near)) == (0, 60_000, 4)
