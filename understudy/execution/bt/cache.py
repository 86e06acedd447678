"""The translation cache: frames of the hypervisor's, and what is where in them.

Source: Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization".
Invariants: an address that leads to code which is gone is nowhere in the cache; each link of a unit
leads to the translation of its target, or to its own trap.
"""

from dataclasses import dataclass
from typing import Final

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.execution.bt.layout import CODE, CODE_BYTES, ENTRIES, EXTRA, TAGS, TARGETS, Layout
from understudy.execution.bt.sequences import Code, Link, Mark
from understudy.instructions.operands import LOW32, MASK64
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host

CHUNK: Final = 64
"""Frames that are taken at once for code."""
CHUNK_BYTES: Final = CHUNK * PAGE
NOTES_KEPT: Final = 1 << 19
"""Addresses in translated code of which is noted what they stand for."""


class Full(Exception):
    """There is no room for one more unit."""


@dataclass(eq=False)
class Unit:
    """Some instructions and their translation."""

    rip: int
    code: Code
    guest: bytes  # what was translated
    gfns: tuple[int, ...]


class Cache:
    """That of one vCPU, while the window lies where it lies."""

    def __init__(self, host: Host, layout: Layout) -> None:
        """OutOfFrames: the host has no room, and nothing of it is taken."""
        self.host, self.memory, self.layout = host, host.memory, layout
        table = ENTRIES * layout.word
        self._runs: list[tuple[int, int]] = []  # (hpa, frames)
        try:
            self.data = self._frames(2)
            self.tags = self._frames(table >> PAGE_SHIFT)
            self.targets = self._frames(table >> PAGE_SHIFT)
        except OutOfFrames:
            self.close()
            raise
        self.chunks: list[int] = []  # hpas
        self.used = 0  # bytes of code
        self.entries: dict[int, int] = {}  # rip: pc
        self.places: dict[int, int] = {}  # pc: rip
        self.marks: dict[int, Mark] = {}
        self.callouts: dict[int, int] = {}  # pc: rip
        self.inline: set[int] = set()  # pcs that fault while an interrupt waits
        self.after_sti: set[int] = set()  # pcs
        self.stubs: dict[int, Link] = {}
        self.incoming: dict[int, list[Link]] = {}  # rip: chained links to there
        self.by_frame: dict[int, list[Unit]] = {}  # gfn: those that were translated from it
        self._put(TAGS, 0, 1)  # zero would be found there
        self.memory.write_u64(self.data + EXTRA, MASK64 - LOW32)

    def _frames(self, count: int) -> int:
        hpa = self.host.frame(count)
        self._runs.append((hpa, count))
        return hpa

    def frames(self) -> list[int]:
        """The pfns of all that is its own."""
        return [(hpa >> PAGE_SHIFT) + n for hpa, count in self._runs for n in range(count)]

    def close(self) -> None:
        """Give all back."""
        for hpa, count in self._runs:
            self.host.release(hpa >> PAGE_SHIFT, count)
        self._runs = []

    # --- memory ---

    def hpa(self, pc: int) -> int:
        """Where code lies on the host."""
        chunk, offset = divmod(pc - self.layout.base - CODE, CHUNK_BYTES)
        return self.chunks[chunk] + offset

    def room(self, length: int) -> tuple[int, int]:
        """The pc for so many bytes of code; also the hpa of a chunk, if it is the first in that.

        Full: nowhere.
        """
        if len(self.places) + len(self.marks) >= NOTES_KEPT:
            raise Full
        new = 0
        if self.used % CHUNK_BYTES + length > CHUNK_BYTES or not self.chunks:
            self.used = len(self.chunks) * CHUNK_BYTES
            if self.used + CHUNK_BYTES > CODE_BYTES:
                raise Full
            new = self._frames(CHUNK)
            self.chunks.append(new)
        return self.layout.base + CODE + self.used, new

    def datum(self, offset: int) -> int:
        """A word of the window's data."""
        at = self.data + offset
        return self.memory.read_u64(at) if self.layout.bits == 64 else self.memory.read_u32(at)

    def set_datum(self, offset: int, value: int) -> None:
        """Set one."""
        self.memory.write(self.data + offset, value.to_bytes(self.layout.word, "little"))

    def words(self, value: int) -> list[int]:
        """64 bits, as words of the window's data."""
        count = 8 // self.layout.word
        return [value >> 8 * n * self.layout.word & self.layout.mask for n in range(count)]

    def extra(self) -> int:
        """Instructions that were executed beyond the guest's since it went on, modulo 2**32."""
        return -self.memory.read_u32(self.data + EXTRA) & LOW32

    # --- units ---

    def unit_at(self, rip: int) -> Unit | None:
        """The one with the translation of the instruction there that is in use."""
        pc = self.entries.get(rip, 0)
        units = (unit for units in self.by_frame.values() for unit in units)
        return next((unit for unit in units if unit.code.has(pc)), None)

    def add(self, unit: Unit) -> None:
        """It is translated."""
        code = unit.code
        self.memory.write(self.hpa(code.pc), bytes(code.out))
        self.used += len(code.out)
        for gfn in unit.gfns:
            self.by_frame.setdefault(gfn, []).append(unit)
        for pc, rip in code.starts:
            self.places[pc] = rip
            self.entries.setdefault(rip, pc)
        self.places.update(code.ends)
        self.marks.update(code.marks)
        self.callouts.update(code.callouts)
        self.inline |= code.inline
        self.after_sti |= code.after_sti
        for link in code.links:
            known = self.entries.get(link.target)
            self.stubs[link.stub] = link
            if known is not None:
                self.chain(link, known)

    def chain(self, link: Link, pc: int) -> None:
        """Its target is translated: at `pc`."""
        self._lead(link, pc)
        self.incoming.setdefault(link.target, []).append(link)

    def _lead(self, link: Link, pc: int) -> None:
        self.memory.write(
            self.hpa(link.place), (pc - link.place - 4).to_bytes(4, "little", signed=True)
        )

    def note_target(self, rip: int, pc: int) -> None:
        """Indirect branches find it from now on, until another takes its place."""
        self._put(TAGS, rip, -rip & self.layout.mask)
        self._put(TARGETS, rip, pc)

    def _put(self, half: int, rip: int, value: int) -> None:
        word = self.layout.word
        table = self.tags if half == TAGS else self.targets
        self.memory.write(table + (rip & ENTRIES - 1) * word, value.to_bytes(word, "little"))

    def drop(self, gfn: int) -> int:
        """What was translated from this frame is not so any more.  How many units they were."""
        units = self.by_frame.pop(gfn, [])
        for unit in units:
            self._forget(unit)
        return len(units)

    def _forget(self, unit: Unit) -> None:
        code, word = unit.code, self.layout.word
        for other in unit.gfns:
            if unit in (rest := self.by_frame.get(other, [])):
                rest.remove(unit)
        for pc, rip in code.starts:
            if self.entries.get(rip) != pc:
                continue
            del self.entries[rip]
            for link in self.incoming.pop(rip, ()):
                self._lead(link, link.stub)
            at = (rip & ENTRIES - 1) * word
            tag = int.from_bytes(self.memory.read(self.tags + at, word), "little")
            if tag == -rip & self.layout.mask:
                self._put(TAGS, rip, 1 - rip & self.layout.mask)
        for pc, _ in code.starts + code.ends:
            self.places.pop(pc, None)
        for table in (self.marks, self.callouts, self.stubs):
            for pc in list(table.keys() & (code.marks.keys() | code.callouts.keys())):
                table.pop(pc, None)
        self.inline -= code.inline
        self.after_sti -= code.after_sti
        for link in code.links:
            self.stubs.pop(link.stub, None)
            chained = self.incoming.get(link.target)
            if chained is not None and link in chained:
                chained.remove(link)
