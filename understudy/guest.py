"""The port: a guest's processor as every decision sees it, whatever runs it.

A technique of execution (`execution/`) stands behind it: it knows where a guest's registers are
kept and how events get in.  Who decides (`answers/`, `paging/`, `instructions/`) knows only this.
Numbers of general registers are the SDM's (0 RAX, 1 RCX, 2 RDX, 3 RBX, 4 RSP, 5 RBP, 6 RSI, 7 RDI).

Source: SDM 3A, "System Architecture Overview"; the lecture's "trap and emulate".

Invariants: registers are read and written only between two stretches of guest code; translations
that a guest's processor must forget are forgotten before its next instruction.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import IntEnum
from threading import get_ident
from typing import Any, ClassVar, Final, NamedTuple

from understudy.arch.cr import RFLAGS
from understudy.arch.segment import Segment, TableRegister
from understudy.silicon import Exit, Processor
from understudy.state import U8, U32, U64

RSP: Final = 4
MOST_STALE: Final = 16  # requests to forget something, before it is to forget everything
IF: Final = RFLAGS.IF.mask
RF: Final = RFLAGS.RF.mask


class Kind(IntEnum):
    """What an event is, by the numbers of SDM 3C, "Event Injection"."""

    INTERRUPT = 0
    NMI = 2
    EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4  # INT n
    PRIVILEGED_SOFTWARE_EXCEPTION = 5  # INT1
    SOFTWARE_EXCEPTION = 6  # INT3, INTO

    @property
    def is_software(self) -> bool:
        """An instruction raised it, and is done once it is delivered."""
        return self >= Kind.SOFTWARE_INTERRUPT


class Event(NamedTuple):
    """An exception or interrupt on its way into the guest."""

    vector: U8
    kind: Kind
    error: U32 | None = None
    length: U8 = 0  # of the instruction that raised it, if one did


class Control(NamedTuple):
    """The control registers as the guest sees them.

    `pdptes`: the processor's copies under PAE paging.
    """

    cr0: U64
    cr3: U64
    cr4: U64
    efer: U64
    pdptes: tuple[U64, ...] = (0, 0, 0, 0)


class CannotExecute(Exception):
    """The technique cannot go on with its guest; says why.  The run ends with an error."""


class Guest(ABC):
    """One virtual processor's registers, and its way in and out of the guest."""

    table: dict[int, Callable[[Any, Exit], Any]]
    """What answers an exit, by its reason: a function of the vCPU and the exit."""
    resume: Callable[[int], Exit]
    """Enter the guest with an instruction budget (0: none); returns at the next exit."""
    timer_shift: int  # `arm` counts in units of 2**timer_shift ticks of the TSC
    read_gpr: Callable[[int], int]
    """A general register but RSP, fast."""
    write_gpr: Callable[[int, int], None]
    """Set a general register but RSP, fast.  0 <= value < 2**64."""
    arm: Callable[[int], None]
    """Come back after this many units of guest time (0 to 2**32 - 1)."""
    advance: Callable[[int], int]
    """Virtual time only: let ticks (> 0) pass without instructions; the TSC then."""
    read_tsc: Callable[[], int]
    """The processor's own TSC, in ns, without the guest's offset; fast."""
    count_retired: Callable[[], int]
    """Instructions that the processor has retired, fast."""
    read_pmu: Callable[[int], int]
    """The guest's counters and their control registers, by the numbers of their MSRs."""
    write_pmu: Callable[[int, int], None]
    """Set one.  KeyError if it does not take the value."""
    take_pmu_interrupt: Callable[[], None]
    """One of them has overflowed, and the technique has come back for it: it may do so again."""
    view: Any  # what this processor has of the paging technique: a `paging.View`
    xcr0: int = 1  # the state components that XSAVE and its kin may save; at reset: x87
    ymm: Callable[[int], bytes]  # a YMM register, by number: 32 bytes
    protection_keys: Callable[[], tuple[int, int]]
    """PKRU and IA32_PKRS, fast; each 0 while it is not in force."""
    put_off: ClassVar[dict[int, Callable[[Any, Exit], Any]]]
    """What answers an exit that says something of memory, if that has changed since."""
    is_in: ClassVar[bool] = True  # for all that others know, while it runs
    takes_turns: ClassVar[bool] = False  # no other processor of its VM may run at the same time
    cr0_always_exits: ClassVar[int] = 0  # a change of these bits of CR0 exits with any paging

    def __init__(self) -> None:
        self.thread = 0  # the one on which this processor's exits are answered now
        self.notify: Callable[[], None] = lambda: None  # have `pay` called before the next entry
        self._stale: list[Sequence[int] | None] = []  # what must be forgotten; None: everything
        self.after_skip: Callable[[], None] | None = None  # hears of instructions that are done
        self.overflowed: Callable[[], None] = lambda: None  # hears of its counters
        self.moved: Callable[[], None] = lambda: None  # hears that the fast ways lead elsewhere

    # --- general registers, instruction pointer, flags ---

    @abstractmethod
    def gpr(self, n: int) -> int:
        """A general register."""

    @abstractmethod
    def set_gpr(self, n: int, value: int) -> None:
        """Set a general register."""

    @property
    @abstractmethod
    def rip(self) -> int: ...

    @rip.setter
    @abstractmethod
    def rip(self, value: int) -> None: ...

    @property
    @abstractmethod
    def rflags(self) -> int: ...

    @rflags.setter
    @abstractmethod
    def rflags(self, value: int) -> None: ...

    @abstractmethod
    def registers(self) -> dict[str, int]:
        """All of the guest's registers, by the names of `Processor.registers`."""

    @abstractmethod
    def set_registers(self, values: dict[str, int]) -> None:
        """Set all registers; those not named are as after reset, flat in protected mode."""

    @abstractmethod
    def fxsave(self) -> bytes:
        """The x87 and SSE state, as FXSAVE64 writes it."""

    @abstractmethod
    def reset(self) -> None:
        """What `set_registers` does not reach is as after power-on: x87, AVX, debug registers."""

    # --- modes and segments ---

    @abstractmethod
    def segment(self, n: int) -> Segment:
        """A segment register, LDTR or TR, by the numbers of `SegmentName`."""

    @abstractmethod
    def set_segment(self, n: int, segment: Segment) -> None:
        """Set one, its hidden part too."""

    @abstractmethod
    def segment_base(self, n: int) -> int:
        """The base of one."""

    @abstractmethod
    def gdtr(self) -> TableRegister: ...

    @abstractmethod
    def idtr(self) -> TableRegister: ...

    @abstractmethod
    def cpl(self) -> int:
        """The current privilege level."""

    @abstractmethod
    def code_bits(self) -> int:
        """The default operand and address size of the code segment: 16, 32, or 64."""

    def is_code64(self) -> bool:
        """The guest executes 64-bit code."""
        return self.code_bits() == 64

    # --- control and debug registers ---

    @abstractmethod
    def control(self) -> Control:
        """CR0, CR3, CR4, EFER and the PDPTEs, as the guest sees them."""

    @abstractmethod
    def paging_control(self) -> Control:
        """The same, cheap: only what decides how linear addresses translate is sure to be right."""

    @abstractmethod
    def real_control(self) -> Control:
        """What the processor has instead: without EPT, CR3 is the root of the hypervisor's."""

    @abstractmethod
    def load_control(self, values: Control) -> None:
        """Set all of them.  OutOfFrames if they need tables for which the host has no room."""

    @abstractmethod
    def note_cr3(self, cr3: int, pdptes: tuple[int, ...]) -> None:
        """The guest has loaded CR3, where the hypervisor keeps it."""

    @abstractmethod
    def set_cr2(self, value: int) -> None: ...

    @property
    @abstractmethod
    def dr7(self) -> int: ...

    @dr7.setter
    @abstractmethod
    def dr7(self, value: int) -> None: ...

    @abstractmethod
    def add_dr6(self, bits: int) -> int:
        """Set these bits of DR6; what it is then."""

    @property
    @abstractmethod
    def debugctl(self) -> int:
        """IA32_DEBUGCTL."""

    @debugctl.setter
    @abstractmethod
    def debugctl(self, value: int) -> None: ...

    # --- going on ---

    @abstractmethod
    def skip(self, length: int) -> None:
        """The instruction that exited is done: go past its `length` bytes."""

    def note_skip(self) -> None:
        """An instruction was carried out in the guest's place."""
        if self.after_skip is not None:
            self.after_skip()

    @abstractmethod
    def has_debug_trap(self) -> bool:
        """A debug trap of the last instruction goes in next, before any interrupt."""

    @abstractmethod
    def end_shadow(self) -> None:
        """No interrupt shadow, no pending debug exception; NMIs are blocked as before."""

    def bend(self) -> bool:
        """The guest could not be entered as it is: change what it notices least, if there is."""
        return False

    def set_resume_flag(self, wanted: bool) -> None:
        """RFLAGS.RF: whether the next instruction's breakpoint is not met (again)."""
        self.rflags = self.rflags & ~RF | RF * wanted

    @abstractmethod
    def single_step(self, on: bool) -> None:
        """Whether to come back after one instruction."""

    @property
    @abstractmethod
    def is_inside(self) -> bool:
        """A run ended between two instructions: `run` goes on; registers are out of reach."""

    @abstractmethod
    def run(self, budget: int) -> Exit:
        """Go on inside the guest; else like `resume`."""

    @abstractmethod
    def kick(self) -> None:
        """From any thread: have the guest come back soon."""

    def come_out(self) -> None:  # noqa: B027
        """The same on the own thread, where the guest executes if no exit is being answered."""

    # --- events ---

    @abstractmethod
    def inject(self, event: Event) -> None:
        """Deliver this event on the next entry."""

    @abstractmethod
    def window(self, interrupts: bool, nmis: bool) -> None:
        """Whether to come back as soon as the guest can take an interrupt, or an NMI."""

    @abstractmethod
    def takes_interrupts(self) -> bool:
        """RFLAGS.IF is set, and nothing blocks interrupts or comes before them."""

    @abstractmethod
    def takes_nmis(self) -> bool:
        """Nothing blocks NMIs or comes before them."""

    @abstractmethod
    def block_nmis(self) -> None:
        """An IRET that unblocked NMIs did not complete, or an NMI was delivered."""

    @abstractmethod
    def unblock_nmis(self) -> None:
        """The NMI in delivery will be delivered again."""

    def interrupt_flag(self) -> bool:
        """RFLAGS.IF."""
        return bool(self.rflags & IF)

    @abstractmethod
    def stir(self, seed: bytes) -> None:
        """Stir 32 bytes into what its random numbers follow from."""

    # --- time ---

    @abstractmethod
    def set_tsc_offset(self, offset: int) -> None:
        """The guest's TSC is the processor's, plus this (modulo 2**64)."""

    @property
    def retired(self) -> int:
        """Instructions that the processor has retired."""
        return self.count_retired()

    # --- translations ---

    @abstractmethod
    def load_root(self, hpa: int) -> None:
        """Translate by the hypervisor's table at this hpa from the next entry on."""

    @abstractmethod
    def code_at(self, gva: int, length: int) -> bytes:
        """The bytes that the processor has just fetched here, as many as are mapped."""

    @abstractmethod
    def forget(self, addresses: Sequence[int] | None) -> None:
        """Drop cached translations: of the pages at these linear addresses; None: all."""

    @abstractmethod
    def forget_guest(self) -> None:
        """Drop what the guest's own tables have led to (its CR3 was loaded in its stead)."""

    def invalidate(self, addresses: Sequence[int] | None = None) -> None:
        """From any thread: have these translations forgotten before the next instruction.

        On the thread that answers this processor's exits they are at once.  For every other it is
        a request, paid on the way into the guest (as KVM's are, and a real shootdown's interrupt).
        """
        if self.thread == get_ident():
            self.forget(addresses)
        elif self._stale[-1:] != [None]:
            is_full = len(self._stale) >= MOST_STALE  # it may not run for long
            self._stale.append(None if is_full else addresses)
            self.notify()

    def pay(self) -> None:
        """Forget what was asked for."""
        while self._stale:
            self.forget(self._stale.pop())

    @abstractmethod
    def use(self, paging: Any) -> None:
        """Translate by another `Paging` from now on.  The processor must be out of the guest."""

    # --- on a processor, or on none ---

    @abstractmethod
    def place(self, processor: Processor) -> None:
        """Put it onto this processor, where nobody is; it leaves the one on which it is."""

    @abstractmethod
    def take_off(self) -> None:
        """It is on no processor now.  It must be out of the guest."""

    @property
    @abstractmethod
    def place_now(self) -> Processor | None:
        """The processor on which it is."""

    # --- saving, ending ---

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """What a snapshot must keep, as plain values; no host-physical address is among them."""

    @abstractmethod
    def load(self, saved: dict[str, Any]) -> None:
        """Become what was saved; the paging technique is restored already."""

    @abstractmethod
    def frames(self) -> list[int]:
        """The host frames (pfn) of the technique's own structures."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""
