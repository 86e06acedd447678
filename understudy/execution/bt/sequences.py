"""Sequences of instructions that stand for one of the guest's: calls, returns, indirect branches.

They change no flags.  Each saves the accumulator and the counter register, and can be undone, so
that the guest's instruction has not begun, up to the one that shows; what follows that one cannot
fault.  How many instructions are executed beyond the guest's is added up in the window's data.

In 32-bit code the data is reached through SS, which is flat and never null in a kernel; in 64-bit
code relative to RIP.

Source: SDM 2, the instructions' own pages; Adams and Agesen, "A Comparison of Software and Hardware
Techniques for x86 Virtualization", for what a translation does.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NamedTuple

from understudy.execution.bt.layout import (
    EXTRA,
    FIRST,
    IF,
    IOPL,
    OFF,
    OPENING,
    SECOND,
    TAGS,
    TARGET,
    TARGETS,
    Layout,
)

AX, CX, SP = 0, 1, 4
LOAD, STORE, LEA = 0x8B, 0x89, 0x8D
UD2: Final = b"\x0f\x0b"


class Mark(NamedTuple):
    """Inside a sequence: what has been executed of it beyond the guest's instructions."""

    rip: int
    steps: int  # that `EXTRA` does not count
    saved: int  # how many of the two registers are to be restored


@dataclass(eq=False, slots=True)
class Link:
    """A direct branch out of a unit."""

    target: int  # the guest's address
    place: int  # pc of its 32-bit displacement
    stub: int  # pc of the trap that it leads to until it is chained


@dataclass
class Code:
    """Translated code as it comes about, from `pc` on."""

    layout: Layout
    pc: int
    out: bytearray = field(default_factory=bytearray)
    starts: list[tuple[int, int]] = field(default_factory=list)  # (pc, rip) of instructions
    ends: list[tuple[int, int]] = field(default_factory=list)  # of what stands for none
    marks: dict[int, Mark] = field(default_factory=dict)  # by pc
    links: list[Link] = field(default_factory=list)
    callouts: dict[int, int] = field(default_factory=dict)  # pc of a trap: rip
    inline: set[int] = field(default_factory=set)  # pcs that fault while an interrupt waits
    after_sti: set[int] = field(default_factory=set)  # pcs
    moves: list[int] = field(default_factory=list)  # where in `out` something is relative to RIP
    copies: int = 0  # of `starts`
    seen: int = 0  # bytes of the guest's code that it depends on
    steps: int = 0  # executed of a sequence, that `EXTRA` does not count
    _rip: int = 0
    _start: int = 0  # pc of the guest's instruction

    def has(self, pc: int) -> bool:
        """Whether that is in it."""
        return self.pc <= pc < self.here

    @cached_property
    def places(self) -> dict[int, int]:
        """By pc: where the guest is then, between two of its instructions."""
        return dict(self.starts + self.ends)

    @property
    def here(self) -> int:
        """The pc of what comes next."""
        return self.pc + len(self.out)

    def begin(self, rip: int) -> None:
        """An instruction of the guest."""
        self.starts.append((self.here, rip))
        self._rip, self._start, self.steps = rip, self.here, 0

    def begin_end(self, rip: int) -> None:
        """What leads on to `rip`, and stands for no instruction."""
        self.ends.append((self.here, rip))
        self._rip, self._start, self.steps = rip, self.here, 0

    # --- one instruction each ---

    def plain(self, code: bytes, *, saved: int = 0) -> None:
        """An instruction before which the guest's has not begun, if the registers are restored."""
        if self.here != self._start:
            self.marks[self.here] = Mark(self._rip, self.steps, saved)
        self.between(code)

    def between(self, code: bytes) -> None:
        """One that cannot fault, before one that has put back whatever these have changed."""
        self.out += code
        self.steps += 1

    def last(self, code: bytes) -> None:
        """One before which the guest's instruction has begun to show."""
        self.out += code

    def wide(self, code: bytes) -> bytes:
        """An instruction on registers of the code's size."""
        return b"\x48" + code if self.layout.bits == 64 else code

    def datum(
        self, opcode: bytes, offset: int, *, wide: bool = True, immediate: bytes = b""
    ) -> bytes:
        """An instruction with one operand in the window's data."""
        at = self.layout.base + offset
        if self.layout.bits == 32:
            return b"\x36" + opcode + at.to_bytes(4, "little") + immediate
        code = self.wide(opcode) if wide else opcode
        self.moves.append(len(self.out) + len(code))
        at -= self.here + len(code) + 4 + len(immediate)
        return code + (at & 0xFFFF_FFFF).to_bytes(4, "little") + immediate

    def move(self, opcode: int, register: int, offset: int, *, saved: int = 0) -> None:
        """LOAD or STORE a register from or to the window's data."""
        self.plain(self.datum(bytes((opcode, 0x05 | register << 3)), offset), saved=saved)

    def jump(self, opcode: bytes, target: int) -> None:
        """A direct branch; its link."""
        self.last(opcode + b"\0\0\0\0")
        self.links.append(Link(target, self.here - 4, 0))

    # --- parts ---

    def count(self, count: int, *, saved: int = 1) -> None:
        """`count` instructions more than the guest's: the sequence is as good as done."""
        self.move(LOAD, AX, EXTRA, saved=saved)
        self.plain(self.wide(bytes((LEA, 0x40, -count & 0xFF))), saved=saved)
        self.move(STORE, AX, EXTRA, saved=saved)
        self.steps -= count

    def _table(self, half: int) -> None:
        """CX: what a half of the table has for the target in AX."""
        at = self.layout.base + half
        if self.layout.bits == 32:
            self.plain(b"\x0f\xb7\xc8", saved=2)
            self.plain(b"\x36\x8b\x0c\x8d" + at.to_bytes(4, "little"), saved=2)
            return
        tags = self.layout.base + TAGS
        self.plain(b"\x48\xb9" + (tags >> 3).to_bytes(8, "little"), saved=2)
        self.plain(b"\x66\x89\xc1", saved=2)
        self.plain(b"\x48\x8b\x0c\xcd" + (at - tags).to_bytes(4, "little"), saved=2)

    def save(self) -> None:
        """The two registers."""
        self.move(STORE, AX, FIRST)
        self.move(STORE, CX, SECOND)

    def restore(self) -> None:
        """Both, while the guest's instruction has not begun."""
        self.move(LOAD, CX, SECOND, saved=2)
        self.move(LOAD, AX, FIRST, saved=2)

    def found_or_trap(self) -> None:
        """CX: where the translation of the target in AX is.  Else trap, with the target stored."""
        self._table(TAGS)
        self.none_or_trap()
        self._table(TARGETS)

    def none_or_trap(self, *, adds: bool = True) -> None:
        """Trap unless CX, with AX added to it, is zero; AX is stored then."""
        if adds:
            self.plain(self.wide(b"\x8d\x0c\x01"), saved=2)
        at = len(self.out)
        self.plain(b"\xe3\0", saved=2)
        before = self.steps
        self.move(STORE, AX, TARGET, saved=2)
        self.restore()
        self.trap()
        self.out[at + 1] = len(self.out) - at - 2
        self.steps = before

    # --- whole ones ---

    def trap(self) -> None:
        """The hypervisor carries the instruction out."""
        self.callouts[self.here] = self._rip
        self.plain(UD2)

    def leave(self, rip: int) -> None:
        """On to another unit."""
        self.begin_end(rip)
        self.move(STORE, AX, FIRST)
        self.count(6)
        self.move(LOAD, AX, FIRST, saved=1)
        self.marks[self.here] = Mark(rip, self.steps, 0)
        self.jump(b"\xe9", rip)

    def set_if(self, value: int) -> None:
        """CLI and STI; that faults while an interrupt waits."""
        if value:
            self.inline.add(self.here)
        immediate = (OFF * (not value)).to_bytes(4, "little", signed=True)
        self.plain(self.datum(b"\xc7\x05", OPENING if value else IF, immediate=immediate))
        if value:
            self.after_sti.add(self.here)

    def pushf(self) -> None:
        """PUSHF of a register's size."""
        self.save()
        self.count(13)
        self.move(LOAD, CX, IF, saved=2)
        self.plain(b"\x9c", saved=2)
        self.last(self.wide(b"\x8b\x04\x24"))
        self.last(self.wide(b"\x8d\x04\x01"))
        self.last(self.datum(b"\x8b\x0d", IOPL))
        self.last(self.wide(b"\x8d\x04\x01"))
        self.last(self.wide(b"\x89\x04\x24"))
        self.last(self.datum(b"\x8b\x0d", SECOND))
        self.last(self.datum(b"\x8b\x05", FIRST))

    def read_datum(self, opcode: bytes, offset: int) -> None:
        """An instruction whose operand is what the guest has there."""
        self.plain(self.datum(opcode, offset, wide=False))

    def call(self, target: int, back: int) -> None:
        """CALL rel32.  `back` fits a sign-extended immediate."""
        self.move(STORE, AX, FIRST)
        self.count(6)
        self.move(LOAD, AX, FIRST, saved=1)
        self.plain(b"\x68" + (back & 0xFFFF_FFFF).to_bytes(4, "little"))
        self.jump(b"\xe9", target)

    def indirect(self, load: bytes, *, back: int | None = None, drops: int = 0) -> None:
        """JMP, CALL with `back`, or RET that drops so many bytes; `load` puts the target in AX.

        Where to go is stored behind the push, which may be to where it is stored.
        """
        self.save()
        self.plain(load)
        self.found_or_trap()
        self.count(self.steps + 6 + (back is not None) + bool(drops), saved=2)
        if back is not None:
            self.plain(b"\x68" + (back & 0xFFFF_FFFF).to_bytes(4, "little"), saved=2)
        self.last(self.datum(b"\x89\x0d", TARGET))
        self.last(self.datum(b"\x8b\x0d", SECOND))
        self.last(self.datum(b"\x8b\x05", FIRST))
        if drops:
            self.last(self.wide(b"\x8d\xa4\x24" + drops.to_bytes(4, "little")))
        self.last(self.datum(b"\xff\x25", TARGET, wide=False))

    def stubs(self) -> None:
        """What links lead to until they are chained."""
        for link in self.links:
            link.stub = self.here
            self.ends.append((link.stub, link.target))
            self.out += UD2
            at = link.place - self.pc
            self.out[at : at + 4] = (link.stub - link.place - 4).to_bytes(4, "little", signed=True)
