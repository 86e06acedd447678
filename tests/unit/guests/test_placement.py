"""Placement against a brute-force oracle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.guests import GuestError
from understudy.guests.placement import Placement, mib

PAGE = 4096


class Pages:
    """A memory of some ranges; contents do not matter here."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self._ranges = ranges
        self.size = sum(length for _, length in ranges)

    def ranges(self) -> list[tuple[int, int]]:
        return self._ranges

    def read(self, gpa: int, length: int, /) -> bytes:
        return bytes(length)

    def write(self, gpa: int, data: bytes, /) -> None:
        raise AssertionError("only places, writes nothing")


@given(
    st.lists(st.tuples(st.integers(0, 59), st.integers(1, 6)), max_size=6),
    st.integers(1, 12),
    st.integers(1, 70),
)
def test_highest_is_the_highest(claims: list[tuple[int, int]], pages: int, below: int) -> None:
    place = Placement(Pages([(0, 20 * PAGE), (24 * PAGE, 40 * PAGE)]))
    free = {*range(20), *range(24, 64)}
    for start, length in claims:
        wanted = set(range(start, start + length))
        if wanted <= free:
            place.claim("a thing", start * PAGE, length * PAGE)
            free -= wanted
        else:
            with pytest.raises(GuestError):
                place.claim("a thing", start * PAGE, length * PAGE)
    fitting = [p for p in range(64) if {*range(p, p + pages)} <= free and p + pages <= below]
    if fitting:
        assert place.highest("it", pages * PAGE, below * PAGE) == fitting[-1] * PAGE
    else:
        with pytest.raises(GuestError, match="does not fit"):
            place.highest("it", pages * PAGE, below * PAGE)


def test_sizes_for_people() -> None:
    assert [mib(n) for n in (1, 1024, 1 << 20, (1 << 20) + 1)] == [
        "1 KiB",
        "1 KiB",
        "1 MiB",
        "2 MiB",
    ]
