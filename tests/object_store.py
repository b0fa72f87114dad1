"""An S3-speaking server in a process of its own, and before it a proxy that counts requests and injects faults.

Clients reach the server through the proxy alone; tests look at what is really there with :class:`Bucket`, which goes
round it and uses another client than the project does.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest
from conftest import Build, Workspace

from spctrl.store.store import Store, forget_what_was_found

if TYPE_CHECKING:
    from aiohttp import ClientSession, web

# It ends with its standard input, so also when the tests are killed.
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
OTHER_SERVER = "SPCTRL_S3_SERVER"
"""Environment variable: URL of an S3 server to use in place of moto's."""
PATIENCE_S = 0.5
WRITES = ("PUT", "POST", "DELETE")
KEYS_PER_LISTING = 100
"""Of the server's answers; elsewhere it is 1,000."""
POLL_S = 0.02
LONGEST_STALL_S = 60


class Fault(StrEnum):
    """What can go wrong between a client and an object store."""

    ERROR = "500"
    SLOW_DOWN = "503 SlowDown"
    DROPPED = "closed before the server saw the request"
    LOST = "closed after the server did it"
    STALLED = "no answer, and the server saw nothing"
    STALLED_AFTER = "no answer, but the server did it"
    CUT = "half the body, then closed"
    SHORT = "half the body, with a Content-Length to match"
    SHORT_UNCHECKED = "the same, of a server that sends no checksums"
    CUT_UPLOAD = "the server got half the upload"


XML_ERRORS = {Fault.ERROR: (500, "InternalError"), Fault.SLOW_DOWN: (503, "SlowDown")}
CUT_ANSWERS = (Fault.CUT, Fault.SHORT, Fault.SHORT_UNCHECKED)
DONE_ALL_THE_SAME = {Fault.LOST, Fault.STALLED_AFTER, *CUT_ANSWERS}
CHECKSUMS = "x-amz-checksum-"
HOP_BY_HOP = {"connection", "content-length", "date", "expect", "keep-alive", "server", "transfer-encoding"}


@dataclass(frozen=True)
class Seen:
    """A request that the proxy saw.

    Attributes:
        operation: the HTTP method, or ``LIST``.
        key: of the object, with the bucket before it; of a listing, the bucket and the prefix.
        size: of the request's body, in bytes.
    """

    operation: str
    key: str
    size: int


Choose = Callable[[Seen], Fault | None]


@dataclass
class Proxy:
    """Passes requests on to the server, or does not.

    Attributes:
        upstream: the server's URL.
        endpoint: the proxy's own.
        choose: says which fault a request meets, if any; one that cannot befall it is passed over.
        seen: requests, those that met a fault among them.
        injected: how often each fault was.
        writes: how often each object was written, by key; the writes of which the client heard nothing count.
    """

    upstream: str
    endpoint: str = ""
    choose: Choose = lambda seen: None
    seen: list[Seen] = field(default_factory=list)
    injected: Counter[Fault] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)

    def forget(self) -> None:
        """Inject nothing more, and count from zero; what was written stays counted."""
        self.choose = lambda seen: None
        self.seen.clear()
        self.injected.clear()

    def count(self, *operations: str, key: str = "*") -> int:
        """How many requests there were."""
        return sum(
            each.operation in operations and fnmatch.fnmatch(each.key, key) for each in list(self.seen)
        )

    async def handle(self, request: web.BaseRequest, session: ClientSession) -> web.StreamResponse:
        from aiohttp import web

        if "Expect" in request.headers and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await request.content.read()
        seen = _seen(request, body)
        self.seen.append(seen)
        fault = self.choose(seen)
        if fault is not None and not _can_befall(fault, seen):
            fault = None
        if fault is not None and fault not in CUT_ANSWERS:
            self.injected[fault] += 1
        if fault in XML_ERRORS:
            status, code = XML_ERRORS[fault]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
            return web.Response(status=status, text=text, content_type="application/xml")
        if fault is Fault.CUT_UPLOAD:
            await self._send_half(request, body)
        if fault is not None and fault not in DONE_ALL_THE_SAME:
            return await _say_nothing(request, stall=fault is Fault.STALLED)

        async with session.request(
            request.method,
            _url(self.upstream, request),
            data=body or None,
            headers={name: value for name, value in request.headers.items() if name.lower() != "expect"},
            allow_redirects=False,
        ) as answer:
            data = await answer.read()
        if seen.operation in ("PUT", "POST") and answer.status == 200:
            self.writes[seen.key] += 1
        if fault in (Fault.LOST, Fault.STALLED_AFTER):
            return await _say_nothing(request, stall=fault is Fault.STALLED_AFTER)
        headers = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
        if fault is None or len(data) < 2:
            made = web.StreamResponse(status=answer.status, headers=headers)
            made.content_length = int(answer.headers.get("Content-Length", len(data)))
            await made.prepare(request)
            await made.write(data)
            await made.write_eof()
            return made
        self.injected[fault] += 1
        if fault is Fault.SHORT_UNCHECKED:
            headers = {
                name: value for name, value in headers.items() if not name.lower().startswith(CHECKSUMS)
            }
        half = data[: len(data) // 2]
        made = web.StreamResponse(status=answer.status, headers=headers)
        made.content_length = len(data) if fault is Fault.CUT else len(half)
        await made.prepare(request)
        await made.write(half)
        if fault is Fault.CUT:
            _hang_up(request)
        return made

    async def _send_half(self, request: web.BaseRequest, body: bytes) -> None:
        """Announce the whole upload to the server and hang up in the middle."""
        host, port = self.upstream.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        lines = [f"{name}: {value}" for name, value in request.headers.items() if name.lower() != "expect"]
        head = "\r\n".join([f"{request.method} {request.raw_path} HTTP/1.1", *lines, "", ""])
        writer.write(head.encode() + body[: len(body) // 2])
        await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _seen(request: web.BaseRequest, body: bytes) -> Seen:
    key = unquote(request.raw_path.partition("?")[0]).strip("/")
    if request.method == "GET" and ("list-type" in request.query or "/" not in key):
        return Seen("LIST", f"{key}/{request.query.get('prefix', '')}", 0)
    return Seen(request.method, key, len(body))


def _can_befall(fault: Fault, seen: Seen) -> bool:
    if fault in CUT_ANSWERS:
        return seen.operation in ("GET", "LIST")
    return fault is not Fault.CUT_UPLOAD or (seen.operation == "PUT" and seen.size > 1)


def _url(upstream: str, request: web.BaseRequest) -> Any:
    from yarl import URL

    return URL(upstream + request.raw_path, encoded=True)


async def _say_nothing(request: web.BaseRequest, *, stall: bool) -> web.StreamResponse:
    """Hang up, at once or when the client has lost patience."""
    from aiohttp import web

    waited = 0.0
    while stall and request.transport is not None and waited < LONGEST_STALL_S:
        await asyncio.sleep(POLL_S)
        waited += POLL_S
    _hang_up(request)
    return web.StreamResponse()


def _hang_up(request: web.BaseRequest) -> None:
    if request.transport is not None:
        request.transport.close()


@dataclass(frozen=True)
class Server:
    """An object store on this machine: the proxy that clients see, and the server behind it."""

    proxy: Proxy
    client: Any = field(repr=False)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def bucket(self) -> Bucket:
        """A new, empty bucket."""
        name = f"bucket-{os.getpid()}-{next(self.numbers)}"  # servers may outlive the tests
        self.client.create_bucket(Bucket=name)
        return Bucket(self, name)


@dataclass(frozen=True)
class Bucket:
    """What is in a bucket, without the proxy's knowing that somebody looks."""

    server: Server
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    @property
    def proxy(self) -> Proxy:
        return self.server.proxy

    def tags(self, prefix: str = "") -> dict[str, str]:
        """ETag of every object, by key."""
        pages = self.server.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return {each["Key"]: each["ETag"] for page in pages for each in page.get("Contents", [])}

    def listing(self, prefix: str = "") -> list[str]:
        """Keys of all objects."""
        return list(self.tags(prefix))

    def read(self, key: str) -> bytes:
        return bytes(self.server.client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def write(self, key: str, data: bytes) -> None:
        self.server.client.put_object(Bucket=self.name, Key=key, Body=data)

    def remove(self, key: str) -> None:
        self.server.client.delete_object(Bucket=self.name, Key=key)

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Content of every object, by key."""
        return {key: self.read(key) for key in self.listing(prefix)}

    def unfinished_uploads(self) -> list[str]:
        """Keys of multipart uploads that were begun and neither completed nor given up."""
        found = self.server.client.list_multipart_uploads(Bucket=self.name)
        return [each["Key"] for each in found.get("Uploads", [])]


# Which requests meet a fault


def always(fault: Fault, *operations: str, key: str = "*") -> Choose:
    """Every request of these operations (by default of all) to objects of such keys."""

    def choose(seen: Seen) -> Fault | None:
        hit = (not operations or seen.operation in operations) and fnmatch.fnmatch(seen.key, key)
        return fault if hit else None

    return choose


def once(fault: Fault, *operations: str, key: str = "*", after: int = 0) -> Choose:
    """One such request, after so many that go well."""
    those, number = always(fault, *operations, key=key), itertools.count()

    def choose(seen: Seen) -> Fault | None:
        hit = those(seen) is not None and _can_befall(fault, seen) and next(number) == after
        return fault if hit else None

    return choose


def often(faults: list[Fault], share: float, seed: int) -> Choose:
    """A share of all requests, at random, each time with one of the faults that can befall it."""
    rng = random.Random(seed)

    def choose(seen: Seen) -> Fault | None:
        possible = [fault for fault in faults if _can_befall(fault, seen)]
        return rng.choice(possible) if possible and rng.random() < share else None

    return choose


# Starting and stopping


@contextlib.contextmanager
def _running_server() -> Iterator[str]:
    """URL of a server process, or of a running one, which ``SPCTRL_S3_SERVER`` names."""
    if given := os.environ.get(OTHER_SERVER):
        yield given.rstrip("/")
        return
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(KEYS_PER_LISTING)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            port = process.stdout.readline().decode().strip()
            assert port.isdigit(), "the S3 server did not start"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stdin.close()


@contextlib.contextmanager
def _running_proxy(upstream: str) -> Iterator[Proxy]:
    proxy, loop = Proxy(upstream), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(_start(proxy), loop).result()
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(proxy: Proxy) -> web.ServerRunner:
    import aiohttp
    from aiohttp import web

    # The server speaks HTTP/1.0: each connection is for one request.
    session = aiohttp.ClientSession(
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        connector=aiohttp.TCPConnector(force_close=True),
    )

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        return await proxy.handle(request, session)

    class Runner(web.ServerRunner):
        async def cleanup(self) -> None:
            await super().cleanup()
            await session.close()

    # No application: its routes know no names with newlines.
    runner = Runner(web.Server(handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    proxy.endpoint = "http://{}:{}".format(*runner.addresses[0][:2])
    return runner


def environment(endpoint: str) -> dict[str, str]:
    """What leads S3 clients to an endpoint, and keeps them from settings of this machine's user.

    The credentials are those of ``SPCTRL_S3_KEY`` (``key:secret``), for servers that check them.
    """
    key, _, secret = os.environ.get("SPCTRL_S3_KEY", "testing:testing").partition(":")
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """An object store, to which S3 clients of this process and of its children are led."""
    import boto3  # type: ignore[import-untyped]

    with (
        _running_server() as upstream,
        _running_proxy(upstream) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in environment(proxy.endpoint).items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        yield Server(proxy, boto3.client("s3", endpoint_url=upstream))


@contextlib.contextmanager
def impatient(*, retries: int = 1) -> Iterator[None]:
    """S3 clients of this process and of its children soon give up waiting for an answer."""
    import fsspec.config
    from s3fs import S3FileSystem

    client = {"read_timeout": PATIENCE_S, "connect_timeout": PATIENCE_S, "retries": {"max_attempts": retries}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSSPEC_S3", json.dumps({"config_kwargs": client}))
        patch.setitem(fsspec.config.conf, "s3", {"config_kwargs": client})
        S3FileSystem.clear_instance_cache()
        yield


@pytest.fixture(scope="session")
def object_server() -> Iterator[Server]:
    """The object store of this test process."""
    pytest.importorskip("moto", reason="moto is not installed")
    pytest.importorskip("flask_cors", reason="moto's server is not installed")
    pytest.importorskip("s3fs", reason="the s3 extra is not installed")
    with running() as server:
        yield server


@pytest.fixture
def bucket(object_server: Server) -> Iterator[Bucket]:
    """A new bucket, between which and its clients nothing goes wrong yet."""
    object_server.proxy.forget()
    yield object_server.bucket()
    object_server.proxy.forget()


# Builds


class BucketWorkspace(Workspace):
    """A workspace whose store and exports lie in a bucket.

    What the methods of a workspace look at, ``store`` and ``exports`` on this machine, is a copy, made anew after each
    build and by ``fetch``.
    """

    def __init__(
        self, folder: Path, data: Path, code: Path, bucket: Bucket, digest_cache: Path | None = None
    ) -> None:
        super().__init__(folder, data, code)
        self.bucket = bucket
        self._fetched: dict[str, str] = {}
        self.configure("paths", store=f"{bucket.url}/store", export=f"{bucket.url}/exports")
        self.on_machine("this", digest_cache)

    def on_machine(self, name: str, digest_cache: Path | None = None) -> None:
        """Build from here on as a machine does that has a cache of its own, which knows the digests of the code."""
        cache = self.folder / f"cache-{name}"
        self.configure("paths", cache=cache)
        if digest_cache is not None and digest_cache.exists():
            home = Store(f"{self.bucket.url}/store", cache).home
            home.mkdir(parents=True)
            shutil.copyfile(digest_cache, home / "cache.sqlite")

    def build(self, family: str = "BuildDataset", **parameters: Any) -> Build:
        """The same; errors of asking whether something is complete, which Luigi tells nobody, are among the errors."""
        import luigi.worker

        forget_what_was_found()
        unanswered: list[str] = []

        class Recorded(luigi.worker.TracebackWrapper):
            def __init__(self, trace: str) -> None:
                super().__init__(trace)  # type: ignore[no-untyped-call]
                unanswered.append(trace.strip().splitlines()[-1].removeprefix("spctrl.storage.files."))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(luigi.worker, "TracebackWrapper", Recorded)
            build = super().build(family, **parameters)
        return replace(build, errors=[*build.errors, *unanswered])

    def fetch(self) -> None:
        """Copy what is in the bucket and is not here yet."""
        tags = self.bucket.tags()
        for key in self._fetched.keys() - tags.keys():
            (self.folder / key).unlink()
        for key in {key for key, tag in tags.items() if self._fetched.get(key) != tag}:
            path = self.folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.bucket.read(key))
        self._fetched = tags

    def _state(self) -> dict[Path, tuple[int, int]]:
        self.fetch()
        writes = self.bucket.proxy.writes
        return {
            path: (writes[f"{self.bucket.name}/{path.relative_to(self.folder).as_posix()}"], 0)
            for path in super()._state()
        }
