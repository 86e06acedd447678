"""The figures of a scan are of what they say: all frames, in each round."""

import pytest

from bench.overcommit import ALIKE, MIXED, OWN, filled, rounds


@pytest.mark.parametrize(("kind", "merged"), [(OWN, 0), (ALIKE, 48), (MIXED, 16 + 31)])
def test_what_is_alike_is_shared_in_the_first_round(kind: str, merged: int) -> None:
    with filled(kind, 2, 48) as sharing:
        assert sharing.scan(2 * 48) == merged
        assert sharing.scanned == 2 * 48 and sharing.scan(2 * 48) == 0


def test_each_round_has_a_figure() -> None:
    found = rounds(OWN, 3, 2, 64)
    assert len(found) == 3 and all(one > 0 for one in found)
