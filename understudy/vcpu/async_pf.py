"""KVM's asynchronous page faults, of one vCPU: a guest that misses what its host has swapped out
does something else meanwhile.

Source: Linux, Documentation/virt/kvm/x86/msr.rst (MSR_KVM_ASYNC_PF_EN, _INT, _ACK).

A miss is told as a #PF whose CR2 is a token ("page not present"); when the page has come, the token
is in the guest's memory and an interrupt says so ("page ready").  Which misses: those of the
guest's own accesses, which it will do again; who cannot be told waits, as `page_wait` says.  As
there, the frame itself is in its place at once, and only time is virtual: another task that needs
the same page before it is told as ready finds it too early.

Cost: none for a guest that has not enabled them.
Invariants: each token that was told as not present is told as ready once, or forgotten with all
others (disabled, INIT, reset); the guest has one token at a time.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from understudy.arch.bits import Bit, Bits, Field
from understudy.arch.cr import CR0
from understudy.arch.msr import Msr
from understudy.clock import Alarm
from understudy.machine.frames import OutOfFrames
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import GuestMemoryError
from understudy.state import U8, U32, U62, U64, Part
from understudy.vcpu.events import Events
from understudy.vcpu.msrs import Msrs
from understudy.vcpu.page_wait import PageWait


class Enable(Bits, width=64):
    """MSR_KVM_ASYNC_PF_EN; bit 2 belongs to a feature that is not shown."""

    ADDR = Field(63, 6)
    DELIVERY_AS_INT = Bit(3)
    SEND_ALWAYS = Bit(1)  # not to user programs only
    ENABLED = Bit(0)


BOTH: Final = int(Enable(DELIVERY_AS_INT=1, ENABLED=1))
RESERVED: Final = 0b11_0100
FLAGS_AT, TOKEN_AT = 0, 4  # in the guest's area of 64 bytes: words of 32 bits
NOT_PRESENT: Final = 1  # KVM_PV_REASON_PAGE_NOT_PRESENT
MOST: Final = 64  # that a guest may wait for at the same time
TOKENS: Final = (1 << 20) - 2  # before a number is used again
NUMBER_SHIFT: Final = 12  # of a token: the vCPU's number is below
AGAIN_NS: Final = 1_000_000  # until a host that has no frame is asked for one again


@dataclass
class AsyncPfState:
    """What the guest has asked for, and what it is still to be told."""

    enable: U64 = 0  # `Enable`
    vector: U8 = 0  # of the interrupt for "page ready"
    made: U64 = 0  # tokens, ever
    coming: list[tuple[U62, U32]] = field(default_factory=list)
    """(when in ns of guest time, token) of each page that has not come."""
    ready: list[U32] = field(default_factory=list)  # tokens of those that have
    is_told: bool = False  # one is in its hands: it has not acknowledged it
    counts: Counter[str] = field(default_factory=Counter)


class AsyncPf(Part):
    """One vCPU's."""

    state: AsyncPfState

    def __init__(self, events: Events, msrs: Msrs, memory: GuestMemory, page: PageWait) -> None:
        self._events, self._msrs, self._memory, self._page = events, msrs, memory, page
        self._now, self._number = msrs.now, msrs.model.apic_id
        self.state, self._alarm = AsyncPfState(), Alarm(msrs.clock, self._came)
        msrs.extra |= {
            Msr.KVM_ASYNC_PF_EN: (lambda: self.state.enable, self._write_enable),
            Msr.KVM_ASYNC_PF_INT: (lambda: self.state.vector, self._write_vector),
            Msr.KVM_ASYNC_PF_ACK: (lambda: 0, self._acknowledge),
        }

    def reset(self) -> None:
        """As after INIT, but for what is counted; no token comes twice."""
        self.state = AsyncPfState(made=self.state.made, counts=self.state.counts)
        self._alarm.set(None)

    def load(self, saved: dict[str, object]) -> None:
        super().load(saved)
        self._set_alarm()

    # --- the MSRs: KeyError is #GP(0) ---

    def _write_enable(self, value: int) -> None:
        if value & RESERVED:
            raise KeyError(Msr.KVM_ASYNC_PF_EN)
        if value & BOTH != BOTH:
            vector = self.state.vector
            self.reset()
            self.state.vector = vector
        self.state.enable = value

    def _write_vector(self, value: int) -> None:
        if value >> 8:
            raise KeyError(Msr.KVM_ASYNC_PF_INT)
        self.state.vector = value

    def _acknowledge(self, value: int) -> None:
        """The guest has taken a token, and its word in memory is free again."""
        if value >> 1:
            raise KeyError(Msr.KVM_ASYNC_PF_ACK)
        if value:
            self.state.is_told = False
            self._tell_ready()

    # --- page not present ---

    def tell_missed(self) -> int:
        """It is to wait for a page: the token for a #PF instead, or 0, and it waits."""
        own = self.state
        if own.enable & BOTH != BOTH:
            return 0
        if not self._takes_it():
            own.counts["waited instead"] += 1
            return 0
        own.made += 1
        token = (own.made % TOKENS + 1) << NUMBER_SHIFT | self._number
        own.coming.append((self._page.give_up(), token))
        own.counts["not present told"] += 1
        self._set_alarm()
        return token

    def _takes_it(self) -> bool:
        """Whether the guest can take a #PF that is none, and knows of it: its flags say so then."""
        own, guest = self.state, self._msrs.guest
        if len(own.coming) + len(own.ready) >= MOST or self._events.has_staged:
            return False
        if not own.enable & Enable.SEND_ALWAYS.mask and not guest.cpl():
            return False
        if not guest.takes_interrupts() or not guest.paging_control().cr0 & CR0.PG.mask:
            return False
        at, waits_until = self._area + FLAGS_AT, self._page.state.at
        try:
            if self._memory.read_u32(at) or self._page.state.at != waits_until:
                return False  # it has not looked at the last one, or waits for the area itself
            self._memory.write_u32(at, NOT_PRESENT)
        except (GuestMemoryError, OutOfFrames):
            return False
        return True

    @property
    def _area(self) -> int:
        return self.state.enable & Enable.ADDR.mask

    # --- page ready ---

    def _set_alarm(self) -> None:
        self._alarm.set(min((when for when, _ in self.state.coming), default=None))

    def _came(self) -> None:
        own, now = self.state, self._now()
        due = sorted(each for each in own.coming if each[0] <= now)
        own.coming = [each for each in own.coming if each[0] > now]
        own.ready += [token for _, token in due]
        self._tell_ready()
        self._set_alarm()

    def _tell_ready(self) -> None:
        """The next one, if the guest has taken the last."""
        own, at = self.state, self._area + TOKEN_AT
        if own.is_told or not own.ready:
            return
        try:
            if self._memory.read_u32(at):
                return
            self._memory.write_u32(at, own.ready[0])
        except GuestMemoryError:
            return
        except OutOfFrames:
            own.coming.append((self._now() + AGAIN_NS, own.ready.pop(0)))
            self._set_alarm()
            return
        del own.ready[0]
        own.is_told = True
        own.counts["ready told"] += 1
        self._msrs.apic.raise_vector(own.vector, False)
        self._msrs.guest.notify()  # it may sleep
