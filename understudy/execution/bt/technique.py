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

from collections.abc import Sequence
from typing import Any, Final

from iced_x86 import FlowControl

from understudy.arch.address import PAGE, is_canonical
from understudy.arch.cr import CR4, RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason
from understudy.arch.msr import Msr
from understudy.arch.segment import SegmentName
from understudy.execution import Execution
from understudy.execution.bt.layout import CS as VIRTUAL_CS
from understudy.execution.bt.layout import FIRST, FLAG_PAGE, OFF, SECOND, TARGET, Layout
from understudy.execution.bt.layout import IF as VIRTUAL_IF
from understudy.execution.bt.layout import IOPL as VIRTUAL_IOPL
from understudy.execution.bt.layout import SS as VIRTUAL_SS
from understudy.execution.bt.sequences import Link, Mark
from understudy.execution.bt.translations import PROGRAM, Translations
from understudy.execution.deprivileged import segments
from understudy.execution.deprivileged.answer import question
from understudy.execution.deprivileged.descriptors import NotHere
from understudy.execution.deprivileged.instructions import Step, step_of
from understudy.execution.deprivileged.technique import INTERRUPT_WINDOW, MTF, Deprivileged
from understudy.execution.vmx.guest_state import GUEST_CR3, RFLAGS_FIELD, RIP, SELECTOR
from understudy.guest import Event
from understudy.instructions.operands import LOW32, MASK64
from understudy.machine.host import Host
from understudy.paging import Paging
from understudy.paging.guest_walk import GuestFault
from understudy.silicon import Exit, Processor
from understudy.telling import Translating
from understudy.vcpu.cpu_model import CpuModel

EXPAND_DOWN: Final = 0x4
LARGEST: Final = 2048
"""Bytes that the translation of a unit has at most."""
IF: Final = RFLAGS.IF.mask
IOPL: Final = 3 << 12
SHOWN: Final = IF | IOPL
FEW: Final = 32
"""Of so many instructions one is the guest's own at least, whatever it writes into the window.

So is one before a stop by budget."""
LONGEST_SEQUENCE: Final = 64
"""Instructions of a sequence are fewer, with those that make the hypervisor look at it again."""
TYPE: Final = 7 << 8  # of interruption information; 0: an external interrupt


class Bt(Translations, Deprivileged, Translating, name="bt"):
    """A vCPU whose guest's kernel is translated.

    Its programs are not, so what of the sensitive instructions a processor can make trap does.
    """

    cr4 = CR4.UMIP.mask

    def __init__(
        self, host: Host, processor: Processor | None, paging: Paging, model: CpuModel,
        *, keep_timer: bool = True, exits: tuple[str, ...] = (),
        before: Execution | None = None,
    ) -> None:  # fmt: skip
        if processor is None:
            raise ValueError("execution 'bt': expected a processor for each vCPU")
        self.begin_translations(host, paging.p2m)
        self._writer = -1  # RIP of an instruction that writes code
        self._began = 0  # what had retired when the guest went on
        self._at: int | None = None  # the pc of a translation where the guest stopped
        super().__init__(
            host, processor, paging, model, keep_timer=keep_timer, exits=exits, before=before
        )

    needs_all_traps = False

    def _own_ring0(self) -> None:
        self.ring0_before = self.processor.ring0
        self.processor.set_ring0("host", "silent")

    def frames(self) -> list[int]:
        return super().frames() + self.space.frames() + self.cache.frames()

    def close(self) -> None:
        super().close()
        self.code_frames.guests.remove(self)
        self.cache.close()
        self.space.close()

    def forget(self, addresses: Sequence[int] | None) -> None:
        super().forget(addresses)
        self._unsure = True

    def own_counts(self) -> dict[str, Any]:
        return {"translated": dict(self.translated)} | super().own_counts()

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        self._renew(Layout(0, 32))

    # --- running ---

    def _descend(self, rip: int) -> None:
        root = self._root()
        if root == self.space.root:
            self.space.copy(self._read_field(GUEST_CR3))
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
            self.space.let_flag_change(may)
            self.processor.invlpg(cache.layout.base + FLAG_PAGE)

    def _waits(self) -> bool:
        """Whether the hypervisor is to hear of it when the guest takes interrupts."""
        return bool(self.current_primary & INTERRUPT_WINDOW)

    def _obstacle(self) -> str | None:
        if (why := super()._obstacle()) is not None:
            return why
        if self._was_written:
            self._was_written = False
            self._writer = self._read_field(RIP)
        if self._read_field(RIP) == self._writer:  # a string instruction writes again
            return "write to code"
        self._writer = -1
        return None

    def _go(self, left: int) -> Exit:
        if self._is_in_the_way():
            self._verify(self.cache.layout.bits)
        if self.cpl() == PROGRAM:
            return super()._go(left)
        if self.primary & MTF:
            raise NotHere
        pc = self._entry(self._read_field(RIP))
        self._show()
        self._descend(pc)
        self._began = self.processor.retired
        return self._came_back(self.processor.run(left))

    def _came_back(self, exit: Exit) -> Exit:
        is_program = self.cpl() == PROGRAM
        if is_program or not self.cache.layout.has(exit.gla):
            self._at = None
            exit = super()._came_back(exit)
            if is_program:
                self._see_null_segments()
            return exit
        found = self._to_a_place(exit)
        if found is None:  # it has destroyed its translation
            return question(Reason.TRIPLE_FAULT)
        exit, pc, flags = found
        rip, mark = self.cache.places.get(pc), self.cache.marks.get(pc)
        steps = 0
        if rip is None:
            assert mark is not None
            rip, steps = mark.rip, mark.steps
            self._undo(mark)
        now = self.cache.extra()
        ran = self.processor.retired - self._began
        most = ran - max(ran // FEW, exit.reason == Reason.BUDGET)
        more = min((now - self._extra & LOW32) + steps, most)
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
        if now & IF and pc in self.cache.after_sti:  # IF may have been clear in between
            self.begin_shadow()
        if now == old:
            return
        self._write_field(RFLAGS_FIELD, now)
        self._shown_flags = now & SHOWN

    def _to_a_place(self, exit: Exit) -> tuple[Exit, int, int] | None:
        """Go on to where the guest's state can be told, from inside a sequence.  None: nowhere.

        The timer may be early there, and is over again when the instruction is done; so it waits.
        """
        processor, places, marks = self.processor, self.cache.places, self.cache.marks
        pc, flags, waits = exit.gla, exit.gpa, False
        for _ in range(LONGEST_SEQUENCE):
            if pc in places:
                if waits:
                    processor.wrmsr(Msr.IA32_TSC_DEADLINE, max(self.due, 1))
                return exit, pc, flags
            if is_timer(exit):  # not by IF, which a PUSHF of the sequence is to find
                processor.wrmsr(Msr.X2APIC_EOI, 0)
                processor.wrmsr(Msr.IA32_TSC_DEADLINE, 0)
                waits = True
            elif exit.reason == Reason.BUDGET:
                pass
            elif pc in marks:
                if waits:
                    processor.wrmsr(Msr.IA32_TSC_DEADLINE, max(self.due, 1))
                return exit, pc, flags
            else:  # what is left of it cannot fault
                processor.set_registers({"rflags": flags & ~IF})
                step = processor.run(1)
                pc, flags = step.gla, step.gpa
                continue
            exit = processor.run(1)
            pc, flags = exit.gla, exit.gpa
        return None

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
        self.translated["links"] += 1
        cache = self.cache
        try:
            pc = self._entry(link.target)
        except NotHere:
            return
        if cache is self.cache and link.stub in cache.stubs:
            cache.chain(link, pc)

    def _branch(self, step: Step) -> Exit | None:
        """An indirect branch whose target was not in the table."""
        self.translated["targets"] += 1
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


def is_timer(exit: Exit) -> bool:
    """Whether the hypervisor's own timer made it."""
    return exit.reason == Reason.EVENT and not exit.intr_info & TYPE


BRANCHES: Final = (
    FlowControl.RETURN, FlowControl.INDIRECT_BRANCH, FlowControl.INDIRECT_CALL,
)  # fmt: skip
