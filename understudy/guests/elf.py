"""ELF images, read defensively: headers, loadable segments, notes.

Source: the System V ABI, "Object Files" and "Program Loading".
Invariant: any bytes give an `Image` or one GuestError; no field of the file is believed before
it is checked against the file's length.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from understudy.guests.entry import GuestError
from understudy.guests.placement import Placement

MAGIC = b"\x7fELF"
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_NOTE = 1, 4
MAX_SEGMENTS = 128  # kernels have fewer than ten


class Segment(NamedTuple):
    """A program header: what of the file goes where."""

    kind: int
    offset: int
    vaddr: int
    paddr: int
    file_size: int
    memory_size: int


@dataclass(frozen=True)
class Image:
    """A parsed ELF file."""

    data: bytes
    is_64: bool
    machine: int
    entry: int
    segments: tuple[Segment, ...]

    @property
    def loads(self) -> tuple[Segment, ...]:
        """The segments that occupy memory."""
        return tuple(s for s in self.segments if s.kind == PT_LOAD and s.memory_size)

    @property
    def physical_entry(self) -> int:
        """The entry point as a physical address.

        An entry given as a virtual address is translated by the segment that holds it.
        """
        if any(s.paddr <= self.entry < s.paddr + s.memory_size for s in self.loads):
            return self.entry
        for s in self.loads:
            if s.vaddr <= self.entry < s.vaddr + s.memory_size:
                return self.entry - s.vaddr + s.paddr
        raise GuestError(f"the ELF entry point {self.entry:#x} lies in no loadable segment")

    def notes(self) -> Iterator[tuple[bytes, int, bytes]]:
        """(name, type, descriptor) of each note."""
        for segment in self.segments:
            if segment.kind == PT_NOTE:
                yield from _notes(self.data[segment.offset :][: segment.file_size])


def parse(data: bytes, what: str = "the kernel") -> Image:
    """Read an ELF file for x86, 32- or 64-bit."""
    try:
        return _parse(data)
    except struct.error:
        raise GuestError(f"{what} is a truncated ELF file ({len(data)} bytes)") from None
    except GuestError as error:
        raise GuestError(f"{what}: {error}") from None


def load(image: Image, place: Placement, what: str = "kernel") -> None:
    """Put each segment at its physical address, with what the file lacks (.bss) zero."""
    for number, s in enumerate(image.loads):
        data = image.data[s.offset : s.offset + s.file_size]
        place.put(f"{what} segment {number}", s.paddr, data, s.memory_size)


def _parse(data: bytes) -> Image:
    if not data.startswith(MAGIC):
        raise GuestError("expected an ELF file")
    if data[4:5] not in (b"\x01", b"\x02") or data[5:6] != b"\x01":
        raise GuestError("expected a little-endian ELF file of 32 or 64 bits")
    is_64 = data[4] == 2
    (machine,) = struct.unpack_from("<H", data, 18)
    if machine not in (EM_386, EM_X86_64):
        raise GuestError(f"expected an ELF file for x86, got machine {machine}")
    if is_64:
        entry, table = struct.unpack_from("<QQ", data, 24)
        entry_size, count = struct.unpack_from("<HH", data, 54)
        layout, minimum = "<IIQQQQQQ", 56
    else:
        entry, table = struct.unpack_from("<II", data, 24)
        entry_size, count = struct.unpack_from("<HH", data, 42)
        layout, minimum = "<IIIIIIII", 32
    if count and entry_size < minimum:
        raise GuestError(f"expected program headers of {minimum} bytes, got {entry_size}")
    if count > MAX_SEGMENTS:
        raise GuestError(f"expected at most {MAX_SEGMENTS} program headers, got {count}")
    if table + count * entry_size > len(data):
        raise GuestError(
            f"truncated ELF file: {count} program headers at {table:#x}, {len(data):#x} bytes"
        )
    segments = []
    for i in range(count):
        if is_64:
            kind, _, offset, vaddr, paddr, in_file, in_memory, _ = struct.unpack_from(
                layout, data, table + i * entry_size
            )
        else:
            kind, offset, vaddr, paddr, in_file, in_memory, _, _ = struct.unpack_from(
                layout, data, table + i * entry_size
            )
        segment = Segment(kind, offset, vaddr, paddr, in_file, in_memory)
        if kind == PT_LOAD:
            _check(segment, len(data))
        segments.append(segment)
    image = Image(data, is_64, machine, entry, tuple(segments))
    if not image.loads:
        raise GuestError("the ELF file has nothing to load (is it an object file?)")
    return image


def _check(segment: Segment, length: int) -> None:
    if segment.offset + segment.file_size > length:
        raise GuestError(
            f"truncated: a segment ends at byte {segment.offset + segment.file_size} "
            f"and the file has {length}"
        )
    if segment.file_size > segment.memory_size:
        raise GuestError("damaged: a segment is larger in the file than in memory")


def _notes(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    at = 0
    while at + 12 <= len(data):
        name_size, size, kind = struct.unpack_from("<III", data, at)
        name_at = at + 12
        at = name_at + (name_size + 3 & ~3)
        yield data[name_at : name_at + name_size].rstrip(b"\0"), kind, data[at : at + size]
        at += size + 3 & ~3
