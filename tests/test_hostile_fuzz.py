"""Every fuzz target for a moment: its seeds, its regressions, and some inputs that are the same each time.

``python tests/fuzz TARGET --seconds N`` goes on from here, guided by coverage.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

REGRESSIONS = sorted((Path(__file__).parent / "fuzz" / "regressions").glob("*/*"))
NEEDS_TORCH = {"weights"}
EXAMPLES = {"store": 40, "tables": 15}
"""Of the targets that write many files; others try 150 inputs."""


def skip_without_torch(target: str) -> None:
    if target in NEEDS_TORCH:
        pytest.importorskip("torch", reason="the models extra is not installed")


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_broke_a_target_does_so_no_more(path: Path) -> None:
    skip_without_torch(path.parent.name)
    TARGETS[path.parent.name].run(path.read_bytes())


@pytest.mark.filterwarnings("ignore::UserWarning")  # what PIL and torch say of damaged files
@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_are_read_or_refused(name: str) -> None:
    skip_without_torch(name)
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in seeds:
        target.run(seed)

    @settings(
        max_examples=EXAMPLES.get(name, 150),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.sampled_from(seeds), number=st.integers(0, 2**32), times=st.integers(1, 3))
    def attempt(seed: bytes, number: int, times: int) -> None:
        chance = Random(number)
        for _ in range(times):
            seed = target.mutate(seed, chance)
        target.run(seed)

    attempt()
