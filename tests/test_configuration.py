"""Configurations that are wrong, by mistake or on purpose: one error that names the file, and no other."""

from __future__ import annotations

import itertools
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from eval.settings import Evaluation
from spctrl.configuration import MAX_DEPTH, MAX_VALUES, ConfigurationError, read_config
from spctrl.inference.methods import Generation
from spctrl.prompts import Templates, load_templates
from spctrl.resources import packaged
from spctrl.training.config import TrainingConfig
from spctrl.weights import known_weights

KINDS: dict[str, type[msgspec.Struct]] = {
    "train": TrainingConfig,
    "generate": Generation,
    "evaluate": Evaluation,
    "prompts": Templates,
}
SHIPPED = {
    f"{name}/{path.name}": path
    for name in KINDS
    for folder in (REPOSITORY / "configs" / name, packaged(name))
    for path in sorted(folder.glob("*.yaml"))
}
TOKENS = [
    *"[]{}:,&*!|>-?#%@`\"'\n\t ~=",
    *("<<:", "- ", ": ", "&a ", "*a", "!!int", "!!binary", "!!python/name:os.system", "---", "...", "? "),
    *("null", ".nan", ".inf", "-0", "1e999", "0x", "0b_", "9" * 400, "2001-99-99", "1:99:99", "true", "{}"),
    *("\x00", "\ufeff", "\u2028", "\ud800", "鹿", "../../etc/passwd"),
]


class Some(msgspec.Struct, forbid_unknown_fields=True):
    number: int = 0
    texts: list[str] = []
    anything: Any = None


def read(tmp_path: Path, text: str | bytes, kind: type[msgspec.Struct] = Some) -> msgspec.Struct:
    path = tmp_path / "some.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return read_config(path, kind)


def refused(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert str(tmp_path / "some.yaml") in message
    return message


def test_values_and_anchors_are_read(tmp_path: Path) -> None:
    found = read(tmp_path, "number: 3\ntexts: &x [a, b]\nanything: {first: *x, <<: {second: *x}}\n")
    assert found == Some(3, ["a", "b"], {"first": ["a", "b"], "second": ["a", "b"]})


@pytest.mark.parametrize(
    "value",
    [
        "2001-99-99",
        "9" * 5000,
        "0b_",
        "0x_",
        "!!int ''",
        "!!float x",
        "!!bool x",
        "!!timestamp x",
        "=",
        "!!python/object/apply:os.system ['false']",
        "*nothing",
        "[",
        "\xff",
        "\x00",
        "1\n---\nnumber: 2",
        "{[1]: 2}",
    ],
)
def test_what_yaml_cannot_build_is_refused(tmp_path: Path, value: str) -> None:
    refused(tmp_path, f"anything: {value}".encode("latin-1"))


@pytest.mark.parametrize("text", ["", "3", "[number]", "!!set {number}", "2001-01-01"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "expected settings by name" in refused(tmp_path, text)


@pytest.mark.parametrize("text", ["{1: 2}", "{null: 1}", "{.nan: 1}", "{2001-01-01: 1}", "{numbr: 1}"])
def test_names_that_are_none_are_refused_with_the_valid_ones(tmp_path: Path, text: str) -> None:
    assert "Valid are: anything, number, texts" in refused(tmp_path, text)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "!!map {a: "])
def test_deep_nesting_is_refused_before_it_is_built(tmp_path: Path, opening: str) -> None:
    # PyYAML's composer calls itself in C: this many end the process, with no exception.
    message = refused(tmp_path, "anything:\n  " + opening * 100_000)
    assert f"nested at most {MAX_DEPTH} deep" in message


def test_nesting_up_to_the_bound_is_fine(tmp_path: Path) -> None:
    inside = MAX_DEPTH - 1
    found = read(tmp_path, f"anything: {'[' * inside}{']' * inside}")
    assert isinstance(found, Some)


def test_aliases_of_aliases_are_refused_before_they_are_large(tmp_path: Path) -> None:
    names = "abcdefghi"
    lines = ["&a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"&{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in itertools.pairwise(names)]
    text = "anything:\n" + "".join(f"  - {line}\n" for line in lines)
    tracemalloc.start()
    started = time.perf_counter()
    message = refused(tmp_path, text)
    seconds = time.perf_counter() - started
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"at most {MAX_VALUES:,} values" in message
    assert "line 6" in message
    assert peak_bytes < 1_000_000
    assert seconds < 5


@pytest.mark.parametrize("value", ["&a [*a]", "&a {b: *a}", "&a [[[*a]]]"])
def test_a_value_that_holds_itself_is_refused(tmp_path: Path, value: str) -> None:
    assert "found *a at line 1" in refused(tmp_path, f"anything: {value}")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("number: 1\ntexts: []\nnumber: 1\n", "`number` in lines 1 and 3"),
        ("number: 1\n'number': 2\n", "`number` in lines 1 and 2"),
        ("anything: {a: {b: 1, c: 2, b: 3}}\n", "`b` twice in line 1"),
        ("anything:\n- k: 1\n- k: 1\n  l: 2\n  k: 3\n", "`k` in lines 3 and 5"),
        ("anything:\n  yes: 1\n  true: 2\n", "`yes` in line 2 and `true` in line 3"),
        ("anything:\n  0x10: a\n  16.0: b\n", "`0x10` in line 2 and `16.0` in line 3"),
        ("anything:\n  <<: {a: 1}\n  <<: {b: 2}\n", "`<<` in lines 2 and 3"),
        ("anything:\n  <<: {a: 1,\n    a: 2}\n", "`a` in lines 2 and 3"),
        ("anything: !!set {é, é}\n", "`é` twice in line 1"),
        ("anything: {=: 1, '=': 2}\n", "`=` twice in line 1"),
        ('anything: {"\\e": 1, "\\x1b": 2}\n', r"`\x1b` twice in line 1"),
        (f"anything: {{{'k' * 99}: 1, {'k' * 99}: 2}}\n", f"`{'k' * 60}` twice in line 1"),
    ],
)
def test_keys_that_are_there_twice_are_refused_with_both_lines(tmp_path: Path, text: str, found: str) -> None:
    assert refused(tmp_path, text) == f"{tmp_path / 'some.yaml'}: expected each key once, found {found}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{1: a, '1': b}", {1: "a", "1": "b"}),
        ("[{a: 1}, {a: 2}]", [{"a": 1}, {"a": 2}]),
        ("{a: {a: 1}}", {"a": {"a": 1}}),
        ("[&x {a: 1}, {<<: *x, a: 2}]", [{"a": 1}, {"a": 2}]),
        ("[&x {a: 1}, &y {<<: *x, a: 2}, {<<: [*x, *y]}]", [{"a": 1}, {"a": 2}, {"a": 1}]),
        ("[&x {a: 1}, &y {<<: *x, a: 2}, {<<: *y, a: 3}, *y]", [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 2}]),
    ],
)
def test_keys_that_differ_and_those_that_override_merged_ones_are_read(
    tmp_path: Path, value: str, expected: object
) -> None:
    assert read(tmp_path, f"anything: {value}\n") == Some(anything=expected)


def test_the_list_of_weights_is_read_as_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = "what: a\n  file: b\n  publisher: c\n  licence: d\n  setting: e\n"
    twice, unknown = (
        f"sam:\n  {fields}sam_hq:\n  {fields}sam:\n  {fields}",
        f"sam:\n  {fields}  colour: red\n",
    )
    for text, fault in ((twice, "found `sam` in lines 1 and 13$"), (unknown, "colour")):
        own = tmp_path / fault[:5] / "configs" / "weights.yaml"
        own.parent.mkdir(parents=True)
        own.write_text(text)
        monkeypatch.chdir(own.parent.parent)
        with pytest.raises(ConfigurationError, match=rf"{own}: .*{fault}"):
            known_weights()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_read(name: str) -> None:
    kind = KINDS[name.partition("/")[0]]
    assert isinstance(read_config(SHIPPED[name], kind), kind)


def mutated(text: str, choice: random.Random) -> str:
    """The text with some stretches cut out, doubled or replaced by what means something to YAML."""
    for _ in range(choice.randint(1, 6)):
        start = choice.randrange(len(text) + 1)
        stop = min(start + choice.choice([0, 1, 2, 5, 20, 200]), len(text))
        between = choice.choice(["", text[start:stop] * 2, *choice.choices(TOKENS, k=8)])
        text = text[:start] + between + text[stop:]
    return text


@pytest.mark.parametrize("name", SHIPPED)
def test_mutated_configurations_are_read_or_refused(name: str, tmp_path: Path) -> None:
    kind, path = KINDS[name.partition("/")[0]], tmp_path / "some.yaml"
    original = SHIPPED[name].read_text()
    refusals = 0
    for seed in range(60):
        path.write_bytes(mutated(original, random.Random(seed)).encode("utf-8", "surrogatepass"))
        try:
            found = load_templates(path, "ap10k") if kind is Templates else read_config(path, kind)
        except ConfigurationError as error:
            assert str(path) in str(error)
            refusals += 1
        else:
            assert isinstance(found, kind)
    assert refusals > 0


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.datetimes()
    | st.binary(max_size=4)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3)
)


@pytest.mark.parametrize("name", KINDS)
@hypothesis_settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_values_of_any_type_are_read_or_refused(name: str, tmp_path: Path, data: st.DataObject) -> None:
    import yaml

    kind = KINDS[name]
    original = next(path for each, path in SHIPPED.items() if each.startswith(name))
    settings = yaml.safe_load(original.read_text())
    names = st.sampled_from([field.name for field in msgspec.structs.fields(kind)])
    settings |= data.draw(st.dictionaries(names, values, min_size=1, max_size=3))
    text = yaml.safe_dump(settings, allow_unicode=True)
    try:
        found = read(tmp_path, text, kind)
    except ConfigurationError as error:
        assert "some.yaml" in str(error)
    else:
        assert isinstance(found, kind)


@hypothesis_settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=200) | st.lists(st.sampled_from(TOKENS), max_size=40).map("".join))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes | str) -> None:
    try:
        assert isinstance(read(tmp_path, data), Some)
    except ConfigurationError as error:
        assert "some.yaml" in str(error)
