"""Builds and commands whose settings hold passwords: no output, file or fingerprint holds them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Workspace
from object_store import Bucket, BucketWorkspace, Fault, always, impatient
from typer.testing import CliRunner

from spctrl.errors import ExpectedError
from spctrl.output import secrets

PASSWORD, ENCODED = "quetz/al wört", "quetz%2Fal%20w%C3%B6rt"
PIECE = "quetz"
"""Of the password, however it is written."""


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_memory", secrets._Memory())


@pytest.fixture
def vault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A file system to whose ``vault://user:password@host/path`` any password leads; its files by path."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Vault(MemoryFileSystem):  # type: ignore[misc]
        protocol = "vault"
        store: dict[str, Any] = {}  # noqa: RUF012 - as in fsspec
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(path.partition("://")[2].rpartition("@")[2] or path))

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "vault", Vault)  # type: ignore[attr-defined]
    yield Vault.store
    Vault.store.clear()


def test_another_password_builds_nothing_again_and_is_in_no_file(
    vault: dict[str, Any], workspace: Workspace
) -> None:
    workspace.configure("build", datasets=["ap10k"], splits=["train"], conditions=["spatext"])
    workspace.configure("export", format="parquet")
    started = []
    for password in (ENCODED, "another-word"):
        address = f"vault://me:{password}@host"
        workspace.configure(
            "paths", store=f"{address}/store", export=f"{address}/exports", cache=workspace.folder / "cache"
        )
        done = workspace.build()
        assert done.succeeded, done.errors
        started.append(done.started)
    assert "Spatext" in started[0] and started[1] == []
    files = {path: bytes(file.getvalue()) for path, file in vault.items()}
    assert any("provenance.json" in path for path in files)
    cache = {str(path): path.read_bytes() for path in (workspace.folder / "cache").rglob("*.sqlite")}
    assert len(cache) == 1
    for path, content in {**files, **cache}.items():
        assert PIECE not in path and PIECE.encode() not in content


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_build_that_cannot_reach_its_store_shows_no_password(workspace: Workspace, form: str) -> None:
    workspace.configure("paths", store=f"ftp://me:{ENCODED}@127.0.0.1:1/store", cache="cache")
    workspace.configure("log", format=form)
    done = workspace.run()
    assert not done.succeeded
    assert "ftp://me:***@127.0.0.1:1/store" in done.output
    assert PIECE not in done.output
    assert [path for path in workspace.folder.rglob("*") if PIECE in path.name] == []


def test_a_command_shows_no_password(workspace: Workspace) -> None:
    workspace.configure("paths", store=f"ftp://me:{ENCODED}@127.0.0.1:1/store", cache="cache")
    done = workspace.spctrl("status")
    assert "ftp://me:***@127.0.0.1:1/store" in done.stderr
    assert PIECE not in done.stdout + done.stderr


def test_a_setting_that_cannot_be_read_is_shown_without_the_password(workspace: Workspace) -> None:
    settings = workspace.settings_file()
    settings.write_text(f"[paths]\nstore = ftp://me:{ENCODED}@host/store\n")
    workspace.settings_file = lambda: settings  # type: ignore[method-assign]
    done = workspace.run()
    assert "expected %% for a percent sign" in done.output and "ftp://me:***@host/store" in done.output
    assert PIECE not in done.output


def test_luigid_that_does_not_answer_is_named_without_the_password(workspace: Workspace) -> None:
    done = workspace.run("--scheduler-url", f"http://me:{ENCODED}@127.0.0.1:1")
    assert "expected luigid at http://me:***@127.0.0.1:1, found none" in done.output
    assert PIECE not in done.output


def test_an_unexpected_error_that_quotes_a_key_is_masked() -> None:
    lines = [
        "import sys; sys.argv[:] = ['luigi', f'--paths-store=s3://me:{sys.argv[1]}@x']",
        "import luigi.cmdline, pipelines, logging, warnings",
        "logging.getLogger('another.library').error('key k-1234567')",
        "warnings.warn('key k-1234567')",
        "print('key k-1234567')",
        f"raise RuntimeError('key k-1234567 of me:{PASSWORD}')",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), ENCODED],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "WANDB_API_KEY": "k-1234567", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "key ***\n"
    assert done.stderr.count("key ***") == 3 and "RuntimeError: key *** of me:***" in done.stderr
    assert "1234567" not in done.stderr.replace("'key k-1234567')", "").replace("'key k-1234567", "")


def test_training_keeps_why_it_stopped_without_the_password(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="the models extra is not installed")
    from spctrl.training import __main__ as training

    def refuse(path: Path) -> None:
        raise ExpectedError(f"cannot read ftp://me:{ENCODED}@host/{path.name}")

    monkeypatch.setattr(training, "read_training_config", refuse)
    done = CliRunner().invoke(training.app, ["run.yaml", "--manifest=m", f"--output={tmp_path}"])
    assert done.exit_code == 1
    assert (tmp_path / training.ERROR).read_text() == "cannot read ftp://me:***@host/run.yaml\n"


def test_a_bucket_whose_url_has_a_key_is_named_without_it(
    bucket: Bucket, sample: Path, tmp_path: Path
) -> None:
    workspace = BucketWorkspace(tmp_path / "remote", sample, REPOSITORY, bucket)
    bucket.proxy.choose = always(Fault.ERROR)
    workspace.configure("paths", store=f"s3://me:{ENCODED}@{bucket.name}/store", export=tmp_path)
    with impatient():
        done = workspace.build()
    assert not done.succeeded and done.errors
    assert PIECE not in "".join(done.errors)
    assert f"me:***@{bucket.name}" in "".join(done.errors)
