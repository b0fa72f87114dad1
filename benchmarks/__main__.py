"""Measure, print tables with ratios and targets, and write build/benchmarks/<name>.json."""

from __future__ import annotations

import argparse
import importlib
import sys

from benchmarks.common import CONSOLE, Report, machine

BENCHMARKS = (
    "render",
    "index",
    "noop",
    "masks",
    "depth",
    "embedding",
    "loader",
    "pose",
    "pose_ap",
    "frechet",
    "coverage",
    "train_step",
    "ray",
    "scaling",
    "bad_records",
)
"""Modules of this package, each with a function ``run``."""


GPU = "gpu"
"""Runs by itself, with options of its own."""


def main() -> None:
    if sys.argv[1:2] == [GPU]:
        from benchmarks.gpu import runner

        sys.exit(runner.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"On a GPU: python -m benchmarks {GPU} --help",
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="small inputs: shows that it works, the ratios mean little"
    )
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(BENCHMARKS)):
        parser.error(f"expected names among {', '.join(BENCHMARKS)}, found {', '.join(unknown)}")
    CONSOLE.print(machine(), highlight=False)
    for name in arguments.names or BENCHMARKS:
        report = Report(name, quick=arguments.quick)
        importlib.import_module(f"benchmarks.{name}").run(report)
        report.write()


if __name__ == "__main__":
    main()
