"""State machines, until so many steps are done."""

import itertools

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def play(kind: type[RuleBasedStateMachine], steps: int, length: int) -> None:
    """Run machines of up to `length` steps until `kind.done` says that so many are done in all."""
    options = settings(
        max_examples=max(1, min(steps // length, 500)), stateful_step_count=length, deadline=None,
        database=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate,),
    )  # fmt: skip
    for chance in itertools.count(1):
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            seed(chance)(kind), settings=options
        )
        if kind.done >= steps:  # type: ignore[attr-defined]
            return
