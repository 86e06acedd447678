"""Ratios are taken pairwise; means are geometric."""

import pytest

from bench.stats import Spread, geomean, spread_of_ratios


def test_geomean_of_a_half_and_two_is_one() -> None:
    assert geomean([0.5, 2.0]) == pytest.approx(1.0)
    assert geomean([]) is None


def test_ratios_are_taken_within_a_repetition() -> None:
    """The computer was twice as slow in the second repetition: the ratio does not notice."""
    assert spread_of_ratios([(4.0, 1.0), (8.0, 2.0), (10.0, 2.0)]) == Spread(4.0, 4.0, 5.0)
    assert spread_of_ratios([]) is None
