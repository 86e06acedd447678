"""Paravirtualization: the guest's kernel calls the hypervisor for what it may not do itself.

Idea: change the ISA that a kernel uses: no sensitive instruction, calls with a purpose instead, and
state that both see, so that most of what trap-and-emulate traps for costs no exit at all.  Source:
lecture, "Para-virtualization"; P. Barham et al., "Xen and the Art of Virtualization", SOSP 2003.
Cost: a call for a batch of changes, and for each return from an event.

The kernel runs at CPL 1, on the ISA as it is, with the parts of trap-and-emulate; what comes back
is a call (INT 82h), an event for the guest, or time.  Events go to one entry that the guest has
named, with a frame that says which; there is no IDT, GDT or TSS of the guest.

Invariants: whatever a guest asks for or leaves in the shared page, no more comes of it than an
error, an event, or the end of its run; VMX never executes anything of it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from iced_x86 import Mnemonic

from understudy.arch.address import is_canonical
from understudy.arch.cr import CR4, RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason
from understudy.execution import Execution
from understudy.execution.deprivileged.answer import question
from understudy.execution.deprivileged.descent import PROGRAM
from understudy.execution.deprivileged.instructions import step_of
from understudy.execution.deprivileged.technique import INTERRUPT_WINDOW, Deprivileged
from understudy.execution.pv import interface as pv
from understudy.execution.pv.calls import answer
from understudy.execution.pv.domain import IF, Domain
from understudy.execution.pv.interface import Shared
from understudy.execution.vmx.exits import event_of
from understudy.execution.vmx.guest_state import RFLAGS_FIELD
from understudy.guest import RSP, CannotExecute, Event, Kind
from understudy.instructions.operands import LOW32
from understudy.machine.host import Host
from understudy.paging import Paging
from understudy.paging.guest_walk import GuestFault
from understudy.silicon import Exit, Processor
from understudy.vcpu.cpu_model import CpuModel
from understudy.vcpu.loop import Vcpu
from understudy.verdict import Stop

ENTERED: Final = ~int(RFLAGS(TF=1, NT=1, RF=1, VM=1, IF=1))
TSD: Final = CR4.TSD.mask
PORTS: Final = (Mnemonic.IN, Mnemonic.OUT)


class Pv(Domain, Deprivileged, name="pv"):
    """A vCPU whose kernel knows its hypervisor."""

    optional_exits: ClassVar[Mapping[str, str]] = {}
    pagings: ClassVar[tuple[str, ...]] = ("pv",)
    holds_any_guest = needs_all_traps = False

    def __init__(
        self, host: Host, processor: Processor | None, paging: Paging, model: CpuModel,
        *, keep_timer: bool = True, exits: tuple[str, ...] = (),
        before: Execution | None = None,
    ) -> None:  # fmt: skip
        if model.topology.count > 1:
            raise ValueError("execution 'pv': expected one processor")
        self.forget_domain()
        super().__init__(
            host, processor, paging, model, keep_timer=keep_timer, exits=exits, before=before
        )
        self.begin_counts()
        self.bounced: Counter[int] = Counter()  # events that went to the guest, by vector
        self.table[Reason.VMCALL] = answer
        self.table[Reason.SENSITIVE] = sensitive

    def reset(self) -> None:
        super().reset()
        self.forget_domain()
        self.view.begin()

    def own_counts(self) -> dict[str, Any]:
        return {
            "calls": dict(self.calls), "refused": dict(self.refused),
            "events": {f"{vector:#04x}": often for vector, often in sorted(self.bounced.items())},
            "updates": self.updates_made, "synchronized": self.synchronized,
            "crossings": self.crossings,
        }  # fmt: skip

    def save(self) -> dict[str, Any]:
        raise ValueError("a paravirtual guest names host frames: it cannot be saved")

    def forget(self, addresses: Sequence[int] | None) -> None:
        """It is never tagged by VPID: the guest runs in root operation."""
        if addresses is None:
            self.root_changed = True
        for gva in addresses or ():
            if is_canonical(gva):
                self.processor.invlpg(gva)

    # --- down and back ---

    def _descend(self, rip: int) -> None:
        """RDTSC executes: a guest reads its clock without a call."""
        was_current = self.is_current
        super()._descend(rip)
        if not was_current:
            cr4 = self.processor.registers()["cr4"]
            self.processor.set_registers(
                {"dr0": self.watch, "dr7": self.watching, "cr4": cr4 & ~TSD}
            )
        if self.has_virtual_if:
            is_on = bool(self._read_field(RFLAGS_FIELD) & IF)
            self.put(Shared.IF_ON, is_on | self.has_waiting << 32)

    @property
    def has_waiting(self) -> bool:
        """Whether the hypervisor waits for interrupts to be on."""
        return bool(self.current_primary & INTERRUPT_WINDOW)

    def _came_back(self, exit: Exit) -> Exit:
        exit = super()._came_back(exit)
        if self.has_virtual_if:
            flags = self._read_field(RFLAGS_FIELD) & ~IF
            is_on = self.get(Shared.IF_ON) & LOW32
            self._write_field(RFLAGS_FIELD, flags | IF * bool(is_on))
        return exit

    def _stretch(self, left: int) -> Exit | None:
        if self.view.paging.problem:
            raise CannotExecute(f"execution pv: {self.view.paging.problem}")
        return super()._stretch(left)

    def _obstacle(self) -> str | None:
        return None

    def _hand_over(self, name: str) -> Exit | None:
        """An event cannot be delivered: there is nothing that VMX could do."""
        return question(Reason.TRIPLE_FAULT)

    def _sort(self, exit: Exit) -> Exit | None:
        if exit.reason == Reason.SENSITIVE:
            return exit
        if exit.reason == Reason.EVENT and not self.cpl():
            vector, kind, _, length = event_of(exit.intr_info, exit.intr_error, exit.length)
            if vector == pv.CALL_VECTOR and kind is Kind.SOFTWARE_INTERRUPT:
                self.skip(length)
                return question(Reason.VMCALL)
        return super()._sort(exit)

    def reflect(self, event: Event, payload: int = 0) -> None:
        """It is the guest's; but for calls and for what its IDT would not let programs raise."""
        if event.vector == Vector.DB:
            self.put(Shared.DEBUG, payload)
        if event.kind is Kind.SOFTWARE_INTERRUPT and event.vector != pv.SYSTEM_CALL_VECTOR:
            event = Event(Vector.GP, Kind.EXCEPTION, event.vector << 3 | 2)
        super().reflect(event, payload)

    def _raised(self, event: Event) -> Exit | None:
        self.reflect(event)
        return None

    def _trap(self, event: Event) -> Exit | None:
        """Ports are the kernel's to use, and CPUID everybody's; the rest is an event of its own."""
        bits = self.code_bits()
        step = self._step(self.code(bits), bits)
        mnemonic = step.instruction.mnemonic
        if mnemonic == Mnemonic.CPUID or (mnemonic in PORTS and not self.cpl()):
            return super()._trap(event)
        self.reflect(event)
        return None

    # --- events ---

    def deliver(self, event: Event) -> bool:
        """Push a frame onto the kernel's stack, and go on at its entry.  False: it has none."""
        from_program = self.cpl() == PROGRAM
        flags = self.rflags
        word = 8 if self.is_code_64 else 4
        words = [
            event.vector, event.error or 0, self.rip + event.length,
            pv.USER_CS if from_program else pv.KERNEL_CS, flags, self.gpr(RSP),
            pv.USER_SS if from_program else pv.KERNEL_SS,
        ]  # fmt: skip
        top = self.kernel_stack if from_program else self.gpr(RSP)
        rsp = ((top & -16) - word * len(words)) & (1 << 8 * word) - 1
        frame = b"".join((one & (1 << 8 * word) - 1).to_bytes(word, "little") for one in words)
        try:
            if not self.entry:
                return False
            self.write_kernel(rsp, frame)
        except GuestFault:
            return False
        self.bounced[event.vector] += 1
        self.tick()  # so that a budget ends a guest that meets nothing but events
        if event.vector == Vector.PF:
            self.put(Shared.FAULT, self.cr2)
        elif event.vector == Vector.NM:
            self.set_task_switched(False)
        if from_program:
            self.go_to(0)
        self.rip, self.rflags = self.entry, flags & ENTERED
        self.set_gpr(RSP, rsp)
        self.end_shadow()
        return True


def sensitive(vcpu: Vcpu, exit: Exit) -> Stop:
    """A paravirtual kernel is one that executes none."""
    guest = vcpu.guest
    assert isinstance(guest, Pv)
    bits = guest.code_bits()
    name = step_of(guest.code(bits), bits).name
    return vcpu.error(f"the kernel executes a sensitive instruction: {name} at {guest.rip:#x}")
