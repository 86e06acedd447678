"""Many Debians in little memory: each answers, and what each costs.  See `two_hundred`."""

import pytest

from tests.guests.fetched import fetched
from tests.walls.two_hundred import crowd


@pytest.mark.real_guest
def test_two_booted_and_two_forked() -> None:
    fetched("cloud-amd64")
    cost = crowd(2, 2, "96M", "1G", megabytes=1, at_once=2)
    booted, forked = cost.kinds(0, 2), cost.kinds(2, 4)
    assert booted["shared"] + booted["zero"] > 0
    assert forked["consumed"] < booted["consumed"], "a fork has its own only where it wrote"
    print(cost)
