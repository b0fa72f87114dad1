"""Passwords, keys and tokens: masked in all output, and no part of what identifies a store's contents."""

from __future__ import annotations

import io
import json
import logging
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from spctrl.output import secrets
from spctrl.output.console import PlainConsole
from spctrl.output.secrets import (
    mask_record,
    masked,
    masked_values,
    remember,
    remember_environment,
    without_secrets,
)
from spctrl.storage import StoreError, files_at
from tasks.execution.logs import JsonLines
from tasks.parameters import PathParameter


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_memory", secrets._Memory())


# Text that looks like a URL


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot read ftp://user:pw@host/a@b: refused", "cannot read ftp://user:***@host/a@b: refused"),
        ("s3://KEY:se/cr+et@bucket/prefix", "s3://KEY:***@bucket/prefix"),
        ("sftp://user:p@w@host:22/x", "sftp://user:***@host:22/x"),
        ("at 'http://user:o'k@host', then a@b", "at 'http://user:***@host', then a@b"),
        ("RAY://:p%40w@head:10001", "RAY://:***@head:10001"),
        ("simplecache::zip://a.zip::ftp://u:p@host/x", "simplecache::zip://a.zip::ftp://u:***@host/x"),
        ("https://h/o?X-Amz-Date=1&X-Amz-Signature=ab12#f", "https://h/o?X-Amz-Date=1&X-Amz-Signature=***#f"),
        ("az://box/x?sv=2021&sig=a%2Fb%3D&se=2", "az://box/x?sv=2021&sig=***&se=2"),
        ("https://h/?access_token=t;x=1", "https://h/?access_token=***;x=1"),
        ("AccountName=me;AccountKey=ab12==;Suffix=x", "AccountName=me;AccountKey=***;Suffix=x"),
        ("https://h/x?password=a;pass=b#c", "https://h/x?password=***;pass=***#c"),
        ("https://h/?auth=a&code=b&key=c&page=4", "https://h/?auth=***&code=***&key=***&page=4"),
        ("https://h/back#state=1&access_token=a", "https://h/back#state=1&access_token=***"),
        ("http://quetzal@127.0.0.1:1/x", "http://***@127.0.0.1:1/x"),
        ("git+https://quetzal:@host/a", "git+https://***:@host/a"),
        ("https://quetzal:x-oauth-basic@host/a", "https://***:***@host/a"),
        ("ftp://me@home:quetzal@host/x", "ftp://me@home:***@host/x"),
        ("ftp://me::quetzal@host/x", "ftp://me:***@host/x"),
        ("ftp://me:quet/z@l@host/a@b", "ftp://me:***@host/a@b"),
        ("http://a:b@c,http://d:e@f", "http://a:***@c,http://d:***@f"),
        ("Authorization: Basic bWU6cHc=", "Authorization: Basic ***"),
        ("[('Authorization', 'Bearer ab12CD34')]", "[('Authorization', 'Bearer ***')]"),
        ("X-Api-Key: ab12cd34", "X-Api-Key: ***"),
        ('{"a": 1, "refresh_token": "b\\"c", "d": "e"}', '{"a": 1, "refresh_token": "***", "d": "e"}'),
        (r'"{\"token\": \"quetzal\"}"', r'"{\"token\": \"***\"}"'),
        ("{'user': 'me', 'password': b'quetzal'}", "{'user': 'me', 'password': b'***'}"),
        ("Login(user='me', password='quet-zal')", "Login(user='me', password='***')"),
    ],
)
def test_the_password_of_a_url_is_masked_and_the_rest_is_readable(text: str, expected: str) -> None:
    assert masked(text) == expected
    assert masked(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8080/a@b",
        "http://[2001:db8::1]:80/a@b",
        "sftp://user@host/x",
        "abfs://container@account.example/x",
        "s3://bucket/a:b@c?versionId=3",
        "see http://host:80, or ask me@host",
        "https://h/?design=sig&monkey=token&signed=1",
        "key=12 of 13, token = 5",
        "expected host:port, found a@b",
        "see http://host:x/y and mail me@host.example",
        "http://a:b, c@d",
        "gs://user@bucket/x",
        "token=5",
        "prompt_token=dog",
        "/data/run?key=3/x",
        "?num_token=5",
        "a.token=5",
        "max_tokens=5;top=1",
        "https://h/?texas=1",
        "authorization: denied, token: expected 5",
        "Bearer authentication failed",
    ],
)
def test_text_without_a_secret_stays(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize(
    "piece",
    [
        "?",
        "token",
        "a.",
        "http://a:b",
        "http://a:b/",
        "a://::",
        "token=b;",
        "?token=b&",
        "'token':",
        "token='",
        "\\'token\\':\\\"",
        "u:@",
        "authorization: bearer ",
        "a=b ",
    ],
)
def test_long_text_takes_no_long_time(piece: str) -> None:
    def fail(*_: object) -> None:
        raise TimeoutError("expected an end within a minute")

    before = signal.signal(signal.SIGALRM, fail)
    repeated = piece * (50_000 // len(piece))
    # Seconds, where time grows with the length; minutes, where it grows with its square.
    signal.alarm(60)
    try:
        for text in (f"?{repeated} =", f"http://a:{repeated}"):
            masked(text)
            remember(text, "address")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# What settings and environment hold


@pytest.mark.parametrize(
    ("name", "setting", "quoted", "expected"),
    [
        ("store", 'ftp://me:qu"et<z4l>@host/x', '530 qu"et<z4l>', "530 ***"),
        ("store", "simplecache::ftp://me:quet zal's@host/x", "530 quet zal's", "530 ***"),
        ("address", "me:qz@host:6379", "cannot join me:qz@host:6379", "cannot join me:***@host:6379"),
        ("HTTPS_PROXY", "me:quetzal-1@host:3128", "denied: quetzal-1", "denied: ***"),
        ("dsn", "host=h;pwd=quet zal 1;a=b", "denied: quet zal 1", "denied: ***"),
        ("dsn", "host=h password=quetzal1 a=b", "denied: quetzal1", "denied: ***"),
        ("query", "?sv=1&sig=quetzal1", "denied: quetzal1", "denied: ***"),
        ("index_url", "https://quetzal1@host/x", "denied: quetzal1", "denied: ***"),
        ("MY_TOKEN", "images", "images openpose", "images openpose"),
        ("MY_TOKEN", "quetzal-of-lower-case", "quetzal-of-lower-case", "***"),
        ("root", "/data/run?key=quetzal1/x", "quetzal1", "quetzal1"),
    ],
)
def test_a_setting_is_taken_whole(name: str, setting: str, quoted: str, expected: str) -> None:
    remember(setting, name)
    assert masked(quoted) == expected


def test_options_of_a_command_line_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    secrets.mask_output(
        {}, ["luigi", "--a-token=quetzal1", "--executor-address", "me:quetzal2@host:1", "--b"]
    )
    print("quetzal1 quetzal2 luigi")
    assert sys.stdout.getvalue() == "*** *** luigi\n"  # type: ignore[attr-defined]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "Quetzal" * 15_000
    remember_environment({"LONG_TOKEN": long})
    assert masked(long) == "***"
    monkeypatch.setattr(secrets, "MOST_REMEMBERED", 3)
    remember_environment({f"TOKEN_{each}": f"quetzal-{each}" for each in range(5)})
    assert masked("quetzal-0 quetzal-1 quetzal-2 quetzal-3") == "*** *** quetzal-2 quetzal-3"
    monkeypatch.setattr(secrets, "MOST_REMEMBERED", 100)
    monkeypatch.setattr(secrets, "MOST_CHARACTERS", len(long) + 40)
    remember({"token": ["b" * 50, "quetzal-5"]})
    assert masked("b" * 50 + "quetzal-5") == "b" * 50 + "***"


@pytest.mark.parametrize(
    "quoted",
    [
        "530 login of user:p$s/s wörd failed",
        "no bucket KEY:p%24s%2Fs%20w%C3%B6rd@host",
        "p%24s%2fs%20w%c3%b6rd",
        "p%24s/s+w%C3%B6rd",
        json.dumps("p$s/s wörd"),
        repr(["p$s/s wörd"]),
    ],
)
@pytest.mark.parametrize(
    "setting", ["ftp://user:p%24s%2Fs%20w%C3%B6rd@host/x", "ftp://user:p$s/s wörd@host/x"]
)
def test_a_password_is_masked_in_all_ways_that_libraries_quote_it(setting: str, quoted: str) -> None:
    assert masked(quoted) == quoted
    remember(f"/a:b::{setting}")
    found = masked(quoted)
    assert secrets.MASK in found
    assert "rd" not in found


def test_a_short_password_is_masked_only_in_its_place() -> None:
    remember("ftp://store:re@host/x")
    assert masked("the store is read again: re") == "the store is read again: re"
    assert masked("bucket store:re@host, store%3Are%40host") == "bucket store:***@host, store%3A***%40host"


def test_keys_in_the_environment_and_in_options_of_fsspec_are_masked() -> None:
    remember_environment(
        {
            "WANDB_API_KEY": "wandb-12345",
            "RAY_AUTH_TOKEN": "ray-12345",
            "AWS_SECRET_ACCESS_KEY": "aws/12345",
            "HTTPS_PROXY": "http://me:proxy-12345@host:3128",
            "FSSPEC_FTP": json.dumps({"username": "visitor", "client": {"password": "ftp-12345"}}),
            "TOKENIZERS_PARALLELISM": "false-alarm",
            "AWS_ACCESS_KEY_ID": "identifier",
            "RAY_AUTH_TOKEN_PATH": "/root/token-file",
            "SOME_TOKEN": sys.executable,
        }
    )
    for secret in ("wandb-12345", "ray-12345", "aws/12345", "proxy-12345", "ftp-12345"):
        assert masked(f"denied: {secret}.") == "denied: ***."
    for text in ("visitor false-alarm identifier /root/token-file", sys.executable, "me"):
        assert masked(text) == text


def test_a_password_from_a_variable_of_a_path_setting_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPCTRL_TEST_WORD", "in-a-variable")
    PathParameter().parse("ftp://me:$SPCTRL_TEST_WORD@host/store")
    assert masked("530 in-a-variable") == "530 ***"


# Where text leaves


@pytest.fixture
def failure() -> Iterator[Any]:
    remember("ftp://user:hunter2%21@host/x")
    try:
        raise RuntimeError("denied to hunter2!")
    except RuntimeError:
        yield sys.exc_info()


def test_log_lines_and_their_tracebacks_are_masked(failure: Any) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    record = logging.LogRecord("n", logging.ERROR, __file__, 1, "at %s", ("ftp://a:b@c",), failure)
    facts = {"folder": "ftp://a:b@c", "of": ["hunter2!", 3]}
    record.facts = facts
    line = json.loads(JsonLines().format(record))
    assert (line["message"], line["folder"], line["of"]) == ("at ftp://a:***@c", "ftp://a:***@c", ["***", 3])
    assert line["exception"].endswith("RuntimeError: denied to ***")
    mask_record(record)
    handler.handle(record)
    assert stream.getvalue().startswith("at ftp://a:***@c\nTraceback")
    assert stream.getvalue().endswith("RuntimeError: denied to ***\n")


def test_a_table_is_masked_before_it_is_wrapped() -> None:
    from rich.table import Table

    table = Table("place")
    table.add_row("ftp://user:a-long-pass-word-of-many-letters@host/store")
    console = PlainConsole(file=io.StringIO(), width=20)
    console.print(table)
    console.print("ftp://user:a-long-pass-word-of-many-letters@host")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "long" not in text and "***" in text


def test_values_of_other_kinds_stay() -> None:
    assert masked_values({"a": (1, None), "token": 2.5}) == {"a": [1, None], "token": 2.5}


def test_values_of_secret_names_are_masked() -> None:
    assert masked_values({"of": [{"api_key": "quetzal", "key": "a"}]}) == {
        "of": [{"api_key": "***", "key": "a"}]
    }


@pytest.mark.parametrize(
    "url",
    [
        "ftp://user:xy/zzy@127.0.0.1:1/x",  # the port is taken for "xy"
        "nosuch://user:xyzzy@host/x",
        "ftp://user:xyzzy@[host/x",
    ],
)
def test_a_store_that_cannot_be_reached_names_its_url_without_the_password(url: str) -> None:
    files = files_at(url)
    with pytest.raises(StoreError) as failure:
        files.exists("a")
    assert f"user:{secrets.MASK}@" in str(failure.value)
    assert "xy" not in str(failure.value)
    assert failure.value.__suppress_context__ or "xy" not in str(failure.value.__cause__)
    assert files.address == url


# What identifies contents


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ftp://u:one@host/x", "ftp://u:two@host/x"),
        ("az://x/y?sv=1&se=2026&sig=ab", "az://x/y?sv=1&se=2027&sig=cd"),
        ("https://h/x?X-Amz-Date=1&X-Amz-Signature=a", "https://h/x?X-Amz-Date=2&X-Amz-Signature=b"),
    ],
)
def test_another_password_leads_to_the_same(one: str, other: str) -> None:
    remember(one)
    assert without_secrets(one) == without_secrets(other)


@pytest.mark.parametrize("address", ["s3://bucket/x?versionId=3", "/a/b", "ftp://u@host/x", "relative/a?b"])
def test_an_address_without_a_secret_identifies_itself(address: str) -> None:
    assert without_secrets(address) == address
