"""Stages whose result users also find in a folder of their own: the run is in the store, the view in the exports.

A run depends on nothing but what decides it, so all users of a store share it. A view is one user's. It is written
where it was deleted or changed, without the run being made again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from spctrl.storage import Files
from spctrl.store.digests import DigestCache, content_digest
from spctrl.store.runs import Run
from tasks.dataset.export_state import UNFINISHED, Entry, Ledger, fingerprint_at
from tasks.execution import logs
from tasks.stage.base import StageTask


@dataclass(frozen=True)
class RenderedView:
    """A few files that are rendered for one user, and the ledger that says which run they are of.

    They are not copied from the run: a store may come from anywhere, and a page from there could run any script.

    Attributes:
        place: where the files go.
        ledger_name: of the ledger's JSON file there.
    """

    place: Files
    ledger_name: str

    def is_of(self, run: Run, cache: DigestCache) -> bool:
        """Whether all files are there as they were written for a run."""
        if fingerprint_at(self.place, self.ledger_name) != run.fingerprint:
            return False
        files = Ledger.read(self.place, self.ledger_name).files
        return bool(files) and all(
            cache.digest_at(self.place, path) == entry.digest for path, entry in files.items()
        )

    def write(self, run: Run, files: Mapping[str, bytes]) -> None:
        """Write the files of a run, and remove those of an earlier one that it has not."""
        old = Ledger.read(self.place, self.ledger_name).files
        # A killed build must not pass for a finished one, and whatever it wrote must be known.
        Ledger(self.place, self.ledger_name, "", old | dict.fromkeys(files, UNFINISHED)).write()
        for path, data in files.items():
            self.place.write(path, data)
        self.place.remove(old.keys() - files.keys())
        entries = {path: Entry(run.fingerprint, content_digest(data)) for path, data in files.items()}
        Ledger(self.place, self.ledger_name, run.fingerprint, entries).write()


class ViewStage(StageTask):
    """A stage with a view of its run."""

    @abstractmethod
    def view_lock(self) -> AbstractContextManager[None]:
        """What keeps other builds from writing to the view."""

    @abstractmethod
    def has_view(self, run: Run) -> bool:
        """Whether the view shows a whole run, and nothing of it was deleted or changed since."""

    @abstractmethod
    def write_view(self, run: Run) -> None:
        """Bring the view in step with a whole run."""

    def is_up_to_date(self) -> bool:
        run = self.current_run()
        return run is not None and self.is_made() and self.has_view(run)

    def run(self) -> None:
        self.fill_cache()
        run = self.store.run(self.stage, self.part, self.made_from().fingerprint)
        # Another build may be writing the same view; when it is done, there may be nothing left to do.
        with self.view_lock():
            run.forget()
            if self.is_up_to_date():
                return
            if not self._is_ready(run):
                # Builds with other views make the same run, whose files must all be of one of them.
                lock, activity = f"{run.prefix}.lock", f"making {self.stage} for {self.part}"
                with self.store.files.exclusive(lock, activity, logs.notify):
                    run.forget()
                    if not self._is_ready(run):
                        self.build(run)
            with self.os_errors_explained():
                self.write_view(run)

    def _is_ready(self, run: Run) -> bool:
        return self.is_made() and self.can_be_shown(run)

    def can_be_shown(self, run: Run) -> bool:
        """Whether what a view of a whole run is written from is still what the run says."""
        return True
