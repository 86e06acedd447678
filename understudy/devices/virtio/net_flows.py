"""Which pair of queues a frame for a guest goes to: that from which the guest answers its sender.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Automatic receive steering in multiqueue mode".

A table has a pair for each bucket of flows.  Two flows in one bucket share a pair; what is no TCP
and no UDP goes by its addresses, and what is no IP is in bucket 0.
"""

from typing import Final
from zlib import crc32

from understudy.backends.frame import HEADER_BYTES

# --- The protocols: RFC 791, 8200 ---

TYPE: Final = 12  # of an Ethernet frame
IPV4, IPV6 = b"\x08\0", b"\x86\xdd"
TCP, UDP = 6, 17
FRAGMENT: Final = 0x3FFF  # more of them, and the offset

# --- Ours ---

BUCKETS: Final = 256
NO_FLOWS: Final = bytes(BUCKETS)


def bucket_of(data: bytes, *, is_out: bool) -> int:
    """The bucket of a frame's flow; both directions of one are in the same."""
    kind, ip = data[TYPE:HEADER_BYTES], data[HEADER_BYTES:]
    if kind == IPV4 and len(ip) >= 20:
        ends, protocol, start = (ip[12:16], ip[16:20]), ip[9], 4 * (ip[0] & 15)
        has_ports = not int.from_bytes(ip[6:8]) & FRAGMENT
    elif kind == IPV6 and len(ip) >= 40:
        ends, protocol, start, has_ports = (ip[8:24], ip[24:40]), ip[6], 40, True
    else:
        return 0
    if has_ports and protocol in (TCP, UDP):
        ends = ends[0] + ip[start : start + 2], ends[1] + ip[start + 2 : start + 4]
    return crc32(b"".join(ends if is_out else ends[::-1])) % BUCKETS
