"""The first rounds of every campaign."""

from pathlib import Path

import pytest

from tests.walls.campaigns import PARTS, chance
from tests.walls.snapshots import booted
from understudy.guests.entry import GuestError

SEED = 1


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.real_guest] * part.boots)
     for name, part in PARTS.items()],
)  # fmt: skip
def test_the_first_rounds_hold(name: str) -> None:
    if PARTS[name].boots:
        try:
            booted()
        except GuestError as problem:
            pytest.skip(f"no guest: {problem}")
    with PARTS[name].setting() as one_round:
        for number in range(PARTS[name].rounds):
            try:
                one_round(chance(name, SEED, number))
            except BaseException as problem:
                problem.add_note(
                    f"python -m tests.walls.campaigns {name} --seed {SEED} --round {number}"
                )
                raise


def test_what_a_part_writes_goes_with_it() -> None:
    with PARTS["agents"].setting():
        Path("a@b").touch()
    assert not Path("a@b").exists()
