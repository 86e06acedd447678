"""Events into the guest: exceptions, NMIs, interrupts of the local APIC and of the 8259s.

Source: SDM 3C, "Event Injection"; SDM 3A, "Exceptions and Interrupts" (priority among
simultaneous events).

At most one event goes in with an entry.  An event whose delivery an exit interrupted comes
first, then an exception that the hypervisor raised, then an NMI, then interrupts.  What must
wait asks for a window: an exit as soon as the guest can take it.

Invariants: a vector leaves the APIC (or the 8259s) only when it is injected; an event that was
taken is never lost, whatever exit comes between.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from understudy.guest import RF, Event, Guest, Kind
from understudy.silicon import LocalApic
from understudy.state import Part

NMI: Final = Event(2, Kind.NMI)


@dataclass
class EventState:
    """What waits, and what was injected, by vector."""

    staged: Event | None = None
    nmi: bool = False  # one is remembered, as by hardware, whether NMIs are blocked or not
    resume: bool = False  # RFLAGS.RF when the last event went in
    trapped_at: int = -1  # what was retired when a repeated instruction was left that traps
    extint: bool = False  # the 8259s' output
    kicked: bool = False  # another processor wants that it does not wait in its next HLT
    injected: Counter[str] = field(default_factory=Counter)


class Events(Part):
    """The events that wait for one vCPU."""

    state: EventState

    def __init__(self, guest: Guest, apic: LocalApic) -> None:
        self.guest, self.apic = guest, apic
        self.acknowledge: Callable[[], int] = lambda: 0xFF  # the 8259s' interrupt acknowledge
        self.accepted: Callable[[], None] = lambda: None  # hears that one of the APIC goes in
        self.state = EventState()

    # --- what others report ---

    def stage(self, event: Event) -> None:
        """This one goes in with the next entry, in place of one that was staged before."""
        self.state.staged = event

    @property
    def has_staged(self) -> bool:
        """Whether one goes in with the next entry, whatever else may wait."""
        return self.state.staged is not None

    def nmi(self) -> None:
        """An NMI arrives.  Of several that cannot be delivered yet one is remembered."""
        self.state.nmi = True

    def requeue(self, event: Event) -> None:
        """An exit came while an event was being delivered: deliver it again."""
        if event.kind is Kind.NMI:
            self.guest.unblock_nmis()
        self.state.staged = event

    def note_trap(self) -> None:
        """A repeated instruction was left after an element, with RF set and a trap that waits."""
        self.state.trapped_at = self.guest.retired

    @property
    def traps_within(self) -> bool:
        """Whether a debug exception that is delivered now comes from such an element."""
        return self.state.trapped_at == self.guest.retired

    def clear(self) -> None:
        """Nothing waits any more, but for the 8259s, whose wire is outside."""
        self.state = EventState(injected=self.state.injected, extint=self.state.extint)

    # --- towards the guest ---

    @property
    def is_due(self) -> bool:
        """Whether something waits that would end a HLT, RFLAGS.IF permitting."""
        return self.apic.pending() >= 0 or self._extint_waits

    @property
    def _extint_waits(self) -> bool:
        return self.state.extint and self.apic.extint_open

    def may_wake(self) -> bool:
        """Whether a halted processor goes on."""
        own = self.state
        if own.nmi or own.kicked or own.staged is not None:
            return True
        return self.is_due and self.guest.takes_interrupts()

    def deliver(self) -> None:
        """Put the first event that can go into the next entry; ask for windows for the rest."""
        guest, apic = self.guest, self.apic
        staged, nmi = self.state.staged, self.state.nmi
        if staged is not None:
            self.state.staged = None
            self._inject(staged)
        elif nmi and guest.takes_nmis():
            self.state.nmi = nmi = False
            self._inject(NMI)
        else:
            vector = apic.pending()
            extint = self._extint_waits
            if (vector >= 0 or extint) and guest.takes_interrupts():
                vector = self.acknowledge() if extint else apic.accept()
                if vector >= 0:
                    self._inject(Event(vector, Kind.INTERRUPT))
                if not extint:
                    self.accepted()
                vector, extint = apic.pending(), self._extint_waits
            guest.window(vector >= 0 or extint, nmi)
            return
        guest.window(apic.pending() >= 0 or self._extint_waits, nmi)

    def _inject(self, event: Event) -> None:
        self.guest.inject(event)
        self.state.resume = bool(self.guest.rflags & RF)
        self.state.injected[f"{event.vector:#04x}"] += 1
