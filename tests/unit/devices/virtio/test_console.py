"""Virtio console: ports, names, bytes both ways, and what waits."""

import json
import struct
from typing import Any

import pytest

from tests.unit.devices.virtio.driver import BUFFERS, VERSION_1, Driver

MULTIPORT = 1 << 1
READY, ADD, PORT_READY, CONSOLE, OPEN, NAME = 0, 1, 3, 4, 6, 7


def console(*ports: str, features: int = VERSION_1 | MULTIPORT) -> tuple[Driver, Any, list[Any]]:
    d = Driver("virtio_console", ports=ports or ("",))
    d.start(features)
    part: Any = d.device
    said: list[Any] = []
    part.on_output.append(lambda port, data: said.append((port, data)))
    return d, part, said


def give(d: Driver, n: int, index: int, room: int) -> int:
    """A buffer to be filled, from the part of memory that belongs to it; where it is."""
    gpa = 0x2_0000 + 0x2000 * n + 0x100 * index
    d.describe(n, index, gpa, room, 2)
    d.offer(n, index)
    d.kick(n)
    return gpa


def filled(d: Driver, n: int) -> list[bytes]:
    return [
        d.memory.read(0x2_0000 + 0x2000 * n + 0x100 * head, count) for head, count in d.finished(n)
    ]


def tell(d: Driver, port: int, event: int, value: int = 1) -> None:
    assert d.request(3, struct.pack("<IHH", port, event, value), 0) == b""


def test_what_the_guest_writes_comes_out() -> None:
    d, _, said = console()
    d.request(1, b"hello", 0)
    d.put(0x2008, ord("!"))  # emerg_wr
    assert said == [(0, b"hello"), (0, b"!")]
    assert d.get(0x2004) == 1


def test_what_the_host_sends_waits_for_buffers() -> None:
    d, part, _ = console()
    part.send(0, b"abcdef")
    assert d.finished(0) == [] and d.messages == []
    give(d, 0, 0, 4)
    assert filled(d, 0) == [b"abcd"]
    give(d, 0, 1, 4)
    give(d, 0, 2, 4)
    assert filled(d, 0) == [b"ef"]
    part.send(0, b"gh")
    assert filled(d, 0) == [b"gh"] and len(d.messages) == 3


def test_ports_introduce_themselves() -> None:
    d, part, _ = console("", "org.understudy.test")
    for n in range(8):
        give(d, 2, n, 64)
    tell(d, 0, READY)
    assert filled(d, 2) == [struct.pack("<IHH", n, ADD, 1) for n in range(2)]
    tell(d, 0, PORT_READY)
    tell(d, 1, PORT_READY)
    assert filled(d, 2) == [
        struct.pack("<IHH", 0, CONSOLE, 1),
        struct.pack("<IHH", 0, OPEN, 1),
        struct.pack("<IHH", 1, NAME, 1) + b"org.understudy.test",
        struct.pack("<IHH", 1, OPEN, 1),
    ]
    tell(d, 1, OPEN)
    assert part.state.is_open == [False, True]


def test_each_port_has_its_queues() -> None:
    d, part, said = console("", "a", "b")
    d.request(5, b"from a", 0, gpa=BUFFERS)
    d.request(7, b"from b", 0, gpa=BUFFERS)
    assert said == [(1, b"from a"), (2, b"from b")]
    give(d, 6, 0, 16)
    tell(d, 2, OPEN)
    part.send(2, b"to b")
    assert filled(d, 6) == [b"to b"]


def test_what_is_sent_to_a_port_waits_until_somebody_has_it_open() -> None:
    d, part, _ = console("", "a")
    give(d, 4, 0, 16)
    part.send(1, b"early")
    assert filled(d, 4) == []
    tell(d, 1, OPEN)
    assert filled(d, 4) == [b"early"]
    tell(d, 1, OPEN, 0)
    give(d, 4, 1, 16)
    part.send(1, b"late")
    assert filled(d, 4) == []
    plain, part, _ = console("a", features=VERSION_1)  # nobody says whether it is open
    give(plain, 0, 0, 16)
    part.send(0, b"x")
    assert filled(plain, 0) == [b"x"]


def test_messages_that_wait_do_not_grow() -> None:
    d, part, _ = console("", "a")
    for _ in range(100):
        tell(d, 0, READY)
        tell(d, 1, PORT_READY)
        tell(d, 77, PORT_READY)
    assert len(part.state.messages) == 4


@pytest.mark.parametrize("message", [b"", b"1234567"])
def test_a_control_message_that_is_cut_off_breaks_the_ring(message: bytes) -> None:
    d, _, _ = console()
    d.describe(3, 0, BUFFERS, len(message), 0)
    d.offer(3, 0)
    d.kick(3)
    assert d.status & 64


def test_a_buffer_of_gigabytes_breaks_the_ring() -> None:
    d, _, said = console()
    for n in range(8):
        d.describe(1, n, 0, 1 << 19, 1 if n < 7 else 0, n + 1)
    d.offer(1, 0)
    d.kick(1)
    assert d.status & 64 and said == []


def test_input_that_waits_is_in_a_snapshot_and_gone_after_a_reset() -> None:
    d, part, _ = console()
    part.send(0, b"later")
    other = Driver("virtio_console")
    other.board.load(json.loads(json.dumps(d.board.save())))
    other.memory.ram[:] = d.memory.ram
    other.rings = d.rings_in(other.memory)
    give(other, 0, 0, 64)
    assert filled(other, 0) == [b"later"]
    part.reset()
    assert part.state.inputs == [b""]


def test_a_snapshot_with_other_ports_is_refused() -> None:
    d, _, _ = console("", "a")
    saved = d.board.save()
    for name in ("inputs", "is_open"):
        damaged = json.loads(json.dumps(saved))
        damaged["virtio_console"]["state"][name] = []
        with pytest.raises(ValueError, match="virtio_console"):
            d.board.load(damaged)
