"""What stands before each frame in a network device's buffers: what is yet to do for it.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Device Operation" of "Network Device".
Invariant: a frame that a driver made is sound, or there is none.
"""

import struct
from typing import Final, NamedTuple

from understudy.backends.frame import HEADER_BYTES, TCPV4, TCPV6, Frame

CSUM, GUEST_CSUM, MRG_RXBUF = 1 << 0, 1 << 1, 1 << 15  # VIRTIO_NET_F_*
GUEST_TSO: Final = {TCPV4: 1 << 7, TCPV6: 1 << 8}
HOST_TSO: Final = {TCPV4: 1 << 11, TCPV6: 1 << 12}
OFFLOADS: Final = CSUM | GUEST_CSUM | sum(GUEST_TSO.values()) | sum(HOST_TSO.values())
NEEDS_CSUM: Final = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM
HEADER: Final = struct.Struct("<BBHHHHH")


class Header(NamedTuple):
    """virtio_net_hdr."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 1


def frame_of(header: Header, data: bytes, features: int) -> Frame | None:
    """What a driver with these features sends; None if it may not, or if it cannot be done."""
    kind = header.gso_type
    if not header.flags & NEEDS_CSUM:
        frame = Frame(data)
        return frame if frame.is_sound and not kind else None
    if not features & CSUM or header.csum_start < HEADER_BYTES:
        return None
    if kind and not features & HOST_TSO.get(kind, 0):
        return None
    size = header.gso_size if kind else 0
    frame = Frame(data, header.csum_start, header.csum_offset, kind, size)
    return frame if frame.is_sound else None


def header_of(frame: Frame) -> Header:
    """For a driver that can do what is yet to do."""
    if not frame.start:
        return Header()
    if not frame.kind:
        return Header(NEEDS_CSUM, csum_start=frame.start, csum_offset=frame.offset)
    headers = frame.start + 4 * (frame.data[frame.start + 12] >> 4)
    return Header(NEEDS_CSUM, frame.kind, headers, frame.size, frame.start, frame.offset)
