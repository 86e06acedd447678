"""Every virtio device survives a hostile driver, before and after it was put into a snapshot.

A short form; `make fuzz-devices` runs the long one.
"""

import pytest

from tests.property.virtio_bench import PARTS, survives


@pytest.mark.parametrize("part", PARTS)
def test_a_hostile_driver_ends_in_needs_reset_at_the_worst(part: str) -> None:
    survives(part, max_examples=60)()
