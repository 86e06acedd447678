"""Virtio network card: frames both ways, the filter, the link, and what waits."""

import json
import struct
from typing import Any

import pytest

from tests.unit.devices.virtio.driver import VERSION_1, Driver
from understudy.backends.cable import MOST_FRAMES, Cable
from understudy.backends.frame import BROADCAST, Frame
from understudy.backends.virtio_header import CSUM
from understudy.devices.virtio import net, net_control
from understudy.devices.virtio.net_address import address_of

HEADER = bytes(10) + b"\1\0"
OWN, OTHER, GROUP = net.USUAL_MAC, b"\x52\x54\0\0\0\2", b"\x33\x33\0\0\0\1"
ALL = VERSION_1 | net.MAC | net.STATUS | net.CTRL_VQ | net.CTRL_RX | net.CTRL_MAC_ADDR


class Wire(Cable):
    """A cable whose other end the test has."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.is_full = False

    def send(self, frame: Frame) -> bool:
        if not self.is_full:
            self.sent.append(frame.data)
        return not self.is_full


def card(features: int = ALL, **options: Any) -> tuple[Driver, Any, Wire]:
    wire = Wire()
    d = Driver("virtio_net", cable=wire, **options)
    d.start(features)
    part: Any = d.device
    wire.notify = part.look
    return d, part, wire


def heard(wire: Wire, part: Any, data: bytes) -> bool:
    """Whether a frame that comes passes the filter; nobody takes it."""
    wire.arrive(Frame(data))
    try:
        part._next()
    except net.NotNow:
        return False
    return True


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
    d, part, wire = card()
    d.request(1, bytes(12) + frame(OTHER, 1518), 0)
    assert wire.sent == [frame(OTHER, 1518)]
    assert part.counts() == {
        "sent": 1, "sent_bytes": 1518, "received": 0, "received_bytes": 0, "refused": 0, "lost": 0
    }  # fmt: skip


@pytest.mark.parametrize("size", [0, 13, 65_554])
def test_what_no_wire_carries_is_given_back_unsent_and_counted(size: int) -> None:
    d, part, wire = card()
    d.request(1, bytes(12 + size), 0)
    assert wire.sent == [] and d.status == 15 and part.state.refused == 1


def test_a_cable_without_room_is_tried_again() -> None:
    d, part, wire = card()
    wire.is_full = True
    d.describe(1, 0, 0x2_0000, 12 + 60, 0)
    d.offer(1, 0)
    d.kick(1)
    assert d.finished(1) == [] and part.state.sent == 0
    wire.is_full = False
    d.clock.advance(net.BUSY_NS - 1)
    assert wire.sent == []
    d.clock.advance(1)
    assert len(wire.sent) == 1 and len(d.finished(1)) == 1


def test_frames_wait_for_buffers_and_keep_their_order() -> None:
    d, _, wire = card()
    assert wire.arrive(Frame(frame(size=60))) and wire.arrive(Frame(frame(size=1518)))
    assert taken(d) == [] and d.messages == []
    give(d, 0)
    give(d, 1)
    assert taken(d) == [HEADER + frame(size=60), HEADER + frame(size=1518)]


def test_what_waits_is_bounded_and_the_card_is_told_once() -> None:
    told: list[None] = []
    wire = Wire()
    wire.notify = lambda: told.append(None)
    assert [wire.arrive(Frame(frame())) for _ in range(MOST_FRAMES + 2)].count(False) == 2
    assert wire.lost == 2 and len(told) == 1


def test_the_filter() -> None:
    d, part, wire = card()
    assert heard(wire, part, frame(OTHER))
    assert command(d, net_control.PROMISC, b"\0") == net.OK
    found = [heard(wire, part, frame(to)) for to in (OWN, BROADCAST, OTHER, GROUP)]
    assert found == [True, True, False, False]
    tables = struct.pack("<I6sI6s", 1, OTHER, 1, GROUP)
    assert command(d, net_control.TABLE_SET, tables) == net.OK
    assert heard(wire, part, frame(OTHER)) and heard(wire, part, frame(GROUP))
    assert command(d, net_control.TABLE_SET, bytes(8)) == net.OK
    assert command(d, net_control.ALLMULTI, b"\1") == net.OK
    assert heard(wire, part, frame(GROUP)) and not heard(wire, part, frame(OTHER))
    assert command(d, net_control.ADDR_SET, OTHER) == net.OK
    assert heard(wire, part, frame(OTHER)) and not heard(wire, part, frame(OWN))


def test_a_clone_hears_its_old_address_and_has_the_new_one_when_its_driver_starts_anew() -> None:
    d, part, wire = card()
    command(d, net_control.PROMISC, b"\0")
    part.become_another("clone")
    own = part.state.own
    assert own != OWN and d.get(0x2000, 4).to_bytes(4, "little") == own[:4]
    assert d.get(0x2006, 2) == 0 and len(d.messages) == 2, "the cable is out"
    d.clock.advance(net.PULLED_NS)
    assert d.get(0x2006, 2) == net.LINK_UP and len(d.messages) == 3
    assert heard(wire, part, frame(OWN)) and heard(wire, part, frame(own))
    d.start(ALL)
    assert part.state.mac == own
    command(d, net_control.PROMISC, b"\0")
    assert not heard(wire, part, frame(OWN))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (net_control.PROMISC, b""),
        (net_control.ADDR_SET, b"12345"),
        (net_control.TABLE_SET, b"\xff" * 8),
        ((9, 9), b""),
    ],
)
def test_a_command_that_is_wrong_is_refused(kind: tuple[int, int], data: bytes) -> None:
    d, _, _ = card()
    assert command(d, kind, data) == net.ERR


def test_the_link() -> None:
    d, part, wire = card()
    part.set_link(is_up=False)
    assert d.get(0x2006, 2) == 0 and len(d.messages) == 1
    d.request(1, bytes(12) + frame(), 0)
    wire.arrive(Frame(frame()))
    assert wire.sent == [] and wire.take() is None and part.counts()["lost"] == 1
    d.start(ALL)
    assert d.get(0x2006, 2) == 0, "a reset plugs no cable in"


def test_a_cable_whose_other_end_is_gone_is_a_link_that_is_down() -> None:
    d, _, wire = card()
    assert d.get(0x2006, 2) == net.LINK_UP
    wire.is_gone = True
    wire.notify()
    assert d.get(0x2006, 2) == 0


def test_a_buffer_too_small_breaks_the_ring_and_nothing_waits_for_a_driver() -> None:
    d, part, wire = card()
    give(d, 0, 40)
    wire.arrive(Frame(frame()))
    assert d.status & 64
    wire.arrive(Frame(frame()))
    assert wire.take() is None and part.state.lost == 1


def test_a_frame_longer_than_the_driver_takes_is_lost_and_breaks_nothing() -> None:
    d, part, wire = card()
    give(d, 0)
    wire.arrive(Frame(frame(size=1519)))
    wire.arrive(Frame(frame()))
    assert taken(d) == [HEADER + frame()] and d.status == 15 and part.state.lost == 1


def test_a_long_frame_takes_as_many_buffers_as_it_needs() -> None:
    d, part, wire = card(ALL | net.MRG_RXBUF)
    data = frame(size=4000)
    wire.arrive(Frame(data))
    for index in range(3):
        assert taken(d) == []
        give(d, index)
    parts = taken(d)
    assert [len(one) for one in parts] == [1530, 1530, 952] and part.state.received == 1
    assert b"".join(parts) == bytes(10) + b"\3\0" + data


def test_the_speed_is_limited_each_way_by_guest_time() -> None:
    d, part, wire = card(rate=8_000_000)  # a byte a microsecond
    for index in range(8):
        d.describe(1, index, 0x2_0000, 12 + 1500, 0)
        d.offer(1, index)
        d.describe(0, index, 0x3_0000, 1530, 2)
        d.offer(0, index)
    d.kick(1)
    early = net.BURST_NS // 1_500_000 + 1
    assert len(wire.sent) == early == 7
    for _ in range(8):
        wire.arrive(Frame(frame(size=1500)))
    assert part.state.received == early
    late = early * 1_500_000 - net.BURST_NS
    d.clock.advance(late - 1)
    assert (part.state.sent, part.state.received) == (early, early)
    d.clock.advance(1)
    assert (part.state.sent, part.state.received) == (8, 8)


def test_addresses_and_times_of_a_snapshot_are_checked() -> None:
    _, part, _ = card()
    saved = json.loads(json.dumps(part.save()))
    other: Any = Driver("virtio_net").device
    other.load(saved)
    assert other.state == part.state
    for name, bad in (("own", b"\1\0\0\0\0\0"), ("free_at", [0]), ("groups", [b"short"])):
        broken = Driver("virtio_net").device
        good = getattr(part.state, name)
        setattr(part.state, name, bad)
        with pytest.raises(ValueError, match="addresses, times or queues"):
            broken.load(json.loads(json.dumps(part.save())))
        setattr(part.state, name, good)


@pytest.mark.parametrize("mac", [b"", bytes(6), b"\1\0\0\0\0\0", "52:54:00:00:00:01"])
def test_a_bad_mac_is_refused(mac: Any) -> None:
    with pytest.raises(ValueError, match="a MAC"):
        Driver("virtio_net", mac=mac)


def test_an_address_by_name_is_the_same_again_and_none_that_is_in_use() -> None:
    first: Any = Driver("virtio_net", mac=None, named="a/0").device
    own = first.state.own
    assert own == address_of("a/0", set()) and not own[0] & 1 and own[0] & 2
    second: Any = Driver("virtio_net", mac=None, named="a/0").device
    assert second.state.own != own
    first.close()
    second.close()
    third: Any = Driver("virtio_net", mac=None, named="a/0").device
    assert third.state.own == own


def _offered(kind: int = 0, size: int = 0) -> tuple[bytes, bytes]:
    """A header with work to do, and a TCP segment to do it for."""
    tcp = bytes(12) + b"\x50" + bytes(7)
    data = OTHER + OWN + b"\x08\0\x45" + bytes(8) + b"\x06" + bytes(10) + tcp + bytes(3000)
    return struct.pack("<BBHHHHH", 1, kind, 54, size, 34, 16, 0), data


@pytest.mark.parametrize(
    ("features", "kind", "is_sent"),
    [
        (0, 0, False), (CSUM, 0, True), (CSUM, 1, False), (CSUM | 1 << 11, 1, True),
        (CSUM | 1 << 11, 4, False), (CSUM | 1 << 12, 1, False), (CSUM | 1 << 11, 3, False),
    ],
)  # fmt: skip
def test_only_what_was_negotiated_is_left_to_the_card(
    features: int, kind: int, is_sent: bool
) -> None:
    d, part, wire = card(ALL | features)
    header, data = _offered(kind, 1000 if kind else 0)
    d.request(1, header + data, 0)
    assert bool(wire.sent) is is_sent and part.state.refused == (not is_sent) and d.status == 15


@pytest.mark.parametrize(
    ("features", "lengths"),
    [
        (0, [1054, 1054, 1054]),
        (net.GUEST_CSUM, [1054, 1054, 1054]),
        (net.GUEST_CSUM | net.GUEST_TSO[1] | net.MRG_RXBUF, [3054]),
        (net.GUEST_CSUM | net.GUEST_TSO[4] | net.MRG_RXBUF, [1054, 1054, 1054]),
    ],
)
def test_what_a_driver_cannot_take_as_it_is_is_done_before(
    features: int, lengths: list[int]
) -> None:
    d, part, wire = card(ALL | features)
    header, data = _offered(1, 1000)
    found = net.frame_of(net.Header(*net.HEADER.unpack(header)), data, net.OFFERED)
    assert found is not None
    wire.arrive(found)
    for index in range(4):
        give(d, index)
    came = taken(d)
    assert part.state.received == len(lengths) and part.state.received_bytes == sum(lengths)
    is_whole = len(lengths) == 1
    assert came[0][:10] == (header[:10] if is_whole else bytes(10))
    assert wire.take() is None
