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
from typing import TYPE_CHECKING, Final

from understudy.arch.exception import WITH_ERROR_CODE
from understudy.arch.vmcs import EventType, InterruptionInformation

if TYPE_CHECKING:
    from understudy.execution import Execution
    from understudy.silicon import Exit, LocalApic

VALID: Final = InterruptionInformation.VALID.mask
ERROR_CODE: Final = InterruptionInformation.ERROR_CODE.mask
TYPE_SHIFT: Final = InterruptionInformation.TYPE.low
WITH_LENGTH: Final = frozenset(
    {
        EventType.SOFTWARE_INTERRUPT,
        EventType.PRIVILEGED_SOFTWARE_EXCEPTION,
        EventType.SOFTWARE_EXCEPTION,
    }
)
NMI: Final = VALID | EventType.NMI << TYPE_SHIFT | 2


@dataclass
class EventState:
    """What a snapshot keeps."""

    staged: tuple[int, int, int] | None = None  # information, error code, instruction length
    nmis: int = 0  # at most two: one in delivery, one latched
    extint: bool = False  # the 8259s' output
    injected: dict[str, int] = field(default_factory=dict)


class Events:
    """The events that wait for one vCPU."""

    def __init__(self, execution: "Execution", apic: "LocalApic") -> None:
        self.execution, self.apic = execution, apic
        self.acknowledge: Callable[[], int] = lambda: 0xFF  # the 8259s' interrupt acknowledge
        self.staged: tuple[int, int, int] | None = None
        self.nmis = 0
        self.extint = False
        self.injected: Counter[str] = Counter()

    # --- what others report ---

    def exception(self, vector: int, error: int | None = None) -> None:
        """Raise an exception in the guest at its current instruction."""
        info = VALID | EventType.HARDWARE_EXCEPTION << TYPE_SHIFT | vector
        if vector in WITH_ERROR_CODE:
            info |= ERROR_CODE
        self.staged = (info, error or 0, 0)

    def nmi(self) -> None:
        """An NMI arrives; a second one is latched, a third is lost."""
        self.nmis = min(self.nmis + 1, 2)

    def requeue(self, exit: "Exit") -> None:
        """An exit came while an event was being delivered: deliver it again."""
        info = exit.idt_info & (VALID | ERROR_CODE | 0x7FF)
        length = exit.length if (info >> TYPE_SHIFT & 7) in WITH_LENGTH else 0
        if info & 0x7FF == NMI & 0x7FF:
            self.execution.unblock_nmis()
        self.staged = (info, exit.idt_error, length)

    # --- towards the guest ---

    @property
    def is_due(self) -> bool:
        """Whether something waits that would end a HLT, RFLAGS.IF permitting."""
        return self.apic.pending() >= 0 or self._extint_waits

    @property
    def _extint_waits(self) -> bool:
        return self.extint and self.apic.extint_open

    def may_wake(self) -> bool:
        """Whether a halted processor goes on."""
        if self.nmis or self.staged is not None:
            return True
        return self.is_due and self.execution.takes_interrupts()

    def deliver(self) -> None:
        """Put the first event that can go into the next entry; ask for windows for the rest."""
        execution, apic = self.execution, self.apic
        staged, nmis = self.staged, self.nmis
        if staged is not None:
            self.staged = None
            self._inject(*staged)
        elif nmis and execution.takes_nmis():
            self.nmis = nmis = nmis - 1
            self._inject(NMI, 0, 0)
        else:
            vector = apic.pending()
            extint = self._extint_waits
            if (vector >= 0 or extint) and execution.takes_interrupts():
                vector = self.acknowledge() if extint else apic.accept()
                if vector >= 0:
                    self._inject(VALID | vector, 0, 0)
                vector, extint = apic.pending(), self._extint_waits
            execution.window(vector >= 0 or extint, nmis > 0)
            return
        execution.window(apic.pending() >= 0 or self._extint_waits, nmis > 0)

    def _inject(self, info: int, error: int, length: int) -> None:
        self.execution.inject(info, error, length)
        self.injected[f"{info & 0xFF:#04x}"] += 1

    # --- snapshots ---

    def save(self) -> EventState:
        """What a snapshot keeps."""
        return EventState(self.staged, self.nmis, self.extint, dict(self.injected))

    def load(self, state: EventState) -> None:
        """Become what was saved."""
        self.staged, self.nmis, self.extint = state.staged, state.nmis, state.extint
        self.injected = Counter(state.injected)
