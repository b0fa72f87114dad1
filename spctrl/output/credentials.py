"""Where text holds passwords, keys and tokens: in URLs, connection strings, headers and quoted mappings.

All functions take time linear in the length of the text: patterns are possessive and names are of bounded length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple
from urllib.parse import unquote

Span = tuple[int, int]
"""Start and end of a secret in its text, in characters."""

LONGEST_SCHEME = 32
_NAME = r"[\w.%\[\]-]{1,64}+"
_SECRET_ENDINGS = (
    *("token", "passwd", "password", "passphrase", "secret", "credential", "credentials", "authorization"),
    *("signature", "connectionstring", "apikey", "accesskey", "secretkey", "accountkey", "privatekey"),
    *("sharedkey", "encryptionkey", "signingkey"),
)
_SECRET_WORDS = frozenset({"sig", "sas", "pwd"})
"""Names that are secret as a whole or as the last word only: ``sas`` is not meant in ``texas``."""
_QUERY_NAMES = frozenset({"key", "pass", "auth", "code"})
"""Secret in the query of a URL only."""
_CONNECTION_NAMES = frozenset({"accountkey", "sharedaccesskey", "sharedaccesssignature"})
_ADDRESS_WORDS = frozenset({"address", "url", "uri", "host", "server", "endpoint", "proxy"})

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*\Z", re.IGNORECASE)
_URL_END = re.compile(r'[\s"<>]')
_AUTHORITY_END = re.compile(r"[/?#]")
_PORT = re.compile(r"\d*+['),.;\]}]*+")
_PARAMETER = re.compile(rf"(?<=[?&;#])(?P<name>{_NAME})=(?P<value>[^&;#\s\"'<>]*+)")
_SETTING = re.compile(
    rf"(?:^|(?<=[?&;#\s]))(?P<name>{_NAME})=(?P<value>[^&;#\s]*+(?:\s(?!{_NAME}=)[^&;#\s]*+)*)"
)
"""A parameter in a setting that is a URL or a list of parameters: values may have spaces and quotes.

The group is not possessive: Python before 3.11.5 matches one with a lookahead wrongly, and nothing follows it
(https://github.com/python/cpython/issues/106052).
"""
_CONNECTION = re.compile(r"(?<![^\s;\"'])(?P<name>[\w.-]{1,64}+)=(?P<value>[^;&\s\"'<>]*+)")
_ADDRESS = re.compile(r"[^\s/:@]*+:(?P<value>\S*)@[^\s@]++")
_HEADER = re.compile(
    r"(?<![\w-])(?P<name>[\w-]{1,64}+):[ \t]{0,4}+"
    r"(?P<scheme>(?:bearer|basic|digest|token)[ ]++)?(?P<value>[^\s\"',;]++)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\bbearer[ ]++(?P<value>[^\s\"',;]++)", re.IGNORECASE)
_QUOTE = r"\\{0,4}+[\"']"
_QUOTED = re.compile(
    rf"(?:(?P<open>{_QUOTE})(?P<key>[\w.-]{{1,64}}+)(?P=open)\s{{0,4}}+:|(?<![\w.-])(?P<keyword>\w{{1,64}}+)=)"
    rf"\s{{0,4}}+b?+(?P<quote>{_QUOTE})"
)
"""The beginning of a value in the text of a mapping, ``'key': 'value'``, or of an object, ``keyword='value'``."""
_QUOTED_REST = {
    '"': re.compile(r'(?:[^"\\]|\\.)*+', re.DOTALL),
    "'": re.compile(r"(?:[^'\\]|\\.)*+", re.DOTALL),
}


class Url(NamedTuple):
    """The part of a text from behind ``://`` to the end of a URL."""

    scheme: str
    start: int
    end: int


@lru_cache(maxsize=1024)
def is_secret_name(name: str, *, in_query: bool = False) -> bool:
    """Whether what is called so is a secret, such as ``WANDB_API_KEY`` or ``X-Amz-Signature``.

    Args:
        name: of a setting, a variable, a parameter or a header.
        in_query: whether it is a parameter of a URL.
    """
    words = _words(name)
    compact = "".join(words)
    return (
        compact.endswith(_SECRET_ENDINGS)
        or words[-1] in _SECRET_WORDS
        or (in_query and compact in _QUERY_NAMES)
    )


def is_distinctive(secret: str) -> bool:
    """Whether a text is hardly anything but a secret: no name or word that genuine output may hold."""
    return len(secret) >= 20 or (len(secret) >= 8 and not (secret.isalpha() and secret.islower()))


def secret_spans(text: str) -> list[Span]:
    """The secrets in running text, sorted and disjoint. Whitespace, ``"``, ``<`` and ``>`` end a URL."""
    found: list[Span] = []
    if "://" in text:
        for url in _urls(text):
            found += _userinfo_spans(text, url)
            found += _secret_values(_PARAMETER.finditer(text, url.start, url.end))
    if "=" in text:
        found += _connection_spans(text)
    if ":" in text or "=" in text:
        found += _quoted_spans(text)
    found += _header_spans(text)
    return _merged(found)


def setting_spans(text: str, name: str = "") -> list[Span]:
    """The secrets in a whole setting, sorted and disjoint.

    Unlike in running text, nothing ends a URL with which the setting begins; the setting may also be a list of
    parameters (``user=me;password=secret``) or, where its name says so, an address without a scheme.
    """
    found = secret_spans(text)
    for url in _whole_urls(text):
        found += _userinfo_spans(text, url)
    found += parameter_spans(text)
    if text.startswith("?") or _SETTING.match(text):
        found += _secret_values(_SETTING.finditer(text), in_query=text.startswith("?"))
    elif "://" not in text and _words(name)[-1] in _ADDRESS_WORDS and (address := _ADDRESS.match(text)):
        found.append(address.span("value"))
    return _merged(found)


def password_spans(url: str) -> list[Span]:
    """The secrets before the hosts of a setting that is a URL or a chain of them."""
    return [span for part in _whole_urls(url) for span in _userinfo_spans(url, part)]


def parameter_spans(url: str) -> list[Span]:
    """The secret parameters of a setting that is a URL or a chain of them."""
    return [
        span
        for part in _whole_urls(url)
        for span in _secret_values(_SETTING.finditer(url, part.start, part.end))
    ]


def replaced(text: str, spans: Iterable[Span], replacement: str) -> str:
    """The text with a replacement for each of sorted, disjoint spans."""
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [text[end:start], replacement]
        end = stop
    return "".join([*pieces, text[end:]])


def _words(name: str) -> list[str]:
    """The words of a name in lower case, without digits at its end; at least one, which may be empty."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", unquote(name[-256:]))
    return [word.lower() for word in re.split(r"[\W_]+", parted.strip("_.[]-0123456789"))]


def _urls(text: str) -> Iterator[Url]:
    """The URLs in running text; one that stands in another ends it."""
    starts = _url_starts(text)
    for (_, start, scheme), (following, _, _) in pairwise([*starts, (len(text), 0, "")]):
        end = _URL_END.search(text, start, following)
        yield Url(scheme, start, end.start() if end else following)


def _whole_urls(text: str) -> Iterator[Url]:
    """The URL that is the whole text, or the parts of a chain such as ``simplecache::ftp://host/x``."""
    starts = [each for each in _url_starts(text) if each[0] == 0 or text.startswith("::", each[0] - 2)]
    for (_, start, scheme), (following, _, _) in pairwise([*starts, (len(text), 0, "")]):
        yield Url(scheme, start, following)


def _url_starts(text: str) -> list[tuple[int, int, str]]:
    """Of each URL: where its scheme begins, where what follows ``://`` begins, and the scheme."""
    return [
        (scheme.start(), match.end(), scheme[0].lower())
        for match in re.finditer("://", text)
        if (scheme := _SCHEME.search(text, max(0, match.start() - LONGEST_SCHEME), match.start()))
    ]


def _userinfo_spans(text: str, url: Url) -> list[Span]:
    """The password before the host. A user without one is a token where the protocol is HTTP."""
    stop = _authority_end(text, url.start, url.end)
    at = text.rfind("@", url.start, stop)
    colon = text.find(":", url.start, stop if at < 0 else at)
    if at < 0 and colon >= 0 and text[url.start] != "[" and not _PORT.fullmatch(text, colon + 1, stop):
        # An unquoted slash in the password ended the host part too early.
        first = text.find("@", stop, url.end)
        at = first if first < 0 else text.rfind("@", first, _authority_end(text, first, url.end))
    if at < 0:
        return []
    password = (colon + 1, at) if colon >= 0 else (at, at)
    found = [password] if password[0] < at else []
    # GitHub takes a token for a user with this password.
    if url.scheme.endswith(("http", "https")) and text[slice(*password)] in ("", "x-oauth-basic"):
        found.insert(0, (url.start, colon if colon >= 0 else at))
    return found


def _authority_end(text: str, start: int, end: int) -> int:
    match = _AUTHORITY_END.search(text, start, end)
    return match.start() if match else end


def _secret_values(matches: Iterable[re.Match[str]], *, in_query: bool = True) -> list[Span]:
    return [match.span("value") for match in matches if is_secret_name(match["name"], in_query=in_query)]


def _connection_spans(text: str) -> Iterator[Span]:
    """Secret parameters that have a neighbour, as in ``AccountName=me;AccountKey=secret``, or are always secret."""
    for match in _CONNECTION.finditer(text):
        is_after = text.startswith(";", match.start() - 1) if match.start() else False
        is_before = (
            text.startswith(";", match.end()) and not text[match.end() + 1 : match.end() + 2].isspace()
        )
        if is_secret_name(match["name"]) and (
            is_after or is_before or "".join(_words(match["name"])) in _CONNECTION_NAMES
        ):
            yield match.span("value")


def _header_spans(text: str) -> Iterator[Span]:
    """Secrets in headers of HTTP. Prose such as ``token: expected`` is none."""
    for match in _HEADER.finditer(text):
        is_header = "-" in match["name"] or match["name"].lower() == "authorization"
        if (
            is_header
            and is_secret_name(match["name"])
            and (match["scheme"] or is_distinctive(match["value"]))
        ):
            yield match.span("value")
    for match in _BEARER.finditer(text):
        if is_distinctive(match["value"]):
            yield match.span("value")


def _quoted_spans(text: str) -> Iterator[Span]:
    """Values of secret keys in the text of mappings, and those of keywords that look like secrets."""
    position = 0
    while match := _QUOTED.search(text, position):
        # The quote of a value may also open the next key.
        position = match.start("quote")
        if not is_secret_name(match["key"] or match["keyword"]):
            continue
        position = _quoted_end(text, match)
        if match["key"] or is_distinctive(text[match.end() : position]):
            yield match.end(), position


def _quoted_end(text: str, match: re.Match[str]) -> int:
    if (quote := match["quote"]) in _QUOTED_REST:
        rest = _QUOTED_REST[quote].match(text, match.end())
        return rest.end() if rest else match.end()
    end = text.find(quote, match.end())
    return len(text) if end < 0 else end


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Sorted, disjoint and not empty."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif start < end:
            merged.append((start, end))
    return merged
