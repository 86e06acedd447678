"""The first rounds of every campaign."""

import pytest

from tests.walls.campaigns import PARTS, chance

SEED = 1


@pytest.mark.parametrize("name", PARTS)
def test_the_first_rounds_hold(name: str) -> None:
    with PARTS[name].setting() as one_round:
        for number in range(PARTS[name].rounds):
            try:
                one_round(chance(name, SEED, number))
            except BaseException as problem:
                problem.add_note(
                    f"python -m tests.walls.campaigns {name} --seed {SEED} --round {number}"
                )
                raise
