"""The base of every stage: what it was made from decides where its result lies, and whether it has to run.

A stage's fingerprint is a digest of its code, the libraries that decide its output, its parameters and its
inputs. Its result is the run under that fingerprint. A stage that works record by record also gives each
record a key, and works only on the keys that its packs do not hold yet.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, ClassVar

import luigi

import spctrl
from spctrl.errors import ExpectedError
from spctrl.output.secrets import masked
from spctrl.storage import StoreError
from spctrl.store.format import upgrade_format
from spctrl.store.runs import Run
from spctrl.store.store import Store
from tasks import settings
from tasks.execution import logs
from tasks.stage.fingerprints import Ingredients, code_of, code_version, library_version
from tasks.stage.rejects import MeetsBadRecords, TooManyRejectsError, reject_examples
from tasks.stage.tables import refuse_damaged_tables, table_faults


class RunTarget(luigi.Target):
    """A stage's committed run."""

    def __init__(self, task: StageTask) -> None:
        self._task = task

    def __str__(self) -> str:
        return f"{self._task.stage} for {self._task.part}"

    def exists(self) -> bool:
        return self._task.is_up_to_date()


class StageTask(MeetsBadRecords):
    """One stage, for one part of the data.

    Subclasses say what the stage is (the class attributes), what it depends on (``parameters``, ``inputs``,
    ``requires``) and how it is made (``make``).
    """

    stage: ClassVar[str]
    function: ClassVar[str]
    also_reaches: ClassVar[Sequence[str]] = ()
    """Code that reaches the function through its arguments, which reading its source cannot show."""
    libraries: ClassVar[Sequence[str]] = ()
    """Distributions that it needs, whose versions are part of its fingerprint."""
    packages: ClassVar[Sequence[str]] = ()
    """Distributions that it needs besides."""
    reads_several_parts: ClassVar[bool] = False
    """Whether a stage may be among the inputs more than once, for different parts of the data."""

    def parameters(self) -> dict[str, Any]:
        """What the result depends on besides code and inputs; JSON values."""
        return {}

    def inputs(self) -> dict[str, str] | None:
        """Digest or fingerprint of everything read, by name; None while that cannot be known yet."""
        found = {}
        for task in self.requires():
            if not isinstance(task, StageTask):
                continue
            if (ingredients := task.ingredients()) is None:
                return None
            name = f"{task.stage} {task.part}" if self.reads_several_parts else task.stage
            found[name] = ingredients.fingerprint
        return found

    def make(self, run: Run) -> dict[str, int]:
        """Write the run's files and return counts for the summary; ``records`` and ``rejected`` among them."""
        raise NotImplementedError

    @property
    def part(self) -> str:
        """What the result covers: ``<dataset>-<split>``, or ``all``."""
        raise NotImplementedError

    @functools.cached_property
    def store(self) -> Store:
        return settings.store()

    @property
    def view_address(self) -> str:
        """Folder or file where users find the result; empty where it is in the store alone."""
        return ""

    def requires(self) -> Sequence[luigi.Task]:
        return ()

    def output(self) -> RunTarget:
        return RunTarget(self)

    def complete(self) -> bool:
        """Whether the result and all that it was made from are there, wherever in the graph they lie.

        Raises:
            MissingPackageError: a package that the stage needs is not installed; before it asks for weights.
        """
        for name in (*self.libraries, *self.packages):
            library_version(name)
        return self.is_up_to_date() and all(task.complete() for task in self.requires())

    def is_up_to_date(self) -> bool:
        """Whether there is nothing to do for this stage itself."""
        return self.is_made()

    def is_made(self) -> bool:
        """Whether the run is there, whole, and without too many rejects."""
        run = self.current_run()
        return run is not None and run.is_whole() and self.reject_fault(run.provenance()["counts"]) is None

    def current_run(self) -> Run | None:
        """Where the result belongs, whether or not it is there; None while the inputs cannot be known."""
        ingredients = self.ingredients()
        return None if ingredients is None else self.store.run(self.stage, self.part, ingredients.fingerprint)

    def finished_run(self) -> Run:
        """The result, for the stages that read it.

        Raises:
            StoreError: there is none, or one with a damaged table, which was struck out.
        """
        run = self.current_run()
        if run is None or not run.provenance():
            raise StoreError(
                f"expected a finished run of {self.stage} for {self.part}, found none in {self.store.files.root}. "
                "Build it, or build again if it was removed meanwhile"
            )
        refuse_damaged_tables(run)
        return run

    def ingredients(self) -> Ingredients | None:
        """What the result is made from, found once a process as far as it can be known."""
        known: Ingredients | None = getattr(self, "_ingredients", None)
        if known is None and (inputs := self.inputs()) is not None:
            known = Ingredients(inputs=inputs, **self.code_and_parameters())
            self._ingredients = known
        return known

    def made_from(self) -> Ingredients:
        """The ingredients of a stage that is running, whose inputs are therefore known."""
        ingredients = self.ingredients()
        if ingredients is None:
            raise RuntimeError(f"the inputs of {self.stage} for {self.part} are not there yet")
        return ingredients

    def code_and_parameters(self) -> dict[str, Any]:
        """All ingredients but the inputs."""
        code = code_of((self.function, *self.also_reaches), self.store)
        libraries = {name: library_version(name) for name in self.libraries}
        version = code_version(self.stage, code, libraries)
        return {
            "code": code,
            "libraries": libraries,
            "code_version": self.store.accepted().get(version, version),
            "parameters": self.parameters(),
        }

    def run(self) -> None:
        self.fill_cache()
        run = self.store.run(self.stage, self.part, self.made_from().fingerprint)
        run.forget()  # whoever has it made found it missing, perhaps on another machine and later
        if not self.is_up_to_date():
            self.build(run)

    def build(self, run: Run) -> None:
        """Make the result, and commit it."""
        started = time.time()
        upgrade_format(self.store, logs.notify)
        with self.os_errors_explained():
            if run.is_whole():  # others may use it under a setting that allows more rejects
                self._refuse_too_many_rejects(run, run.provenance()["counts"])
            counts = self.make(run)
            self._refuse_too_many_rejects(run, counts)
            self.commit(run, counts, started)

    def _refuse_too_many_rejects(self, run: Run, counts: Mapping[str, int]) -> None:
        if (fault := self.reject_fault(counts)) is not None:
            where = f" in {self.view_address}" if self.view_address else ""
            raise TooManyRejectsError(f"{self.stage} for {self.part}{where}: {fault}{reject_examples(run)}")

    @contextmanager
    def os_errors_explained(self) -> Iterator[None]:
        """Errors of the system as errors that name the stage and say what to do."""
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{self.stage} for {self.part}: {error}. What was finished before stays; see to the file, then "
                "run again"
            ) from error

    def on_failure(self, exception: BaseException) -> str:
        """What the visualiser and other machines show: of an error that explains itself, the message alone."""
        explains_itself = isinstance(exception, ExpectedError)
        return masked(str(exception) if explains_itself else super().on_failure(exception))

    def fill_cache(self) -> None:
        """Find out what the inputs are where that takes long (reading many files)."""

    def commit(self, run: Run, counts: Mapping[str, int], started: float) -> None:
        provenance = {
            "stage": self.stage,
            "part": self.part,
            "fingerprint": run.fingerprint,
            **asdict(self.made_from()),
            **({"weights": note} if (note := self.weights_note()) else {}),
            **self.notes(),
            "counts": dict(counts),
            "started_at": _iso_time(started),
            "finished_at": _iso_time(time.time()),
            "duration_s": round(time.time() - started, 3),
            "made_by": {
                "spctrl": spctrl.__version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
            },
        }
        for fault in table_faults(run, run.files(), counts):  # or the stage would be built again and again
            raise ValueError(f"{self.stage} {self.part}: {fault}")
        run.commit(self.packs_of(run), provenance)
        logs.event(
            "stage done",
            stage=self.stage,
            part=self.part,
            fingerprint=run.fingerprint,
            duration_s=provenance["duration_s"],
            counts=dict(counts),
        )

    def weights_note(self) -> str | None:
        """Of what a model made: ``random``, or the digest of the model's weights."""
        return None

    def notes(self) -> dict[str, Any]:
        """What else the provenance says; JSON values."""
        return {}

    def packs_of(self, run: Run) -> Sequence[str]:
        """Names of the packs that the run refers to."""
        return ()

    def reject_fault(self, counts: Mapping[str, int]) -> str | None:
        """Why the rejects are too many, or None. Asked of finished runs too: a stricter setting counts at once."""
        rejected, records = counts.get("rejected", 0), counts.get("records", 0)
        if rejected and self.on_bad_record == "fail":
            return f"{rejected:,} of {records:,} records cannot be used, and on_bad_record = fail"
        if rejected > self.max_reject_share * records:
            return (
                f"{rejected:,} of {records:,} records cannot be used, more than "
                f"max_reject_share = {self.max_reject_share:g} allows"
            )
        return None


def _iso_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"
