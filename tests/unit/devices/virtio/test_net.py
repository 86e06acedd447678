"""Virtio network card: frames both ways, the filter, the link, and what waits."""

import json
import struct
from typing import Any

import pytest

from tests.unit.devices.virtio.driver import VERSION_1, Driver
from understudy.devices.virtio import net

HEADER = bytes(10) + b"\1\0"
OWN, OTHER, GROUP = net.USUAL_MAC, b"\x52\x54\0\0\0\2", b"\x33\x33\0\0\0\1"
ALL = VERSION_1 | net.MAC | net.STATUS | net.CTRL_VQ | net.CTRL_RX | net.CTRL_MAC_ADDR


def card() -> tuple[Driver, Any, list[bytes]]:
    d = Driver("virtio_net")
    d.start(ALL)
    part: Any = d.device
    sent: list[bytes] = []
    part.on_frame.append(sent.append)
    return d, part, sent


def frame(to: bytes = OWN, size: int = 60) -> bytes:
    return (to + OTHER + b"\x08\0").ljust(size, b"x")


def give(d: Driver, index: int, room: int = 1530) -> None:
    d.describe(0, index, 0x2_0000 + 0x800 * index, room, 2)
    d.offer(0, index)
    d.kick(0)


def taken(d: Driver) -> list[bytes]:
    return [d.memory.read(0x2_0000 + 0x800 * head, count) for head, count in d.finished(0)]


def command(d: Driver, kind: tuple[int, int], data: bytes) -> bytes:
    return d.request(2, bytes(kind) + data, 1)


def test_a_frame_goes_out_without_its_header() -> None:
    d, _, sent = card()
    d.request(1, bytes(12) + frame(OTHER, 1518), 0)
    assert sent == [frame(OTHER, 1518)]


@pytest.mark.parametrize("size", [0, 13, 1519, 60_000])
def test_what_no_wire_carries_is_given_back_unsent(size: int) -> None:
    d, _, sent = card()
    d.request(1, bytes(12 + size), 0)
    assert sent == [] and d.status == 15


def test_frames_wait_for_buffers_and_keep_their_order() -> None:
    d, part, _ = card()
    assert part.receive(frame(size=60)) and part.receive(frame(size=1518))
    assert taken(d) == [] and d.messages == []
    give(d, 0)
    give(d, 1)
    assert taken(d) == [HEADER + frame(size=60), HEADER + frame(size=1518)]


def test_what_waits_is_bounded() -> None:
    _, part, _ = card()
    assert [part.receive(frame()) for _ in range(net.WAITING + 2)].count(False) == 2
    assert part.state.lost == 2


def test_the_filter() -> None:
    d, part, _ = card()
    assert part.receive(frame(OTHER))
    assert command(d, net.PROMISC, b"\0") == net.OK
    heard = [part.receive(frame(to)) for to in (OWN, net.BROADCAST, OTHER, GROUP)]
    assert heard == [True, True, False, False]
    tables = struct.pack("<I6sI6s", 1, OTHER, 1, GROUP)
    assert command(d, net.TABLE_SET, tables) == net.OK
    assert part.receive(frame(OTHER)) and part.receive(frame(GROUP))
    assert command(d, net.TABLE_SET, bytes(8)) == net.OK
    assert command(d, net.ALLMULTI, b"\1") == net.OK
    assert part.receive(frame(GROUP)) and not part.receive(frame(OTHER))
    assert command(d, net.ADDR_SET, OTHER) == net.OK
    assert part.receive(frame(OTHER)) and not part.receive(frame(OWN))


@pytest.mark.parametrize(
    ("kind", "data"),
    [(net.PROMISC, b""), (net.ADDR_SET, b"12345"), (net.TABLE_SET, b"\xff" * 8), ((9, 9), b"")],
)
def test_a_command_that_is_wrong_is_refused(kind: tuple[int, int], data: bytes) -> None:
    d, _, _ = card()
    assert command(d, kind, data) == net.ERR


def test_the_link() -> None:
    d, part, sent = card()
    part.set_link(is_up=False)
    assert d.get(0x3006, 2) == 0 and len(d.messages) == 1
    d.request(1, bytes(12) + frame(), 0)
    assert sent == [] and not part.receive(frame())
    d.start(ALL)
    assert d.get(0x3006, 2) == 0, "a reset plugs no cable in"


def test_a_buffer_too_small_breaks_the_ring_and_nothing_comes_before_the_driver() -> None:
    d, part, _ = card()
    give(d, 0, 40)
    part.receive(frame())
    assert d.status & 64
    assert not part.receive(frame())
    assert not Driver("virtio_net").device.receive(frame())  # type: ignore[attr-defined]


def test_frames_that_wait_are_in_the_snapshot_and_are_checked() -> None:
    _, part, _ = card()
    part.receive(frame())
    saved = json.loads(json.dumps(part.save()))
    other: Any = Driver("virtio_net").device
    other.load(saved)
    assert other.state == part.state
    part.state.arrived.append(b"short")
    with pytest.raises(ValueError, match="frames or addresses"):
        other.load(json.loads(json.dumps(part.save())))


@pytest.mark.parametrize("mac", [b"", bytes(6), b"\1\0\0\0\0\0", "52:54:00:00:00:01"])
def test_a_bad_mac_is_refused(mac: Any) -> None:
    with pytest.raises(ValueError, match="a MAC"):
        Driver("virtio_net", mac=mac)
