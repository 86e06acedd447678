"""Trap and emulate: the guest runs at CPL 1 and 3 on a processor that the hypervisor owns.

Idea: on an ISA whose sensitive instructions all trap, a kernel can run without privileges; each of
them is carried out on virtual registers, by the hypervisor, when it has trapped.  Source: lecture,
"Dealing with problematic ISAs"; Popek and Goldberg, "Formal Requirements for Virtualizable Third
Generation Architectures".  Cost: a trap for each of them, and for each event and system call.

Between two stretches the guest's state rests where VMX keeps it (decision 0067).  The stretches
themselves are no VM entries: the processor is in root operation, and what brings it back is what
leads to CPL 0 (`Processor.set_ring0`).  What cannot run so (real-address and virtual-8086 mode,
16-bit code, single steps, breakpoints) and what is not carried out here is executed by VMX, one
instruction at a time, and counted in `handed_over`.

Invariants: an instruction that is not carried out here to its end has changed nothing; one that
needs no exit in VMX operation takes a tick of virtual time, as there.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

import iced_x86 as iced

from understudy.arch.cr import RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason
from understudy.arch.msr import Msr
from understudy.arch.segment import Segment
from understudy.arch.vmcs import Interruptibility, Vmcs
from understudy.arch.vmx_controls import PrimaryControls
from understudy.execution import Execution
from understudy.execution.deprivileged import delivery, descent
from understudy.execution.deprivileged.answer import question
from understudy.execution.deprivileged.descriptors import LOADABLE, NotHere
from understudy.execution.deprivileged.instructions import CarryOut, Step, step_of
from understudy.execution.deprivileged.live import TIMER, Live
from understudy.execution.deprivileged.slips import Slips, look
from understudy.execution.vmx.exits import event_of
from understudy.execution.vmx.guest_state import RFLAGS_FIELD, RIP
from understudy.execution.vmx.technique import INFO, INTERRUPTIBILITY, PENDING_DEBUG, VALID, Vmx
from understudy.guest import Event, Kind
from understudy.guests import kallsyms
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.paging import Paging
from understudy.paging.guest_walk import GuestFault
from understudy.silicon import Exit, Processor
from understudy.state import restore
from understudy.telling import Telling
from understudy.vcpu.cpu_model import CpuModel
from understudy.vcpu.loop import Vcpu
from understudy.verdict import Stop

STEPS_KEPT: Final = 1 << 14
MTF: Final = PrimaryControls.MONITOR_TRAP_FLAG.mask
INTERRUPT_WINDOW: Final = PrimaryControls.INTERRUPT_WINDOW_EXITING.mask
NMI_WINDOW: Final = PrimaryControls.NMI_WINDOW_EXITING.mask
NMI_BLOCKED: Final = Interruptibility.NMI.mask
IF: Final = RFLAGS.IF.mask
BY_HARDWARE: Final = int(RFLAGS(TF=1, VM=1))
BREAKPOINTS: Final = 0xFF  # of DR7
INSTRUCTION_FAULTS: Final = (Vector.GP, Vector.UD)
ENDINGS: Final = (Reason.HLT, Reason.TRIPLE_FAULT)
"""After a sensitive instruction has done harm: the guest waits, perhaps for ever, or is lost."""


class Deprivileged(Live, Vmx, Telling, name="deprivileged"):
    """A vCPU whose guest has no privileges."""

    pagings: ClassVar[tuple[str, ...]] = ("eager", "lazy", "vtlb")
    optional_exits: ClassVar[Mapping[str, str]] = {
        name: words for name, words in Vmx.optional_exits.items() if name != "pause"
    }
    hidden_features = ("pmu", "xsaves")
    cannot_hide: ClassVar[tuple[str, ...]] = ("rdrand", "rdseed")
    needs_own_processor = needs_all_traps = True
    to_the_end: ClassVar[tuple[str, ...]] = ()
    """What is handed over by these names, and is repeated, is executed to its end, not once."""

    def __init__(
        self, host: Host, processor: Processor | None, paging: Paging, model: CpuModel,
        *, keep_timer: bool = True, exits: tuple[str, ...] = (),
        before: Execution | None = None,
    ) -> None:  # fmt: skip
        self.begin(host, paging.p2m, is_virtual=keep_timer)
        self.handed_over: Counter[str] = Counter()  # by mnemonic, or by what it was
        self.traps: Counter[str] = Counter()  # by mnemonic
        self._steps: dict[tuple[bytes, int], Step] = {}
        super().__init__(
            host, processor, paging, model, keep_timer=keep_timer, exits=exits, before=before
        )
        self.slips: Slips | None = None
        self.table[Reason.SENSITIVE] = too_many_slips
        if before is None:
            self._own_ring0()

    def _own_ring0(self) -> None:
        """The hypervisor is at CPL 0 of the processor, beside a guest without privileges."""
        self.ring0_before = self.processor.ring0
        _, sensitive = self.ring0_before
        self.slips = Slips() if sensitive == "silent" else None
        self.processor.set_ring0("host", sensitive if self.slips is None else "stop")

    def take_over(self, before: Execution) -> None:
        super().take_over(before)
        self._own_ring0()
        self._note_shadow()

    def rest(self) -> None:
        self._end_shadow()
        self._to_vmx()
        self.processor.set_ring0(*self.ring0_before)

    def own_counts(self) -> dict[str, Any]:
        return {
            "traps": dict(self.traps), "handed_over": dict(self.handed_over),
            "crossings": self.crossings,
        }  # fmt: skip

    # --- the ways ---

    @property
    def resume(self) -> Callable[[int], Exit]:
        """Run the guest; `_way` is how VMX enters it."""
        return self._run

    @resume.setter
    def resume(self, way: Callable[[int], Exit]) -> None:
        self._way = way

    def _ways(self, processor: Processor) -> None:
        super()._ways(processor)
        self.count_retired = self._count
        self._read_field, self._write_field = processor.vmread, processor.vmwrite
        self.read, self.write, self.arm = self._read, self._write, self._arm

    def load_root(self, hpa: int) -> None:
        super().load_root(hpa)
        self.root_changed = True

    def forget(self, addresses: Sequence[int] | None) -> None:
        super().forget(addresses)
        self.forget_walks()
        if addresses is None:
            self.root_changed = True
        elif not self.root_changed:
            for gva in addresses:
                self.processor.invlpg(gva)

    def set_cr2(self, value: int) -> None:
        super().set_cr2(value)
        self.virtual_cr2 = value

    def set_registers(self, values: dict[str, int]) -> None:
        self._leave()
        super().set_registers(values)
        self.virtual_cr2 = None

    def reset(self) -> None:
        super().reset()
        self.virtual_cr2 = None

    def save(self) -> dict[str, Any]:
        self._write_field(TIMER, self._left())
        return super().save() | {"carried": self.carried}

    def load(self, saved: dict[str, Any]) -> None:
        self.is_current = False
        super().load(saved)
        self.carried = restore(int, saved["carried"], "carried")
        self.virtual_cr2 = None
        self.forget_walks()
        self._note_shadow()
        self._arm(self._read_field(TIMER))

    def takes_interrupts(self) -> bool:
        self._end_shadow()
        return super().takes_interrupts()

    def takes_nmis(self) -> bool:
        self._end_shadow()
        return super().takes_nmis()

    def _run(self, budget: int) -> Exit:
        """Go on until something is for the hypervisor, or the budget is used up."""
        end = self._count() + budget if budget else 0
        while True:
            left = end - self._count() if end else 0
            is_over = end and left <= 0
            if is_over and (self.view.eptp or not self._read_field(INFO) & VALID):
                return question(Reason.BUDGET)  # else the event comes first
            if self.view.eptp:
                return self._by_vmx(left)
            if (exit := self._deliver_staged() if is_over else self._stretch(left)) is not None:
                is_end = exit.reason in ENDINGS and self.slips is not None and self.slips.harmful
                return question(Reason.SENSITIVE) if is_end else exit

    def _stretch(self, left: int) -> Exit | None:
        """Until the next trap.  None: it was dealt with."""
        read = self._read_field
        if (why := self._obstacle()) is not None:
            return self._hand_over(why)
        if read(INFO) & VALID:
            return self._deliver_staged()
        if self.slips is not None and self.slips.is_over(self._count()):
            return question(Reason.SENSITIVE)
        is_watched = self.primary & MTF
        if (window := self._window()) is not None:
            self._end_shadow()
            if self.shadow_at < 0:
                return question(window)
            left = 1  # in the shadow
        before = self._count()
        try:
            exit = self._go(1 if is_watched else left)
        except NotHere:
            return self._hand_over("code")
        if self.shadow_at >= 0:
            self._end_shadow()
        found = self._sort(exit)
        if is_watched and found is None and self._count() != before:
            return question(Reason.MONITOR_TRAP_FLAG)
        return found

    def _deliver_staged(self) -> Exit | None:
        """Have the guest go on in the handler of what goes in.  None: nothing else has happened."""
        if self._obstacle() is not None or not self.deliver(self._staged()):
            return self._hand_over("delivery")
        self._write_field(INFO, 0)
        return None

    def _window(self) -> Reason | None:
        """What the hypervisor waits for, as soon as the guest is in no interrupt shadow."""
        read, asked = self._read_field, self.current_primary
        if asked & INTERRUPT_WINDOW and read(RFLAGS_FIELD) & IF:
            return Reason.INTERRUPT_WINDOW
        if asked & NMI_WINDOW and not read(INTERRUPTIBILITY) & NMI_BLOCKED:
            return Reason.NMI_WINDOW
        return None

    def deliver(self, event: Event) -> bool:
        """Have the guest go on in its handler.  False: it cannot here."""
        return delivery.deliver(self, event)

    def _go(self, left: int) -> Exit:
        """The guest's code, until something is for ring 0.  NotHere: it cannot run so."""
        self._descend(self._read_field(RIP))
        return self._came_back(self.processor.run(left))

    def _obstacle(self) -> str | None:
        """Why the guest cannot run so now."""
        read = self._read_field
        flags = read(RFLAGS_FIELD)
        if flags & BY_HARDWARE:
            return "virtual-8086 mode" if flags & RFLAGS.VM.mask else "single step"
        if self.is_current:
            return None
        if self.code_bits() == 16:
            return "16-bit code"
        if read(Vmcs.GUEST_DR7) & BREAKPOINTS:
            return "breakpoints"
        if read(PENDING_DEBUG):
            return "debug trap"
        return None

    def _sort(self, exit: Exit) -> Exit | None:
        """What to ask the hypervisor; None: nothing."""
        if exit.reason == Reason.BUDGET:
            return None
        if exit.reason == Reason.KICK:
            return question(Reason.EXTERNAL_INTERRUPT)
        if exit.reason == Reason.SENSITIVE:
            return self._let_slip()
        if exit.reason != Reason.EVENT:
            return exit
        event = event_of(exit.intr_info, exit.intr_error, exit.length)
        if event.kind is Kind.INTERRUPT:
            self.processor.wrmsr(Msr.X2APIC_EOI, 0)
            return question(Reason.PREEMPTION_TIMER)
        if event.kind is Kind.EXCEPTION:
            if event.vector == Vector.PF:
                return question(
                    Reason.EXCEPTION_OR_NMI, exit.qualification, intr_info=exit.intr_info,
                    intr_error=exit.intr_error,
                )  # fmt: skip
            if event.vector in INSTRUCTION_FAULTS:
                return self._trap(event)
        if event.kind.is_software:
            return self._raised(event)
        self.reflect(event, exit.qualification)
        return None

    def _raised(self, event: Event) -> Exit | None:
        """An INT n.  If it faults it does not retire, which VMX knows best."""
        if not self.deliver(event):
            return self._hand_over("delivery")
        self.tick()
        return None

    def _let_slip(self) -> Exit | None:
        """A sensitive instruction that does not trap: see what it does, and execute it."""
        slips, bits = self.slips, self.code_bits()
        assert slips is not None
        name, instruction, _, _ = step_of(self.code(bits), bits)
        slips.note(self.rip, name, look(self, instruction), self._count())
        self.processor.set_ring0("host", "silent")
        exit = self._go(1)
        self.processor.set_ring0("host", "stop")
        self._see_null_segments()
        return self._sort(exit)

    def _see_null_segments(self) -> None:
        """Null selectors can be loaded without a trap: the guest's register is null then."""
        registers = self.processor.registers()
        for n in LOADABLE:
            name = descent.NAMES[n]
            if registers[name] != self._read_field(Vmcs.GUEST_ES + 2 * n):
                self.set_live_segment(n, Segment(
                    *(registers[name + part] for part in ("", "_base", "_limit", "_attr"))
                ))  # fmt: skip

    def _trap(self, event: Event) -> Exit | None:
        """An instruction may not do at this level what it does."""
        bits = self.code_bits()
        name, instruction, carry_out, for_programs = self._step(self.code(bits), bits)
        if carry_out is None or (self.cpl() and not for_programs):
            if carry_out is not None and self.iopl_allows(instruction):
                return self._hand_over(name)
            self.reflect(event)
            return None
        return self._carry_out(name, instruction, carry_out)

    def _carry_out(self, name: str, instruction: iced.Instruction, act: CarryOut) -> Exit | None:
        """A sensitive instruction, on the guest's virtual registers."""
        self.traps[name] += 1
        try:
            if self._read_field(RFLAGS_FIELD) & BY_HARDWARE:  # a program has just set it
                raise NotHere
            return act(self, instruction)
        except (GuestFault, NotHere):
            return self._hand_over(name)

    def _step(self, code: bytes, bits: int) -> Step:
        step = self._steps.get((code, bits))
        if step is None:
            if len(self._steps) >= STEPS_KEPT:
                self._steps.clear()
            step = self._steps[code, bits] = step_of(code, bits)
        return step

    def slip_report(self, memory: GuestMemory) -> str:
        """What slipped through, by the names that the guest's kernel has for its addresses."""
        assert self.slips is not None
        return self.slips.report(kallsyms.find(memory.read, memory.size).name)

    # --- what VMX executes ---

    def _to_vmx(self) -> None:
        self._leave()
        if self.is_low:
            self.is_low = False
            self.processor.set_registers(self.operation.root.own)
        self._stop_timer()
        self._write_field(TIMER, self._left())

    def _hand_over(self, name: str) -> Exit | None:
        """Have an instruction executed, or an event delivered.  None: it is, and nothing else."""
        self.handed_over[name] += 1
        whole, is_watched = name in self.to_the_end, bool(self.primary & MTF)
        self._to_vmx()
        self.single_step(is_watched or not whole)
        try:
            exit = self._way(1 if whole else 0)
            if exit.reason == Reason.BUDGET:  # the processor is still in the guest
                self.kick()
                exit = self.processor.run(0)
        finally:
            if not is_watched:
                self.single_step(False)
        self._note_shadow()
        self.forget_walks()
        self.virtual_cr2 = None
        if exit.reason == Reason.MONITOR_TRAP_FLAG and not is_watched:
            return None
        return exit

    def _by_vmx(self, left: int) -> Exit:
        """The guest does not page as a deprivileged one can: in real-address mode."""
        self.handed_over["real-address mode"] += 1
        self._to_vmx()
        exit = self._way(left)
        self.virtual_cr2 = None
        return exit


def too_many_slips(vcpu: Vcpu, exit: Exit) -> Stop:
    """The guest runs on an ISA on which it cannot run so."""
    guest = vcpu.guest
    assert isinstance(guest, Deprivileged)
    return vcpu.error(guest.slip_report(vcpu.memory))
