"""Builds into an object store that fails: what is asked of each, and a driver that counts how many keep to it.

``python tests/object_store_faults.py --minutes 10`` injects faults at random, from one seed after another, and ends
with the counts; it stops at the first build that does not keep to it, whose seed was printed last.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import Build, Workspace
from object_store import WRITES, BucketWorkspace, Choose, Fault, Seen, Server, impatient, often, running
from processes import HANG_S

from spctrl.store.code_version import copy_code
from spctrl.store.runs import Run
from spctrl.store.store import Store
from tasks.maintenance import verify

SHARD_IMAGES = 3
IMAGES = 8
NOT_OF_THE_DATA = {"started_at", "finished_at", "duration_s"}
SHARES = (0.02, 0.1, 0.3)
BUILDS_PER_KILL = 5
LAST_WRITE = 20


@dataclass(frozen=True)
class Contents:
    """What a store and its exports hold, without what the time of day and the place decide."""

    packs: dict[str, bytes]
    runs: dict[str, dict[str, Any]]
    exported: dict[str, str]

    @classmethod
    def of(cls, workspace: Workspace) -> Contents:
        packs = {
            path.relative_to(workspace.store).as_posix(): path.read_bytes()
            for path in workspace.store.glob("packs/*/[!.]*")
        }
        runs = {}
        for run in Store(workspace.store).runs():
            if run.stage != "export":  # its counts depend on what the folder held
                runs[run.prefix] = _facts(run)
        return cls(packs, runs, workspace.exported())

    def differences(self, other: Contents) -> list[str]:
        """Names of what only one of them has, or has otherwise."""
        names: set[str] = set()
        for ours, theirs in (
            (self.packs, other.packs),
            (self.runs, other.runs),
            (self.exported, other.exported),
        ):
            names |= {name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)}
        return sorted(names)


def _facts(run: Run) -> dict[str, Any]:
    facts = {name: value for name, value in run.provenance().items() if name not in NOT_OF_THE_DATA}
    facts["files"] = {name: entry for name, entry in facts["files"].items() if name != "report.html"}
    # How many were made depends on what an interrupted build had made before.
    facts["counts"] = {name: count for name, count in facts["counts"].items() if name != "made"}
    return facts


def configure_small(workspace: Workspace) -> None:
    """Set a workspace to build one condition of AP-10K's training split."""
    workspace.configure("export", format="webdataset,parquet", shard_images=SHARD_IMAGES)
    workspace.configure("build", datasets=["ap10k"], splits=["train"], conditions=["spatext"])


def build_through(remote: BucketWorkspace, undisturbed: Contents, choose: Choose) -> Build:
    """Build through faults, then without: what counted as done was sound, and the end is as if nothing had been."""
    remote.bucket.proxy.choose = choose
    build = remote.build()
    remote.bucket.proxy.choose = lambda seen: None
    remote.fetch()
    check_sound(remote)
    assert build.succeeded or build.errors, build
    for error in build.errors:
        assert error.startswith("StoreError: ") and remote.bucket.url in error and "un again" in error, error
    again = remote.build()
    assert again.succeeded, again.errors
    found = Contents.of(remote)
    assert found == undisturbed, found.differences(undisturbed)
    assert remote.faults() == []
    return build


def check_sound(remote: BucketWorkspace) -> None:
    """What counts as done is whole, to those who look at the bucket and to ``spctrl verify``."""
    store, exports = (f"{remote.bucket.url}/{name}" for name in ("store", "exports"))
    assert remote.faults() == []
    assert verify(Store(store, remote.folder / "verify"), exports, repair=False) == []


def kill_at_write(remote: BucketWorkspace, number: int) -> bool:
    """Kill a build with its n-th write, which the server does not see; says whether it came so far."""
    build = remote.start()
    remote.bucket.proxy.choose = _killing(build, number)
    output, _ = build.communicate(timeout=HANG_S)
    remote.bucket.proxy.choose = lambda seen: None
    assert build.returncode in (0, -signal.SIGKILL), output
    return build.returncode != 0


def _killing(build: subprocess.Popen[str], at_write: int) -> Choose:
    """Kill a build, with its workers, at its n-th write, which the server does not see."""
    writes = 0

    def choose(seen: Seen) -> Fault | None:
        nonlocal writes
        writes += seen.operation in WRITES
        if seen.operation not in WRITES or writes < at_write:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(build.pid, signal.SIGKILL)
        return Fault.DROPPED

    return choose


# The driver


def count_builds(server: Server, folder: Path, minutes: float, first_seed: int) -> Counter[str]:
    """Build through faults until the time is over; gives what happened how often."""
    from spctrl.demo_data import write_sample

    data, code = folder / "data", folder / "code"
    write_sample(data, images_per_split=IMAGES, datasets=["ap10k"])
    copy_code(code)
    local = Workspace(folder / "local", data)
    configure_small(local)
    assert local.build().succeeded
    undisturbed = Contents.of(local)
    digest_cache = local.store / "cache.sqlite"

    counts: Counter[str] = Counter()
    end, seed = time.monotonic() + 60 * minutes, first_seed
    while time.monotonic() < end:
        rng = random.Random(seed)
        server.proxy.forget()
        remote = BucketWorkspace(folder / f"seed-{seed}", data, code, server.bucket(), digest_cache)
        configure_small(remote)
        print(f"seed {seed}", flush=True)
        if seed % BUILDS_PER_KILL == 0:
            counts["builds killed at a write"] += kill_at_write(remote, rng.randint(1, LAST_WRITE))
        faults = list(Fault) if rng.random() < 0.5 else [rng.choice(list(Fault))]
        build = build_through(remote, undisturbed, often(faults, rng.choice(SHARES), seed))
        counts["builds through faults"] += 1
        counts["of them done all the same" if build.succeeded else "of them ended with a clear error"] += 1
        counts["requests"] += len(server.proxy.seen)
        counts.update({f"fault: {fault}": count for fault, count in server.proxy.injected.items()})
        shutil.rmtree(remote.folder)
        seed += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first build")
    options = parser.parse_args()
    with running() as server, impatient(), tempfile.TemporaryDirectory() as folder:
        counts = count_builds(server, Path(folder), options.minutes, options.seed)
    faults = sum(count for name, count in counts.items() if name.startswith("fault: "))
    print(f"{faults:,} faults injected; every store ended as one of an undisturbed build")
    for name, count in sorted(counts.items()):
        print(f"{count:8,}  {name}")


if __name__ == "__main__":
    main()
