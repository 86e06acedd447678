"""A guest at a tap, in a network namespace of the test's own: IPv4 and IPv6, both ways."""

import pytest

from tests.guests.fetched import fetched
from tests.unit.backends.test_tap import in_namespace


@pytest.mark.real_guest
def test_a_guest_at_a_tap() -> None:
    fetched("cloud-amd64")
    assert in_namespace("tests.guests.tap_in_namespace").endswith("all is well\n")
