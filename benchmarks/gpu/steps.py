"""The steps of the GPU check, most valuable first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Step:
    """A part of the check that runs in a process of its own.

    Attributes:
        name: of the step.
        function: ``module:function`` in this package; called with ``Measurements``.
        expected_s: seconds that it takes on one H100 or H200; it is skipped where less is left of the budget.
        limit_s: seconds after which it is ended.
    """

    name: str
    function: str
    expected_s: float
    limit_s: float


STEPS = (
    Step(name="correctness", function="correctness:run", expected_s=45, limit_s=90),
    Step(name="training", function="training:run", expected_s=90, limit_s=140),
    Step(name="generation", function="generation:run", expected_s=85, limit_s=120),
    Step(name="masks", function="masks:run", expected_s=40, limit_s=60),
    Step(name="poses", function="poses:run", expected_s=30, limit_s=70),
    Step(name="throughput", function="throughput:run", expected_s=60, limit_s=80),
    Step(name="resume", function="resume:run", expected_s=45, limit_s=65),
    Step(name="training_compiled", function="training:run_compiled", expected_s=100, limit_s=200),
    Step(name="generation_compiled", function="generation:run_compiled", expected_s=90, limit_s=180),
)
