"""The steps of the GPU check, most valuable first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Step:
    """A part of the check that runs in a process of its own.

    Attributes:
        name: of the step.
        function: ``module:function`` in this package; called with ``Measurements``.
        expected_s: seconds that it takes on one H200, measured or estimated; it is skipped where less is left of the
            budget.
        limit_s: seconds after which it is ended.
    """

    name: str
    function: str
    expected_s: float
    limit_s: float


STEPS = (
    Step(name="correctness", function="correctness:run", expected_s=60, limit_s=90),
    Step(name="training", function="training:run", expected_s=75, limit_s=120),
    Step(name="generation", function="generation:run", expected_s=55, limit_s=90),
    Step(name="masks", function="masks:run", expected_s=40, limit_s=70),
    Step(name="poses", function="poses:run", expected_s=50, limit_s=70),
    Step(name="throughput", function="throughput:run", expected_s=55, limit_s=80),
    Step(name="resume", function="resume:run", expected_s=60, limit_s=90),
    # Compiling alone takes more than two minutes: these need --only and a budget of their own.
    Step(name="training_compiled", function="training:run_compiled", expected_s=300, limit_s=560),
    Step(name="generation_compiled", function="generation:run_compiled", expected_s=200, limit_s=400),
)
