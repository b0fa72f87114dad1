"""Fuzz one target: ``python tests/fuzz TARGET --seconds 300``.

Needs ``pip install atheris``. Prints a line of JSON: number of inputs, time, and the largest memory that the process
held. An input that breaks the target ends the run and is kept below ``--out``; once the fault is mended it belongs
into ``tests/fuzz/regressions/TARGET/``, where the tests try it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import sys
import time
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from random import Random

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS), str(TESTS.parent)]

with atheris.instrument_imports(include=["spctrl", "eval", "tasks"]):
    from fuzz.targets import TARGETS, Target

SHARE_OF_OWN_MUTATIONS = 0.8
"""The others are libFuzzer's, which know nothing of the format but learn words from comparisons."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path("build/fuzz"), help="folder for inputs that are kept"
    )
    parser.add_argument("--growth-mib", type=int, default=200, help="memory that one input may add")
    parser.add_argument("--largest-input", type=int, default=65_536, help="bytes")
    given = parser.parse_args()
    counts = RawArray("d", 3)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        fuzz(TARGETS[given.target], given, counts)
        os._exit(1)  # not reached: libFuzzer ends the process
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - started
    facts = {
        "target": given.target, "inputs": int(counts[0]), "seconds": round(seconds),
        "slowest_input_s": round(counts[1], 2), "start_mib": int(counts[2]), "peak_mib": usage.ru_maxrss // 1024,
        "exit_code": os.waitstatus_to_exitcode(status),
    }  # fmt: skip
    print(json.dumps(facts), flush=True)
    return int(facts["exit_code"] != 0)


def fuzz(target: Target, given: argparse.Namespace, counts: ctypes.Array[ctypes.c_double]) -> None:
    """Try inputs until the time is up or one breaks the target; ``counts`` are inputs, slowest (s), start (MiB)."""
    corpus, crashes = given.out / given.target / "corpus", given.out / given.target / "crashes"
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
        target.run(seed)  # what is loaded once is not held against an input
    counts[2] = peak_mib()

    def one(data: bytes) -> None:
        before_mib, began = peak_mib(), time.monotonic()
        target.run(data)
        counts[0] += 1
        counts[1] = max(counts[1], time.monotonic() - began)
        if (grown_mib := peak_mib() - before_mib) > given.growth_mib:
            raise MemoryError(f"this input of {len(data)} bytes took {grown_mib} MiB more than any before it")

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        chance = Random(seed)
        own = chance.random() < SHARE_OF_OWN_MUTATIONS
        return (target.mutate(data, chance) if own else atheris.Mutate(data, largest))[:largest]

    options = [
        f"-max_total_time={given.seconds}", f"-seed={given.seed}", f"-max_len={given.largest_input}",
        f"-artifact_prefix={crashes}/", "-timeout=60", "-rss_limit_mb=4096", "-verbosity=0",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    sys.exit(main())
