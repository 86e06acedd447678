"""A network card with several pairs of queues: which frame goes where."""

import json
from typing import Any

import pytest

from tests.unit.devices.virtio.driver import PACKED, VERSION_1, Driver
from tests.unit.devices.virtio.test_net import Wire
from understudy.backends.frame import Frame
from understudy.devices.virtio import net, net_control
from understudy.devices.virtio.net_flows import bucket_of

ALL = VERSION_1 | net.MAC | net.CTRL_VQ | net.CTRL_RX | net.MQ
OTHER = b"\x52\x54\0\0\0\2"
PAIRS = 3
FLOWS = [(n.to_bytes(2, "big"), b"\0\x50") for n in range(5000, 5003)]


def card(features: int = ALL, pairs: int = PAIRS, **options: Any) -> tuple[Driver, Any, Wire]:
    wire = Wire()
    d = Driver("virtio_net", cable=wire, pairs=pairs, **options)
    d.start(features)
    part: Any = d.device
    wire.notify = part.look
    return d, part, wire


def datagram(flow: int, mark: int, *, is_out: bool) -> bytes:
    """UDP between two ports, over IPv4."""
    ends = ((b"\x0a\0\0\1", FLOWS[flow][0]), (b"\x0a\0\0\2", FLOWS[flow][1]))
    (source, port), (target, other) = ends if is_out else ends[::-1]
    ip = b"\x45" + bytes(8) + b"\x11" + bytes(2) + source + target
    data = net.USUAL_MAC + OTHER + b"\x08\0" + ip + port + other
    return (data + bytes([mark])).ljust(60, b"x")


def give(d: Driver, queue: int, index: int) -> None:
    d.describe(queue, index, 0x2_0000 + 0x4000 * queue + 0x800 * index, 1530, 2)
    d.offer(queue, index)
    d.kick(queue)


def marks(d: Driver, queue: int) -> list[int]:
    """The marks of the frames that came to a queue."""
    at = [0x2_0000 + 0x4000 * queue + 0x800 * head for head, _ in d.finished(queue)]
    return [d.memory.read(gpa + 12 + 38, 1)[0] for gpa in at]


def set_pairs(d: Driver, count: int, *, queue: int = 2 * PAIRS) -> bytes:
    return d.request(queue, bytes(net_control.PAIRS_SET) + count.to_bytes(2, "little"), 1)


@pytest.mark.parametrize("features", [ALL, ALL | PACKED])
def test_a_frame_comes_where_its_flow_went_out(features: int) -> None:
    d, part, wire = card(features)
    assert d.get(0x2008, 2) == PAIRS and d.get(0x12, 2) == 2 * PAIRS + 1
    assert set_pairs(d, PAIRS) == net.OK
    for flow in range(3):
        d.request(2 * flow + 1, bytes(12) + datagram(flow, 0, is_out=True), 0)
        for index in range(2):
            give(d, 2 * flow, index)
    for mark, flow in enumerate((2, 0, 1, 1, 2, 0)):
        wire.arrive(Frame(datagram(flow, mark, is_out=False)))
    assert [marks(d, 2 * flow) for flow in range(3)] == [[1, 5], [2, 3], [0, 4]]
    assert part.counts()["received"] == 6 and part.counts()["lost"] == 0
    d.request(3, bytes(12) + datagram(0, 0, is_out=True), 0)  # its program has moved
    give(d, 2, 2)
    wire.arrive(Frame(datagram(0, 9, is_out=False)))
    assert marks(d, 2) == [9]


def test_a_frame_waits_for_its_own_queue_and_those_behind_it_wait() -> None:
    d, _, wire = card()
    set_pairs(d, PAIRS)
    d.request(3, bytes(12) + datagram(1, 0, is_out=True), 0)
    for index in range(2):
        give(d, 0, index)
    for mark, flow in enumerate((0, 1, 0)):
        wire.arrive(Frame(datagram(flow, mark, is_out=False)))
    assert (marks(d, 0), marks(d, 2)) == ([0], [])
    give(d, 2, 0)
    assert (marks(d, 0), marks(d, 2)) == ([2], [1]), "the other queue is served within that kick"


def test_no_frame_comes_to_a_pair_that_is_not_in_use() -> None:
    d, _, wire = card()
    set_pairs(d, PAIRS)
    d.request(5, bytes(12) + datagram(2, 0, is_out=True), 0)
    assert set_pairs(d, 2) == net.OK
    give(d, 0, 0)
    give(d, 4, 0)
    wire.arrive(Frame(datagram(2, 7, is_out=False)))
    assert (marks(d, 0), marks(d, 4)) == ([7], [])


def test_a_frame_that_waits_for_a_pair_comes_to_the_first_when_that_is_used_no_more() -> None:
    d, _, wire = card()
    set_pairs(d, PAIRS)
    d.request(5, bytes(12) + datagram(2, 0, is_out=True), 0)
    give(d, 0, 0)
    wire.arrive(Frame(datagram(2, 7, is_out=False)))
    assert marks(d, 0) == []
    assert set_pairs(d, 1) == net.OK
    assert marks(d, 0) == [7]


@pytest.mark.parametrize("count", [0, PAIRS + 1, 0xFFFF])
def test_so_many_pairs_there_are_not(count: int) -> None:
    d, part, _ = card()
    assert set_pairs(d, count) == net.ERR and part.state.pairs == 1


def test_without_the_feature_there_is_one_pair_and_the_control_queue_is_the_third() -> None:
    d, _, wire = card(ALL & ~net.MQ)
    assert set_pairs(d, 1, queue=2) == net.ERR, "no such command"
    assert d.request(2, bytes(net_control.PROMISC) + b"\0", 1) == net.OK
    for queue in (3, 4, 6):  # none of the card's queues then
        d.describe(queue, 0, 0x2_0000, 72, 0)
        d.offer(queue, 0)
        d.kick(queue)
        assert d.finished(queue) == []
    assert d.status == 15 and wire.sent == []


def test_pairs_and_flows_are_in_a_snapshot_and_gone_after_a_reset() -> None:
    d, part, _ = card()
    set_pairs(d, PAIRS)
    d.request(5, bytes(12) + datagram(2, 0, is_out=True), 0)
    saved = json.loads(json.dumps(part.save()))
    other: Any = Driver("virtio_net", pairs=PAIRS).device
    other.load(saved)
    assert other.state == part.state and part.state.flows.count(2) == 1
    saved["state"]["pairs"] = PAIRS + 1
    with pytest.raises(ValueError, match="queues"):
        Driver("virtio_net", pairs=PAIRS).device.load(saved)
    part.reset()
    assert part.state.pairs == 1 and not any(part.state.flows)


def test_as_many_pairs_as_there_may_be() -> None:
    with pytest.raises(ValueError, match="9 pairs of queues, expected 1 to 8"):
        Driver("virtio_net", pairs=9)


# --- flows ---


def ipv6(ends: tuple[bytes, bytes], ports: bytes) -> bytes:
    head = b"\x60" + bytes(5) + b"\x06\x40" + ends[0] + ends[1]
    return bytes(12) + b"\x86\xdd" + head + ports


def test_both_directions_of_a_flow_are_in_one_bucket() -> None:
    one, two = b"\xfe" + bytes(15), b"\xfe" + bytes(14) + b"\1"
    assert bucket_of(ipv6((one, two), b"\0\1\0\2"), is_out=True) == bucket_of(
        ipv6((two, one), b"\0\2\0\1"), is_out=False
    )
    buckets = {bucket_of(ipv6((one, two), bytes([0, n, 0, 2])), is_out=True) for n in range(99)}
    assert len(buckets) > 50
    for flow in range(3):
        buckets = {bucket_of(datagram(flow, n, is_out=bool(n)), is_out=bool(n)) for n in range(2)}
        assert len(buckets) == 1


def test_fragments_go_by_their_addresses_and_what_is_no_ip_to_bucket_0() -> None:
    def fragment(ports: bytes) -> bytes:
        data = bytearray(datagram(0, 0, is_out=True))
        data[20], data[34:38] = 0x20, ports
        return bytes(data)

    assert bucket_of(fragment(b"abcd"), is_out=True) == bucket_of(fragment(b"efgh"), is_out=True)
    for data in (bytes(14), bytes(60), bytes(12) + b"\x08\0" + bytes(19), b""):
        assert bucket_of(data, is_out=True) == 0
    assert bucket_of(datagram(0, 0, is_out=True)[:34], is_out=True) >= 0
