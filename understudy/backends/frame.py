"""An Ethernet frame on its way, with what its sender left for others to do.

A driver may leave the checksum of TCP or UDP to the card, and the cutting of a long TCP segment.
Between two cards that both can do without, nobody ever does it.

Source: IEEE 802.3; Virtual I/O Device (VIRTIO) Version 1.2, "Packet Transmission"; RFC 791, 8200
and 9293 for the headers, RFC 1071 for the checksum.
Invariant: what `whole` and `pieces` return are frames as any wire carries them.
"""

from typing import Final, NamedTuple

MAC_BYTES: Final = 6
HEADER_BYTES: Final = 14
GROUP: Final = 1  # in the first byte of an address
BROADCAST: Final = b"\xff" * MAC_BYTES
LONGEST: Final = 0xFFFF + HEADER_BYTES + 4  # the longest IP packet, in a frame with a VLAN tag

TCPV4, TCPV6 = 1, 4  # VIRTIO_NET_HDR_GSO_*
IPV4, IPV6, TCP = 0x0800, 0x86DD, 6
CHECKSUM_AT: Final = {6: 16, 17: 6}  # where TCP and UDP have it
PSH, FIN = 0x08, 0x01
SMALLEST: Final = 48  # bytes of TCP in a piece; Linux has no smaller ones


class Frame(NamedTuple):
    """The bytes from the addresses on, without check sequence; the rest is what is yet to do."""

    data: bytes
    start: int = 0
    """From where on a checksum is to be made; 0: none is."""
    offset: int = 0
    """Where it goes, from there on."""
    kind: int = 0
    """To be cut as TCPV4 or TCPV6; 0: not at all."""
    size: int = 0
    """Bytes of TCP in each piece."""

    @property
    def to(self) -> bytes:
        """The address of whom it is for."""
        return self.data[:MAC_BYTES]

    @property
    def source(self) -> bytes:
        """The address of who sent it."""
        return self.data[MAC_BYTES : 2 * MAC_BYTES]

    @property
    def is_sound(self) -> bool:
        """Whether what is to do can be done."""
        data, start = self.data, self.start
        if not HEADER_BYTES <= len(data) <= LONGEST:
            return False
        if not start:
            return not self.kind
        if start < HEADER_BYTES or start + self.offset + 2 > len(data):
            return False
        return not self.kind or self._is_tcp()

    def _is_tcp(self) -> bool:
        """Whether it is one TCP segment of the kind that it says."""
        data, at = self.data, HEADER_BYTES
        protocol = int.from_bytes(data[12:14], "big")
        if self.kind == TCPV4 and protocol == IPV4 and len(data) >= at + 20:
            header, is_tcp = 4 * (data[at] & 15), data[at] >> 4 == 4 and data[at + 9] == TCP
        elif self.kind == TCPV6 and protocol == IPV6 and len(data) >= at + 40:
            header, is_tcp = 40, data[at] >> 4 == 6 and data[at + 6] == TCP
        else:
            return False
        start = at + header
        if not is_tcp or header < 20 or self.start != start or self.offset != CHECKSUM_AT[TCP]:
            return False
        if len(data) < start + 20 or self.size < SMALLEST:
            return False
        return 20 <= 4 * (data[start + 12] >> 4) <= len(data) - start

    def whole(self) -> "Frame":
        """With its checksum; it is to be cut no more."""
        if not self.start:
            return self
        data = bytearray(self.data)
        _fill(data, self.start, self.offset)
        return Frame(bytes(data))

    def pieces(self) -> "list[Frame]":
        """What a wire carries in its place: as many frames as it takes, with their checksums.

        RFC 9293: each has the header, with its own sequence number; PSH and FIN are the last one's.
        """
        if not self.kind:
            return [self.whole()]
        data, start = self.data, self.start
        body = start + 4 * (data[start + 12] >> 4)
        if len(data) - body <= self.size:
            return [self._without_kind().whole()]
        first = int.from_bytes(data[start + 4 : start + 8], "big")
        number = int.from_bytes(data[HEADER_BYTES + 4 : HEADER_BYTES + 6], "big")
        made = []
        for count, at in enumerate(range(body, len(data), self.size)):
            piece = bytearray(data[:body])
            part = data[at : at + self.size]
            piece += part
            sequence = first + at - body & 0xFFFF_FFFF
            piece[start + 4 : start + 8] = sequence.to_bytes(4, "big")
            if at + self.size < len(data):
                piece[start + 13] &= ~(PSH | FIN)
            length = len(piece) - HEADER_BYTES
            if self.kind == TCPV4:
                piece[16:18] = length.to_bytes(2, "big")
                piece[18:20] = (number + count & 0xFFFF).to_bytes(2, "big")
                piece[24:26] = bytes(2)
                piece[24:26] = (~_sum(piece[HEADER_BYTES:start]) & 0xFFFF).to_bytes(2, "big")
            else:
                piece[18:20] = (length - 40).to_bytes(2, "big")
            # The driver's sum is of addresses, protocol and length, and the length is another.
            base = int.from_bytes(piece[start + 16 : start + 18], "big")
            right = base + (~(len(data) - start) & 0xFFFF) + len(piece) - start
            piece[start + 16 : start + 18] = _folded(right).to_bytes(2, "big")
            _fill(piece, start, self.offset)
            made.append(Frame(bytes(piece)))
        return made

    def _without_kind(self) -> "Frame":
        return self._replace(kind=0, size=0)


def _folded(value: int) -> int:
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def _sum(data: bytes | bytearray) -> int:
    """The sum of 16-bit words in one's complement; RFC 1071."""
    value = int.from_bytes(data, "big") << 8 * (len(data) & 1)
    return value % 0xFFFF or (0xFFFF if value else 0)


def _fill(data: bytearray, start: int, offset: int) -> None:
    """Put the checksum of what is from `start` on to its place, where its first part stands."""
    at = start + offset
    value = ~_sum(data[start:]) & 0xFFFF
    data[at : at + 2] = (value or 0xFFFF).to_bytes(2, "big")  # zero: "no checksum", for UDP
