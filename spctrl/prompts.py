"""Prompts: templates filled with what is annotated, and which tokens stand for which keypoint.

Legend: K keypoints (17), T tokens of a prompt (77, CLIP's context).
"""

from __future__ import annotations

import functools
import random
from bisect import bisect_left
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import numpy as np

from spctrl.configuration import ConfigurationError, read_config
from spctrl.data.datasets import DATASETS
from spctrl.data.records import instance_categories, records_from_table
from spctrl.errors import ExpectedError
from spctrl.resources import resource

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa
    from numpy.typing import NDArray

    from spctrl.data.records import Record

CONTEXT_TOKENS = 77
_ROWS_AT_ONCE = 4096

KeypointWords = Literal["tokens", "names"]
"""Keypoints in a prompt: learned placeholder tokens (``<left-eye>``), or plain names (``left eye``)."""

Concept = Literal["partition", "whole"]
"""What the marked tokens of a prompt stand for: its keypoints, or the object as a whole."""

Span = tuple[int, int]
"""First character and the one after the last."""


class Templates(msgspec.Struct, frozen=True, kw_only=True):
    """A file of prompt templates, such as ``prompts/ap10k.yaml``.

    Attributes:
        training: one of them is drawn for each sample and epoch.
        evaluation: the first that can be used is an image's one prompt.
    """

    training: list[str]
    evaluation: list[str]


class Subject(NamedTuple):
    """What a prompt says of one image.

    Attributes:
        image_id: decides, with seed and epoch, what is drawn for it.
        categories: names of what the instances are, each once, in annotation order.
        background: where they are; None where it is not known.
        caption: a description; None where there is none.
        labelled: (K,) bool: keypoints that some instance has labelled.
    """

    image_id: int
    categories: tuple[str, ...]
    background: str | None
    caption: str | None
    labelled: NDArray[np.bool_]


class Prompt(NamedTuple):
    """A prompt, and where in its text things are.

    Attributes:
        text: the prompt; empty for unconditional training.
        class_span: the first category's name; None where the prompt does not name it.
        keypoint_spans: K entries; None for keypoints that the prompt does not name.
    """

    text: str
    class_span: Span | None
    keypoint_spans: tuple[Span | None, ...]


class Tokens(NamedTuple):
    """A tokenized prompt.

    Attributes:
        input_ids: (T,) int64.
        token_mask: (T,) bool: the tokens that stand for the concept. Of the keypoints: one token each, in keypoint
            order, as many as ``keypoint_mask`` has; of a name of several words, the last one's. Of the whole object:
            the last token of the class name; none in an empty prompt.
        keypoint_mask: (K,) bool: the keypoints that the prompt names, without those that were cut off.
    """

    input_ids: NDArray[np.int64]
    token_mask: NDArray[np.bool_]
    keypoint_mask: NDArray[np.bool_]


def subjects_from_table(
    table: pa.Table | pa.RecordBatch, records: Sequence[Record] | None = None
) -> list[Subject]:
    """Subjects of the rows of an index or manifest. A picture without a caption gets its scenario's name for one.

    Args:
        table: the rows.
        records: of the same rows, where they are there already.
    """
    columns = (table.column(name).to_pylist() for name in ("background_name", "captions", "category"))
    return [
        Subject(
            image_id=record.image_id,
            categories=tuple(name.replace("_", " ") for name in dict.fromkeys(categories) if name.strip()),
            background=background,
            caption=_caption(captions or (), scenario),
            labelled=(record.keypoints[..., 2] > 0).any(axis=0),
        )
        for record, categories, background, captions, scenario in zip(
            records_from_table(table) if records is None else records,
            instance_categories(table),
            *columns,
            strict=True,
        )
    ]


def _caption(captions: Sequence[str], scenario: str | None) -> str | None:
    candidates = (next(iter(captions), None), scenario and scenario.replace("_", " "))
    return next((each for each in candidates if each and each.strip()), None)


# Templates


def templates_path(dataset: str) -> Path:
    """The file of prompt templates of a dataset: ``configs/prompts/<dataset>.yaml``, or the package's own."""
    return resource(f"prompts/{dataset}.yaml")


def load_templates(path: Path | None, dataset: str) -> Templates:
    """Templates of a file, by default that of ``templates_path``.

    Raises:
        ConfigurationError: the file is missing or broken, has no templates, or a template is not valid.
    """
    path = path or templates_path(dataset)
    templates = read_config(path, Templates)
    for kind in ("training", "evaluation"):
        if not getattr(templates, kind):
            raise ConfigurationError(f"{path}: expected at least one template under {kind}, found none")
        for template in getattr(templates, kind):
            if fault := _template_fault(template):
                raise ConfigurationError(f"{path}: {kind}: {template!r}: {fault}")
    return templates


_FIELDS = ("category", "background", "caption", "keypoints")


def _template_fault(template: str) -> str | None:
    """Why a template cannot be used, or None."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        return f"{error} (a brace in the text is written twice)"
    fields = [field for _, field, _, _ in parts if field is not None]
    for _, field, form, conversion in parts:
        if field is not None and (field not in _FIELDS or form or conversion):
            return (
                f"expected {{{'}, {'.join(_FIELDS)}}}, found {{{field}{'...' if form or conversion else ''}}}"
            )
    if fields.count("keypoints") != 1 or fields.count("category") > 1:
        return "expected {keypoints} once and {category} at most once"
    return None


@functools.cache
def fields_of(template: str) -> frozenset[str]:
    """Names of a template's fields."""
    return frozenset(field for _, field, _, _ in Formatter().parse(template) if field is not None)


def usable(templates: Sequence[str], subject: Subject) -> list[str]:
    """The templates all of whose fields are known of an image.

    Raises:
        ExpectedError: there is none.
    """
    known = {"category": subject.categories, "background": subject.background, "caption": subject.caption}
    missing = {name for name, value in known.items() if not value}
    found = [template for template in templates if not fields_of(template) & missing]
    if not found:
        missing &= frozenset().union(*map(fields_of, templates))
        raise ExpectedError(
            f"image {subject.image_id}: expected a prompt template without {' or '.join(sorted(missing))}, which this "
            f"image does not have; found none among {len(templates)}. One at the end of the list in the file of "
            "templates would do; in training it would be sampled for other images too"
        )
    return found


def rows_without_prompt(
    templates: Sequence[str], table: pa.Table | pa.RecordBatch
) -> dict[int, ExpectedError]:
    """Rows of an index or manifest that no template fits, with the reasons."""
    found = {}
    for first in range(0, table.num_rows, _ROWS_AT_ONCE):
        for row, subject in enumerate(subjects_from_table(table.slice(first, _ROWS_AT_ONCE)), first):
            try:
                usable(templates, subject)
            except ExpectedError as error:
                found[row] = error
    return found


# Prompts


def build_prompt(
    subject: Subject,
    templates: Templates,
    dataset: str,
    *,
    keypoints: KeypointWords,
    seed: int,
    epoch: int,
    add_keypoint_prompt: float = 0.0,
    proportion_empty_prompts: float = 0.0,
) -> Prompt:
    """The prompt of an image in an epoch of training.

    What is drawn depends on ``seed``, ``epoch`` and the image alone, not on the order of the samples or the number of
    workers. Each probability has a draw of its own, so that changing one changes nothing else.

    Args:
        subject: what the prompt says.
        templates: of ``load_templates``.
        dataset: decides the keypoints' names.
        keypoints: how keypoints are written.
        seed, epoch: of training.
        add_keypoint_prompt: probability that the labelled keypoints are in the prompt.
        proportion_empty_prompts: probability of an empty prompt.

    Raises:
        ExpectedError: no template fits the image.
    """
    generator = random.Random(f"{seed} {epoch} {subject.image_id}")
    which, with_keypoints, empty = (generator.random() for _ in range(3))
    if empty < proportion_empty_prompts:
        return Prompt("", None, (None,) * len(subject.labelled))
    choices = usable(templates.training, subject)
    return fill(
        choices[int(which * len(choices))],
        subject,
        dataset,
        keypoints=keypoints if with_keypoints < add_keypoint_prompt else None,
    )


def evaluation_prompt(
    subject: Subject, templates: Templates, dataset: str, *, keypoints: KeypointWords | None
) -> Prompt:
    """The one prompt of an image wherever methods are compared; ``keypoints=None`` leaves them out.

    Raises:
        ExpectedError: no template fits the image.
    """
    return fill(usable(templates.evaluation, subject)[0], subject, dataset, keypoints=keypoints)


def fill(template: str, subject: Subject, dataset: str, *, keypoints: KeypointWords | None) -> Prompt:
    """A template with an image's own words.

    Where nothing stands for ``{keypoints}``, the space before it goes too.
    """
    text = ""
    class_span: Span | None = None
    keypoint_spans: list[Span | None] = [None] * len(subject.labelled)
    for literal, field, _, _ in Formatter().parse(template):
        text += literal
        if field == "category":
            class_span = len(text), len(text) + len(subject.categories[0])
            text += " ".join(subject.categories)
        elif field == "keypoints":
            if keypoints is None or not subject.labelled.any():
                text = text.rstrip()
                continue
            words, opening = keypoint_words(dataset, keypoints), "<"
            for k in np.flatnonzero(subject.labelled).tolist():
                word = words[k]
                text += opening
                keypoint_spans[k] = len(text), len(text) + len(word)
                text += word
                opening = ", "
            text += ">"
        elif field is not None:
            text += str(getattr(subject, field)).strip()
    return Prompt(text, class_span, tuple(keypoint_spans))


def keypoint_words(dataset: str, keypoints: KeypointWords) -> tuple[str, ...]:
    """How each keypoint is written in prompts: K placeholders or plain names."""
    skeleton = DATASETS[dataset].skeleton
    if keypoints == "tokens":
        return skeleton.placeholders
    return tuple(name.replace("_", " ") for name in skeleton.keypoint_names)


# Tokens


def tokenize(tokenizer: Any, prompt: Prompt, *, concept: Concept = "partition") -> Tokens:
    """A prompt as CLIP's text encoder takes it, cut at T tokens, with the tokens that stand for the concept.

    Args:
        tokenizer: a ``CLIPTokenizer`` of transformers 5, which has the placeholders where the prompt has some.
        prompt: of ``build_prompt`` or ``evaluation_prompt``.
        concept: what the marked tokens stand for.
    """
    backend = tokenizer.backend_tokenizer
    # A call of the tokenizer itself sets these again as it needs them, and takes twice as long.
    backend.no_truncation()
    backend.no_padding()
    encoded = backend.encode(prompt.text)
    room = CONTEXT_TOKENS - 1  # the last token is the end
    ids = [*encoded.ids[:-1][:room], encoded.ids[-1]]
    ids += [tokenizer.pad_token_id] * (CONTEXT_TOKENS - len(ids))
    # The start has no characters.
    ends = [end for _, end in encoded.offsets[1:-1][: room - 1]]

    def last_token(span: Span | None) -> int | None:
        """Position of the token that a span's last character is in; None where that was cut off."""
        found = bisect_left(ends, span[1]) if span else len(ends)
        return found + 1 if found < len(ends) else None

    of_keypoints = [last_token(span) for span in prompt.keypoint_spans]
    token_mask = np.zeros(CONTEXT_TOKENS, np.bool_)
    for position in of_keypoints if concept == "partition" else [last_token(prompt.class_span)]:
        if position is not None:
            token_mask[position] = True
    return Tokens(
        input_ids=np.array(ids, np.int64),
        token_mask=token_mask,
        keypoint_mask=np.array([position is not None for position in of_keypoints]),
    )
