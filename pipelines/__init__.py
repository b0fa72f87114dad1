"""The targets that users name.

``luigi --module pipelines BuildDataset`` imports this package, and Luigi offers no other hook for a set-up of the
command. So this is where the set-up is made, and only in the processes of the commands: an import in a notebook or in
another program changes nothing.
"""

from __future__ import annotations

from pipelines import luigi_setup

if luigi_setup.is_luigi_command() or luigi_setup.is_spctrl_command():
    luigi_setup.prepare_process()  # before Luigi is imported, which reads the settings files while it is

# isort: split
from pipelines.benchmark import Benchmark, Evaluate
from pipelines.build_dataset import BuildDataset
from pipelines.generate import Generate
from tasks.experiment.train import Train

__all__ = ["Benchmark", "BuildDataset", "Evaluate", "Generate", "Train"]

if luigi_setup.is_luigi_command():
    luigi_setup.configure()
