"""How often a virtio device goes to guest memory for what it is asked, counted.

Source: ours; docs/decisions/0105-*.  An access of many places counts once.
"""

import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.devices.virtio.driver import PACKED, VERSION_1, Driver
from understudy.backends.cable import Cable
from understudy.backends.frame import Frame
from understudy.backends.medium import Zeros
from understudy.backends.overlay import Overlay
from understudy.devices.virtio import net

INDIRECT, EVENT_IDX = 1 << 28, 1 << 29
AT, TABLES = 0x2_0000, 0x8_0000
READ, WRITE = 0, 1
KINDS = [VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | PACKED, VERSION_1 | PACKED | EVENT_IDX]


def for_a_kick(features: int) -> int:
    """The ring's entries, before and after; what was used, and whether it is to be told of.

    A split ring has its descriptors beside the entries.  With event indices the driver is asked for
    the next kick.
    """
    return 4 + (not features & PACKED) + bool(features & EVENT_IDX)


def accesses(d: Driver, act: Callable[[], None]) -> int:
    """How many `act` makes of the driver's memory."""
    count = depth = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def access(*given: Any) -> Any:
            nonlocal count, depth
            count += not depth
            depth += 1
            try:
                return call(*given)
            finally:
                depth -= 1

        return access

    for name in ("read", "write", "gather", "scatter"):
        setattr(d.memory, name, counted(getattr(d.memory, name)))
    act()
    for name in ("read", "write", "gather", "scatter"):
        delattr(d.memory, name)
    return count


def hand_over(d: Driver, slot: int, kind: int) -> None:
    """A request of 1 KB in two pieces, in an indirect table."""
    at, table = AT + 0x1000 * slot, TABLES + 0x100 * slot
    d.memory.write(at, struct.pack("<IIQ", kind, 0, 2 * slot))
    way = 2 if kind == READ else 0
    rows = [(at, 16, 0), (at + 0x100, 512, way), (at + 0x400, 512, way), (at + 0x800, 1, 2)]
    packed = [
        (gpa, size, 0, flags) if d.features & PACKED else (gpa, size, flags | (n < 3), n + 1)
        for n, (gpa, size, flags) in enumerate(rows)
    ]
    d.memory.write(table, b"".join(struct.pack("<QIHH", *row) for row in packed))
    d.describe(0, slot, table, 16 * len(rows), 4)
    d.offer(0, slot)


@pytest.mark.parametrize("requests", [1, 2, 7, 31])
@pytest.mark.parametrize("features", KINDS)
@pytest.mark.parametrize("kind", [READ, WRITE])
def test_a_request_is_two_and_what_comes_by_one_kick_shares_the_rest(
    kind: int, features: int, requests: int
) -> None:
    d = Driver("virtio_blk", medium=Overlay(Zeros(1 << 20)))
    d.start(features | INDIRECT, 64)
    for slot in range(requests):
        hand_over(d, slot, kind)
    tables = 1
    assert accesses(d, d.kick) == 2 * requests + tables + for_a_kick(features)
    assert len(d.finished(0)) == requests


@pytest.mark.parametrize("buffers", [1, 2, 7, 31])
@pytest.mark.parametrize("features", KINDS)
def test_a_frame_is_one_however_many_buffers_it_fills(features: int, buffers: int) -> None:
    wire = Cable()
    d = Driver("virtio_net", cable=wire)
    d.start(features | net.MRG_RXBUF, 64)
    for n in range(buffers):
        d.describe(0, n, AT + 0x800 * n, 1500, 2)
        d.offer(0, n)
    wire.arrive(Frame(bytes(1500 * buffers - 12)))
    part: Any = d.device
    assert accesses(d, part.look) == 1 + for_a_kick(features)
    assert len(d.finished(0)) == buffers
