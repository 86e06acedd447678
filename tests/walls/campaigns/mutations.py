"""Bytes made wrong: at random, and where a format has its lengths, counts and addresses."""

import random
import socket
import struct

TELLING = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x1000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF,
           0xC000_0000, 0x1_0000_0000, 0x7FFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)  # fmt: skip
HEADERS = 0x400  # most of what decides is near the beginning


def send(client: socket.socket, line: bytes, chance: random.Random, *, whole: float) -> None:
    """A line in pieces, after each of which it goes on with this probability; perhaps a hang-up."""
    while line:
        size = chance.choice((1, 7, len(line), len(line)))
        client.sendall(line[:size])
        line = line[size:] if chance.random() < whole else b""
    if chance.random() < 0.2:
        client.shutdown(chance.choice((socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR)))


def mutated(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Some changes, mostly few; `others` are what may be spliced in."""
    out = bytearray(data)
    for _ in range(chance.choice((0, 1, 1, 2, 3, 8))):
        if not out:
            break
        near = min(len(out), HEADERS) if chance.random() < 0.7 else len(out)
        at = chance.randrange(near)
        match chance.randrange(7):
            case 0:
                out[at] ^= 1 << chance.randrange(8)
            case 1 | 2:
                layout = chance.choice("BHIQ")
                size = struct.calcsize(layout)
                value = chance.choice(TELLING) + chance.choice((0, 0, 1, -1))
                raw = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
                at -= at % size
                out[at : at + size] = raw
            case 3:
                del out[at:]
            case 4:
                length = chance.randrange(1, 600)
                out[at:at] = out[at : at + length] * chance.randrange(1, 4)
            case 5:
                other = chance.choice(others)
                start = chance.randrange(len(other)) if other else 0
                out[at:at] = other[start : start + chance.randrange(1, 5000)]
            case 6:
                del out[at : at + chance.randrange(1, 64)]
    return bytes(out)
