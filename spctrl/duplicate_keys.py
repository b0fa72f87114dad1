"""Keys that a settings file holds twice: decoders keep the last one and pass over the others."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import yaml

MAX_SHOWN = 60
"""Characters of a key in an error."""
MERGE, DEFAULT_VALUE = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"
"""Tags of the keys ``<<`` and ``=``; the loader reads the latter as text."""
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"(?P<colon>\s*:)?|[{}]')


class DuplicateKeyError(ValueError):
    """A key twice in a mapping or object; names it and both lines."""


class _Key(NamedTuple):
    """A key of a mapping: its value, how the file spells it, and its line, from 1."""

    value: Hashable
    text: str
    line: int


class YamlLoader(yaml.CSafeLoader):
    """A safe loader that refuses keys that are equal once their tags are resolved, such as ``yes`` and ``true``.

    A key of a mapping may override one that it merges in (``<<``): that is what merging is for.
    """

    def construct_document(self, node: yaml.Node) -> Any:
        """The value of a document.

        Raises:
            DuplicateKeyError: a key twice in a mapping.
        """
        waiting, seen = [node], set[int]()
        while waiting:
            each = waiting.pop()
            if id(each) in seen or isinstance(each, yaml.ScalarNode):
                continue
            seen.add(id(each))
            if isinstance(each, yaml.MappingNode):
                _refuse_duplicates(self._key(key) for key, _ in each.value)
                waiting += (part for pair in each.value for part in pair)
            else:
                waiting += each.value
        return super().construct_document(node)

    def _key(self, node: yaml.Node) -> _Key:
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode):
            return _Key(id(node), node.tag, line)  # the loader itself refuses containers as keys
        if node.tag == MERGE:
            return _Key(MERGE, node.value, line)
        value = node.value if node.tag == DEFAULT_VALUE else self.construct_object(node)
        return _Key(value, node.value, line)


def refuse_duplicate_json_keys(text: str) -> None:
    """Look through JSON, which must be valid.

    Raises:
        DuplicateKeyError: a key twice in an object.
    """
    objects: list[list[_Key]] = []
    line, counted_to = 1, 0
    for token in _JSON_TOKEN.finditer(text):
        if token[0] == "{":
            objects.append([])
        elif token[0] == "}":
            _refuse_duplicates(objects.pop())
        elif (colon := token["colon"]) is not None:
            line += text.count("\n", counted_to, token.start())
            counted_to = token.start()
            name = json.loads(token[0].removesuffix(colon))
            objects[-1].append(_Key(name, name, line))


def _refuse_duplicates(keys: Iterable[_Key]) -> None:
    first: dict[Hashable, _Key] = {}
    for key in keys:
        if (known := first.setdefault(key.value, key)) is not key:
            raise DuplicateKeyError(f"expected each key once, found {_both(known, key)}")


def _both(first: _Key, second: _Key) -> str:
    if first.text != second.text:
        return f"{_shown(first.text)} in line {first.line} and {_shown(second.text)} in line {second.line}"
    if first.line == second.line:
        return f"{_shown(first.text)} twice in line {first.line}"
    return f"{_shown(first.text)} in lines {first.line} and {second.line}"


def _shown(text: str) -> str:
    return f"`{repr(text[:MAX_SHOWN])[1:-1]}`"
