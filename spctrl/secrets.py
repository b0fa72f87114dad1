"""Passwords, keys and tokens, which appear in no output: neither on a terminal nor in files that others may read.

Two mechanisms work together. Text that looks like the credentials of a URL is masked wherever it comes from. What
settings and environment hold is remembered, and masked also where a library quotes it out of its URL.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MASK = "***"
SHORTEST_ANYWHERE = 6
"""Length in characters from which a secret is masked wherever it occurs; a shorter one, which may be part of any word,
only where it is the password or a parameter of a URL."""

_NAME = (
    r"(?:sig|signature|token|passwd|password|passphrase|pwd|secret|credentials?|authorization|sas"
    r"|connection[-_]?string|(?:api|access|secret|account|private|shared|encryption|signing)[-_]?key)"
)
_SECRET_NAME = re.compile(rf"(?:^|[-_.a-z]){_NAME}$", re.IGNORECASE)
_USERINFO = re.compile(
    r"(?P<before>[a-z][a-z0-9+.-]*://[^\s/?#@:\"<>\[]*:)(?!:)(?!\d*(?:[/?#\s\"'<>]|$))"
    # Up to the last @ of the host part; a secret with unquoted slashes makes that part end too early.
    r"(?P<secret>[^\s/?#\"<>]*(?=@)|[^\s\"<>]*?(?=@))",
    re.IGNORECASE,
)
_PARAMETER = re.compile(
    rf"(?P<before>(?:^|[?&;])(?:[\w.-]*?[-_.a-z])?(?:{_NAME}|(?<=[?&;])key)=)(?P<secret>[^&;\s\"'<>#]+)",
    re.IGNORECASE | re.MULTILINE,
)
_URL_PATTERNS = (_USERINFO, _PARAMETER)

_remembered: set[str] = set()
_pattern: re.Pattern[str] | None = None


def remember(value: Any, name: str = "") -> None:
    """Have ``masked`` hide the secrets of a setting from now on.

    Args:
        value: of the setting: text in which URLs or connection strings may occur, or a mapping or list of values.
        name: of the setting. A whole text is secret where its setting is called so, such as ``WANDB_API_KEY``.
    """
    global _pattern
    if isinstance(value, Mapping):
        for key, each in value.items():
            remember(each, str(key))
    elif isinstance(value, list | tuple):
        for each in value:
            remember(each, name)
    elif isinstance(value, str):
        found = {match["secret"] for pattern in _URL_PATTERNS for match in pattern.finditer(value)}
        found |= {match["secret"] for match in _USERINFO.finditer(re.sub(r"\s", "\0", value))}
        if _SECRET_NAME.search(name) and not _is_file(value):
            found.add(value)
        if not (new := {form for each in found for form in _forms(each)} - _remembered):
            return
        _remembered.update(new)
        _pattern = _pattern_of(_remembered)


def remember_environment(environment: Mapping[str, str]) -> None:
    """Remember the secrets of environment variables: keys, tokens, proxies with passwords, options of fsspec."""
    for name, value in environment.items():
        remember(value, name)
        if value.startswith("{"):
            try:
                remember(json.loads(value))
            except ValueError:
                continue


def masked(text: str) -> str:
    """The text with ``***`` for the secrets of URLs and those remembered; the rest stays readable."""
    if "://" in text or "=" in text:
        text = masked_url(text)
    return _pattern.sub(_masked_match, text) if _pattern is not None else text


def masked_url(text: str) -> str:
    """The text with ``***`` for the passwords and secret parameters of URLs, whatever is remembered."""
    for pattern in _URL_PATTERNS:
        text = pattern.sub(rf"\g<before>{MASK}", text)
    return text


def masked_values(value: Any) -> Any:
    """The same of all texts in nested mappings and lists."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {masked_values(key): masked_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [masked_values(each) for each in value]
    return value


def without_secrets(url: str) -> str:
    """What a URL leads to, the same after a change of its password or signature; a path stays as it is.

    The parameters of a signed URL go as a whole: its date and its expiry change with the signature.
    """
    address = masked_url(url)
    return address.partition("?")[0] if _PARAMETER.search(url) else address


def has_unquoted_password(url: str) -> bool:
    """Whether a URL has a password with letters that end its host part, so that libraries misread it."""
    return any(set(match["secret"]) & set("/?#") for match in _USERINFO.finditer(url))


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
    for argument in arguments:
        remember(argument)
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


def _forms(secret: str) -> set[str]:
    """A secret as it is and as libraries may quote it: percent-encoded, decoded, in a JSON or Python string."""
    secret = secret.replace("\0", " ")
    plain = {secret, unquote(secret), unquote_plus(secret)}
    encoded = {
        form for each in plain for safe in ("/", "") for form in (quote(each, safe), quote_plus(each, safe))
    }
    escaped = {form for each in plain for form in (json.dumps(each)[1:-1], repr(each)[1:-1])}
    lower = {re.sub(r"%[0-9A-F]{2}", lambda code: code[0].lower(), each) for each in encoded}
    return {each for each in (plain | encoded | escaped | lower) if each.strip()} - {MASK}


def _pattern_of(secrets: Iterable[str]) -> re.Pattern[str]:
    """Matches a long secret anywhere, a short one between ``:`` and ``@``. One may begin another: longer ones first."""
    ordered = sorted(secrets, key=len, reverse=True)
    anywhere = "|".join(re.escape(each) for each in ordered if len(each) >= SHORTEST_ANYWHERE)
    short = "|".join(re.escape(each) for each in ordered if len(each) < SHORTEST_ANYWHERE)
    patterns = [anywhere] * bool(anywhere) + [rf"(?:(?<=:)|(?<=%3A))(?:{short})(?=@|%40)"] * bool(short)
    return re.compile("|".join(patterns))


def _masked_match(match: re.Match[str]) -> str:
    return MASK


def _is_file(value: str) -> bool:
    """Whether a value is the path of a file that holds the secret, which is none itself."""
    try:
        return Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False
