"""Packets of a virtio socket device.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Socket Device", "Device Operation".
"""

import struct
from enum import IntEnum
from typing import Final, NamedTuple

HOST_CID: Final = 2
STREAM: Final = 1  # VIRTIO_VSOCK_TYPE_STREAM
RECEIVE, SEND = 1, 2  # VIRTIO_VSOCK_SHUTDOWN_*: who says so will do no more of it
BOTH: Final = RECEIVE | SEND
LAYOUT: Final = struct.Struct("<QQIIIHHIII")


class Op(IntEnum):
    """VIRTIO_VSOCK_OP_*."""

    INVALID = 0
    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Header(NamedTuple):
    """`struct virtio_vsock_hdr`."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int


def header_of(data: bytes) -> Header:
    """What stands at the beginning of a packet."""
    return Header(*LAYOUT.unpack_from(data))
