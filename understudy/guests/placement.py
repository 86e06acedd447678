"""Who gets which guest-physical memory while a guest is being loaded.

Invariants: nothing is placed outside RAM; no two things overlap; each refusal is one line that
says what did not fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from understudy.arch.address import PAGE
from understudy.arch.memory_map import usable
from understudy.guests.entry import GDT_GPA, LOW_BLOCK_GPA, TABLES_END, GuestError, GuestMemory

MIB = 1 << 20
FIRMWARE_END = 0x500  # the vector table and the BIOS data area


@dataclass(frozen=True)
class Claim:
    """A piece of guest-physical memory in use: [start, end)."""

    start: int
    end: int
    what: str


class NoRoom(GuestError):
    """The memory is too small, or has no RAM there; `loader` adds what to do about it."""


class Pretended:
    """A PC's memory of some size, without the memory."""

    def __init__(self, size: int) -> None:
        self.size = size

    def ranges(self) -> Sequence[tuple[int, int]]:
        """As a PC has them."""
        return usable(self.size)

    def read(self, gpa: int, length: int, /) -> bytes:
        """Nothing is in it."""
        return b""

    def write(self, gpa: int, data: bytes, /) -> None:
        """Nothing is kept."""


class Placement:
    """The pieces of a VM's memory that a loader has given away."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.claims: list[Claim] = []
        self.moved = 0
        """How far above their usual places the first tables are: see `tables`."""

    @property
    def low_block(self) -> int:
        """The gpa of the protocol's own structures, beside those tables."""
        return LOW_BLOCK_GPA + self.moved

    def claim(self, what: str, gpa: int, length: int) -> None:
        """Reserve [gpa, gpa+length) for `what`; GuestError if it is not free RAM."""
        end = gpa + length
        if not self._is_ram(gpa, end):
            raise NoRoom(
                f"{what} must be at {gpa:#x}-{end:#x}, which is not all memory of this VM "
                f"({mib(self.memory.size)})"
            )
        for other in self.claims:
            if gpa < other.end and other.start < end:
                raise GuestError(
                    f"{what} at {gpa:#x}-{end:#x} overlaps {other.what} "
                    f"at {other.start:#x}-{other.end:#x}"
                )
        self.claims.append(Claim(gpa, end, what))

    def tables(self) -> None:
        """Find the place of all that is not the kernel, once it is there: the usual one, or the
        lowest above it where the kernel is not."""
        self.claim("what firmware leaves", 0, FIRMWARE_END)
        length = TABLES_END - GDT_GPA
        ends = [claim.end for claim in self.claims] + [base for base, _ in self._ram()]
        places = [GDT_GPA, *sorted((end + PAGE - 1) & -PAGE for end in ends)]
        free = (gpa for gpa in places if gpa >= GDT_GPA and self._is_free(gpa, gpa + length))
        self.moved = next(free, GDT_GPA) - GDT_GPA
        self.claim("the first tables", GDT_GPA + self.moved, LOW_BLOCK_GPA - GDT_GPA)

    def _is_ram(self, start: int, end: int) -> bool:
        return any(base <= start and end <= base + size for base, size in self._ram())

    def _is_free(self, start: int, end: int) -> bool:
        taken = any(start < other.end and other.start < end for other in self.claims)
        return self._is_ram(start, end) and not taken

    def highest(self, what: str, length: int, below: int, align: int = 4096) -> int:
        """Reserve the highest free place under `below`; returns its address."""
        walls = sorted(self.claims, key=lambda claim: claim.start, reverse=True)
        best = -1
        for base, size in self._ram():
            top = min(base + size, below)
            for wall in [*walls, Claim(-1, base, "")]:
                if wall.start >= top:
                    continue
                gpa = (top - length) & -align
                if gpa >= max(base, wall.end):
                    best = max(best, gpa)
                    break
                top = min(top, wall.start)
        if best < 0:
            raise NoRoom(
                f"{what} of {mib(length)} does not fit in the VM's {mib(self.memory.size)} of "
                "memory beside the kernel"
            )
        self.claims.append(Claim(best, best + length, what))
        return best

    def put(self, what: str, gpa: int, data: bytes, length: int | None = None) -> None:
        """Claim and write; `length` beyond the data is made zero."""
        whole = max(len(data), length or 0)
        self.claim(what, gpa, whole)
        self.memory.write(gpa, data)
        self._zero(gpa + len(data), gpa + whole)

    def _zero(self, start: int, end: int) -> None:
        """Clear memory; what reads as zero already is left alone and stays a hole."""
        if isinstance(self.memory, Pretended):
            return
        for gpa in range(start, end, MIB):
            length = min(MIB, end - gpa)
            if any(self.memory.read(gpa, length)):
                self.memory.write(gpa, bytes(length))

    def _ram(self) -> list[tuple[int, int]]:
        return [(base, size) for base, size in self.memory.ranges() if size > 0]


def mib(length: int) -> str:
    """Bytes for people, rounded up to whole MiB (KiB when small)."""
    if length < MIB:
        return f"{-(-length // 1024)} KiB"
    return f"{-(-length // MIB)} MiB"
