"""A guest's registers while it is interpreted: near, as `instructions.registers.Program` asks.

Source: SDM 1, "Basic Program Execution Registers".

Invariant: what segments say is what the guest's say now: `begin` forgets what was known of them.
"""

from collections.abc import Callable
from typing import Final

from understudy.arch.address import is_canonical
from understudy.arch.cr import CR0, CR4, RFLAGS
from understudy.arch.msr import EFER, Msr
from understudy.arch.segment import Segment, SegmentName
from understudy.arch.vmcs import Interruptibility, Vmcs
from understudy.arch.vmx_controls import PrimaryControls, SecondaryControls
from understudy.execution.emulate.linear import Linear
from understudy.execution.vmx.placement import ONE_ADDRESS
from understudy.execution.vmx.technique import INTERRUPTIBILITY, Vmx
from understudy.guest import RSP, Control, Kind
from understudy.instructions.operands import LOW32, MASK64
from understudy.instructions.registers import NotHere
from understudy.instructions.segment_limits import DEFAULT_BIG, Reach, place, reach

LMA: Final = EFER.LMA.mask
RDTSC_EXITING, PAUSE_EXITING, PAUSE_LOOP = (
    PrimaryControls.RDTSC_EXITING.mask, PrimaryControls.PAUSE_EXITING.mask,
    SecondaryControls.PAUSE_LOOP_EXITING.mask,
)  # fmt: skip
TSD: Final = CR4.TSD.mask
INVLPG_EXITING: Final = PrimaryControls.INVLPG_EXITING.mask
NMI_BLOCKED: Final = Interruptibility.NMI.mask
PE, VM = CR0.PE.mask, RFLAGS.VM.mask


class Reaches(dict[int, Reach]):
    """What segments reach, by their numbers; asked for when it is needed."""

    def __init__(self, guest: Vmx) -> None:
        super().__init__()
        self.guest, self.is_real = guest, False

    def __missing__(self, n: int) -> Reach:
        found = self[n] = reach(self.guest.segment(n), self.is_real)
        return found


class Held:
    """General registers, RIP and RFLAGS; what else is asked for is in the guest."""

    def __init__(self, guest: Vmx, linear: Linear, *, is_virtual: bool) -> None:
        self.guest, self.linear, self.values = guest, linear, [0] * 16
        self.is_virtual = is_virtual  # time: a tick for each instruction
        self.rip, self.rflags, self.cpl = 0, 2, 0
        self.code_limit, self.stack_mask, self.bits = MASK64, MASK64, 64
        self.is_real = self.is_long = False
        self.read_gpr: Callable[[int], int] = self.values.__getitem__
        self.write_gpr: Callable[[int, int], None] = self.values.__setitem__
        self.gpr, self.set_gpr = self.read_gpr, self.write_gpr
        self.segment_base = guest.segment_base
        self.reaches = Reaches(guest)
        self.done = 0  # of this stretch, before the run that is interpreted now
        self.blocking = 0  # by STI (1) or MOV SS (2): the next instruction comes before interrupts
        self.is_attended = False  # after this one somebody has to look

    def begin(self, values: tuple[int, ...], bits: int, control: Control) -> None:
        """Take over what the guest has."""
        guest = self.guest
        self.values[:] = values
        self.values[RSP] = guest.gpr(RSP)
        self.rip, self.rflags, self.cpl = guest.rip, guest.rflags, guest.cpl()
        self.is_attended = False
        is_protected = control.cr0 & PE
        self.bits, self.is_real = bits, not is_protected
        self.is_long = bool(control.efer & LMA)
        if bits == 64:
            self.stack_mask = MASK64
        else:
            reaches = self.reaches
            reaches.clear()
            reaches.is_real = not is_protected or bool(self.rflags & VM)
            self._use_stack(guest.segment(SegmentName.SS))

    def place(self, n: int, offset: int, size: int, write: bool) -> int:
        """A linear address, as `Program` says."""
        return place(self.reaches[n], offset, size, write)

    def selector(self, n: int) -> int:
        """Of a segment register."""
        return self.guest.segment(n).selector

    def shadow(self, *, by_stack: bool = False) -> None:
        """As `Program` says."""
        self.blocking, self.is_attended = 2 if by_stack else 1, True

    def look_up(self) -> None:
        """As `Program` says."""
        self.is_attended = True

    def load_segment(self, n: int, segment: Segment) -> None:
        """As `Program` says."""
        self.guest.set_segment(n, segment)
        self.reaches.pop(n, None)
        if n == SegmentName.SS and self.bits != 64:
            self._use_stack(segment)
        self.is_attended = True

    def _use_stack(self, segment: Segment) -> None:
        self.stack_mask = LOW32 if segment.rights & DEFAULT_BIG else 0xFFFF

    def enter_code(self, code: Segment, rip: int, cpl: int) -> None:
        """As `Program` says."""
        self.guest.set_segment(SegmentName.CS, code)
        self.rip, self.cpl, self.is_attended = rip, cpl, True

    def become_supervisor(self) -> None:
        """As `Program` says."""
        self.linear.become_supervisor()

    def blocks_nmis(self) -> bool:
        """As `Program` says."""
        return bool(self.guest.read(INTERRUPTIBILITY) & NMI_BLOCKED)

    def exits_on(self, vector: int, kind: Kind) -> bool:
        """As `Program` says.  INT n never does."""
        bitmap = self.guest.read(Vmcs.EXCEPTION_BITMAP)
        return kind is not Kind.SOFTWARE_INTERRUPT and bool(bitmap >> vector & 1)

    def msr(self, index: int) -> int:
        """As `Program` says."""
        return self.guest.processor.rdmsr(index)

    def set_msr(self, index: int, value: int) -> None:
        """As `Program` says."""
        self.guest.processor.wrmsr(index, value)

    def invalidate(self, gva: int) -> None:
        """As `Program` says; the processor's TLB must hear of it, too."""
        guest = self.guest
        if guest.primary & INVLPG_EXITING:
            raise NotHere
        if is_canonical(gva):
            guest.processor.invvpid(ONE_ADDRESS, guest.vpid, gva)
            self.linear.invalidate(gva)

    def probe(self, at: int, size: int) -> None:
        """As `Program` says."""
        self.linear.load_to_write(at, size)

    def time_stamp(self, *, with_processor: bool) -> int:
        """As `Program` says."""
        guest = self.guest
        is_kept = bool(guest.primary & RDTSC_EXITING)
        is_shown = not with_processor or "rdtscp" in guest.model.shown
        if is_kept or not is_shown or (self.cpl and guest.control().cr4 & TSD):
            raise NotHere
        ticks = self.done if self.is_virtual else 0
        now = guest.processor.rdmsr(Msr.IA32_TSC) + ticks + guest.read(Vmcs.TSC_OFFSET)
        return now & MASK64

    def pause(self) -> None:
        """As `Program` says.  Where a loop of it may exit, the processor has to see them all."""
        guest = self.guest
        if guest.primary & PAUSE_EXITING or guest.read(Vmcs.SECONDARY_CONTROLS) & PAUSE_LOOP:
            raise NotHere
