"""The guest's state while it runs deprivileged: in the processor, and where VMX keeps it.

Between two stretches RIP, RSP and RFLAGS are in the VMCS, and so is all else; the bases of FS and
GS, which programs and kernels can write without a trap, are in the processor while `is_current`.

Source: SDM 3A, "System Architecture Overview"; SDM 3C, "Guest Register State".
Invariants: what is not in the VMCS is in the processor, and nowhere else; whoever changes a field
that the processor has a copy of makes it load that before the guest goes on.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic

from understudy.arch.address import PAGE
from understudy.arch.cr import RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.msr import EFER, ApicBase, Msr
from understudy.arch.segment import Segment, SegmentName
from understudy.arch.vmcs import Interruptibility, Vmcs
from understudy.arch.vmx_controls import PrimaryControls
from understudy.execution.deprivileged import descent
from understudy.execution.emulate.linear import Linear, Ram
from understudy.execution.vmx.exits import event_of
from understudy.execution.vmx.guest_state import GUEST_CR3, GUEST_RSP, RFLAGS_FIELD, RIP, GuestState
from understudy.execution.vmx.technique import INFO, INTERRUPTIBILITY
from understudy.guest import RSP, Event
from understudy.instructions.operands import LONGEST, LOW32
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.silicon import Exit
from understudy.vcpu.cpu_model import CpuModel

TIMER_VECTOR: Final = 0xFD
SPURIOUS_ENABLED: Final = 0x1FF  # spurious vector and "APIC software enable"
IRR_OF_TIMER: Final = Msr.X2APIC_IRR0 + TIMER_VECTOR // 32
TIMER_BIT: Final = 1 << TIMER_VECTOR % 32
DEADLINE_MODE: Final = 2 << 17  # of the LVT's timer
TIMER: Final = int(Vmcs.PREEMPTION_TIMER_VALUE)
BASES: Final = {
    int(Vmcs.GUEST_FS_BASE): Msr.IA32_FS_BASE, int(Vmcs.GUEST_GS_BASE): Msr.IA32_GS_BASE,
}  # fmt: skip
STI_SHADOW: Final = Interruptibility.STI.mask
SHADOW: Final = int(Interruptibility(STI=1, MOV_SS=1))
AC: Final = RFLAGS.AC.mask
LMA: Final = EFER.LMA.mask
RDTSC_EXITING: Final = PrimaryControls.RDTSC_EXITING.mask
TRAPS: Final = (Vector.DB, Vector.BP, Vector.OF)
PDPT_BYTES: Final = 32
SEGMENT_FIELDS: Final = (
    Vmcs.GUEST_ES, Vmcs.GUEST_ES_BASE, Vmcs.GUEST_ES_LIMIT, Vmcs.GUEST_ES_ACCESS_RIGHTS,
)  # fmt: skip
BY_IOPL: Final = frozenset({
    Mnemonic.IN, Mnemonic.OUT, Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD, Mnemonic.OUTSB,
    Mnemonic.OUTSW, Mnemonic.OUTSD, Mnemonic.CLI, Mnemonic.STI,
})  # fmt: skip


class Live(GuestState):
    """One vCPU's."""

    model: CpuModel
    asked: tuple[int, int]  # the exits that a user has asked for
    cr4 = 0  # bits that the processor has while the guest runs, whatever the guest has
    _read_field: Callable[[int], int]
    _write_field: Callable[[int, int], None]

    def begin(self, host: Host, p2m: P2m, *, is_virtual: bool) -> None:
        """Nothing is in the processor yet."""
        self.is_virtual = is_virtual
        self.is_low = False  # the processor is at the guest's level
        self.is_current = False  # and has the guest's state
        self.root_changed = False  # but for CR3, or what it has cached
        self.updates: dict[str, int] = {}  # and but for these
        self.pdptes = b""  # that it has loaded, under PAE paging
        self.due = 0  # TSC at which the timer is over
        self.crossings = 0  # times that the processor came from the guest to the hypervisor
        self.carried = 0  # instructions carried out here that VMX would have executed
        self.shadow_at = -1  # what was retired when an interrupt shadow began
        self.virtual_cr2: int | None = None
        self.linear, self.programs = Linear(Ram(host, p2m)), Linear(Ram(host, p2m))

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

    def forget_walks(self) -> None:
        """What was kept of walks for what is carried out here is not to be used any more."""
        self.linear.forget()
        self.programs.forget()

    @property
    def cr2(self) -> int:
        """CR2."""
        if self.virtual_cr2 is None:
            self.virtual_cr2 = self.processor.registers()["cr2"]
        return self.virtual_cr2

    def _end_shadow(self) -> None:
        """An interrupt shadow is over when an instruction is done in it: has retired, or exited."""
        if self.shadow_at < 0:
            return
        blocking = self._read_field(INTERRUPTIBILITY)
        if self.shadow_at != self._count():
            self._write_field(INTERRUPTIBILITY, blocking & ~SHADOW)
        elif blocking & SHADOW:
            return
        self.shadow_at = -1

    def _note_shadow(self) -> None:
        """VMX says whether the guest is in an interrupt shadow."""
        is_in = self._read_field(INTERRUPTIBILITY) & SHADOW
        self.shadow_at = self._count() if is_in else -1

    def begin_shadow(self, kind: int = STI_SHADOW) -> None:
        """The next instruction is not interrupted."""
        blocking = self._read_field(INTERRUPTIBILITY) & ~SHADOW  # of one before it
        self._write_field(INTERRUPTIBILITY, blocking | kind)
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
        for first, value in zip(SEGMENT_FIELDS, segment, strict=True):
            field = first + 2 * n
            write = self._write if field in BASES else self._write_field  # the rest by `updates`
            write(field, value)
        if n == SegmentName.LDTR or n == SegmentName.TR:
            return
        level = descent.real_level(self.cpl())
        self.updates |= descent.loaded(n, segment, level)
        if n == SegmentName.SS and self.is_current:  # CPL has changed: CS follows
            self.updates |= descent.loaded(SegmentName.CS, self.segment(SegmentName.CS), level)

    def _reach(self, linear: Linear, level: int, ac: bool = False) -> Linear:
        linear.follow(self.paging_control(), (level, ac, self.protection_keys()))
        return linear

    def memory(self) -> Linear:
        """Memory as operands of the instruction that trapped reach it, until somebody asks anew."""
        if self.cpl() == 3:
            return self.programs_memory()
        return self._reach(self.linear, 0, bool(self._read_field(RFLAGS_FIELD) & AC))

    def kernel_memory(self) -> Linear:
        """Memory as the processor reaches its tables: SMAP keeps it from a program's, AC or not."""
        return self._reach(self.linear, 0)

    def programs_memory(self) -> Linear:
        """Memory as level 3 reaches it."""
        return self._reach(self.programs, 3)

    def shows_own_time(self) -> bool:
        """Whether a user has asked that RDTSC come to the hypervisor."""
        return bool(self.asked[0] & RDTSC_EXITING)

    # --- running ---

    def _came_back(self, exit: Exit) -> Exit:
        """See where the guest is, and why it came there."""
        self._land(exit.gla, exit.gpa)
        return exit

    def _land(self, rip: int, flags: int) -> None:
        """The guest is there; `flags`: as the processor has them."""
        self.crossings += 1
        own = self._read_field(RFLAGS_FIELD)
        self._write_field(RIP, rip)
        self._write_field(RFLAGS_FIELD, descent.up(flags, own))
        self._write_field(GUEST_RSP, self.processor.gpr(RSP))

    def _staged(self) -> Event:
        info, error = self._read_field(INFO), self._read_field(Vmcs.ENTRY_EXCEPTION_ERROR_CODE)
        return event_of(info, error, self._read_field(Vmcs.ENTRY_INSTRUCTION_LENGTH))

    def _root(self) -> int:
        """The hpa of the tables by which the guest runs."""
        return self._read_field(GUEST_CR3)

    def _state(self) -> dict[str, int]:
        return descent.state(self, self._root(), self.cr4)

    def _descend(self, rip: int) -> None:
        """Give the processor the guest's state, as far as it has not got it, to go on at `rip`."""
        processor, read = self.processor, self._read_field
        flags = descent.down(read(RFLAGS_FIELD))
        values = {"rip": rip, "rflags": flags, "rsp": read(GUEST_RSP)}
        if not self.is_current:
            processor.set_registers(self._state() | values)
            self._start_timer()
            self.is_current = self.is_low = True
            self._note_pdptes()
        else:
            if self.root_changed or self._pdptes_changed():
                values["cr3"] = self._root()
                self._note_pdptes()
            processor.set_registers(values | self.updates)
        self.root_changed = False
        self.updates.clear()

    def _note_pdptes(self) -> None:
        if not self.is_code64():
            self.pdptes = self.host.memory.read(self._root(), PDPT_BYTES)

    def _pdptes_changed(self) -> bool:
        """The processor has copies of the shadow's PDPTEs, if that is a PAE one."""
        if self.is_code64():
            return False
        return self.pdptes != self.host.memory.read(self._root(), PDPT_BYTES)

    def _start_timer(self) -> None:
        processor = self.processor
        base = ApicBase(processor.rdmsr(Msr.IA32_APIC_BASE))
        if not base.EXTD:
            processor.wrmsr(Msr.IA32_APIC_BASE, int(base.replace(EN=1, EXTD=1)))
        processor.wrmsr(Msr.X2APIC_SVR, SPURIOUS_ENABLED)
        processor.wrmsr(Msr.X2APIC_LVT_TIMER, DEADLINE_MODE | TIMER_VECTOR)
        processor.wrmsr(Msr.IA32_TSC_DEADLINE, max(self.due, 1))

    def _stop_timer(self) -> None:
        """VMX has the guest's timer; an interrupt of this one would end each entry at once."""
        processor = self.processor
        processor.wrmsr(Msr.IA32_TSC_DEADLINE, 0)
        is_open = ApicBase(processor.rdmsr(Msr.IA32_APIC_BASE)).EXTD
        while is_open and processor.rdmsr(IRR_OF_TIMER) & TIMER_BIT:
            processor.apic.accept()
            processor.wrmsr(Msr.X2APIC_EOI, 0)

    # --- what came back ---

    def reflect(self, event: Event, payload: int = 0) -> None:
        """It is the guest's own."""
        if event.vector == Vector.DB:
            self.add_dr6(payload)
        elif event.vector not in TRAPS and not event.kind.is_software:
            self.set_resume_flag(True)
        self.inject(event)

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
