"""Checksums and segments that a driver left to do: against sums made another way, word by word."""

import struct

import pytest

from understudy.backends.frame import SMALLEST, TCPV4, TCPV6, Frame

A, B = b"\x02\0\0\0\0\1", b"\x02\0\0\0\0\2"
BODY = bytes(range(256)) * 12


def _sum(data: bytes) -> int:
    """RFC 1071, as it is told there."""
    total = 0
    for (word,) in struct.iter_unpack(">H", data + b"\0" * (len(data) & 1)):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _pseudo(data: bytes, start: int) -> bytes:
    """The header that goes into the sum but not onto the wire."""
    length = len(data) - start
    if data[12:14] == b"\x08\0":
        return data[26:34] + struct.pack(">BBH", 0, data[23], length)
    return data[22:54] + struct.pack(">IxxxB", length, data[20])


def _segment(kind: int, body: bytes, size: int = 0, flags: int = 0x19) -> Frame:
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 0xFFFF_FF00, 7, 8 << 4, flags, 99, 0, 0) + b"\1" * 12
    length = len(tcp) + len(body)
    if kind == TCPV4:
        ip = struct.pack(
            ">BBHHHBBH8s", 0x45, 0, 20 + length, 0xFFFF, 0, 64, 6, 0, b"\n\0\0\1\n\0\0\2"
        )
        ip = ip[:10] + struct.pack(">H", ~_sum(ip) & 0xFFFF) + ip[12:]
    else:
        ip = struct.pack(">IHBB", 0x6000_0000, length, 6, 64) + b"\xfd" * 32
    data = B + A + (b"\x08\0" if kind == TCPV4 else b"\x86\xdd") + ip + tcp + body
    start = 14 + len(ip)
    seed = struct.pack(">H", _sum(_pseudo(data, start)))
    data = data[: start + 16] + seed + data[start + 18 :]
    return Frame(data, start, 16, kind if size else 0, size)


def _is_right(frame: Frame, start: int) -> bool:
    data = frame.data
    is_header_right = data[12:14] != b"\x08\0" or _sum(data[14:start]) == 0xFFFF
    return is_header_right and _sum(_pseudo(data, start) + data[start:]) == 0xFFFF


@pytest.mark.parametrize("kind", [TCPV4, TCPV6])
@pytest.mark.parametrize("size", [0, 1, 2999])
def test_a_checksum_is_filled_in(kind: int, size: int) -> None:
    frame = _segment(kind, BODY[:size])
    assert frame.is_sound and not _is_right(frame, frame.start)
    assert _is_right(frame.whole(), frame.start) and frame.pieces() == [frame.whole()]


@pytest.mark.parametrize("kind", [TCPV4, TCPV6])
@pytest.mark.parametrize("size", [SMALLEST, 1001, 1440, 3071, 3072, 5000])
def test_a_long_segment_is_cut_into_whole_ones(kind: int, size: int) -> None:
    long = _segment(kind, BODY, size)
    assert long.is_sound and _is_right(long.whole(), long.start)
    pieces, start, at = long.pieces(), long.start, 0
    assert len(pieces) == -(-len(BODY) // size)
    for number, piece in enumerate(pieces):
        data, is_last = piece.data, number == len(pieces) - 1
        assert _is_right(piece, start) and not piece.start and not piece.kind
        assert data[start + 32 :] == BODY[at : at + size]
        assert int.from_bytes(data[start + 4 : start + 8], "big") == (0xFFFF_FF00 + at) % (1 << 32)
        assert data[start + 13] == (0x19 if is_last else 0x10), "PSH and FIN are the last one's"
        length = int.from_bytes(data[16:18] if kind == TCPV4 else data[18:20], "big")
        assert length == len(data) - (14 if kind == TCPV4 else 54)
        if kind == TCPV4:
            assert int.from_bytes(data[18:20], "big") == (0xFFFF + number) % (1 << 16)
        at += size
    assert at >= len(BODY)


def test_what_cannot_be_done_is_not_sound() -> None:
    good = _segment(TCPV4, BODY, 1000)
    for broken in (
        good._replace(start=0), good._replace(start=13), good._replace(start=len(good.data)),
        good._replace(offset=len(good.data)), good._replace(offset=17), good._replace(kind=2),
        good._replace(kind=TCPV6), good._replace(size=SMALLEST - 1), good._replace(start=35),
        good._replace(data=good.data[:53]), good._replace(data=good.data[:14]),
        good._replace(data=good.data[:23] + b"\x11" + good.data[24:]),
        good._replace(data=good.data[:46] + b"\xf0" + good.data[47:60]),
        good._replace(data=good.data[:46] + b"\x40" + good.data[47:]),
        Frame(b"x" * 13), Frame(b"x" * 70_000),
    ):  # fmt: skip
        assert not broken.is_sound, broken._replace(data=b"")


def test_a_sum_of_zero_is_sent_as_ones() -> None:
    data = bytes(34) + b"\xff\xff" + bytes(4)
    assert Frame(data, 34, 4).whole().data[38:] == b"\xff\xff"
