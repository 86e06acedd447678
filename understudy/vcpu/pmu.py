"""Performance monitoring for one guest: the processor counts, and what it cannot count is added.

Source: SDM 3B, "Performance Monitoring"; SDM 4, "Architectural MSRs".

The processor's own counters count while it is in the guest, and stand still while it is not (the
entry and exit controls "load IA32_PERF_GLOBAL_CTRL").  An instruction that the hypervisor carries
out in the guest's place retires nowhere, so each is added here, as one instruction and one cycle:
the guest counts its own instructions, each once, under every technique.

Invariants: a guest's counters never count the hypervisor; an overflow is told to the guest before
its next instruction.
"""

from dataclasses import dataclass
from typing import NamedTuple

from understudy.arch.msr import DebugCtl, FixedCounterControl, Msr, PerfEventSelect
from understudy.guest import Guest
from understudy.silicon import LocalApic
from understudy.state import U64, Part
from understudy.vcpu.events import Events
from understudy.vcpu.perfmon import COUNTED, FIXED, GENERAL, GLOBAL, PERFMON_MSRS, WIDTH


class Counter(NamedTuple):
    """One counter that counts, by the register that writes all of it."""

    msr: int
    bit: int  # in the global registers
    at_user: bool
    at_supervisor: bool
    interrupts: bool


@dataclass
class PmuState:
    """What a snapshot keeps beside the processor's registers."""

    overflowed: U64 = 0  # counters that instructions in the guest's place made overflow


class Pmu(Part):
    """The counters of one vCPU."""

    state: PmuState

    def __init__(self, guest: Guest, apic: LocalApic, events: Events) -> None:
        self.guest, self.apic, self.events = guest, apic, events
        self.state = PmuState()
        self.counting: tuple[Counter, ...] = ()

    def read(self, index: int) -> int:
        """RDMSR."""
        value = self.guest.read_pmu(index)
        return value | self.state.overflowed if index == Msr.IA32_PERF_GLOBAL_STATUS else value

    def write(self, index: int, value: int) -> None:
        """WRMSR.  KeyError is #GP(0)."""
        if index == Msr.IA32_PERF_GLOBAL_CTRL and value & ~GLOBAL:
            raise KeyError(index)
        self.guest.write_pmu(index, value)
        if index == Msr.IA32_PERF_GLOBAL_OVF_CTRL:
            self.state.overflowed &= ~value
        self._note()

    def reset(self) -> None:
        """As after power-on."""
        for index in PERFMON_MSRS:
            if index != Msr.IA32_PERF_GLOBAL_STATUS:
                self.guest.write_pmu(index, 0)
        self.guest.write_pmu(Msr.IA32_PERF_GLOBAL_OVF_CTRL, GLOBAL)
        self.guest.write_pmu(Msr.IA32_PERF_GLOBAL_CTRL, (1 << GENERAL) - 1)
        self.state = PmuState()
        self._note()

    def load(self, saved: dict[str, object]) -> None:
        """The processor's registers are restored already."""
        super().load(saved)
        self._note()

    def _note(self) -> None:
        """Which counters count, and so have to hear of instructions in the guest's place."""
        self.counting = tuple(self._enabled())
        self.guest.after_skip = self.carried_out if self.counting else None

    def _enabled(self) -> list[Counter]:
        read, found = self.guest.read_pmu, []
        enables = read(Msr.IA32_PERF_GLOBAL_CTRL)
        fixed = read(Msr.IA32_FIXED_CTR_CTRL)
        for n in range(GENERAL):
            if not enables >> n & 1:
                continue
            select = PerfEventSelect(read(Msr.IA32_PERFEVTSEL0 + n))
            is_plain = not (select.CMASK or select.INV or select.EDGE)
            if select.EN and is_plain and select.EVENT in COUNTED and (select.USR or select.OS):
                found.append(Counter(Msr.IA32_A_PMC0 + n, n, select.USR, select.OS, select.INT))
        for n in range(FIXED):
            control = FixedCounterControl(fixed >> 4 * n & 0xF)
            if enables >> 32 + n & 1 and (control.USR or control.OS):
                msr, levels = Msr.IA32_FIXED_CTR0 + n, (control.USR, control.OS)
                found.append(Counter(msr, 32 + n, *levels, control.PMI))
        return found

    def carried_out(self) -> None:
        """An instruction was carried out in the guest's place."""
        guest, is_user, interrupts = self.guest, self.guest.cpl() != 0, False
        for counter in self.counting:
            if counter.at_user if is_user else counter.at_supervisor:
                value = guest.read_pmu(counter.msr) + 1
                guest.write_pmu(counter.msr, value & (1 << WIDTH) - 1)
                if value >> WIDTH:
                    self.state.overflowed |= 1 << counter.bit
                    interrupts |= counter.interrupts
        if interrupts:
            self.interrupt()

    def interrupt(self) -> None:
        """A counter that interrupts has overflowed.

        "Freezing": version 2 clears the enables in IA32_PERF_GLOBAL_CTRL.
        """
        if DebugCtl(self.guest.debugctl).FREEZE_PERFMON_ON_PMI:
            self.guest.write_pmu(Msr.IA32_PERF_GLOBAL_CTRL, 0)
            self._note()
        if self.apic.performance_interrupt():
            self.events.nmi()
        self.guest.notify()
