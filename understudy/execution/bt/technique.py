"""Binary translation: the guest's programs run as they are, its kernel as its translation.

Idea: what an ISA lets slip through when a kernel runs deprivileged is not there any more if the
kernel's code is rewritten first.  A few instructions at a time, when the guest comes to them, are
translated: most are copied, direct branches lead from translation to translation, indirect ones
look their target up, and what is sensitive traps.  Source: lecture, "Dealing with problematic
ISAs"; Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization".
Cost: the translation of each instruction once; some instructions more for a call, a return, an
indirect branch; a trap for each sensitive instruction.

All but the code is as it is deprivileged: virtual registers, events, shadow tables.

Invariants: the guest's registers and what lies in its memory have its own addresses, never those of
translations; between two stretches nothing of a translation is in the processor; instructions
executed beyond the guest's own take no virtual time and are not counted.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from iced_x86 import FlowControl

from understudy.arch.address import PAGE, PAGE_SHIFT, is_canonical
from understudy.arch.cr import RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason
from understudy.arch.msr import Msr
from understudy.arch.segment import SegmentName
from understudy.execution.bt.cache import CHUNK, Cache, Full, Unit
from understudy.execution.bt.layout import CS as VIRTUAL_CS
from understudy.execution.bt.layout import FIRST, FLAG_PAGE, OFF, SECOND, TARGET, Layout
from understudy.execution.bt.layout import IF as VIRTUAL_IF
from understudy.execution.bt.layout import IOPL as VIRTUAL_IOPL
from understudy.execution.bt.layout import SS as VIRTUAL_SS
from understudy.execution.bt.sequences import Link, Mark
from understudy.execution.bt.sources import CodeFrames, Tables
from understudy.execution.bt.translate import MOST, Cut, translate
from understudy.execution.bt.window import Window, choose, is_free
from understudy.execution.deprivileged import segments
from understudy.execution.deprivileged.descriptors import BIG, FLAT, UNUSABLE, NotHere
from understudy.execution.deprivileged.instructions import Step, step_of
from understudy.execution.deprivileged.technique import INTERRUPT_WINDOW, MTF, Deprivileged
from understudy.execution.vmx.guest_state import RFLAGS_FIELD, RIP, SELECTOR
from understudy.guest import Event
from understudy.instructions.operands import LONGEST, LOW32, MASK64
from understudy.machine.host import Host
from understudy.machine.words import Flag
from understudy.paging import Paging
from understudy.paging.guest_walk import Found, GuestFault, entries_of
from understudy.silicon import Exit, Processor
from understudy.vcpu.cpu_model import CpuModel

EXPAND_DOWN: Final = 0x4
LARGEST: Final = 2048
"""Bytes that the translation of a unit has at most."""
IF: Final = RFLAGS.IF.mask
IOPL: Final = 3 << 12
SHOWN: Final = IF | IOPL
PROGRAM: Final = 3
TYPE: Final = 7 << 8  # of interruption information; 0: an external interrupt


class Bt(Deprivileged, name="bt"):
    """A vCPU whose guest's kernel is translated."""

    def __init__(
        self, host: Host, processor: Processor | None, paging: Paging, model: CpuModel,
        *, keep_timer: bool = True, exits: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        if processor is None:
            raise ValueError("execution 'bt': expected a processor for each vCPU")
        self.shown, self.cache = Window(host), Cache(host, Layout(0, 32))
        self.tables, self.p2m = Tables(), paging.p2m
        self.units: Counter[str] = Counter()
        self._steps_at: dict[int, Step] = {}  # by pc of a callout
        self._at: int | None = None  # the pc of a translation where the guest stopped
        self._extra = 0  # of the window's data, when the guest stopped
        self._loaded = 0  # hpa of the root by which it ran last
        self._unsure = True  # whether what was translated is what the guest's tables lead to
        self._was_written = False  # code, by the instruction that comes next
        self._is_flat = False
        self._shown_flags = -1
        self._has_selectors = False
        self._may_change_if = True
        super().__init__(host, processor, paging, model, keep_timer=keep_timer, exits=exits)
        self.slips = None
        processor.set_ring0("host", "silent")
        self.code_frames = CodeFrames.of(self.p2m)
        self.code_frames.guests.append(self)

    def frames(self) -> list[int]:
        return super().frames() + self.shown.frames() + self.cache.frames()

    def close(self) -> None:
        super().close()
        self.cache.close()
        self.shown.close()
        self.code_frames.guests.remove(self)

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        self._renew(Layout(0, 32))

    # --- what it depends on ---

    def forget_walks(self) -> None:
        super().forget_walks()
        self._unsure = True

    def forget(self, addresses: Sequence[int] | None) -> None:
        super().forget(addresses)
        self._unsure = True

    def _leave(self) -> None:
        super()._leave()
        self._is_flat = self._has_selectors = False

    def set_live_segment(self, n: int, segment: Any) -> None:
        super().set_live_segment(n, segment)
        self._is_flat = self._has_selectors = False

    def code_written(self, gfn: int) -> None:
        dropped = self.cache.drop(gfn)
        self.units["dropped"] += dropped
        self._was_written = True

    def _verify(self, bits: int) -> None:
        """Have a cache for this code, and nothing in it that the guest's tables do not lead to."""
        memory, control = self.kernel_memory(), self.paging_control()
        regime, read = memory.translation.regime, entries_of(memory.ram)
        layout = self.cache.layout
        if not (
            layout.bits == bits and layout.base and self.tables.are_same(regime, control, read)
            and is_free(layout, regime, read)
        ):  # fmt: skip
            new = choose(bits, control, read)
            if new is None:
                raise NotHere
            self._renew(new)
        self._unsure = False

    def _renew(self, layout: Layout) -> None:
        """Begin anew."""
        self.units["caches"] += 1
        for gfn in self.cache.by_frame:
            self.p2m.unprotect(gfn, 1, Flag.TRANSLATED)
        self.cache.close()
        self.cache = Cache(self.host, layout)
        self.tables.clear()
        self._steps_at.clear()
        self._extra = 0
        self._loaded = 0
        self._shown_flags, self._has_selectors, self._may_change_if = -1, False, True
        self.root_changed = True
        self.shown.show(self.cache)

    # --- running ---

    def _root(self) -> int:
        bits = self.cache.layout.bits if self.cache.layout.base else 0
        if (bits == 64) != self.is_long_mode() or not bits:
            return super()._root()
        return self.shown.root

    def _descend(self, rip: int) -> None:
        root = self._root()
        if root == self.shown.root:
            self.shown.copy(super()._root())
        if root != self._loaded:
            self._loaded, self.root_changed = root, True
        super()._descend(rip)

    def _show(self) -> None:
        """What translated code asks for of the guest's virtual registers."""
        flags, cache, may = self._read_field(RFLAGS_FIELD), self.cache, not self._waits()
        if flags & SHOWN != self._shown_flags:
            self._shown_flags = flags & SHOWN
            cache.set_datum(VIRTUAL_IF, 0 if flags & IF else OFF & cache.layout.mask)
            cache.set_datum(VIRTUAL_IOPL, flags & IOPL)
        if not self._has_selectors:
            self._has_selectors = True
            cache.set_datum(VIRTUAL_CS, self._read_field(SELECTOR + 2 * SegmentName.CS))
            cache.set_datum(VIRTUAL_SS, self._read_field(SELECTOR + 2 * SegmentName.SS))
        if may != self._may_change_if:
            self._may_change_if = may
            self.shown.let_flag_change(may)
            self.processor.invlpg(cache.layout.base + FLAG_PAGE)

    def _waits(self) -> bool:
        """Whether the hypervisor is to hear of it when the guest takes interrupts."""
        return bool(self.current_primary & INTERRUPT_WINDOW)

    def _obstacle(self) -> str | None:
        if (why := super()._obstacle()) is not None:
            return why
        if self._was_written:
            self._was_written = False
            return "write to code"
        return None

    def _go(self, left: int) -> Exit:
        if self.cpl() == PROGRAM:
            return super()._go(left)
        if self.primary & MTF:
            raise NotHere
        pc = self._entry(self._read_field(RIP))
        self._show()
        self._descend(pc)
        return self._came_back(self.processor.run(left))

    def _entry(self, rip: int) -> int:
        """The pc of the translation of the instruction there."""
        bits = self.code_bits()
        if bits == 16:
            raise NotHere
        if bits == 32 and not self._is_flat:
            self._check_flat()
        if self._unsure or self.cache.layout.bits != bits:
            self._verify(bits)
        pc = self.cache.entries.get(rip)
        return self._translate(rip) if pc is None else pc

    def _check_flat(self) -> None:
        """NotHere: code or stack segment are such that a translation would not work in them."""
        if self.is_long_mode():
            raise NotHere
        for n in (SegmentName.CS, SegmentName.SS):
            _, base, limit, rights = self.segment(n)
            bad = UNUSABLE | (EXPAND_DOWN if n == SegmentName.SS else 0)
            if base or limit != FLAT or rights & bad or not rights & BIG:
                raise NotHere
        self._is_flat = True

    def _translate(self, rip: int) -> int:
        """A unit."""
        layout = self.cache.layout
        parts = [self._fetch(rip, PAGE)]
        for _ in range(2):
            try:
                pc, chunk = self.cache.room(LARGEST)
            except Full:
                self._renew(layout)
                pc, chunk = self.cache.room(LARGEST)
            if chunk:
                self.shown.show_code(len(self.cache.chunks) - 1, chunk, CHUNK)
            raw = b"".join(part for _, part in parts)
            try:
                code, count, copies = translate(layout, pc, raw, rip)
                break
            except Cut:
                parts.append(self._fetch(rip + len(raw) & layout.mask, LONGEST))
        else:
            raise NotHere
        self.units.update(units=1, instructions=count, copies=copies, bytes=len(code.out))
        gfns = tuple({found.gpa >> PAGE_SHIFT for found, _ in parts})
        memory, control = self.kernel_memory(), self.paging_control()
        for found, gva in zip((found for found, _ in parts), (rip, rip + len(raw) - 1), strict=False):
            self.tables.note(memory.translation.regime, control, gva, found)
        for gfn in gfns:
            if gfn not in self.cache.by_frame:
                self.p2m.protect(gfn, 1, Flag.TRANSLATED)
        self.cache.add(Unit(rip, code, raw, gfns))
        return pc

    def _fetch(self, gva: int, most: int) -> tuple[Found, bytes]:
        """Code, inside a page, and where it was found.  NotHere: it cannot be fetched."""
        memory = self.kernel_memory()
        try:
            found = memory.translation.find(memory.ram, gva, fetch=True)
            length = min(most, MOST * LONGEST, PAGE - gva % PAGE)
            return found, memory.ram.read(found.gpa, length)
        except GuestFault:
            raise NotHere from None

    def _came_back(self, exit: Exit) -> Exit:
        layout = self.cache.layout
        if not layout.has(exit.gla):
            self._at = None
            return super()._came_back(exit)
        exit, pc, flags = self._to_a_place(exit)
        rip, mark = self.cache.places.get(pc), self.cache.marks.get(pc)
        steps = 0
        if rip is None:
            assert mark is not None
            rip, steps = mark.rip, mark.steps
            self._undo(mark)
        now = self.cache.extra()
        more = (now - self._extra & LOW32) + steps
        self._extra = now
        if more:
            self.carried -= more
            if self.is_virtual:
                self.advance(-more & MASK64)
        self._at = pc
        self._land(rip, flags)
        self._see_if(pc)
        return exit

    def _see_if(self, pc: int) -> None:
        """The guest may have changed its IF, without a trap."""
        old = self._read_field(RFLAGS_FIELD)
        now = old & ~IF | (0 if self.cache.datum(VIRTUAL_IF) else IF)
        if now == old:
            return
        self._write_field(RFLAGS_FIELD, now)
        self._shown_flags = now & SHOWN
        if now & IF and pc in self.cache.after_sti:
            self.begin_shadow()

    def _to_a_place(self, exit: Exit) -> tuple[Exit, int, int]:
        """Go on to where the guest's state can be told, from inside a sequence.

        The timer may be early there, and is over again when the instruction is done; so it waits.
        """
        processor, places, marks = self.processor, self.cache.places, self.cache.marks
        pc, flags = exit.gla, exit.gpa
        while pc not in places:
            if is_timer(exit):
                self._wait_for_timer()
                processor.set_registers({"rflags": flags & ~IF})
            elif exit.reason == Reason.BUDGET:
                pass
            elif pc in marks:
                break
            else:  # what is left of it cannot fault
                processor.set_registers({"rflags": flags & ~IF})
                step = processor.run(1)
                pc, flags = step.gla, step.gpa
                continue
            exit = processor.run(1)
            pc, flags = exit.gla, exit.gpa
        return exit, pc, flags

    def _wait_for_timer(self) -> None:
        """It was early, for instructions beyond the guest's were executed."""
        self.processor.wrmsr(Msr.X2APIC_EOI, 0)
        self.processor.wrmsr(Msr.IA32_TSC_DEADLINE, self.due)

    def _undo(self, mark: Mark) -> None:
        for register, place in ((0, FIRST), (1, SECOND))[: mark.saved]:
            self.processor.set_gpr(register, self.cache.datum(place))

    # --- what came back ---

    def _sort(self, exit: Exit) -> Exit | None:
        if is_timer(exit) and self.processor.tsc < self.due:
            self._wait_for_timer()
            return None
        if self._at in self.cache.inline and self._is_about_flag(exit):
            return self._callout(self._at)
        return super()._sort(exit)

    def _is_about_flag(self, exit: Exit) -> bool:
        """Whether CLI or STI has come while an interrupt waits."""
        page = self.cache.layout.base + FLAG_PAGE
        return exit.reason == Reason.EVENT and exit.qualification & -PAGE == page

    def _trap(self, event: Event) -> Exit | None:
        if (pc := self._at) is None or event.vector != Vector.UD:
            return super()._trap(event)
        if (link := self.cache.stubs.get(pc)) is not None:
            self._follow(link)
            return None
        if pc not in self.cache.callouts:
            return super()._trap(event)
        return self._callout(pc)

    def _callout(self, pc: int) -> Exit | None:
        """Carry out what is not translated."""
        step = self._steps_at.get(pc)
        if step is None:
            bits = self.cache.layout.bits
            step = self._steps_at[pc] = step_of(self.code(bits), bits)
        if step.carry_out is not None and not (self.cpl() and not step.for_programs):
            return self._carry_out(step.name, step.instruction, step.carry_out)
        if step.instruction.flow_control in BRANCHES and pc not in self.cache.places:
            return self._branch(step)
        return self._hand_over(step.name)

    def _follow(self, link: Link) -> None:
        """A link that leads nowhere yet."""
        self.units["links"] += 1
        cache = self.cache
        try:
            pc = self._entry(link.target)
        except NotHere:
            return
        if cache is self.cache and link.stub in cache.stubs:
            cache.chain(link, pc)

    def _branch(self, step: Step) -> Exit | None:
        """An indirect branch whose target was not in the table."""
        self.units["targets"] += 1
        instruction, layout = step.instruction, self.cache.layout
        target = self.cache.datum(TARGET)
        if layout.bits == 64 and not is_canonical(target):
            return self._hand_over(step.name)
        try:
            if instruction.flow_control == FlowControl.RETURN:
                extra = instruction.immediate16 if instruction.op_count else 0
                segments.drop(self, layout.word + extra)
            elif instruction.flow_control == FlowControl.INDIRECT_CALL:
                segments.push(self, layout.word, self.rip + instruction.len & layout.mask)
        except (GuestFault, NotHere):
            return self._hand_over(step.name)
        self.rip = target
        self.tick()
        self.note_skip()
        try:
            pc = self._entry(target)
        except NotHere:
            return None
        self.cache.note_target(target, pc)
        return None

    def code(self, bits: int) -> bytes:
        if self.cpl() == PROGRAM:
            return super().code(bits)
        rip = self._read_field(RIP)
        if bits != 64:
            rip = rip + self.segment_base(SegmentName.CS) & LOW32
        try:
            raw = self._fetch(rip, LONGEST)[1]
        except NotHere:
            return b""
        try:
            return raw + self._fetch(rip + len(raw) & MASK64, LONGEST - len(raw))[1]
        except NotHere:
            return raw


def is_timer(exit: Exit) -> bool:
    """Whether the hypervisor's own timer made it."""
    return exit.reason == Reason.EVENT and not exit.intr_info & TYPE


BRANCHES: Final = (
    FlowControl.RETURN, FlowControl.INDIRECT_BRANCH, FlowControl.INDIRECT_CALL,
)  # fmt: skip
