"""Prompts: what they say, what is drawn for them, and which of their tokens stand for what."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from spctrl.configuration import ConfigurationError
from spctrl.data.datasets import AP10K, DATASETS, HUMANART
from spctrl.data.records import RECORD_SCHEMA
from spctrl.errors import ExpectedError
from spctrl.prompts import (
    Prompt,
    Subject,
    Templates,
    build_prompt,
    evaluation_prompt,
    fields_of,
    keypoint_words,
    load_templates,
    rows_without_prompt,
    subjects_from_table,
    tokenize,
    usable,
)

K = 17
BUILD: dict[str, Any] = {"keypoints": "tokens", "seed": 0, "epoch": 0, "add_keypoint_prompt": 1.0}


def subject(*labelled: int, image_id: int = 1, **values: Any) -> Subject:
    """One whose keypoints of these indices are labelled."""
    given = {"categories": ("polar bear", "fox"), "background": "snowfield", "caption": " two women. "}
    return Subject(image_id=image_id, labelled=np.isin(np.arange(K), labelled), **{**given, **values})


def only(template: str) -> Templates:
    return Templates(training=[template], evaluation=[template])


# Templates


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_templates_that_come_along_are_valid_and_name_the_subject(dataset: str) -> None:
    templates = load_templates(None, dataset)
    named = {"ap10k": "category", "humanart": "caption"}[dataset]
    assert len(set(templates.training)) == {"ap10k": 10, "humanart": 1}[dataset]
    assert all(named in fields_of(each) for each in (*templates.training, *templates.evaluation))
    assert any("background" not in fields_of(each) for each in templates.evaluation)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("training: []\nevaluation: ['{caption} {keypoints}']", "at least one template under training"),
        ("training: ['a {species} {keypoints}']\nevaluation: ['{keypoints}']", "found {species}"),
        ("training: ['a {category}']\nevaluation: ['{keypoints}']", "{keypoints} once"),
        ("training: ['{keypoints}']\nevaluation: ['{keypoints} {keypoints}']", "evaluation: .*once"),
        ("training: ['{category} {category} {keypoints}']\nevaluation: ['{keypoints}']", "at most once"),
        ("training: ['{category:>9} {keypoints}']\nevaluation: ['{keypoints}']", r"found {category...}"),
        ("training: ['{category {keypoints}']\nevaluation: ['{keypoints}']", "brace"),
        ("training: ['{keypoints}']\nevaluating: ['{keypoints}']", "did you mean evaluation"),
    ],
)
def test_templates_that_cannot_be_used_are_named(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=match) as raised:
        load_templates(path, "ap10k")
    assert str(path) in str(raised.value)


def test_a_file_of_ones_own_is_used(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: ['my {category} {keypoints} {{so}}']\nevaluation: ['{category} {keypoints}']")
    assert build_prompt(subject(), load_templates(path, "ap10k"), "ap10k", **BUILD).text == (
        "my polar bear fox {so}"
    )


# Texts


def test_a_prompt_says_what_is_annotated_and_where_it_says_it() -> None:
    prompt = build_prompt(
        subject(0, 4, 16), only("some {category} {keypoints} in the {background}"), "ap10k", **BUILD
    )
    words = "<left-eye>", "<root-of-tail>", "<right-back-paw>"
    assert prompt.text == f"some polar bear fox <{', '.join(words)}> in the snowfield"
    assert prompt.class_span is not None
    assert prompt.text[slice(*prompt.class_span)] == "polar bear"
    spans = [span for span in prompt.keypoint_spans if span]
    assert tuple(prompt.text[slice(*span)] for span in spans) == words
    assert [k for k, span in enumerate(prompt.keypoint_spans) if span] == [0, 4, 16]


def test_keypoints_can_be_plain_names_or_left_out() -> None:
    templates = only("{caption}. {keypoints}")
    assert evaluation_prompt(subject(1, 9), templates, "humanart", keypoints="names").text == (
        "two women.. <left eye, left wrist>"
    )
    without = evaluation_prompt(subject(1, 9), templates, "humanart", keypoints=None)
    assert without == Prompt("two women..", None, (None,) * K)


@pytest.mark.parametrize("keypoints", ["tokens", "names"])
def test_nothing_stands_for_keypoints_that_are_not_labelled(keypoints: Any) -> None:
    found = evaluation_prompt(subject(), only("a {category} {keypoints} there"), "ap10k", keypoints=keypoints)
    assert found.text == "a polar bear fox there"


@pytest.mark.parametrize("dataset", [AP10K, HUMANART], ids=lambda each: each.name)
def test_every_keypoint_has_words_of_its_own(dataset: Any) -> None:
    for kind in ("tokens", "names"):
        assert len(set(keypoint_words(dataset.name, kind))) == K
    assert keypoint_words("ap10k", "tokens")[4] == "<root-of-tail>"


def test_templates_whose_background_is_not_known_are_left_out() -> None:
    templates = load_templates(None, "ap10k")
    drawn = {
        build_prompt(subject(image_id=i, background=None), templates, "ap10k", **BUILD).text
        for i in range(64)
    }
    assert drawn == {"a good photo of polar bear fox", "a close photo of polar bear fox"}


def test_no_template_that_fits_is_an_error_that_says_what_is_missing() -> None:
    with pytest.raises(ExpectedError, match=r"image 7: .*without caption, which"):
        build_prompt(
            subject(image_id=7, background=None, caption=None),
            only("{caption} {keypoints}"),
            "ap10k",
            **BUILD,
        )


# What is drawn


def drawn(count: int, **settings: Any) -> list[str]:
    templates = load_templates(None, "ap10k")
    return [
        build_prompt(subject(0, image_id=i), templates, "ap10k", **{**BUILD, **settings}).text
        for i in range(count)
    ]


def test_a_choice_depends_on_seed_epoch_and_image_alone() -> None:
    assert drawn(50) == drawn(50)
    for changed in ({"seed": 1}, {"epoch": 1}):
        assert sum(a != b for a, b in zip(drawn(50), drawn(50, **changed), strict=True)) > 30
    # Known values: another Python, another machine or another hash seed must not draw others.
    assert drawn(3) == [
        "there is polar bear fox <<left-eye>> on the snowfield",
        "a good photo of polar bear fox <<left-eye>>",
        "a close photo of polar bear fox <<left-eye>>",
    ]


def test_all_templates_are_drawn_about_equally_often() -> None:
    counts = Counter(drawn(2000))
    assert len(counts) == 10
    assert min(counts.values()) > 140
    assert max(counts.values()) < 270


def test_probabilities_are_kept_and_leave_each_other_alone() -> None:
    assert not any(drawn(50, proportion_empty_prompts=1.0))
    assert all(drawn(50, proportion_empty_prompts=0.0))
    assert not any("<" in text for text in drawn(50, add_keypoint_prompt=0.0))
    half = drawn(1000, proportion_empty_prompts=0.5, add_keypoint_prompt=0.8)
    full = [text for text in half if text]
    assert 430 < len(full) < 570
    assert 0.75 < sum("<" in text for text in full) / len(full) < 0.85
    always = drawn(1000, add_keypoint_prompt=0.8)
    assert all(text in ("", other) for text, other in zip(half, always, strict=True))


def test_an_evaluation_prompt_is_always_the_same() -> None:
    templates = load_templates(None, "ap10k")
    found = {
        evaluation_prompt(subject(2, image_id=i), templates, "ap10k", keypoints="tokens") for i in range(20)
    }
    assert {prompt.text for prompt in found} == {"a clear photo of polar bear fox <<nose>> in the snowfield"}


# Records


def table(**values: Any) -> pa.Table:
    def instance(category: str, *labelled: int) -> dict[str, Any]:
        points = [[1.0, 2.0, 2.0 if k in labelled else 0.0] for k in range(K)]
        return {"category": category, "keypoints": points, "bbox_xywh": [0.0, 0.0, 1.0, 1.0]}

    row = {
        "image_id": 5,
        "file_name": "5.jpg",
        "width": 9,
        "height": 9,
        "background_name": "dark",
        "instances": [instance("polar_bear", 3), instance("fox", 5), instance("polar_bear", 5, 16)],
        **values,
    }
    return pa.Table.from_pylist([{**row, "image_id": 4, "instances": []}, row], schema=RECORD_SCHEMA)


def test_subjects_come_from_records_in_annotation_order() -> None:
    empty, found = subjects_from_table(table())
    assert found[:4] == (5, ("polar bear", "fox"), "dark", None)
    assert np.flatnonzero(found.labelled).tolist() == [3, 5, 16]
    assert empty.categories == ()
    assert not empty.labelled.any()
    (sliced,) = subjects_from_table(table().slice(1, 1))
    assert sliced.categories == found.categories
    assert np.array_equal(sliced.labelled, found.labelled)


def test_a_picture_without_a_caption_has_its_scenario_for_one() -> None:
    assert subjects_from_table(table(captions=["a dance"], category="oil_painting"))[1].caption == "a dance"
    for captions in ([], [""], [" \n"]):
        found = subjects_from_table(table(captions=captions, category="oil_painting"))[1]
        assert found.caption == "oil painting"
    assert subjects_from_table(table(captions=[" "], category=" "))[1].caption is None


@pytest.mark.parametrize("name", ["", "  "])
def test_a_blank_category_counts_as_none(name: str) -> None:
    instances = [{"category": name, "keypoints": [[1.0, 2.0, 2.0]] * K, "bbox_xywh": [0.0, 0.0, 1.0, 1.0]}]
    found = subjects_from_table(table(instances=instances))[1]
    assert found.categories == ()
    with pytest.raises(ExpectedError, match="template without category, which"):
        usable(only("a photo of {category} {keypoints}").training, found)


def test_rows_without_prompt_are_those_that_no_template_fits() -> None:
    assert set(rows_without_prompt(["a photo of {category} {keypoints}"], table())) == {0}
    assert rows_without_prompt(["a photo {keypoints}"], table()) == {}
    assert set(rows_without_prompt(["{caption} {keypoints}"], table())) == {0, 1}


# Tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers", reason="the models extra is not installed")
    from spctrl.models.tiny import write_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    made = transformers.CLIPTokenizer.from_pretrained(folder)
    for dataset in DATASETS.values():
        made.add_tokens(list(dataset.skeleton.placeholders))
    return made


def marked(tokenizer: Any, prompt: Prompt, concept: Any = "partition") -> list[str]:
    tokens = tokenize(tokenizer, prompt, concept=concept)
    assert tokens.input_ids.shape == tokens.token_mask.shape == (77,)
    assert (tokens.input_ids.dtype, tokens.token_mask.dtype, tokens.keypoint_mask.dtype) == (
        np.int64, np.bool_, np.bool_,
    )  # fmt: skip
    found: list[str] = tokenizer.convert_ids_to_tokens(tokens.input_ids[tokens.token_mask].tolist())
    return found


@pytest.mark.parametrize("dataset", DATASETS)
def test_placeholders_are_marked_in_keypoint_order(tokenizer: Any, dataset: str) -> None:
    labelled = [0, 3, 4, 11, 16]
    prompt = build_prompt(subject(*labelled), load_templates(None, dataset), dataset, **BUILD)
    words = keypoint_words(dataset, "tokens")
    assert marked(tokenizer, prompt) == [words[k] for k in labelled]
    assert np.flatnonzero(tokenize(tokenizer, prompt).keypoint_mask).tolist() == labelled


def test_of_plain_names_the_last_token_is_marked(tokenizer: Any) -> None:
    prompt = build_prompt(
        subject(0, 2, 4, 7), load_templates(None, "ap10k"), "ap10k", **{**BUILD, "keypoints": "names"}
    )
    assert marked(tokenizer, prompt) == ["eye</w>", "nose</w>", "tail</w>", "paw</w>"]


def test_of_the_whole_object_one_token_is_marked(tokenizer: Any) -> None:
    prompt = build_prompt(subject(0, 2), load_templates(None, "ap10k"), "ap10k", **BUILD)
    tokens = tokenize(tokenizer, prompt, concept="whole")
    (position,) = np.flatnonzero(tokens.token_mask)
    assert tokenizer.decode(tokens.input_ids[: position + 1]).endswith("polar bear")
    assert tokens.keypoint_mask.sum() == 2


@pytest.mark.parametrize("concept", ["partition", "whole"])
def test_an_empty_prompt_marks_nothing(tokenizer: Any, concept: Any) -> None:
    templates = load_templates(None, "ap10k")
    prompt = build_prompt(subject(0), templates, "ap10k", **BUILD, proportion_empty_prompts=1.0)
    tokens = tokenize(tokenizer, prompt, concept=concept)
    assert not tokens.token_mask.any()
    assert not tokens.keypoint_mask.any()
    assert tokens.input_ids.tolist() == tokenizer("", padding="max_length", max_length=77)["input_ids"]


@pytest.mark.parametrize("kind", ["tokens", "names"])
def test_keypoints_that_are_cut_off_are_missing_from_both_masks(tokenizer: Any, kind: Any) -> None:
    words = keypoint_words("humanart", kind)
    seen = set()
    for length in range(1, 80):
        prompt = evaluation_prompt(
            subject(*range(K), caption="e " * length),
            only("{caption}. {keypoints}"),
            "humanart",
            keypoints=kind,
        )
        tokens = tokenize(tokenizer, prompt)
        expected = tokenizer(prompt.text, padding="max_length", truncation=True, max_length=77)["input_ids"]
        assert tokens.input_ids.tolist() == expected
        if kind == "tokens":
            count = len({*tokenizer.convert_tokens_to_ids(list(words))} & {*expected})
        else:
            listed = tokenizer.decode(expected, skip_special_tokens=True).partition(". <")[2]
            left = [each.removesuffix(">").strip() for each in listed.split(",")]
            count = sum(each == word for each, word in zip(left, words, strict=False))
        assert tokens.keypoint_mask.tolist() == [k < count for k in range(K)]
        assert tokens.token_mask.sum() == count
        seen.add(count)
    assert seen == set(range(K + 1))


def test_other_scripts_do_not_shift_the_marks(tokenizer: Any) -> None:
    prompt = evaluation_prompt(
        subject(1, caption="Ünï  çode 𝒳 猫 🐈"),
        only("{caption}. {keypoints}"),
        "humanart",
        keypoints="tokens",
    )
    assert marked(tokenizer, prompt) == ["<left-eye>"]


def test_tokens_are_not_changed_by_how_the_tokenizer_was_used_before(tokenizer: Any) -> None:
    prompt = build_prompt(subject(*range(K)), load_templates(None, "ap10k"), "ap10k", **BUILD)
    before = tokenize(tokenizer, prompt)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)
    assert np.array_equal(tokenize(tokenizer, prompt).input_ids, before.input_ids)
