"""The report page: what it says, what it escapes, that it loads nothing, and how large it gets."""

from __future__ import annotations

import base64
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from spctrl.audit import SplitTables, audit_split
from spctrl.data.records import RECORD_SCHEMA, RecordError
from spctrl.errors import ExpectedError
from spctrl.report import render_report
from spctrl.report.gallery import choose_gallery_rows, primary_categories
from spctrl.report.pictures import (
    INDEX_COLOURS,
    ThumbnailBudget,
    colourise_index_map,
    encode_thumbnail,
    overlay_index_map,
    thicken_lines,
)

CONDITIONS = ("spatext", "openpose", "mask")
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
TIMES = "\N{MULTIPLICATION SIGN}"
HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"'&"


def png(image: Any) -> bytes:
    return bytes(cv2.imencode(".png", image)[1].tobytes())


def index_map_png() -> bytes:
    index_map = np.zeros((90, 120), np.uint8)
    cv2.line(index_map, (10, 10), (100, 80), 51, 5)
    cv2.circle(index_map, (10, 10), 4, 1, -1)
    return png(index_map)


def noise_png(seed: int, side: int = 500) -> bytes:
    return png(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def make(
    split: str = "train",
    num_rows: int = 4,
    *,
    dataset: str = "ap10k",
    title: str = "AP-10K",
    on_disk: bool = True,
    hostile: bool = False,
    rejects: tuple[dict[str, Any], ...] = (),
    noise: bool = False,
    phash: str | None = None,
) -> SplitTables:
    text = HOSTILE if hostile else ""
    rows = [
        {
            "image_id": i,
            "file_name": f"{text}{split}-{i:04d}.jpg",
            "width": 120,
            "height": 90,
            "background": 1,
            "background_name": f"grass{text}",
            "captions": [f"caption {text}"],
            "author": f"author {text}",
            "licence": "CC",
            "source_url": "http://source.example/page",
            "instances": [
                {
                    "category": f"species_{i % 5}{text}",
                    "bbox_xywh": [1.0, 2.0, 60.0, 40.0],
                    "keypoints": [[10.0, 10.0, 2.0]] * 17,
                }
            ],
            "image_path": "x" if on_disk else None,
            "image_digest": f"{split}{i}" if on_disk else None,
            "image_phash": (phash or f"{(i + 1) * 0x9E3779B97F4A7C15 % 2**64:016x}") if on_disk else None,
            **{f"{name}_key": "k" for name in CONDITIONS},
        }
        for i in range(num_rows)
    ]

    def read_condition(row: int, condition: str) -> bytes | None:
        if noise:
            return noise_png(row)
        return index_map_png() if condition == "spatext" else png(np.full((90, 120, 3), 200, np.uint8))

    return SplitTables(
        dataset=dataset,
        title=title,
        split=split,
        manifest=pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA),
        rejects=pa.Table.from_pylist(list(rejects), schema=REJECT_SCHEMA),
        conditions=CONDITIONS,
        read_image=(lambda row: noise_png(row) if noise else png(np.full((90, 120, 3), 90, np.uint8)))
        if on_disk
        else (lambda _: None),
        read_condition=read_condition,
    )


def render(*splits: SplitTables, **options: Any) -> str:
    return render_report(
        [audit_split(tables) for tables in splits], title="Report", generated_at="today", **options
    )


def text_of(page: str) -> str:
    body = re.sub(r"<style>.*?</style>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


class Outline(HTMLParser):
    """Ids, links, headings, images and open tags of a page."""

    VOID = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[int] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.add(tag)
        self.attributes.update(attributes)
        if attributes.get("id"):
            self.ids.append(str(attributes["id"]))
        if tag == "a":
            self.links.append(str(attributes["href"]))
        if tag == "img":
            self.images.append(attributes)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.update(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_well_formed_and_navigable() -> None:
    page = render(make("train"), make("val"), make("validation", dataset="humanart", title="HumanArt"))
    found = outline(page)
    assert page.startswith("<!doctype html>")
    assert len(set(found.ids)) == len(found.ids)
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert len(found.links) > 10
    assert found.headings.count(1) == 1
    assert found.images and all(image["alt"] for image in found.images)


def test_untrusted_text_is_escaped_everywhere() -> None:
    rejects = ({"stage": HOSTILE, "file_name": HOSTILE, "code": HOSTILE, "message": HOSTILE, "image_id": 1},)
    shared: dict[str, Any] = {"hostile": True, "phash": "0" * 16, "rejects": rejects}
    page = render(
        make(f"train{HOSTILE}", title=f"T{HOSTILE}", **shared),
        make("val", title=f"T{HOSTILE}", **shared),
        notes=[HOSTILE],
    )
    page_with_title = render_report([audit_split(make())], title=HOSTILE, generated_at=HOSTILE)
    for html in (page, page_with_title):
        found = outline(html)
        assert "<script" not in html
        assert "script" not in found.tags
        assert not any(name.startswith("on") for name in found.attributes)
        assert all(str(image["src"]).startswith("data:image/webp;base64,") for image in found.images)
        assert "&lt;script&gt;alert(1)" in html


def test_nothing_is_loaded_from_elsewhere() -> None:
    page = render(make("train", hostile=True), make("val"))
    for attribute, value in re.findall(
        r"""\b(src|href|srcset|action|data)=["']?([^"'\s>]*)""", outline_markup(page)
    ):
        assert value.startswith(("data:", "#")), (attribute, value)
    assert "url(" not in page and "@import" not in page and "<link" not in page
    assert "default-src 'none'" in page


def outline_markup(page: str) -> str:
    """The page's tags only: what captions say about URLs is text."""
    return " ".join(re.findall(r"<[a-z][^>]*>", page))


def test_numbers_appear_with_separators() -> None:
    page = text_of(render(make("train", 1234), make("val", 2)))
    assert "1,236 images" in page
    assert re.search(r"1,236 instances", page)
    assert "labelled keypoints 21,012" in page
    assert re.search(r"left eye 100\.0 100\.0", page)
    assert re.search(r"species 0 247 1 248", page)


def test_notes_are_shown_before_the_numbers() -> None:
    page = text_of(render(make(), notes=["Masks are boxes."]))
    assert page.index("Masks are boxes.") < page.index("Summary")
    assert "Please note" not in text_of(render(make()))


def test_empty_cases_say_so() -> None:
    one = text_of(render(make()))
    assert "Nothing was rejected" in one
    assert "There is only one split" in one
    clean = text_of(render(make("train", 3), replace(make("val", 0), split="val")))
    assert "No image is in two splits" in clean
    no_images = text_of(render(make("train", on_disk=False), make("val", on_disk=False)))
    assert "the splits could not be compared" in no_images
    assert "image not on disk" in no_images
    assert "images in two splits not compared" in no_images
    nothing = text_of(render(make(num_rows=0)))
    for what in (
        "no instances to count",
        "no keypoint is labelled",
        "no images to measure",
        "no records to show",
    ):
        assert what in nothing


def test_conditions_are_shown_where_the_image_is_missing() -> None:
    found = outline(render(make(num_rows=1, on_disk=False)))
    assert [str(image["alt"]).split(" of ")[0] for image in found.images] == [
        "Index map, colourised,", "openpose", "mask",
    ]  # fmt: skip


def test_rejects_are_listed_with_examples() -> None:
    rejects = tuple(
        {"stage": "index", "image_id": i, "file_name": f"f{i}.jpg", "code": "bad", "message": "m" * 900}
        for i in range(5)
    )
    page = text_of(render(make(rejects=rejects), make("val")))
    assert "index bad 5 0 3 of 5: f0.jpg, image 0: mmm" in page
    assert "f3.jpg" not in page
    assert "m" * 301 not in page


def test_leaks_are_shown_with_pictures() -> None:
    train, val = make("train", 1), make("val", 1)
    near = render(train, val)
    assert "Near-duplicate, 0 of 64 bits differ train: train-0000.jpg, image 0 val: val-0000.jpg" in text_of(
        near
    )
    assert [image["alt"] for image in outline(near).images[:2]] == ["Image 0 of train", "Image 0 of val"]
    copy = replace(train, split="val")
    same = render(train, copy)
    assert "Same file train: train-0000.jpg, image 0 val: train-0000.jpg, image 0" in text_of(same)
    assert "Near-duplicate" not in text_of(same)


def test_broken_files_do_not_break_the_report() -> None:
    broken = replace(make(num_rows=1), read_image=lambda _: b"not an image", read_condition=lambda _, __: b"")
    page = text_of(render(broken))
    assert "image cannot be decoded" in page
    assert "mask cannot be decoded" in page
    absent = replace(make(num_rows=1), read_condition=lambda _, __: None)
    assert "no spatext of this record" in text_of(render(absent))


def test_files_that_cannot_be_read_do_not_break_the_report() -> None:
    def refuse(*_: object) -> bytes:
        raise RecordError("bad_image", "a pipe")

    unreadable = replace(make(num_rows=1), read_image=refuse, read_condition=refuse)
    copy = replace(unreadable, split="val")
    page = text_of(render(unreadable, copy))
    assert page.count("image cannot be read") == 3  # both records and the pair that leaks
    assert page.count("mask cannot be read") == 2


def test_a_damaged_store_is_no_missing_picture() -> None:
    """It fails the stage: a page with gaps would count as done after the store is repaired."""

    def refuse(*_: object) -> bytes:
        raise ExpectedError("the pack is damaged")

    with pytest.raises(ExpectedError, match="the pack is damaged"):
        render(replace(make(num_rows=1), read_condition=refuse))


def test_maps_of_another_size_are_not_overlaid() -> None:
    other = replace(make(num_rows=1), read_image=lambda _: png(np.zeros((10, 20, 3), np.uint8)))
    assert f"map is 120 {TIMES} 90, image 20 {TIMES} 10" in text_of(render(other))


def test_the_page_stays_small_even_for_noise() -> None:
    page = render(
        *(make(split, 30, dataset=name, title=name, noise=True, phash="0" * 16)
          for name in ("ap10k", "humanart") for split in ("train", "val", "test"))
    )  # fmt: skip
    assert len(outline(page).images) > 100
    assert len(page.encode()) < 3_000_000


def test_the_page_is_the_same_each_time() -> None:
    assert render(make("train", 40), make("val", 7)) == render(make("train", 40), make("val", 7))


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="expected the audit of at least one split"):
        render()
    with pytest.raises(ValueError, match="expected each split of a dataset once"):
        render(make(), make())


def test_gallery_spreads_over_splits_and_species() -> None:
    splits = [make("train", 100), make("val", 3), make("test", 1)]
    chosen = choose_gallery_rows(splits)
    assert len(chosen) == len(set(chosen)) == 12
    assert [sum(split == number for split, _ in chosen) for number in range(3)] == [8, 3, 1]
    assert sorted(Counter(row % 5 for _, row in chosen).values()) == [2, 2, 2, 3, 3]
    assert choose_gallery_rows([make(num_rows=2)]) == [(0, 0), (0, 1)]
    assert choose_gallery_rows([make(num_rows=0)]) == []


def test_gallery_prefers_records_with_an_image() -> None:
    tables = make(num_rows=30)
    paths = pa.array([None] * 25 + ["x"] * 5, pa.string())
    index = tables.manifest.column_names.index("image_path")
    tables = replace(tables, manifest=tables.manifest.set_column(index, "image_path", paths))
    assert {25, 26, 27, 28, 29} < {row for _, row in choose_gallery_rows([tables])}


def test_primary_category_is_the_scenario_or_the_first_species() -> None:
    two = [{"category": "dog"}, {"category": "cat"}]
    rows = [{"instances": two}, {"instances": []}, {"instances": two, "category": "mural"}]
    manifest = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    assert primary_categories(manifest).to_pylist() == ["dog", None, "mural"]


def test_index_maps_get_distinct_visible_colours() -> None:
    table = INDEX_COLOURS
    used = [0, *range(1, 18), *range(51, 70)]
    assert len({tuple(table[value]) for value in used}) == len(used)
    assert (table[[18, 50, 70, 255]] == 255).all()
    assert table[0].max() < 30 and table[1:18].max(axis=1).min() == 255
    index_map = np.array([[0, 1], [51, 69]], np.uint8)
    assert (colourise_index_map(index_map)[1, 1] == table[69]).all()


def test_overlay_keeps_the_image_where_nothing_is_drawn() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    overlay = overlay_index_map(image, np.array([[0, 5], [0, 0]], np.uint8))
    assert overlay[0, 0].tolist() == [60, 60, 60]
    assert (overlay[0, 1] == INDEX_COLOURS[5]).all()


def test_thin_lines_survive_a_thumbnail() -> None:
    drawing = np.zeros((3200, 3200, 3), np.uint8)
    drawing[1600] = 255
    small = cv2.resize(thicken_lines(drawing), (320, 320), interpolation=cv2.INTER_AREA)
    assert small.max() > 100
    assert thicken_lines(drawing[:300, :300]).shape == (300, 300, 3)


def test_thumbnails_fit_their_side_and_budget() -> None:
    image = np.random.default_rng(0).integers(0, 256, (700, 500, 3), dtype=np.uint8)
    small = encode_thumbnail(image, 320, max_bytes=4000)
    assert len(small) <= 4000
    assert decoded_shape(encode_thumbnail(image, 320, max_bytes=10**6)) == (320, 229, 3)
    uri = ThumbnailBudget(1).encode(image[:50, :40])
    assert uri is not None
    assert decoded_shape(base64.b64decode(uri.split(",")[1])) == (50, 40, 3)


def decoded_shape(data: bytes) -> tuple[int, ...]:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return tuple(np.shape(image))
