"""Virtio over PCI: what a driver finds, negotiates, and is told."""

import json
from typing import Any

import pytest

from tests.unit.devices.virtio.driver import BAR, BUFFERS, MSIX, PACKED, QUEUES, VERSION_1, Driver
from understudy.devices import Device
from understudy.devices.message import Message
from understudy.devices.virtio.function import ISR, NOTIFY
from understudy.devices.virtio.pci import VirtioPci

EVENT_IDX = 1 << 29


def test_a_driver_finds_it_by_its_ids_and_capabilities() -> None:
    d = Driver("virtio_rng")
    assert d.config(0) == 0x1044_1AF4
    found = [
        (d.config(at + 3, 1), d.config(at + 4, 1), d.config(at + 8), d.config(at + 12))
        for at in (d.capability(9, n) for n in range(5))
    ]
    assert found == [(1, 0, 0, 56), (2, 0, NOTIFY, 4), (3, 0, ISR, 1), (4, 0, 0x2000, 0x1000),
                     (5, 0, 0, 0)]  # fmt: skip
    assert d.config(d.capability(9, 1) + 16) == 4
    assert d.config(0x10) == BAR


def test_features_are_only_ok_with_version_1_and_nothing_that_was_not_offered() -> None:
    d = Driver("virtio_rng")
    assert d.offered == VERSION_1 | PACKED | 3 << 28
    assert d.accept(0) == 3
    assert d.accept(VERSION_1 | 1 << 27) == 3
    assert d.accept(VERSION_1 | EVENT_IDX) == 11
    d.put(8, 0)
    d.put(0xC, 0)  # too late
    assert d.get(0xC) == EVENT_IDX


def test_a_reset_forgets_all_but_the_bus() -> None:
    d = Driver("virtio_rng")
    d.start()
    d.put(0x14, 0, 1)
    assert d.status == 0
    assert (d.get(0x18, 2), d.get(0x1A, 2), d.get(0x1C, 2)) == (64, 0xFFFF, 0)
    assert d.get(0x20, 8) == 0
    d.start()
    assert len(d.request(0, b"", 32)) == 32


def test_messages_by_vector_and_none_without_one() -> None:
    d = Driver("virtio_rng")
    d.start()
    d.request(0, b"", 8)
    assert d.messages == [Message(0x41, 0)]
    d.put(0x1A, 2, 2)  # there are but two vectors
    assert d.get(0x1A, 2) == 0xFFFF
    d.request(0, b"", 8)
    assert len(d.messages) == 1 and d.irqs == []


def test_the_pin_stays_up_until_the_isr_is_read() -> None:
    d = Driver("virtio_rng")
    d.start(msix=False)
    d.request(0, b"", 8)
    d.request(0, b"", 8)
    assert d.irqs == [(1, True)] and d.messages == []
    assert d.get(ISR, 1) == 1
    assert d.irqs == [(1, True), (1, False)] and d.get(ISR, 1) == 0


def test_nothing_before_driver_ok_and_all_of_it_then() -> None:
    d = Driver("virtio_rng")
    d.start()
    d.put(0x14, 0, 1)
    d.accept(VERSION_1)
    for register, place in ((0x20, 0), (0x28, 0x400), (0x30, 0x800)):
        d.put(register, QUEUES + place, 8)
    d.put(0x18, 8, 2)
    d.put(0x1C, 1, 2)
    d.describe(0, 0, BUFFERS, 4, 2)
    d.offer(0, 0)
    d.kick()
    assert d.finished(0) == []
    d.put(0x14, 15, 1)
    assert d.finished(0) == [(0, 4)]


def test_registers_of_64_bits_in_halves() -> None:
    d = Driver("virtio_rng")
    d.put(0x20, 0x1000)
    d.put(0x24, 0x5)
    assert d.get(0x20, 8) == 0x5_0000_1000
    d.put(0x18, 6, 2)  # no power of two
    assert d.get(0x18, 2) == 64
    d.put(0x21, 0xFF, 1)  # no register
    assert d.get(0x20, 8) == 0x5_0000_1000


def test_the_window_in_configuration_space_reaches_the_registers() -> None:
    d = Driver("virtio_rng")
    at = d.capability(9, 4)
    d.set_config(at + 8, 0x14)
    d.set_config(at + 12, 1)
    d.set_config(at + 16, 1, 1)
    assert d.status == 1
    d.put(0x14, 3, 1)
    assert d.config(at + 16, 1) == 3
    d.set_config(at + 12, 3)  # no size: nothing happens
    d.set_config(at + 16, 0, 1)
    assert d.status == 3


def test_it_needs_memory_and_bears_to_be_refused() -> None:
    d = Driver("virtio_rng")
    d.start()
    d.set_config(4, 2, 2)  # no longer bus master
    d.describe(0, 0, BUFFERS, 4, 2)
    d.offer(0, 0)
    d.kick()
    assert d.status == 15 | 64 and d.messages == []
    d.set_config(4, 6, 2)
    d.kick()
    assert d.finished(0) == []  # until the driver has reset it
    d.start()
    assert len(d.request(0, b"", 4)) == 4


def test_a_broken_ring_tells_the_driver_by_a_change_of_configuration() -> None:
    d = Driver("virtio_rng")
    d.start()
    generation = d.get(0x15, 1)
    d.offer(0, 99)
    d.kick()
    assert d.status == 15 | 64 and d.messages == [Message(0x40, 0)]
    assert d.get(0x15, 1) == generation + 1


def test_a_snapshot_between_offer_and_kick() -> None:
    d = Driver("virtio_rng")
    d.start(VERSION_1 | EVENT_IDX)
    first = d.request(0, b"", 16)
    d.describe(0, 0, BUFFERS, 16, 2)
    d.offer(0, 0)
    other = Driver("virtio_rng")
    other.board.load(json.loads(json.dumps(d.board.save())))
    other.memory.ram[:] = d.memory.ram
    for one in (d, other):
        one.board.bus.mmio_write(BAR + NOTIFY, 2, 0)
    assert other.memory.ram == d.memory.ram
    assert d.memory.read(BUFFERS, 16) not in (first, bytes(16))


@pytest.mark.parametrize(("field", "value"), [("size", 0), ("size", 128), ("vector", 2)])
def test_a_snapshot_with_a_queue_that_cannot_be_is_refused(field: str, value: int) -> None:
    d = Driver("virtio_rng")
    saved = d.board.save()
    saved["virtio_rng"]["state"]["queues"][0][field] = value
    with pytest.raises(ValueError, match="virtio_rng"):
        d.board.load(saved)


def test_a_snapshot_with_more_queues_is_refused() -> None:
    d = Driver("virtio_rng")
    saved = d.board.save()
    saved["virtio_rng"]["state"]["queues"] *= 2
    with pytest.raises(ValueError, match="virtio_rng"):
        d.board.load(saved)


def test_msix_table_is_where_the_capability_says() -> None:
    d = Driver("virtio_rng")
    assert d.config(0x10 + 4 * 2) == MSIX


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("virtio_blk", {"queues": 0}),
        ("virtio_blk", {"queues": 1 << 30}),
        ("virtio_console", {"ports": []}),
        ("virtio_console", {"ports": [""] * 17}),
        ("virtio_rng", {"seed": "a text"}),
        ("virtio_rng", {"seed": b"short"}),
    ],
)
def test_a_row_with_what_cannot_be_is_refused(part: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{part}: .*expected"):
        Driver(part, **options)


@pytest.mark.parametrize("part", sorted(kind.name for kind in Device.ALL.values()
                                        if issubclass(kind, VirtioPci)))  # fmt: skip
def test_each_switch_hides_its_feature_and_no_other(part: str) -> None:
    options: dict[str, dict[str, int]] = {"virtio_blk": {"queues": 2}, "virtio_net": {"pairs": 2}}
    whole = Driver(part, **options.get(part, {})).offered
    switches = Device.ALL[part].switches  # type: ignore[attr-defined]
    assert {"packed", "indirect", "event-idx"} <= switches.keys()
    for name, bit in switches.items():
        d = Driver(part, **options.get(part, {}))
        d.device.hide([name, "of-another-device"])
        assert whole & bit and d.offered == whole & ~bit
        assert d.accept(whole) == 3, "and it cannot be accepted"
