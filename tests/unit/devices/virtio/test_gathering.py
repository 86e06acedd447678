"""Requests that wait for others: when they do, when it ends, and what a snapshot keeps of it."""

import json
import struct

import pytest

from tests.unit.devices.virtio.driver import PACKED, VERSION_1, Driver
from understudy.backends.medium import Zeros
from understudy.backends.overlay import Overlay
from understudy.devices.virtio.gathering import ALONE, GATHER_NS, Gathering

EVENT_IDX = 1 << 29
SIZE, AT = 1 << 16, 0x2_0000


def disk(features: int = VERSION_1 | EVENT_IDX) -> Driver:
    d = Driver("virtio_blk", medium=Overlay(Zeros(SIZE)))
    d.start(features)
    return d


def offer(d: Driver, slot: int) -> None:
    """A read of one sector, in descriptors of its own."""
    at = AT + 0x1000 * slot
    d.memory.write(at, struct.pack("<IIQ", 0, 0, slot) + b"\xee" * 513)
    d.describe(0, 2 * slot, at, 16, 1, 2 * slot + 1)
    d.describe(0, 2 * slot + 1, at + 16, 513, 2)
    d.offer(0, 2 * slot)
    if d.features & EVENT_IDX and not d.features & PACKED:  # it wants an interrupt for the next
        state = d.device.state.queues[0]
        d.memory.write(state.driver + 4 + 2 * state.size, struct.pack("<H", d.rings[0].used))


def ask(d: Driver, slot: int = 0) -> list[int]:
    """Offer it and kick; whose have come back."""
    offer(d, slot)
    d.kick()
    return finished(d)


def finished(d: Driver) -> list[int]:
    return [head // 2 for head, _ in d.finished(0)]


def alone(d: Driver) -> None:
    """As many as are answered at once."""
    for _ in range(ALONE):
        assert ask(d) == [0]
    d.messages.clear()


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | PACKED])
def test_one_of_many_waits_and_what_comes_meanwhile_comes_back_with_it(features: int) -> None:
    d = disk(features)
    alone(d)
    assert ask(d, 0) == [] and ask(d, 1) == []  # the second kick changes nothing
    offer(d, 2)  # nobody asked for a kick
    d.clock.advance(GATHER_NS - 1)
    assert finished(d) == [] and d.messages == []
    d.clock.advance(1)
    assert finished(d) == [0, 1, 2] and len(d.messages) == 1
    assert d.memory.read(AT + 0x2000 + 16, 513) == bytes(513)
    assert ask(d, 0) == []  # it was worth it, so it waits again


@pytest.mark.parametrize("kind", [0, PACKED])
def test_a_driver_without_event_indices_is_told_not_to_kick(
    kind: int,
) -> None:
    """VIRTQ_USED_F_NO_NOTIFY; RING_EVENT_FLAGS_DISABLE."""
    d = disk(VERSION_1 | kind)
    where = d.device.state.queues[0].device + (2 if kind else 0), 2
    alone(d)
    assert d.memory.read(*where).hex() == "0000"
    assert ask(d) == [] and d.memory.read(*where).hex() == "0100"
    d.clock.hurry()
    assert finished(d) == [0] and d.memory.read(*where).hex() == "0000"


@pytest.mark.parametrize("kind", [0, PACKED])
def test_while_requests_wait_the_driver_is_asked_for_no_kick(kind: int) -> None:
    """What tells the driver where to kick is written when the ring has been served, and only then.

    Source: "Available Buffer Notification Suppression".
    """
    d = disk(VERSION_1 | EVENT_IDX | kind)
    alone(d)
    state = d.device.state.queues[0]
    where = (state.device, 4) if kind else (state.device + 4 + 8 * state.size, 2)
    before = d.memory.read(*where)
    assert ask(d, 0) == []
    offer(d, 1)
    assert d.memory.read(*where) == before
    d.clock.hurry()
    assert finished(d) == [0, 1] and d.memory.read(*where) != before


def test_a_wait_without_company_is_the_last_one_for_a_while() -> None:
    d = disk()
    for _ in range(3):
        alone(d)
        assert ask(d) == []
        d.clock.advance(GATHER_NS)
        assert finished(d) == [0]


def test_it_ends_when_a_processor_has_nothing_else_to_do() -> None:
    d = disk()
    alone(d)
    assert ask(d, 0) == []
    offer(d, 1)
    d.clock.hurry()
    assert finished(d) == [0, 1] and len(d.messages) == 1
    d.clock.hurry()
    d.clock.advance(2 * GATHER_NS)
    assert finished(d) == [] and len(d.messages) == 1


def test_a_snapshot_keeps_who_waits_and_until_when() -> None:
    d = disk()
    alone(d)
    assert ask(d, 0) == []
    offer(d, 1)
    d.clock.advance(1000)
    others = []
    for _ in range(2):
        other = Driver("virtio_blk", d.clock.ns, medium=Overlay(Zeros(SIZE)))
        other.board.load(json.loads(json.dumps(d.board.save())))
        other.memory.ram[:] = d.memory.ram
        other.rings = d.rings_in(other.memory)
        others.append(other)
    others[0].clock.advance(GATHER_NS - 1001)
    assert finished(others[0]) == []
    others[0].clock.advance(1)
    others[1].clock.hurry()
    assert [finished(one) for one in others] == [[0, 1], [0, 1]]
    assert others[0].board.save() == others[1].board.save()


def test_a_reset_ends_the_wait_and_a_broken_ring_is_found_when_it_ends() -> None:
    d = disk()
    alone(d)
    assert ask(d) == []
    d.put(0x14, 0, 1)
    assert isinstance(d.device, Gathering) and d.device.state.gathering == 0
    d.clock.advance(2 * GATHER_NS)
    d.start(VERSION_1 | EVENT_IDX)
    alone(d)
    d.offer(0, 0xFFFF)
    d.kick()
    assert d.status == 15
    d.clock.hurry()
    assert d.status == 15 | 64  # needs reset
    d.kick()
    d.clock.advance(2 * GATHER_NS)
    assert finished(d) == []
