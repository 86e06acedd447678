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

import iced_x86 as iced
from iced_x86 import FlowControl

from understudy.arch.address import PAGE, is_canonical
from understudy.arch.cr import CR4, RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason
from understudy.arch.msr import Msr
from understudy.arch.vmcs import Vmcs
from understudy.execution import Execution
from understudy.execution.bt import selectors, window
from understudy.execution.bt.layout import EXTRA, FIRST, OFF, OPENING, SECOND, TARGET, Layout
from understudy.execution.bt.layout import IF as VIRTUAL_IF
from understudy.execution.bt.layout import IOPL as VIRTUAL_IOPL
from understudy.execution.bt.sequences import Code, Link, Mark
from understudy.execution.bt.translations import PROGRAM, Translations
from understudy.execution.deprivileged import segments
from understudy.execution.deprivileged.answer import question
from understudy.execution.deprivileged.descriptors import NotHere
from understudy.execution.deprivileged.instructions import Step, step_of
from understudy.execution.deprivileged.technique import (
    INTERRUPT_WINDOW,
    MTF,
    NMI_BLOCKED,
    Deprivileged,
)
from understudy.execution.vmx.guest_state import GUEST_CR3, RFLAGS_FIELD, RIP
from understudy.execution.vmx.technique import INTERRUPTIBILITY
from understudy.guest import Event
from understudy.instructions.operands import MASK64
from understudy.machine.host import Host
from understudy.paging import Paging
from understudy.paging.guest_walk import GuestFault
from understudy.silicon import Exit, Processor
from understudy.telling import Translating
from understudy.vcpu.cpu_model import CpuModel

IF: Final = RFLAGS.IF.mask
IOPL: Final = 3 << 12
SHOWN: Final = IF | IOPL
DIRECT: Final = IF  # of a program that runs as it is: the processor has no other IOPL than 0
FEW: Final = 64
"""Of so many instructions one is the guest's own at least, whatever it writes into the window.

So is one before a stop by budget."""
LONGEST_SEQUENCE: Final = 96
"""Instructions of a sequence are fewer, with those that make the hypervisor look at it again."""
NT: Final = RFLAGS.NT.mask
NO_IRET: Final = int(RFLAGS(NT=1, VIF=1, VIP=1))  # a POPF in its stead would leave the last two
TSD: Final = CR4.TSD.mask
TABLE_LOADS: Final = ("LGDT",)
MOST_AT_ONCE: Final = 1 << 24
"""Instructions of a stretch; so many times `FEW` fit the word that counts those beyond."""
WRITE_TO_CODE: Final = "write to code"
TYPE: Final = 7 << 8  # of interruption information; 0: an external interrupt


class Bt(Translations, Deprivileged, Translating, name="bt"):
    """A vCPU whose guest's kernel is translated.

    Its programs are not, so what of the sensitive instructions a processor can make trap does.
    """

    cr4 = CR4.UMIP.mask

    beside = window.ALL_BYTES
    to_the_end = (WRITE_TO_CODE,)

    def __init__(
        self, host: Host, processor: Processor | None, paging: Paging, model: CpuModel,
        *, keep_timer: bool = True, exits: tuple[str, ...] = (),
        before: Execution | None = None,
    ) -> None:  # fmt: skip
        self.begin_translations(host, paging.p2m)
        self._writer = -1  # RIP of one whose write would be refused again
        self._began = 0  # what had retired when the guest went on
        self._at: int | None = None  # the pc of a translation where the guest stopped
        self._code: Code | None = None  # what is noted of that
        self._link: Link | None = None  # the guest is about to go where this leads
        self._target = -1  # where an indirect branch has led it
        try:
            super().__init__(
                host, processor, paging, model, keep_timer=keep_timer, exits=exits, before=before
            )
        except BaseException:
            self.end_translations()
            raise

    cannot_hide = ()  # what is hidden is not copied
    needs_all_traps = False

    def _own_ring0(self) -> None:
        self.ring0_before = self.processor.ring0
        self.processor.set_ring0("host", "silent")

    def frames(self) -> list[int]:
        return super().frames() + self.space.frames() + self.cache.frames()

    def close(self) -> None:
        super().close()
        self.end_translations()

    def load_root(self, hpa: int) -> None:
        super().load_root(hpa)
        self._is_watching = False

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

    def _state(self) -> dict[str, int]:
        values = super()._state()
        if not self._traps_time():
            values["cr4"] = values["cr4"] & ~TSD | self.real_control().cr4 & TSD
        return values

    def _traps_time(self) -> bool:
        """Whether RDTSC would not read what the guest is to see."""
        is_other = self._read_field(Vmcs.TSC_OFFSET) or self.shows_own_time()
        return bool(is_other) or "rdtscp" not in self.model.shown

    def set_tsc_offset(self, offset: int) -> None:
        super().set_tsc_offset(offset)
        self._leave()

    def _show(self) -> None:
        """What translated code asks for of the guest's virtual registers."""
        flags, cache, may = self._read_field(RFLAGS_FIELD), self.cache, not self._waits()
        cache.set_datum(EXTRA, 0)
        if flags & SHOWN != self._shown_flags:
            self._shown_flags = flags & SHOWN
            cache.set_datum(VIRTUAL_IF, 0 if flags & IF else OFF & cache.layout.mask)
            cache.set_datum(VIRTUAL_IOPL, flags & IOPL)
        returns = not (flags & NO_IRET or self._read_field(INTERRUPTIBILITY) & NMI_BLOCKED)
        if not self._has_selectors or returns != self._returns:
            self._has_selectors, self._returns = True, returns
            selectors.show(self, cache, returns=returns)
        if may != self._may_change_if:
            self._may_change_if = may
            self.space.let_flag_change(may)
            self.processor.invlpg(cache.layout.base + OPENING)

    def _waits(self) -> bool:
        """Whether the hypervisor is to hear of it when the guest takes interrupts."""
        return bool(self.current_primary & INTERRUPT_WINDOW)

    def _obstacle(self) -> str | None:
        if (why := super()._obstacle()) is not None:
            return why
        if self.cpl() == PROGRAM and self._read_field(RFLAGS_FIELD) & SHOWN != DIRECT:
            return "flags of a program"  # which sees them by PUSHF, and sets IF by POPF
        if self._written and self._would_write_again():
            self._writer = self._read_field(RIP)
        if self._read_field(RIP) == self._writer:  # or it has not come to its end yet
            return WRITE_TO_CODE
        self._writer = -1
        return None

    def _go(self, left: int) -> Exit:
        if self.faulted is not None:
            self.see_trace(*self.faulted)
        if not self._is_watching:
            if self._is_in_the_way():
                self._verify(self.cache.layout.bits)
            self._watch_window()
        if (cpl := self.cpl()) == PROGRAM:
            return super()._go(left)
        if cpl or self.primary & MTF:
            raise NotHere
        if self.is_current and self.processor.tsc >= self.due:  # before what comes next is fetched
            return question(Reason.PREEMPTION_TIMER)
        rip = self._read_field(RIP)
        pc = self._entry(rip)
        self._lead_here(rip, pc)
        self._show()
        self._descend(pc)
        self._began = self.processor.retired
        return self._came_back(self.processor.run(min(left or MOST_AT_ONCE, MOST_AT_ONCE)))

    def _lead_here(self, rip: int, pc: int) -> None:
        """What has just led to `rip` finds its translation by itself from now on.

        Not before: code is fetched when it is executed, which an interrupt may put off.
        """
        link, self._link = self._link, None
        if link is not None and link.target == rip and self.cache.stubs.get(link.stub) is link:
            self.cache.chain(link, pc)
        if self._target == rip:
            self.cache.note_target(rip, pc)
        self._target = -1

    def _came_back(self, exit: Exit) -> Exit:
        is_program = self.cpl() == PROGRAM
        if is_program or not self.cache.layout.has(exit.gla):
            self._at = self._code = None
            exit = super()._came_back(exit)
            if is_program:
                self._see_null_segments()
            return exit
        found = self._to_a_place(exit)
        if found is None:  # it has destroyed its translation
            return question(Reason.TRIPLE_FAULT)
        exit, pc, flags = found
        link, code, steps = self.cache.stubs.get(pc), None, 0
        if link is not None:
            rip = link.target
        else:
            code = self.cache.code_at(pc)
            assert code is not None
            if (mark := code.marks.get(pc)) is not None:
                rip, steps = mark.rip, mark.steps
                self._undo(mark)
            else:
                rip = code.places[pc]
        ran = self.processor.retired - self._began
        most = ran - max(ran // FEW, exit.reason == Reason.BUDGET)
        more = min(self.cache.extra() + steps, most)
        if more:
            self.carried -= more
            if self.is_virtual:
                self.advance(-more & MASK64)
        self._at, self._code = pc, code
        self._land(rip, flags)
        self._see_if(is_behind_sti=code is not None and pc in code.after_sti)
        return exit

    def _see_if(self, *, is_behind_sti: bool) -> None:
        """The guest may have changed its IF, without a trap."""
        old = self._read_field(RFLAGS_FIELD)
        now = old & ~IF | (0 if self.cache.datum(VIRTUAL_IF) else IF)
        if now & IF and is_behind_sti:  # IF may have been clear in between
            self.begin_shadow()
        if now == old:
            return
        self._write_field(RFLAGS_FIELD, now)
        self._shown_flags = now & SHOWN

    def _to_a_place(self, exit: Exit) -> tuple[Exit, int, int] | None:
        """Go on to where the guest's state can be told, from inside a sequence.  None: nowhere.

        The timer may be early there, and is over again when the instruction is done; so it waits.
        (RFLAGS.IF stays what it is: a sequence may push it.)
        """
        processor, cache, waits = self.processor, self.cache, False
        at = exit
        for _ in range(LONGEST_SEQUENCE):
            pc = at.gla
            code = None if pc in cache.stubs else cache.code_at(pc)
            is_cut = is_timer(exit) or exit.reason == Reason.BUDGET
            if pc in cache.stubs or (
                code is not None and (pc in code.places or (not is_cut and pc in code.marks))
            ):
                if waits:
                    processor.wrmsr(Msr.IA32_TSC_DEADLINE, max(self.due, 1))
                return exit, pc, at.gpa
            if is_timer(at):
                processor.wrmsr(Msr.X2APIC_EOI, 0)
            if not waits:
                waits = True
                processor.wrmsr(Msr.IA32_TSC_DEADLINE, 0)
            at = processor.run(1)
            if is_cut:
                exit = at  # else what is left of it cannot fault
        return None

    def _undo(self, mark: Mark) -> None:
        for register, place in ((0, FIRST), (1, SECOND))[: mark.saved]:
            self.processor.set_gpr(register, self.cache.datum(place))

    # --- what came back ---

    def _sort(self, exit: Exit) -> Exit | None:
        if is_timer(exit) and self.processor.tsc < self.due:
            # It was early, for instructions beyond the guest's were executed.
            self.processor.wrmsr(Msr.X2APIC_EOI, 0)
            self.processor.wrmsr(Msr.IA32_TSC_DEADLINE, self.due)
            return None
        pc, code = self._at, self._code
        if pc is None and exit.reason == Reason.EVENT and self._returns_to_task():
            return self._hand_over("IRET to a task")
        if pc and code is not None and pc in code.inline and self._is_about_flag(exit):
            return self._callout(pc)
        found = super()._sort(exit)
        if found is not None and found.reason == Reason.EXCEPTION_OR_NMI and code is not None:
            self.faulted = self.rip, self.traces()
        return found

    def _returns_to_task(self) -> bool:
        """Whether a program has met this by an IRET that looks into the hypervisor's own TSS."""
        if not self._read_field(RFLAGS_FIELD) & NT or self.cpl() != PROGRAM or self.is_long_mode():
            return False
        bits = self.code_bits()
        return step_of(self.code(bits), bits).instruction.mnemonic in (
            iced.Mnemonic.IRET, iced.Mnemonic.IRETD,
        )  # fmt: skip

    def _is_about_flag(self, exit: Exit) -> bool:
        """Whether IF is to be set while an interrupt waits."""
        page = self.cache.layout.base + OPENING
        return exit.reason == Reason.EVENT and exit.qualification & -PAGE == page

    def _trap(self, event: Event) -> Exit | None:
        if (pc := self._at) is None or event.vector != Vector.UD:
            return super()._trap(event)
        if (link := self.cache.stubs.get(pc)) is not None:
            self.translated["links"] += 1
            self._link = link
            return None
        if self._code is None or pc not in self._code.callouts:
            return super()._trap(event)
        return self._callout(pc)

    def _callout(self, pc: int) -> Exit | None:
        """Carry out what is not translated."""
        step = self._steps_at.get(pc)
        if step is None:
            bits = self.cache.layout.bits
            step = self._steps_at[pc] = step_of(self.code(bits), bits)
        if step.carry_out is not None and not (self.cpl() and not step.for_programs):
            self._has_selectors = self._has_selectors and step.name not in TABLE_LOADS
            exit = self._carry_out(step.name, step.instruction, step.carry_out)
            if step.instruction.code in IRETS and exit is None and not self.cpl():
                self._target = self._read_field(RIP)
            return exit
        assert self._code is not None
        if step.instruction.flow_control in BRANCHES and pc not in self._code.places:
            return self._branch(step)
        if self.rip in self.sites.called_out and self.write_out(pc, step):
            return None
        return self._hand_over(step.name)

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
        self._target = target
        return None


def is_timer(exit: Exit) -> bool:
    """Whether the hypervisor's own timer made it."""
    return exit.reason == Reason.EVENT and not exit.intr_info & TYPE


IRETS: Final = (iced.Code.IRETD, iced.Code.IRETQ)
BRANCHES: Final = (
    FlowControl.RETURN, FlowControl.INDIRECT_BRANCH, FlowControl.INDIRECT_CALL,
)  # fmt: skip
