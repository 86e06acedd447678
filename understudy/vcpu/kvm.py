"""KVM's paravirtual features, as far as one vCPU keeps them: ends of interrupts in memory,
polling, and whether it is away.

Source: Linux, Documentation/virt/kvm/x86/msr.rst (MSR_KVM_PV_EOI_EN, MSR_KVM_STEAL_TIME,
MSR_KVM_POLL_CONTROL), cpuid.rst (KVM_FEATURE_PV_TLB_FLUSH), hypercalls.rst (KVM_HC_KICK_CPU).

Which of them a guest has, the CPU model says (`--cpu +pv_eoi,…`).  The clock and the time that a
vCPU had no processor are in `devices/kvmclock.py`, asynchronous page faults in `async_pf.py`.

Invariants: an interrupt whose end is offered in memory is ended, or the offer taken back, before
anything looks at the APIC; who was away with a flush asked for flushes before its next instruction.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from understudy.arch.msr import Msr
from understudy.machine.frames import OutOfFrames
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import GuestMemoryError
from understudy.state import U64, Part
from understudy.vcpu.async_pf import AsyncPf
from understudy.vcpu.events import Events
from understudy.vcpu.msrs import Msrs
from understudy.vcpu.page_wait import PageWait

ENABLED: Final = 1
NO_MEMORY: Final = GuestMemoryError, OutOfFrames
"""There is none at an address, or the host has none left for it."""
EOI_RESERVED: Final = 2
PREEMPTED_AT: Final = 16  # in the structure for steal time
PREEMPTED, FLUSH_TLB = 1, 2
EOI_PAGE: Final = 0xB0
TELLS: Final = frozenset({"pv_unhalt", "pv_tlb_flush"})
"""Features by which a guest looks who is away."""


@dataclass
class KvmState:
    """What the guest has asked for, and what was told to it."""

    eoi: U64 = 0  # where the end of an interrupt may be said, and whether it may
    poll: U64 = ENABLED  # whether the host may poll before it lets a halted vCPU sleep
    offered: bool = False  # the interrupt in service may be ended in memory
    away: bool = False  # the guest was told that it has no processor
    counts: Counter[str] = field(default_factory=Counter)


class Kvm(Part):
    """One vCPU's."""

    state: KvmState

    def __init__(
        self, events: Events, msrs: Msrs, memory: GuestMemory, flush: Callable[[], None],
        page: PageWait,
    ) -> None:  # fmt: skip
        """`flush`: have all translations forgotten."""
        self.apic, self.now, self.look = msrs.apic, msrs.now, msrs.look
        self.memory, self.flush, shown = memory, flush, msrs.model.shown
        self.tells = "steal_time" in shown and not TELLS.isdisjoint(shown)
        self.steal: Callable[[], int] = lambda: 0  # MSR_KVM_STEAL_TIME, of this vCPU
        self.kick_other: Callable[[int], None] = lambda apic_id: None  # KVM_HC_KICK_CPU
        self.state = KvmState()
        self.async_pf = AsyncPf(events, msrs, memory, page)
        events.accepted, msrs.settle = self.offer, self.settle
        msrs.extra |= {
            Msr.KVM_PV_EOI: (lambda: self.state.eoi, self._write_eoi),
            Msr.KVM_POLL_CONTROL: (lambda: self.state.poll, self._write_poll),
        }

    def reset(self) -> None:
        """As after INIT, but for what is counted, and for what others were told of it."""
        self.state = KvmState(counts=self.state.counts, away=self.state.away)
        self.async_pf.reset()

    def _write_eoi(self, value: int) -> None:
        if value & EOI_RESERVED:
            raise KeyError(Msr.KVM_PV_EOI)
        self.settle()
        self.state.eoi = value

    def _write_poll(self, value: int) -> None:
        """It is kept; a vCPU that halts here sleeps at once either way."""
        if value & ~ENABLED:
            raise KeyError(Msr.KVM_POLL_CONTROL)
        self.state.poll = value

    # --- the end of an interrupt ---

    def offer(self) -> None:
        """An interrupt of the APIC goes in: let it be ended in memory, if nothing follows then."""
        own = self.state
        if not own.eoi & ENABLED or not self.apic.ends_quietly:
            return
        try:
            self.memory.exchange(own.eoi & ~3, 1)
        except NO_MEMORY:
            return
        own.offered = True

    def settle(self) -> None:
        """What is offered is ended by now, or no longer offered."""
        own = self.state
        if not own.offered:
            return
        own.offered = False
        try:
            is_over = not self.memory.exchange(own.eoi & ~3, 0) & 1
        except NO_MEMORY:
            is_over = False
        own.counts["ended in memory" if is_over else "taken back"] += 1
        if not is_over:
            return
        try:
            self.apic.wrmsr(Msr.X2APIC_EOI, 0, self.now())
        except KeyError:  # it is not in x2APIC mode
            self.apic.write(EOI_PAGE, 0, self.now())

    # --- away ---

    def leave(self) -> None:
        """It has no processor, or wants none: others need not wait for it."""
        if not self.tells:
            return
        own, steal = self.state, self.steal()
        if own.away or not steal & ENABLED:
            return
        own.away = self._exchange(steal, PREEMPTED) is not None
        self.look()

    def come_back(self) -> None:
        """It goes on: what was left to be done is done first."""
        own = self.state
        if not own.away:
            return
        own.away, steal = False, self.steal()
        old = self._exchange(steal, 0) if steal & ENABLED else None
        if old is not None and old & FLUSH_TLB:
            own.counts["flushes left"] += 1
            self.flush()

    def _exchange(self, steal: int, value: int) -> int | None:
        """Others write there at the same time."""
        try:
            return self.memory.exchange((steal & ~0x3F) + PREEMPTED_AT, value)
        except NO_MEMORY:
            return None
