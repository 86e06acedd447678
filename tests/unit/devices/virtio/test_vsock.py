"""The virtio socket device, packet by packet: connections, credit, refusals, ends, snapshots.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Socket Device"; Firecracker's docs/vsock.md.
"""

import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.unit.devices.virtio.sockets import CID, PATIENCE_S, VsockDriver
from understudy.backends.unix_ports import UnixPorts, VsockError
from understudy.devices.virtio import vsock, vsock_stream
from understudy.devices.virtio.pci import NEEDS_RESET
from understudy.devices.virtio.vsock import EVENT, RX, TX
from understudy.devices.virtio.vsock_packet import BOTH, LAYOUT, RECEIVE, SEND, Header, Op
from understudy.devices.virtio.vsock_stream import Phase


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "v.sock"


@pytest.fixture
def d(path: Path) -> Iterator[VsockDriver]:
    with closing(VsockDriver(path)) as made:
        made.give()
        yield made


def client(path: Path, wish: bytes) -> socket.socket:
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(PATIENCE_S)
    end.connect(str(path))
    end.sendall(wish)
    return end


def opened(d: VsockDriver, path: Path, port: int = 80) -> tuple[socket.socket, int]:
    """A connection from this computer that the guest has taken; its port here."""
    end = client(path, b"CONNECT %d\n" % port)
    header, _ = d.next(Op.REQUEST)
    assert (header.src_cid, header.dst_cid, header.dst_port) == (2, CID, port)
    d.say(Op.RESPONSE, port, header.src_port)
    assert end.recv(100) == b"OK %d\n" % header.src_port
    return end, header.src_port


def served(path: Path, port: int) -> socket.socket:
    """A program that listens for the guest."""
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(PATIENCE_S)
    listener.bind(f"{path}_{port}")
    listener.listen(1)
    return listener


def test_the_guests_address(d: VsockDriver) -> None:
    assert d.get(0x2000) == CID and d.get(0x2004) == 0
    assert d.offered & 1


def test_a_connection_from_here_and_bytes_both_ways(d: VsockDriver, path: Path) -> None:
    end, own = opened(d, path)
    with end:
        end.sendall(b"to the guest")
        header, data = d.next(Op.RW)
        assert (header.src_port, header.dst_port, data) == (own, 80, b"to the guest")
        assert (header.type, header.buf_alloc) == (1, vsock_stream.BUFFER)
        d.say(Op.RW, 80, own, b"from the guest")
        assert end.recv(100) == b"from the guest"


def test_what_is_said_behind_the_wish_is_not_lost(d: VsockDriver, path: Path) -> None:
    with client(path, b"CONNECT 5\nhello") as end:
        header, _ = d.next(Op.REQUEST)
        d.say(Op.RESPONSE, 5, header.src_port)
        assert d.next(Op.RW)[1] == b"hello"
        assert end.recv(100).startswith(b"OK ")


def test_a_wish_in_pieces(d: VsockDriver, path: Path) -> None:
    with client(path, b"CONN") as end:
        d.wait(lambda: [said for _, said in d.part._asking.values()] == [b"CONN"])
        assert not d.part.readiness.take(), "nobody looks again before there is more"
        end.sendall(b"ECT 7\n")
        assert d.next(Op.REQUEST)[0].dst_port == 7


@pytest.mark.parametrize(
    "wish", [b"CONNECT x\n", b"connect 1\n", b"CONNECT 4294967296\n", b"\n", b"x" * 40, b""]
)
def test_who_says_something_else_is_turned_away(d: VsockDriver, path: Path, wish: bytes) -> None:
    with client(path, wish) as end:
        if not wish:
            end.shutdown(socket.SHUT_WR)
        d.wait(lambda: not d.part._asking and not d.part.streams)
        end.settimeout(0.01)
        d.wait(lambda: is_closed(end))
        assert d.heard() == []


def is_closed(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_a_guest_that_refuses(d: VsockDriver, path: Path) -> None:
    with client(path, b"CONNECT 80\n") as end:
        header, _ = d.next(Op.REQUEST)
        d.say(Op.RST, 80, header.src_port)
        assert end.recv(100) == b"" and d.part.streams == {}


def test_who_gives_up_before_the_guest_has_answered(d: VsockDriver, path: Path) -> None:
    with client(path, b"CONNECT 80\n"):
        header, _ = d.next(Op.REQUEST)
    assert d.next(Op.RST)[0].src_port == header.src_port and d.part.streams == {}


def test_a_guest_without_a_driver_refuses(path: Path) -> None:
    with closing(VsockDriver(path)) as d:
        d.put(0x14, 0, 1)
        with client(path, b"CONNECT 80\n") as end:
            end.settimeout(0.01)
            d.wait(lambda: is_closed(end))


def test_a_connection_from_the_guest(d: VsockDriver, path: Path) -> None:
    with served(path, 99) as listener:
        d.say(Op.REQUEST, 1024, 99)
        header, _ = d.next(Op.RESPONSE)
        assert (header.src_port, header.dst_port) == (99, 1024)
        end, _ = listener.accept()
        with end:
            end.sendall(b"welcome")
            assert d.next(Op.RW)[1] == b"welcome"
            d.say(Op.RW, 1024, 99, b"thanks")
            assert end.recv(100) == b"thanks"
            d.say(Op.SHUTDOWN, 1024, 99, flags=SEND)
            assert end.recv(100) == b"", "it sends no more"
            end.sendall(b"and more")
            assert d.next(Op.RW)[1] == b"and more"
            d.say(Op.SHUTDOWN, 1024, 99, flags=RECEIVE)
            d.next(Op.RST)
            assert d.part.streams == {}


def test_nobody_listens(d: VsockDriver) -> None:
    d.say(Op.REQUEST, 1024, 99)
    header, _ = d.next(Op.RST)
    assert (header.src_port, header.dst_port) == (99, 1024)


def test_an_end_of_this_computers(d: VsockDriver, path: Path) -> None:
    end, own = opened(d, path)
    end.sendall(b"last words")
    end.shutdown(socket.SHUT_WR)
    assert d.next(Op.RW)[1] == b"last words"
    assert d.next(Op.SHUTDOWN)[0].flags == SEND
    d.say(Op.RW, 80, own, b"answer")
    assert end.recv(100) == b"answer"
    end.close()
    assert d.next(Op.SHUTDOWN)[0].flags == BOTH
    d.say(Op.SHUTDOWN, 80, own, flags=BOTH)
    d.next(Op.RST)
    assert d.part.streams == {}


def test_the_guest_gets_no_more_than_it_has_room_for(d: VsockDriver, path: Path) -> None:
    d.alloc = 10
    end, own = opened(d, path)
    with end:
        end.sendall(b"0123456789abcdef")
        assert d.next(Op.RW)[1] == b"0123456789"
        d.next(Op.CREDIT_REQUEST)
        assert d.heard() == []
        d.taken = 4
        d.say(Op.CREDIT_UPDATE, 80, own)
        assert d.next(Op.RW)[1] == b"abcd"
        d.alloc, d.taken = 0, 0xFFFF_FFF0  # nonsense
        d.say(Op.CREDIT_UPDATE, 80, own)
        d.alloc, d.taken = 100, 14
        d.say(Op.CREDIT_UPDATE, 80, own)
        assert d.next(Op.RW)[1] == b"ef"


def test_a_guest_that_sends_more_than_there_is_room_for_is_cut_off(
    d: VsockDriver, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock_stream, "BUFFER", 1 << 19)
    end, own = opened(d, path)
    with end:
        stream = d.part.streams[own, 80]
        sent = 0
        while stream.phase is Phase.OPEN and sent < 1 << 22:
            assert len(stream.out) <= 1 << 19
            d.say(Op.RW, 80, own, bytes(0x8000))
            sent += 0x8000
        d.next(Op.RST)
        assert sent > 1 << 19 and d.part.streams == {}


def test_what_the_socket_had_no_room_for_comes_when_it_has(d: VsockDriver, path: Path) -> None:
    end, own = opened(d, path)
    with end:
        stream = d.part.streams[own, 80]
        sent = bytearray()
        while not stream.out:
            part = bytes([len(sent) >> 12 & 0xFF]) * 0x1000
            d.say(Op.RW, 80, own, part)
            sent += part
        d.say(Op.CREDIT_REQUEST, 80, own)
        before = d.next(Op.CREDIT_UPDATE)[0].fwd_cnt
        got = bytearray()
        end.settimeout(0.01)

        def read() -> bool:
            with suppress(TimeoutError):
                got.extend(end.recv(1 << 16))
            return len(got) >= len(sent)

        d.wait(read)
        end.settimeout(PATIENCE_S)
        assert got == sent
        d.wait(lambda: not stream.out)
        d.heard()
        d.behind.clear()
        d.say(Op.CREDIT_REQUEST, 80, own)
        assert d.next(Op.CREDIT_UPDATE)[0].fwd_cnt == len(sent) > before
        d.say(Op.RW, 80, own, b"end")
        assert end.recv(100) == b"end"


@pytest.mark.parametrize("op", [0, Op.RESPONSE, Op.SHUTDOWN, Op.RW, Op.CREDIT_UPDATE, 8, 0xFFFF])
def test_packets_of_no_connection_are_refused(d: VsockDriver, op: int) -> None:
    d.say(op, 5, 6)
    assert d.next(Op.RST)[0].dst_port == 5


def test_packets_that_mean_nothing_here(d: VsockDriver, path: Path) -> None:
    d.say(Op.RST, 5, 6)
    d.say(Op.REQUEST, 5, 6, src=CID + 1)
    d.say(Op.REQUEST, 5, 6, dst=1)
    assert d.heard() == []
    d.say(Op.REQUEST, 5, 6, kind=2)
    d.next(Op.RST)
    end, own = opened(d, path)
    with end:
        d.say(Op.REQUEST, 80, own)
        d.next(Op.RST)
        assert d.part.streams == {}
    end, own = opened(d, path)
    with end:
        d.say(0x1234, 80, own)
        d.next(Op.RST)
        assert d.part.streams == {}


def test_broken_packets_break_the_ring(path: Path) -> None:
    for data, size in ((b"x" * 10, 11), (b"", 0xFFFF_FFFF)):
        with closing(VsockDriver()) as d:
            header = Header(CID, 2, 1, 1, size, 1, Op.RW, 0, 0, 0)
            d.memory.write(0x2_0000, LAYOUT.pack(*header) + data)
            d.describe(TX, 0, 0x2_0000, LAYOUT.size + len(data), 0)
            d.offer(TX, 0)
            d.kick(TX)
            assert d.status & NEEDS_RESET
    for number, length in ((TX, 43), (TX, LAYOUT.size + vsock_stream.MOST + 1)):
        with closing(VsockDriver()) as d:
            d.describe(number, 0, 0x2_0000, length, 0)
            d.offer(number, 0)
            d.kick(number)
            assert d.status & NEEDS_RESET
    with closing(VsockDriver()) as d:
        d.say(Op.RW, 1, 2)
        d.describe(RX, 0, 0x2_0000, LAYOUT.size, 2)
        d.offer(RX, 0)
        d.kick(RX)
        assert d.status & NEEDS_RESET


def test_refusals_that_wait_are_bounded_and_then_packets_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vsock, "MOST_RESETS", 3)
    with closing(VsockDriver()) as d:
        for port in range(5):
            header = Header(CID, 2, port, 9, 0, 1, Op.RW, 0, 0, 0)
            d.memory.write(0x2_0000 + 64 * port, LAYOUT.pack(*header))
            d.describe(TX, port, 0x2_0000 + 64 * port, LAYOUT.size, 0)
            d.offer(TX, port)
            d.kick(TX)
        assert len(d.finished(TX)) == 3 == len(d.part.state.resets)
        d.give(8)
        assert [header.dst_port for header, _ in d.heard()] == [0, 1, 2, 3, 4]
        assert len(d.finished(TX)) == 2


def test_connections_are_bounded(
    d: VsockDriver, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock, "MOST_STREAMS", 2)
    ends = [opened(d, path)[0] for _ in range(2)]
    with client(path, b"CONNECT 80\n") as more, served(path, 99):
        more.settimeout(0.01)
        d.wait(lambda: is_closed(more))
        d.say(Op.REQUEST, 1024, 99)
        d.next(Op.RST)
    for end in ends:
        end.close()


def test_a_reset_of_the_device_ends_all(d: VsockDriver, path: Path) -> None:
    end, _ = opened(d, path)
    with end:
        d.put(0x14, 0, 1)
        assert end.recv(100) == b"" and d.part.streams == {}


def test_a_snapshot_has_no_connections_and_says_so_to_the_guest(
    d: VsockDriver, path: Path, tmp_path: Path
) -> None:
    end, own = opened(d, path)
    with end, closing(VsockDriver(tmp_path / "other")) as other:
        other.give()
        other.board.load(d.board.save())
        other.memory.ram[:] = d.memory.ram
        other.rings = d.rings_in(other.memory)
        other.clock.advance(10_000)
        other.give(1, EVENT)
        assert other.events() == [bytes(4)]
        other.say(Op.RW, 80, own, b"x")
        other.next(Op.RST)
        d.say(Op.RW, 80, own, b"x")
        assert end.recv(100) == b"x", "the one that was saved goes on"
        again = d.board.save()
        d.give(1, EVENT)
        assert d.events() == [] and again["virtio_vsock"]["state"]["is_lost"]


def test_a_path_that_is_taken_or_cannot_be(path: Path, tmp_path: Path) -> None:
    with closing(UnixPorts(path)):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(VsockError, match="another VM has it: choose another path"):
            UnixPorts(path)
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    UnixPorts(path).close()
    path.write_text("x")
    with pytest.raises(VsockError, match="there is something of that name"):
        UnixPorts(path)
    with pytest.raises(VsockError, match="No such file"):
        UnixPorts(tmp_path / "none" / "v")
    with pytest.raises(VsockError, match="has at most 107 bytes"):
        UnixPorts(tmp_path / ("x" * 107))
