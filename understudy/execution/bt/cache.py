"""The translation cache: frames of the hypervisor's, and what is where in them.

Source: Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization".
Invariants: an address that leads to code which is gone is nowhere in the cache; each link of a unit
leads to the translation of its target, or to its own trap.
"""

from array import array
from bisect import bisect_right
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.execution.bt.layout import CODE, CODE_BYTES, ENTRIES, EXTRA, TAGS, TARGETS, Layout
from understudy.execution.bt.sequences import Code, Link
from understudy.execution.bt.translate import Cut, translate
from understudy.instructions.operands import LOW32, MASK64
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host

CHUNK: Final = 64
"""Frames that are taken at once for code."""
CHUNK_BYTES: Final = CHUNK * PAGE
NOTES_KEPT: Final = 1 << 19
"""Instructions that have a translation; and what is noted of places in translations."""

MANY: Final = 64  # units
STI: Final = 0xFB  # its last byte, and of some others


class Full(Exception):
    """There is no room for one more unit."""


@dataclass(eq=False, slots=True)
class Unit:
    """Some instructions and their translation."""

    rip: int
    pc: int
    guest: bytes  # what was translated
    length: int  # bytes of the translation
    starts: bytes  # of each instruction: two words of 16 bits, from pc on and from rip on
    links: list[Link]
    gfns: tuple[int, ...] = ()
    copies: int = 0  # of its instructions
    code: Code | None = None  # None: it is made again when it is needed

    @classmethod
    def of(cls, code: Code, guest: bytes) -> "Unit":
        """One that has been translated, from the beginning of this."""
        (pc, rip), mask = code.starts[0], code.layout.mask
        offsets = [(at - pc, own - rip & mask) for at, own in code.starts]
        starts = array("H", [offset for pair in offsets for offset in pair]).tobytes()
        length, own = len(code.out), guest[: code.seen]
        return cls(rip, pc, own, length, starts, code.links, copies=code.copies, code=code)

    @property
    def count(self) -> int:
        """Of its instructions."""
        return len(self.starts) // 4

    def is_behind_sti(self, offset: int) -> bool:
        """Whether the instruction there is in the shadow of the one before, or might be.

        Nobody jumps to its copy, so that whoever stops there has come by the STI.
        """
        return offset > 0 and self.guest[offset - 1] == STI

    def places(self, mask: int) -> Iterator[tuple[int, int]]:
        """(pc, rip) of its instructions."""
        offsets = array("H", self.starts)
        for at, own in zip(offsets[::2], offsets[1::2], strict=True):
            yield self.pc + at, self.rip + own & mask


class Cache:
    """That of one vCPU, while the window lies where it lies."""

    def __init__(
        self, host: Host, layout: Layout, *, is_virtual: bool = True,
        hidden: Container[int] = (), called_out: Container[int] = (),
    ) -> None:  # fmt: skip
        """is_virtual, hidden, called_out: as `translate` has them.

        OutOfFrames: the host has no room, and nothing of it is taken.
        """
        self.host, self.memory, self.layout = host, host.memory, layout
        self._translate = partial(
            translate, layout, is_virtual=is_virtual, hidden=hidden, called_out=called_out
        )
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
        self.notes = 0  # of places in code, that units have
        self._units: list[Unit] = []  # by pc
        self._pcs: list[int] = []  # of those
        self.stubs: dict[int, Link] = {}
        self.incoming: dict[int, dict[Link, None]] = {}  # rip: chained links to there
        self.by_frame: dict[int, dict[Unit, None]] = {}  # gfn: those that were translated from it
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
        if len(self.entries) >= NOTES_KEPT:
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

    def unit_of(self, pc: int) -> Unit | None:
        """The one whose code that is."""
        n = bisect_right(self._pcs, pc) - 1
        if n < 0 or pc >= (unit := self._units[n]).pc + unit.length:
            return None
        return unit

    def code_at(self, pc: int) -> Code | None:
        """What is noted of the code there; None: there is none of ours."""
        if (unit := self.unit_of(pc)) is None:
            return None
        if (code := unit.code) is None:
            try:
                code = self.translate(unit.pc, unit.guest, unit.rip)
            except Cut:  # from a file that somebody has made up
                return None
            self._note(code)
            unit.code = code
        return code

    def translate(self, pc: int, code: bytes, rip: int) -> Code:
        """A unit.  Cut: more code is needed."""
        return self._translate(pc, code, rip)

    def _note(self, code: Code) -> None:
        self.notes += len(code.starts) + len(code.marks)
        if self.notes > NOTES_KEPT:
            self.notes = 0
            for unit in self._units:
                unit.code = None

    def add(self, unit: Unit, out: bytes) -> None:
        """It is translated, to this."""
        if unit.code is not None:
            self._note(unit.code)
        self.memory.write(self.hpa(unit.pc), out)
        self.used += unit.length
        self._units.append(unit)
        self._pcs.append(unit.pc)
        for gfn in unit.gfns:
            self.by_frame.setdefault(gfn, {})[unit] = None
        entries = self.entries
        for pc, rip in unit.places(self.layout.mask):
            if not unit.is_behind_sti(rip - unit.rip):
                entries.setdefault(rip, pc)
        for link in unit.links:
            known = entries.get(link.target)
            self.stubs[link.stub] = link
            if known is not None:
                self.chain(link, known)

    def chain(self, link: Link, pc: int) -> None:
        """Its target is translated: at `pc`."""
        self._lead(link, pc)
        self.incoming.setdefault(link.target, {})[link] = None

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
        units = self.by_frame.pop(gfn, {})
        self._forget(units)
        return len(units)

    def drop_at(self, rip: int) -> None:
        """Whatever has a translation of the instruction there is to be translated anew."""
        mask = self.layout.mask
        near = [unit for unit in self._units if 0 <= rip - unit.rip < len(unit.guest)]
        self._forget([unit for unit in near if any(own == rip for _, own in unit.places(mask))])

    def _forget(self, units: Collection[Unit]) -> None:
        for unit in units:
            self._unlink(unit)
        if len(units) < MANY:
            for unit in units:
                n = bisect_right(self._pcs, unit.pc) - 1
                del self._pcs[n], self._units[n]
        else:  # all at once: a guest may have had one frame translated at any number of addresses
            self._units = [unit for unit in self._units if unit not in units]
            self._pcs = [unit.pc for unit in self._units]

    def _unlink(self, unit: Unit) -> None:
        word = self.layout.word
        for other in unit.gfns:
            self.by_frame.get(other, {}).pop(unit, None)
        for pc, rip in unit.places(self.layout.mask):
            if self.entries.get(rip) != pc:
                continue
            del self.entries[rip]
            for link in self.incoming.pop(rip, ()):
                self._lead(link, link.stub)
            at = (rip & ENTRIES - 1) * word
            tag = int.from_bytes(self.memory.read(self.tags + at, word), "little")
            if tag == -rip & self.layout.mask:
                self._put(TAGS, rip, 1 - rip & self.layout.mask)
        for link in unit.links:
            self.stubs.pop(link.stub, None)
            chained = self.incoming.get(link.target)
            if chained is not None:
                chained.pop(link, None)
