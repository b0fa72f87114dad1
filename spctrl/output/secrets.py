"""Passwords, keys and tokens, which appear in no output: neither on a terminal nor in files that others may read.

Two mechanisms work together. Text that looks like the credentials of a URL is masked wherever it comes from. What
settings and environment hold is remembered, and masked also where a library quotes it out of its URL.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

from spctrl.output.credentials import (
    is_distinctive,
    is_secret_name,
    parameter_spans,
    password_spans,
    replaced,
    secret_spans,
    setting_spans,
)

MASK = "***"
LONGEST_REMEMBERED = 131_072
"""Length in characters up to which a secret is remembered, the longest variable that Linux allows."""
MOST_REMEMBERED = 1_000
"""Forms of secrets that are remembered. The first ones count: those of environment and settings."""
MOST_CHARACTERS = 4_000_000
"""Length of all of them together."""


class _Memory:
    """Secrets to be masked wherever they occur, or, where they may be plain words, before the host of a URL only."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._characters = 0
        self._count = 0
        self._anywhere: list[str] = []
        self._before_host: re.Pattern[str] | None = None

    def add(self, secrets: Iterable[str]) -> None:
        """Remember secrets, the shortest first, as long as there is room."""
        for each in sorted(set(secrets) - self._known, key=lambda secret: (len(secret), secret)):
            if len(self._known) < MOST_REMEMBERED and self._characters + len(each) <= MOST_CHARACTERS:
                self._known.add(each)
                self._characters += len(each)

    def masked(self, text: str) -> str:
        """The text with a mask for each secret."""
        # Secrets are only added: their count tells whether there are new ones.
        if (count := len(self._known)) != self._count:
            self._prepare()
            self._count = count
        for each in self._anywhere:
            text = text.replace(each, MASK)
        return self._before_host.sub(MASK, text) if self._before_host else text

    def _prepare(self) -> None:
        # One secret may begin another: longer ones first.
        ordered = sorted(self._known, key=len, reverse=True)
        self._anywhere = [each for each in ordered if is_distinctive(each)]
        plain = "|".join(re.escape(each) for each in ordered if not is_distinctive(each))
        pattern = rf"(?:(?<=:)|(?<=%3A)|(?<=%3a))(?:{plain})(?=@|%40)"
        self._before_host = re.compile(pattern) if plain else None


_memory = _Memory()


def remember(value: Any, name: str = "") -> None:
    """Have ``masked`` hide the secrets of a setting from now on.

    Args:
        value: of the setting: text in which URLs or connection strings may occur, or a mapping or list of values.
        name: of the setting. A whole text is secret where its setting is called so, such as ``WANDB_API_KEY``.
    """
    _memory.add(form for secret in set(_secrets_of(value, name)) for form in _forms(secret))


def remember_environment(environment: Mapping[str, str]) -> None:
    """Remember the secrets of environment variables: keys, tokens, proxies with passwords, options of fsspec."""
    remember(environment)
    for value in environment.values():
        if value.startswith("{"):
            try:
                remember(json.loads(value))
            except (ValueError, RecursionError):
                continue


def masked(text: str) -> str:
    """The text with ``***`` for the secrets that it shows as such and those remembered; the rest stays readable."""
    return _memory.masked(replaced(text, secret_spans(text), MASK))


def masked_url(url: str) -> str:
    """A whole URL with ``***`` for its passwords and secret parameters, whatever is remembered."""
    return replaced(url, setting_spans(url), MASK)


def masked_values(value: Any) -> Any:
    """The same of all texts in nested mappings and lists."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {masked_values(key): _masked_entry(key, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [masked_values(each) for each in value]
    return value


def without_secrets(url: str) -> str:
    """What a URL leads to, the same after a change of its password or signature; a path stays as it is.

    The parameters of a signed URL go as a whole: its date and its expiry change with the signature.
    """
    address = masked_url(url)
    return address.partition("?")[0] if parameter_spans(url) else address


def has_unquoted_password(url: str) -> bool:
    """Whether a URL has a password with letters that end its host part, so that libraries misread it."""
    return any(set(url[start:end]) & set("/?#") for start, end in password_spans(url))


def mask_record(record: logging.LogRecord) -> None:
    """Mask what a log record says, its traceback included."""
    record.msg, record.args = masked(record.getMessage()), ()
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = masked(logging.Formatter().formatException(record.exc_info))


def mask_output(environment: Mapping[str, str], arguments: Iterable[str]) -> None:
    """Mask everything that this process writes to standard output and standard error from now on.

    Args:
        environment: its variables, whose secrets are remembered.
        arguments: its command line, likewise.
    """
    remember_environment(environment)
    for name, value in _options(arguments):
        remember(value, name)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not hasattr(stream.write, "__wrapped__"):
            _mask_stream(stream)


def _mask_stream(stream: Any) -> None:
    """Replace the stream's method and not the stream: log handlers and libraries may have it already."""
    write = stream.write

    def write_masked(text: Any) -> int:
        write(masked(text) if isinstance(text, str) else text)
        return len(text)

    write_masked.__wrapped__ = write  # type: ignore[attr-defined]
    stream.write = write_masked


def _masked_entry(key: Any, value: Any) -> Any:
    return (
        MASK
        if isinstance(key, str) and isinstance(value, str) and is_secret_name(key)
        else masked_values(value)
    )


def _options(arguments: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names and values of ``--name=value`` and ``--name value``; other arguments have an empty name."""
    name = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            yield name, argument
        elif equals:
            yield option, value
        name = option if argument.startswith("--") and not equals else ""


def _secrets_of(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _secrets_of(each, str(key))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _secrets_of(each, name)
    elif isinstance(value, str):
        yield from (value[start:end] for start, end in setting_spans(value, name))
        if is_secret_name(name) and not _is_file(value):
            yield value


def _forms(secret: str) -> set[str]:
    """A secret as it is and as libraries may quote it: percent-encoded, decoded, in a JSON or Python string."""
    secret = secret[:LONGEST_REMEMBERED]
    plain = {secret, unquote(secret), unquote_plus(secret)}
    encoded = {
        form for each in plain for safe in ("/", "") for form in (quote(each, safe), quote_plus(each, safe))
    }
    escaped = {form for each in plain for form in (json.dumps(each)[1:-1], repr(each)[1:-1])}
    lower = {re.sub(r"%[0-9A-F]{2}", lambda code: code[0].lower(), each) for each in encoded}
    return {each for each in (plain | encoded | escaped | lower) if each.strip()} - {MASK}


def _is_file(value: str) -> bool:
    """Whether a value is the path of a file that holds the secret, which is none itself."""
    try:
        return Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False
