"""KVM's paravirtual clock: a page in guest memory from which the guest computes the time.

Source: Linux, Documentation/virt/kvm/x86/msr.rst ("KVM-specific MSRs") and cpuid.rst.  The TSC
runs at 1 GHz and never stops, so system time equals the TSC and one update lasts for ever.

Beside it, how long a vCPU could have run and had no processor ("steal time").

Not modeled: asynchronous page faults.  What else KVM offers a guest is kept by the vCPU:
`vcpu/kvm.py`.

Invariants: the version is odd while the structure changes and even afterwards; an address without
memory behind it is ignored.
"""

import struct
from dataclasses import dataclass, field
from typing import Any

from understudy.clock import NS_PER_SECOND
from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.machine.frames import OutOfFrames
from understudy.state import U32, U64

# --- The interface ---

MSR_WALL_CLOCK_OLD, MSR_SYSTEM_TIME_OLD = 0x11, 0x12
MSR_WALL_CLOCK, MSR_SYSTEM_TIME = 0x4B56_4D00, 0x4B56_4D01
MSR_STEAL_TIME = 0x4B56_4D03
MSRS = frozenset((
    MSR_WALL_CLOCK_OLD, MSR_SYSTEM_TIME_OLD, MSR_WALL_CLOCK, MSR_SYSTEM_TIME, MSR_STEAL_TIME,
))  # fmt: skip

TIME_INFO = struct.Struct("<IIQQIbBH")  # version, -, TSC, system time, multiplier, shift, flags, -
WALL_CLOCK = struct.Struct("<III")  # version, seconds, nanoseconds
STEAL_TIME = struct.Struct("<QII")  # ns, version, flags; behind them `vcpu/kvm.py` writes
ENABLED, STEAL_RESERVED = 1, 0x3E
TSC_STABLE = 1
MASK32 = (1 << 32) - 1
MULTIPLIER, SHIFT = 1 << 31, 1  # ns = (ticks << 1) * 2**31 >> 32 = ticks


# --- The device ---


@dataclass
class KvmClockState:
    """The MSRs, and the version that the structures had last."""

    wall_clock: U64 = 0
    system_time: list[U64] = field(default_factory=list)  # by vCPU
    version: U32 = 0
    steal: list[U64] = field(default_factory=list)  # by vCPU


class KvmClock(Device, name="kvmclock"):
    """The MSRs."""

    state: KvmClockState

    def __init__(self, wires: Wires, *, epoch_ns: int = 0, vcpus: int = 1) -> None:
        super().__init__(wires)
        self.epoch_ns, self.vcpus = epoch_ns, vcpus
        self.state = self.power_on()

    def power_on(self) -> KvmClockState:
        return KvmClockState(system_time=[0] * self.vcpus, steal=[0] * self.vcpus)

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        if {len(self.state.system_time), len(self.state.steal)} != {self.vcpus}:
            raise ValueError(f"snapshot: kvmclock was saved with other than {self.vcpus} vCPUs")

    def rdmsr(self, vcpu: int, index: int) -> int:
        """The MSR's value.  KeyError means #GP(0)."""
        if index in (MSR_WALL_CLOCK, MSR_WALL_CLOCK_OLD):
            return self.state.wall_clock
        if index in (MSR_SYSTEM_TIME, MSR_SYSTEM_TIME_OLD):
            return self.state.system_time[vcpu]
        if index == MSR_STEAL_TIME:
            return self.state.steal[vcpu]
        raise KeyError(index)

    def wrmsr(self, vcpu: int, index: int, value: int) -> None:
        """Fill the guest's structure.  KeyError means #GP(0)."""
        s = self.state
        if index in (MSR_WALL_CLOCK, MSR_WALL_CLOCK_OLD):
            self._write(value, WALL_CLOCK, *divmod(self.epoch_ns, NS_PER_SECOND))
            s.wall_clock = value
        elif index in (MSR_SYSTEM_TIME, MSR_SYSTEM_TIME_OLD):
            if value & 1:
                now = self.clock.now()
                body = (0, now, now, MULTIPLIER, SHIFT, TSC_STABLE, 0)
                self._write(value & ~1, TIME_INFO, *body)
            s.system_time[vcpu] = value
        elif index == MSR_STEAL_TIME and not value & STEAL_RESERVED:
            s.steal[vcpu] = value
        else:
            raise KeyError(index)

    def stolen(self, vcpu: int, ns: int) -> None:
        """A vCPU goes on, which has waited for a processor for so long in all.

        "version: … guest has to check version before and after grabbing time information and
        check that they are both equal and even."
        """
        value = self.state.steal[vcpu]
        if not value & ENABLED:
            return
        gpa, version = value & ~(STEAL_RESERVED | ENABLED), self.state.version + 2 & MASK32 & ~1
        try:
            self.wires.dma.write(gpa, STEAL_TIME.pack(ns, version | 1, 0))
            self.wires.dma.write(gpa + 8, struct.pack("<I", version))
        except (IndexError, ValueError, OverflowError, OutOfFrames):
            pass  # as for the clock; if the host has no frame, the next one says it
        self.state.version = version

    def _write(self, gpa: int, layout: struct.Struct, *body: int) -> None:
        version = self.state.version + 2 & MASK32 & ~1
        try:
            self.wires.dma.write(gpa, layout.pack(version | 1, *body))
            self.wires.dma.write(gpa, struct.pack("<I", version))
        except (IndexError, ValueError, OverflowError):
            pass  # the guest named an address without memory: KVM ignores it as well
        self.state.version = version

    def inspect(self) -> dict[str, Any]:
        s = self.state
        return {
            "wall clock": f"{s.wall_clock:#x}",
            "system time": [f"{value:#x}" for value in s.system_time],
            "steal time": [f"{value:#x}" for value in s.steal],
        }
