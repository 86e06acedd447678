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
from collections.abc import Callable, Sequence
from typing import Any, Final

import iced_x86 as iced
from iced_x86 import Mnemonic

from understudy.arch.address import PAGE
from understudy.arch.cr import RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason
from understudy.arch.msr import EFER, ApicBase, Msr
from understudy.arch.segment import Segment, SegmentName
from understudy.arch.vmcs import Interruptibility, Vmcs
from understudy.arch.vmx_controls import PrimaryControls
from understudy.execution.deprivileged import delivery, descent
from understudy.execution.deprivileged.answer import question
from understudy.execution.deprivileged.instructions import NotHere, Step, step_of
from understudy.execution.emulate.linear import Linear, Ram
from understudy.execution.vmx.exits import event_of
from understudy.execution.vmx.guest_state import GUEST_CR3, GUEST_RSP, RFLAGS_FIELD, RIP
from understudy.execution.vmx.technique import INFO, INTERRUPTIBILITY, PENDING_DEBUG, VALID, Vmx
from understudy.guest import RSP, Event, Kind
from understudy.instructions.operands import LONGEST, LOW32
from understudy.machine.host import Host
from understudy.paging import Paging
from understudy.paging.guest_walk import GuestFault, Translation
from understudy.silicon import Exit, Processor
from understudy.state import restore
from understudy.vcpu.cpu_model import CpuModel

STEPS_KEPT: Final = 1 << 14
TIMER_VECTOR: Final = 0xFD
SPURIOUS_ENABLED: Final = 0x1FF  # spurious vector and "APIC software enable"
DEADLINE_MODE: Final = 2 << 17  # of the LVT's timer
MTF: Final = PrimaryControls.MONITOR_TRAP_FLAG.mask
INTERRUPT_WINDOW: Final = PrimaryControls.INTERRUPT_WINDOW_EXITING.mask
NMI_WINDOW: Final = PrimaryControls.NMI_WINDOW_EXITING.mask
TIMER: Final = int(Vmcs.PREEMPTION_TIMER_VALUE)
FS_BASE, GS_BASE = int(Vmcs.GUEST_FS_BASE), int(Vmcs.GUEST_GS_BASE)
BASES: Final = {FS_BASE: Msr.IA32_FS_BASE, GS_BASE: Msr.IA32_GS_BASE}
STI_SHADOW: Final = Interruptibility.STI.mask
SHADOW: Final = int(Interruptibility(STI=1, MOV_SS=1))
NMI_BLOCKED: Final = Interruptibility.NMI.mask
IF: Final = RFLAGS.IF.mask
AC: Final = RFLAGS.AC.mask
LMA: Final = EFER.LMA.mask
BY_HARDWARE: Final = int(RFLAGS(TF=1, VM=1))
BREAKPOINTS: Final = 0xFF  # of DR7
INSTRUCTION_FAULTS: Final = (Vector.GP, Vector.UD)
TRAPS: Final = (Vector.DB, Vector.BP, Vector.OF)
WORDS_PER_PDPT: Final = 32  # bytes


class Deprivileged(Vmx, name="deprivileged"):
    """A vCPU whose guest has no privileges."""

    pagings = ("eager", "lazy", "vtlb")
    hidden_features = ("pmu", "xsaves")

    def __init__(
        self, host: Host, processor: Processor | None, paging: Paging, model: CpuModel,
        *, keep_timer: bool = True, exits: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        if processor is None:
            raise ValueError("execution 'deprivileged': expected a processor for each vCPU")
        self.is_virtual = keep_timer
        self.is_low = False  # the processor is at the guest's level
        self.is_current = False  # and has the guest's state
        self.root_changed = False  # but for CR3, or what it has cached
        self.updates: dict[str, int] = {}  # and but for these
        self.pdptes = b""  # that it has loaded, under PAE paging
        self.due = 0  # TSC at which the timer is over
        self.carried = 0  # instructions carried out here that VMX would have executed
        self.shadow_at = -1  # what was retired when an interrupt shadow began
        self.virtual_cr2: int | None = None
        self.handed_over: Counter[str] = Counter()  # by mnemonic, or by what it was
        self.traps: Counter[str] = Counter()  # by mnemonic
        self._steps: dict[tuple[bytes, int], Step] = {}
        super().__init__(host, processor, paging, model, keep_timer=keep_timer, exits=exits)
        self.linear, self.programs = Linear(Ram(host, paging.p2m)), Linear(Ram(host, paging.p2m))
        _, sensitive = processor.ring0
        processor.set_ring0("host", sensitive)

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

    def _count(self) -> int:
        return self.processor.retired + self.carried

    def _read(self, field: int) -> int:
        if self.is_current and field in BASES:
            return self.processor.rdmsr(BASES[field])
        return self._read_field(field)

    def _write(self, field: int, value: int) -> None:
        self._write_field(field, value)
        if field in descent.PRIVATE or not self.is_current:
            return
        if field in BASES:
            self.processor.wrmsr(BASES[field], value)
        elif field == GUEST_CR3:
            self.root_changed = True
        else:
            self._leave()

    def _leave(self) -> None:
        """The processor is not to have the guest's state any more: VMX is."""
        if self.is_current:
            self.is_current = False
            for field, msr in BASES.items():
                self._write_field(field, self.processor.rdmsr(msr))
            self.updates.clear()

    def _arm(self, units: int) -> None:
        shift = self.timer_shift
        self.due = (self.processor.tsc >> shift) + units << shift
        self._write_field(TIMER, units)
        if self.is_current:
            self.processor.wrmsr(Msr.IA32_TSC_DEADLINE, max(self.due, 1))

    def _left(self) -> int:
        """Of the timer, in its units."""
        shift = self.timer_shift
        return max((self.due >> shift) - (self.processor.tsc >> shift), 0)

    # --- the port, where it is not as VMX has it ---

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

    def forget_walks(self) -> None:
        """What was kept of walks for what is carried out here is not to be used any more."""
        self.linear.forget()
        self.programs.forget()

    def set_cr2(self, value: int) -> None:
        super().set_cr2(value)
        self.virtual_cr2 = value

    @property
    def cr2(self) -> int:
        """CR2."""
        if self.virtual_cr2 is None:
            self.virtual_cr2 = self.processor.registers()["cr2"]
        return self.virtual_cr2

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
        self._arm(self._read_field(TIMER))

    def takes_interrupts(self) -> bool:
        self._end_shadow()
        return super().takes_interrupts()

    def _end_shadow(self) -> None:
        """An interrupt shadow is over when an instruction has retired in it."""
        if self.shadow_at >= 0 and self.shadow_at != self._count():
            self.shadow_at = -1
            self._write_field(INTERRUPTIBILITY, self._read_field(INTERRUPTIBILITY) & ~SHADOW)

    def begin_shadow(self, kind: int = STI_SHADOW) -> None:
        """The next instruction is not interrupted."""
        self._write_field(INTERRUPTIBILITY, self._read_field(INTERRUPTIBILITY) | kind)
        self.shadow_at = self._count()

    def is_long_mode(self) -> bool:
        """IA32_EFER.LMA."""
        return bool(self.paging_control().efer & LMA)

    def shows_single_step(self, flags: int) -> bool:
        """Whether these flags would make a trap behind each instruction."""
        return bool(flags & RFLAGS.TF.mask)

    def tick(self) -> None:
        """An instruction was carried out that VMX would have executed."""
        self.carried += 1
        if self.is_virtual:
            self.advance(1)

    def set_live_segment(self, n: int, segment: Segment) -> None:
        """A segment register, here and in the processor."""
        for first, value in zip((Vmcs.GUEST_ES, Vmcs.GUEST_ES_BASE, Vmcs.GUEST_ES_LIMIT,
                                 Vmcs.GUEST_ES_ACCESS_RIGHTS), segment, strict=True):  # fmt: skip
            self._write_field(first + 2 * n, value)
        if n == SegmentName.LDTR or n == SegmentName.TR:
            return
        level = descent.real_level(self.cpl())
        self.updates |= descent.loaded(n, segment, level)
        if n == SegmentName.SS and self.is_current:  # CPL has changed: CS follows
            self.updates |= descent.loaded(SegmentName.CS, self.segment(SegmentName.CS), level)

    def translation(self, *, is_program: bool = False) -> Translation:
        """How the guest's kernel reaches memory, or its program."""
        cr0, cr3, cr4, efer, pdptes = self.paging_control()
        flags = self._read_field(RFLAGS_FIELD)
        keys = self.protection_keys()
        return Translation(
            cr0, cr3, cr4, efer, 3 if is_program else 0, pdptes, bool(flags & AC), keys
        )

    def memory(self) -> Linear:
        """Memory as the instruction that trapped reaches it."""
        return self.programs_memory() if self.cpl() == 3 else self.kernel_memory()

    def kernel_memory(self) -> Linear:
        """Memory as level 0 reaches it."""
        self.linear.follow(self.translation())
        return self.linear

    def programs_memory(self) -> Linear:
        """Memory as level 3 reaches it."""
        self.programs.follow(self.translation(is_program=True))
        return self.programs

    # --- running ---

    def _run(self, budget: int) -> Exit:
        """Go on until something is for the hypervisor, or the budget is used up."""
        end = self._count() + budget if budget else 0
        while True:
            left = end - self._count() if end else 0
            if end and left <= 0:
                return question(Reason.BUDGET)
            if self.view.eptp:
                return self._by_vmx(left)
            if (exit := self._stretch(left)) is not None:
                return exit

    def _stretch(self, left: int) -> Exit | None:
        """Until the next trap.  None: it was dealt with."""
        read = self._read_field
        if (why := self._obstacle()) is not None:
            return self._hand_over(why)
        if read(INFO) & VALID:
            if not delivery.deliver(self, self._staged()):
                return self._hand_over("delivery")
            self._write_field(INFO, 0)
        is_watched = self.primary & MTF
        if self.current_primary & INTERRUPT_WINDOW and read(RFLAGS_FIELD) & IF:
            self._end_shadow()
            if self.shadow_at >= 0:
                left = 1
            else:
                return question(Reason.INTERRUPT_WINDOW)
        if self.current_primary & NMI_WINDOW and not read(INTERRUPTIBILITY) & NMI_BLOCKED:
            return question(Reason.NMI_WINDOW)
        self._descend()
        before = self._count()
        exit = self.processor.run(1 if is_watched else left)
        self._write_field(RIP, exit.gla)
        self._write_field(RFLAGS_FIELD, descent.up(exit.gpa, read(RFLAGS_FIELD)))
        self._write_field(GUEST_RSP, self.processor.gpr(RSP))
        if self.shadow_at >= 0:
            self._end_shadow()
        found = self._sort(exit)
        if is_watched and found is None and self._count() != before:
            return question(Reason.MONITOR_TRAP_FLAG)
        return found

    def _staged(self) -> Event:
        info, error = self._read_field(INFO), self._read_field(Vmcs.ENTRY_EXCEPTION_ERROR_CODE)
        return event_of(info, error, self._read_field(Vmcs.ENTRY_INSTRUCTION_LENGTH))

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

    def _descend(self) -> None:
        """Give the processor the guest's state, as far as it has not got it."""
        processor, read = self.processor, self._read_field
        flags = descent.down(read(RFLAGS_FIELD))
        values = {"rip": read(RIP), "rflags": flags, "rsp": read(GUEST_RSP)}
        if not self.is_current:
            processor.set_registers(descent.state(self) | values)
            self._start_timer()
            self.is_current = self.is_low = True
            self._note_pdptes()
        else:
            if self.root_changed or self._pdptes_changed():
                values["cr3"] = read(GUEST_CR3)
                self._note_pdptes()
            processor.set_registers(values | self.updates)
        self.root_changed = False
        self.updates.clear()

    def _note_pdptes(self) -> None:
        if not self.is_code64():
            self.pdptes = self.host.memory.read(self._read_field(GUEST_CR3), WORDS_PER_PDPT)

    def _pdptes_changed(self) -> bool:
        """The processor has copies of the shadow's PDPTEs, if that is a PAE one."""
        if self.is_code64():
            return False
        return self.pdptes != self.host.memory.read(self._read_field(GUEST_CR3), WORDS_PER_PDPT)

    def _start_timer(self) -> None:
        processor = self.processor
        base = ApicBase(processor.rdmsr(Msr.IA32_APIC_BASE))
        if not base.EXTD:
            processor.wrmsr(Msr.IA32_APIC_BASE, int(base.replace(EN=1, EXTD=1)))
        processor.wrmsr(Msr.X2APIC_SVR, SPURIOUS_ENABLED)
        processor.wrmsr(Msr.X2APIC_LVT_TIMER, DEADLINE_MODE | TIMER_VECTOR)
        processor.wrmsr(Msr.IA32_TSC_DEADLINE, max(self.due, 1))

    # --- what came back ---

    def _sort(self, exit: Exit) -> Exit | None:
        """What to ask the hypervisor; None: nothing."""
        if exit.reason == Reason.BUDGET:
            return None
        if exit.reason == Reason.KICK:
            return question(Reason.EXTERNAL_INTERRUPT)
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
        self.reflect(event, exit.qualification)
        return None

    def reflect(self, event: Event, payload: int = 0) -> None:
        """It is the guest's own."""
        if event.kind.is_software:
            self.tick()
        elif event.vector == Vector.DB:
            self.add_dr6(payload)
        elif event.vector not in TRAPS:
            self.set_resume_flag(True)
        self.inject(event)

    def _trap(self, event: Event) -> Exit | None:
        """An instruction may not do at this level what it does."""
        bits = self.code_bits()
        code = self.code(bits)
        step = self._steps.get((code, bits))
        if step is None:
            if len(self._steps) >= STEPS_KEPT:
                self._steps.clear()
            step = self._steps[code, bits] = step_of(code, bits)
        name, instruction, carry_out, for_programs = step
        if carry_out is None or (self.cpl() and not for_programs):
            if carry_out is not None and self.iopl_allows(instruction):
                return self._hand_over(name)
            self.reflect(event)
            return None
        self.traps[name] += 1
        try:
            return carry_out(self, instruction)
        except (GuestFault, NotHere):
            return self._hand_over(name)

    def iopl_allows(self, instruction: iced.Instruction) -> bool:
        """Whether a program may perhaps do what only IOPL or the TSS's map of ports can forbid."""
        return instruction.mnemonic in BY_IOPL

    def code(self, bits: int) -> bytes:
        """The bytes of the instruction at RIP, as many as the processor can fetch."""
        at = self._read_field(RIP)
        if bits != 64:
            at = at + self._read_field(Vmcs.GUEST_CS_BASE) & LOW32
        for length in (LONGEST, min(LONGEST, PAGE - at % PAGE)):
            try:
                return self.processor.read_linear(at, length)
            except ValueError:
                pass
        return b""

    # --- what VMX executes ---

    def _to_vmx(self) -> None:
        self._leave()
        if self.is_low:
            self.is_low = False
            self.processor.set_registers(self.operation.root.own)
        self.processor.wrmsr(Msr.IA32_TSC_DEADLINE, 0)
        self._write_field(TIMER, self._left())

    def _hand_over(self, name: str) -> Exit | None:
        """Have one instruction executed, or one event delivered.  None: it is, and nothing else."""
        self.handed_over[name] += 1
        is_watched = self.primary & MTF
        self._to_vmx()
        self.single_step(True)
        try:
            exit = self._way(0)
        finally:
            if not is_watched:
                self.single_step(False)
        self.shadow_at = self._count() if self._read_field(INTERRUPTIBILITY) & SHADOW else -1
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


BY_IOPL: Final = frozenset({
    Mnemonic.IN, Mnemonic.OUT, Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD, Mnemonic.OUTSB,
    Mnemonic.OUTSW, Mnemonic.OUTSD, Mnemonic.CLI, Mnemonic.STI,
})  # fmt: skip
