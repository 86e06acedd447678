"""What a Linux kernel calls its own addresses: kallsyms, read where they lie in its memory.

Source: Linux, scripts/kallsyms.c and kernel/kallsyms.c.  A name is a string of tokens; offsets are
from one base, or, with per-CPU symbols apart, the negative ones are.
Invariant: what is no such table gives no names; nothing of the guest's memory raises here.
"""

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Final

Read = Callable[[int, int], bytes]
"""(gpa, bytes)."""
DIGITS: Final = b"".join(bytes([digit, 0]) for digit in b"0123456789")
TOKENS, PER_MARKER = 256, 256
FARTHEST: Final = 1 << 16  # behind a name, that it can be meant
CHUNK: Final = 1 << 22
MOST_SYMBOLS: Final = 1 << 20
LONGEST: Final = 1 << 23  # bytes of all tables
LONGEST_NAME: Final = 64  # bytes of a name, on the average
FEWEST_MARKERS: Final = 16  # of a kernel of a few thousand names
MOST_NAMES: Final = PER_MARKER * 512  # bytes behind the last marker
MOST_TOKENS: Final = 1 << 13  # bytes


class Symbols:
    """Addresses and their names, in order."""

    def __init__(self, rows: list[tuple[int, str]]) -> None:
        self.rows = sorted(rows)
        self._addresses = [address for address, _ in self.rows]

    def name(self, address: int) -> str:
        """Like `native_irq_disable+0x1`; the address if there is no name for it."""
        at = bisect_right(self._addresses, address) - 1
        base, name = self.rows[at] if at >= 0 else (0, "")
        if at < 0 or address - base >= FARTHEST:
            return f"{address:#x}"
        return f"{name}+{address - base:#x} ({address:#x})"


def find(read: Read, size: int) -> Symbols:
    """Those of the kernel that runs in memory of this size; none if none is found."""
    for at in range(0, size, CHUNK):
        data = read(at, min(CHUNK + len(DIGITS), size - at))
        found = data.find(DIGITS)
        while found >= 0:
            rows = _tables(read, at + found, size)
            if rows:
                return Symbols(rows)
            found = data.find(DIGITS, found + 1)
    return Symbols([])


def _tables(read: Read, digits: int, size: int) -> list[tuple[int, str]]:
    """`digits`: where the token of the digit 0 lies, perhaps."""
    after = read(digits, min(MOST_TOKENS, size - digits))
    end = 0
    for _ in range(TOKENS - ord("0")):
        end = after.find(b"\0", end) + 1
        if not end:
            return []
    for align in (8, 4):
        index_at = -(-(digits + end) // align) * align
        raw = read(index_at, 2 * TOKENS) if index_at + 2 * TOKENS <= size else bytes(2 * TOKENS)
        index = struct.unpack(f"<{TOKENS}H", raw)
        start = digits - index[ord("0")]
        if not index[0] and 0 < index[ord("0")] < MOST_TOKENS and list(index) == sorted(index):
            tokens = read(start, digits + end - start)
            words = [tokens[at : tokens.index(b"\0", at)] for at in index]
            if rows := _names(read, start, words, align):
                return rows
    return []


def _names(read: Read, tokens_at: int, words: list[bytes], align: int) -> list[tuple[int, str]]:
    first = max(0, tokens_at - LONGEST) & -8
    data = read(first, (tokens_at - first) & -8)
    for end, markers in _markers(data):
        latest = (end - markers[-1]) & -align
        for at in range(latest, max(latest - MOST_NAMES, 2 * align), -align):
            count = int.from_bytes(data[at - align : at - align + 4], "little")
            if -(-count // PER_MARKER) != len(markers) or count > MOST_SYMBOLS:
                continue
            names = _decode(data[at:end], count, words, markers)
            if names is not None:
                return _addressed(data, at - 2 * align, names, align)
    return []


def _addressed(data: bytes, base_at: int, names: list[str], pointer: int) -> list[tuple[int, str]]:
    """The names with their addresses; the base lies behind the offsets."""
    at = (base_at - 4 * len(names)) & -pointer
    base = int.from_bytes(data[base_at : base_at + pointer], "little")
    offsets = struct.unpack_from(f"<{len(names)}I", data, at)
    return [
        (_address(offset, base, pointer), name) for offset, name in zip(offsets, names, strict=True)
    ]


def _address(offset: int, base: int, pointer: int) -> int:
    if pointer == 4:
        return base + offset & 0xFFFF_FFFF
    return offset if offset < 1 << 31 else base - 1 - (offset - (1 << 32))


def _markers(data: bytes) -> Iterator[tuple[int, list[int]]]:
    """Where there may be markers, the offsets of every 256th name, and which; the last first."""
    values = memoryview(data).cast("I")
    for at in range(len(values) - 4, -1, -1):
        if values[at] or not values[at + 1] or not _follows(values[at], values[at + 1]):
            continue
        end = at + 1
        while end < len(values) and _follows(values[end - 1], values[end]):
            end += 1
        if end - at >= FEWEST_MARKERS:
            yield 4 * at, list(values[at:end])


def _follows(marker: int, another: int) -> bool:
    """Whether 256 names may be as long as these two are apart."""
    return 2 * PER_MARKER <= another - marker <= LONGEST_NAME * PER_MARKER


def _decode(data: bytes, count: int, words: list[bytes], markers: list[int]) -> list[str] | None:
    """The names, without the letter of their type; None if the markers do not fit."""
    names, at = [], 0
    for n in range(count):
        if n % PER_MARKER == 0 and markers[n // PER_MARKER] != at:
            return None
        if at >= len(data):
            return None
        length, at = data[at], at + 1
        if length & 0x80 and at < len(data):
            length, at = length & 0x7F | data[at] << 7, at + 1
        name = b"".join(words[token] for token in data[at : at + length])
        names.append(name[1:].decode("ascii", "replace"))
        at += length
    return names
