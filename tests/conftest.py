"""What tests of whole builds share: sample data, a workspace to build in, and an account of what a build did."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import luigi
import luigi.configuration
import luigi.task_register
import pytest
from processes import HANG_S

from spctrl.store.code_version import copy_code
from tasks.execution import fork_server
from tasks.execution.worker_pool import WorkerPool

# Networks of tests are tiny: threads of torch that share their work take longer than one, and on a busy machine, where
# they wait for each other, many times as long. Read when torch is imported, here and in the processes of builds.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A script that starts the tests in the background has them ignore Ctrl-C and SIGQUIT, nohup SIGHUP. Commands under test
# would inherit that; a handler they do not inherit.
for each in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(each) is signal.SIG_IGN:
        signal.signal(
            each, signal.default_int_handler if each == signal.SIGINT else lambda signum, frame: None
        )

pytest_plugins = ["object_store"]

REPOSITORY = Path(__file__).parents[1]
REAL_DATA = REPOSITORY.parent / "shared" / "data"
ANNOTATION_FILES = {
    ("ap10k", "train"): "AP-10K/annotations/ap10k-train-split1.json",
    ("ap10k", "val"): "AP-10K/annotations/ap10k-val-split1.json",
    ("humanart", "train"): "HumanArt/annotations/training_humanart.json",
    ("humanart", "val"): "HumanArt/annotations/validation_humanart.json",
}
EXPORT_FOLDERS = {"ap10k": "AP-10K_triplet", "humanart": "HumanArt_triplet"}
LEDGERS = ".spctrl"
SAMPLE_IMAGES = 8
LOADED_FOR_MODELS = [
    "torch",
    "torchvision",
    "diffusers",
    "segment_anything",
    "segment_anything_hq",
    "torch_fidelity",
    "transformers.models.clip.modeling_clip",
    "transformers.models.vitpose.modeling_vitpose",
    "transformers.models.zoedepth.modeling_zoedepth",
    "spctrl.inference.generator",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--moments",
        type=int,
        help="at how many moments of a build each fault is tried, and all kinds of faults and builds with it; a large "
        "number means at every operation",
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    if any("forked_models" in getattr(item, "fixturenames", ()) for item in session.items):
        fork_server.PRELOADED += LOADED_FOR_MODELS


@pytest.fixture
def forked_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the workers of builds in this process fork from one that has loaded the models' libraries.

    A build starts new ones, in which loading takes seconds and the tests' tiny models next to nothing.
    """
    initialize = WorkerPool.__init__

    def fork(
        self: WorkerPool, workers: int, start_method: str, environments: Sequence[Mapping[str, str]] = ()
    ) -> None:
        initialize(self, workers, "forkserver", environments)

    monkeypatch.setattr(WorkerPool, "__init__", fork)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """What a command holds back in this process must not be held back in processes of later tests."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many faults were injected, by test."""
    reports = [each for outcome in ("passed", "failed") for each in terminalreporter.stats.get(outcome, [])]
    counts = {each: sum(name == "faults" for name, _ in each.user_properties) for each in reports}
    if any(counts.values()):
        terminalreporter.section("faults injected")
        for report, count in counts.items():
            if count:
                test = report.nodeid.partition("::")[2]
                terminalreporter.line(f"{count:6,} {report.outcome} in {report.duration:4.0f} s  {test}")
        terminalreporter.line(f"{sum(counts.values()):6,} in all")


Stamp = tuple[int, int]
"""Modification time in nanoseconds and inode: another one means that the file was written again."""


@dataclass(frozen=True)
class Build:
    """What one build did.

    Attributes:
        succeeded: whether everything that was asked for was built.
        committed: counts of each run that was committed, by (stage, part).
        worked: calls of each record stage's function, read off the packs that were written.
        started: families of the Luigi tasks that ran; only known of builds in this process.
        errors: messages of tasks that failed; only known of builds in this process.
        exit_code: only known of builds in their own process.
        output: what the process wrote to stdout and stderr.
    """

    succeeded: bool
    committed: dict[tuple[str, str], dict[str, int]]
    worked: dict[str, int]
    started: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    exit_code: int | None = None
    output: str = ""

    @property
    def stages(self) -> set[str]:
        """Stages that committed a run."""
        return {stage for stage, _ in self.committed}

    def counted(self, stage: str, what: str) -> int:
        """A count of the summary, over all parts that were committed."""
        return sum(counts.get(what, 0) for (each, _), counts in self.committed.items() if each == stage)


class Workspace:
    """A folder with raw data, settings, a store and exports, in which to build.

    Attributes:
        settings: sections of the settings file; the file is written anew for each build.
        code: the folder of the project's packages, for builds in a process of their own.
    """

    def __init__(self, folder: Path, data: Path, code: Path = REPOSITORY) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.data = data
        self.code = code
        self.store = folder / "store"
        self.exports = folder / "exports"
        self.settings: dict[str, dict[str, Any]] = {
            "paths": {"data": data, "store": self.store, "export": self.exports},
            "executor": {"workers": 1},
        }

    def configure(self, section: str, **values: Any) -> None:
        """Set settings of a section; None takes one back."""
        kept = {**self.settings.get(section, {}), **values}
        self.settings[section] = {name: value for name, value in kept.items() if value is not None}

    def settings_file(self) -> Path:
        """The settings, as a file for ``LUIGI_CONFIG_PATH``."""
        path = self.folder / "luigi-test.cfg"
        lines = []
        for section, values in self.settings.items():
            lines.append(f"[{section}]")
            lines += [f"{name} = {_setting(value)}" for name, value in values.items()]
        path.write_text("\n".join(lines) + "\n")
        return path

    # Building

    def build(self, family: str = "BuildDataset", **parameters: Any) -> Build:
        """Build a pipeline in this process: no start-up time, but its code is what was imported."""
        before = self._state()
        started: list[str] = []
        errors: list[str] = []
        with _luigi_settings(self.settings_file()), _luigi_events(started, errors), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Luigi's, of config_path
            import pipelines
            from pipelines import luigi_setup

            luigi_setup.configure()
            task = getattr(pipelines, family)(**parameters)
            result = luigi.build([task], local_scheduler=True, detailed_summary=True, log_level="ERROR")
        return self._account(
            before, succeeded=result.status.name == "SUCCESS", started=started, errors=errors
        )

    def run(self, *arguments: str, family: str = "BuildDataset") -> Build:
        """Build as people do, in a process of its own."""
        before = self._state()
        process = self.start(*arguments, family=family)
        output, _ = process.communicate(timeout=HANG_S)
        return self._account(
            before, succeeded=process.returncode == 0, exit_code=process.returncode, output=output
        )

    def start(self, *arguments: str, family: str = "BuildDataset") -> subprocess.Popen[str]:
        """Start a build in a process group of its own."""
        script = Path(sys.executable).with_name("luigi")
        command = [str(script)] if script.exists() else [sys.executable, "-m", "luigi"]
        return subprocess.Popen(
            [*command, "--module", "pipelines", family, *arguments],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def environment(self) -> dict[str, str]:
        """For a process that finds the project's code and these settings."""
        return {
            **os.environ,
            "PYTHONPATH": str(self.code),
            "LUIGI_CONFIG_PATH": str(self.settings_file()),
            "COLUMNS": "200",
        }

    def spctrl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the ``spctrl`` command, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "spctrl", *arguments],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    def _state(self) -> dict[Path, Stamp]:
        """Stamps of everything that counts as done: provenance of runs and indexes of packs."""
        done = [*self.store.glob("runs/*/*/*/provenance.json"), *self.store.glob("packs/*/[!.]*.parquet")]
        return {path: _stamp(path) for path in done}

    def _account(self, before: Mapping[Path, Stamp], **facts: Any) -> Build:
        committed: dict[tuple[str, str], dict[str, int]] = {}
        worked: Counter[str] = Counter()
        for path, stamp in self._state().items():
            if before.get(path) == stamp:
                continue
            if path.name == "provenance.json":
                committed[path.parts[-4], path.parts[-3]] = json.loads(path.read_bytes())["counts"]
            else:
                worked[path.parts[-2]] += len(_read_keys(path))
        return Build(committed=committed, worked=dict(worked), **facts)

    # What is there

    def keys(self, stage: str) -> set[str]:
        """Keys of the artifacts and rejects that the packs of a stage hold."""
        return {key for path in self.store.glob(f"packs/{stage}/[!.]*.parquet") for key in _read_keys(path)}

    def packs(self, *stages: str) -> dict[str, str]:
        """SHA-256 of each tar of the stages, by path below the store."""
        paths = [path for stage in stages for path in self.store.glob(f"packs/{stage}/[!.]*.tar")]
        return {path.relative_to(self.store).as_posix(): sha256(path) for path in paths}

    def exported(self) -> dict[str, str]:
        """SHA-256 of each exported file by path; without ledgers and the report, which holds the time of day."""
        paths = [path for path in self.exports.rglob("*") if path.is_file() or path.is_symlink()]
        return {
            path.relative_to(self.exports).as_posix(): sha256(path)
            for path in paths
            if LEDGERS not in path.parts and path.name != "report.html"
        }

    def export_folder(self, dataset: str) -> Path:
        return self.exports / EXPORT_FOLDERS[dataset]

    def manifest(self, dataset: str, split: str) -> list[dict[str, Any]]:
        """Rows of an exported manifest."""
        import pyarrow.parquet as pq

        path = self.export_folder(dataset) / "manifests" / f"{split}_split1.parquet"
        rows: list[dict[str, Any]] = pq.read_table(path, partitioning=None).to_pylist()
        return rows

    def json_lines(self, dataset: str, split: str) -> list[dict[str, Any]]:
        """Lines of an exported JSON lines file."""
        text = (self.export_folder(dataset) / f"{split}_split1.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def faults(self) -> list[str]:
        """What counts as done in the store but is not whole, read back to the byte."""
        from stores import locations

        from spctrl.storage import StoreError
        from spctrl.store.store import Store

        store, found = Store(self.store), []
        for run in store.runs():
            provenance = run.provenance()
            files = {
                run.path(name): (entry["size"], entry["digest"])
                for name, entry in provenance["files"].items()
            }
            found += [
                f"{path} is not what its run says" for path, what in files.items() if _facts(path) != what
            ]
            packs = {store.pack_path(run.stage, pack): size for pack, size in provenance["packs"].items()}
            found += [f"{path} has another size" for path, size in packs.items() if _facts(path)[0] != size]
        for stage in store.stages():
            for key, place in locations(store, stage).items():
                if place.code is not None:
                    continue
                try:
                    data = store.read(stage, place)
                except StoreError as error:
                    found.append(str(error))
                    continue
                if hashlib.sha256(data).hexdigest() != place.digest:
                    found.append(f"{stage} {key} is damaged")
        return found

    # Changing the raw data

    def annotation_path(self, dataset: str, split: str) -> Path:
        return self.data / ANNOTATION_FILES[dataset, split]

    @contextlib.contextmanager
    def edit_annotations(self, dataset: str, split: str) -> Iterator[dict[str, Any]]:
        """The content of an annotation file, which is written back."""
        path = self.annotation_path(dataset, split)
        content: dict[str, Any] = json.loads(path.read_bytes())
        yield content
        path.write_text(json.dumps(content))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _facts(path: Path) -> tuple[int, str]:
    return (path.stat().st_size, sha256(path)) if path.is_file() else (-1, "")


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_mtime_ns, found.st_ino


def _read_keys(pack_index: Path) -> list[str]:
    import pyarrow.parquet as pq

    keys: list[str] = pq.read_table(pack_index, columns=["key"], partitioning=None).column(0).to_pylist()
    return keys


def _setting(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list | tuple) else str(value)
    return text.replace("%", "%%")


@contextlib.contextmanager
def _luigi_settings(path: Path) -> Iterator[None]:
    """Luigi as a fresh process with one settings file would have it."""
    from spctrl.store import digests, format
    from tasks import settings

    def forget() -> None:
        luigi.task_register.Register.clear_instance_cache()
        digests._digest_cache.cache_clear()
        format.refuse_later_format.cache_clear()
        settings.settings_digest.cache_clear()
        settings.warn_of_settings_without_effect.cache_clear()

    parser = type(luigi.configuration.get_config())
    outer = parser._instance
    fresh = parser()
    fresh.read([path])
    parser._instance = fresh
    forget()
    try:
        yield
    finally:
        parser._instance = outer
        forget()


@contextlib.contextmanager
def _luigi_events(started: list[str], errors: list[str]) -> Iterator[None]:
    """Listen to what Luigi does."""

    def on_start(task: luigi.Task) -> None:
        started.append(task.task_family)

    def on_error(task: luigi.Task, error: BaseException) -> None:
        errors.append(f"{type(error).__name__}: {error}")

    handlers: list[tuple[str, Callable[..., None]]] = [
        (luigi.Event.START, on_start),
        (luigi.Event.FAILURE, on_error),
        (luigi.Event.BROKEN_TASK, on_error),
    ]
    for event, handler in handlers:
        luigi.Task.event_handler(event)(handler)
    try:
        yield
    finally:
        for event, handler in handlers:
            luigi.Task.remove_event_handler(event, handler)


def only(ids: set[int], content: dict[str, Any]) -> None:
    """Keep some images of an annotation file's content."""
    content["images"] = [image for image in content["images"] if image["id"] in ids]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in ids]


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn sample, some images a split, of both datasets; not to be changed."""
    from spctrl.demo_data import write_sample

    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, images_per_split=SAMPLE_IMAGES)
    return folder


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's packages as they are now, so that an edit while tests run does not come between two builds."""
    folder = tmp_path_factory.mktemp("code")
    copy_code(folder)
    return folder


@pytest.fixture(scope="session")
def digest_cache(sample: Path, code: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of an earlier build, which knows the digests of the code: finding them takes half a second."""
    earlier = Workspace(tmp_path_factory.mktemp("earlier"), sample)
    earlier.configure(
        "build", splits=["train"], conditions=["spatext", "openpose", "mask", "depth", "masked_depth"]
    )
    earlier.build()
    earlier.code = code
    earlier.run()
    return earlier.store / "cache.sqlite"


@pytest.fixture
def make_workspace(tmp_path: Path, digest_cache: Path, code: Path) -> Callable[..., Workspace]:
    """Makes workspaces below the test's folder: ``make_workspace(name, data)``."""

    def make(name: str, data: Path) -> Workspace:
        made = Workspace(tmp_path / name, data, code)
        made.store.mkdir()
        if digest_cache.exists():
            shutil.copyfile(digest_cache, made.store / "cache.sqlite")
        return made

    return make


@pytest.fixture
def workspace(sample: Path, tmp_path: Path, make_workspace: Callable[..., Workspace]) -> Workspace:
    """A workspace with its own copy of the sample of both datasets, set to build AP-10K's training split."""
    shutil.copytree(sample, tmp_path / "data")
    made = make_workspace("work", tmp_path / "data")
    made.configure("build", datasets=["ap10k"], splits=["train"])
    return made


def real_annotations(dataset: str, *splits: str) -> Path:
    """Root of a real dataset in ``../shared``; skips the test where it is not there."""
    root = REAL_DATA / dataset
    names = {"ap10k": "ap10k-{}-split1.json", "humanart": "{}_humanart.json"}
    missing = [
        split for split in splits if not (root / "annotations" / names[dataset].format(split)).is_file()
    ]
    if missing:
        pytest.skip(f"real {dataset} annotations ({', '.join(missing)}) are not in {root}")
    return root
