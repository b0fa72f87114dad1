"""Weights of models: where they lie, what tells them apart, and the task that asks the user for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import luigi

from spctrl.store.digests import MISSING, digest, digest_cache
from spctrl.store.store import Store
from tasks import settings
from tasks.settings import OfSettings

if TYPE_CHECKING:
    from spctrl.weights import KnownWeights


class Weights(OfSettings, luigi.ExternalTask):
    """A weight file or folder, which the user puts in place."""

    name = luigi.Parameter(description="entry of weights.yaml")
    path = luigi.Parameter()

    def output(self) -> luigi.LocalTarget:
        return luigi.LocalTarget(self.path)

    def complete(self) -> bool:
        from spctrl.weights import known_weights

        entry = known_weights()[self.name]
        if Path(self.path).exists():
            return self._is_genuine(entry)
        luigi.task.logger.error(
            "expected weights at %s, found none. They are %s, for %s: get %s from %s (licence: %s), put it there, or "
            "name another place in those settings",
            self.path, entry.what, entry.setting, Path(entry.file).name, entry.publisher, entry.licence,
        )  # fmt: skip
        return False

    def _is_genuine(self, entry: KnownWeights) -> bool:
        """Whether a file under its publisher's name is its publisher's; one under another name may be anything."""
        from spctrl.weights import are_random

        path = Path(self.path)
        if entry.sha256 is None or path.name != Path(entry.file).name or are_random(path):
            return True
        found = digest_cache(settings.store()).file_digest(path)
        if found.startswith(entry.sha256):
            return True
        luigi.task.logger.error(
            "expected a file whose SHA-256 begins with %s at %s (weights.yaml, %s), found %s. It may be cut "
            "short: get it again from %s. Weights of your own need another file name",
            entry.sha256, path, self.name, found, entry.publisher,
        )  # fmt: skip
        return False


def weights_at(name: str) -> Path:
    """Where weights lie: an entry of weights.yaml, below ``[paths] weights``; or else the path itself."""
    from spctrl.weights import known_weights

    known = known_weights()
    return Path(settings.paths().weights) / known[name].file if name in known else Path(name)


def weights_digest(store: Store, path: Path) -> str:
    """Digest of weights' contents, wherever they lie; ``MISSING`` where there are none."""
    cache = digest_cache(store)
    if not path.is_dir():
        # The sizes of a model that is not one of the known ones.
        beside = path.with_name(f"{path.name}.json")
        if path.exists() and beside.exists():
            return digest(cache.file_digest(path), cache.file_digest(beside))
        return cache.file_digest(path)
    names = sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_file())
    return cache.list_digest(str(path), names) or MISSING
