"""One step of the GPU check, as the runner starts it: ``python -m benchmarks.gpu STEP RESULTS DEVICE [--small]``."""

from __future__ import annotations

import argparse
import importlib
import warnings
from pathlib import Path

import torch

from benchmarks.gpu.measure import Measurements
from benchmarks.gpu.steps import STEPS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("step", choices=[step.name for step in STEPS])
    parser.add_argument("results", type=Path)
    parser.add_argument("device", type=torch.device)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    step = next(step for step in STEPS if step.name == arguments.step)
    module, _, function = step.function.partition(":")
    warnings.simplefilter("ignore", FutureWarning)
    measurements = Measurements(step.name, arguments.results, arguments.device, arguments.small)
    getattr(importlib.import_module(f"benchmarks.gpu.steps.{module}"), function)(measurements)


if __name__ == "__main__":
    main()
