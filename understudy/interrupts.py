"""Who gets which interrupt: messages, interprocessor interrupts, NMIs, and the 8259s' output.

Source: SDM 3A, "Local APIC", "Determining IPI Destination", "Interrupt Command Register (ICR)";
MultiProcessor Specification, "Virtual Wire Mode".

Invariant: a message reaches the processors that its destination names, and no other.
"""

from collections.abc import Sequence
from functools import partial
from threading import get_ident
from typing import Final

from understudy.answers import startup
from understudy.arch.msr import InterruptCommand
from understudy.devices.message import Delivery, Message
from understudy.vcpu.loop import Vcpu

NOT, SELF, ALL, OTHERS = range(4)  # destination shorthands
LDR, DFR = 0xD0, 0xE0  # offsets in the APIC's page: logical destination, its format
X2APIC_LDR: Final = 0x80D
FLAT: Final = 0xF
LOWEST_VECTOR: Final = 16
BROADCAST: Final = {False: 0xFF, True: 0xFFFF_FFFF}  # by whether it is an x2APIC


class Router:
    """The interrupt wires of one VM, from the board and between its processors."""

    def __init__(self, vcpus: Sequence[Vcpu]) -> None:
        self.vcpus = vcpus

    def here(self) -> Vcpu:
        """The one whose exit is being answered on this thread; else the bootstrap processor."""
        thread = get_ident()
        return next((vcpu for vcpu in self.vcpus if vcpu.guest.thread == thread), self.vcpus[0])

    # --- from the board ---

    def deliver(self, message: Message) -> None:
        """An interrupt message from the I/O APIC, or of a device (MSI)."""
        if message.delivery == Delivery.START_UP:
            return  # reserved
        targets = self.targets(message.destination, message.logical, is_x2apic=False)
        self._send(message.delivery, message.vector, targets, level=message.level)

    def extint(self, level: bool) -> None:
        """The 8259 pair's output, which is wired to the bootstrap processor."""
        bootstrap = self.vcpus[0]
        bootstrap.events.state.extint = level
        bootstrap.apic.lint(0, level)
        bootstrap.look_now()

    # --- between processors ---

    def command(self, source: Vcpu, icr: int) -> None:
        """An interrupt command that has left the APIC of `source`.

        What concerns `source` itself stays inside its APIC, but for an NMI.
        """
        command = InterruptCommand(icr)
        is_x2apic = source.msrs.apic_page == 0
        match command.SHORTHAND:
            case 0:
                destination = icr >> 32 if is_x2apic else icr >> 56
                targets = self.targets(destination, bool(command.LOGICAL), is_x2apic=is_x2apic)
            case 1:
                targets = [source]
            case shorthand:
                targets = [v for v in self.vcpus if shorthand == ALL or v is not source]
        if command.DELIVERY_MODE in (Delivery.FIXED, Delivery.LOWEST):
            targets = [vcpu for vcpu in targets if vcpu is not source]
        self._send(command.DELIVERY_MODE, command.VECTOR, targets)

    def targets(self, destination: int, logical: bool, *, is_x2apic: bool) -> list[Vcpu]:
        """The processors that a destination names."""
        if destination == BROADCAST[is_x2apic]:
            return list(self.vcpus)
        if logical:
            return [vcpu for vcpu in self.vcpus if _is_member(vcpu, destination)]
        return [vcpu for vcpu in self.vcpus if vcpu.model.apic_id == destination]

    def kick(self, apic_id: int) -> None:
        """A processor of the VM wants this one to go on, halted or about to be."""
        for vcpu in self.targets(apic_id, False, is_x2apic=True):
            vcpu.events.state.kicked = True
            vcpu.kvm.state.counts["kicks"] += 1
            vcpu.look_now()

    def _send(
        self, delivery: int, vector: int, targets: list[Vcpu], *, level: bool = False
    ) -> None:
        for vcpu in targets[:1] if delivery == Delivery.LOWEST else targets:
            match delivery:
                case Delivery.FIXED | Delivery.LOWEST if vector >= LOWEST_VECTOR:
                    vcpu.apic.raise_vector(vector, level)
                case Delivery.NMI:
                    vcpu.events.nmi()
                case Delivery.INIT:
                    vcpu.command(partial(startup.init, vcpu), is_first=True)
                case Delivery.START_UP:
                    vcpu.command(partial(startup.start_up, vcpu, vector), is_first=False)
                case _:
                    continue
            vcpu.look_now()


def _is_member(vcpu: Vcpu, destination: int) -> bool:
    """Whether a logical destination names this processor."""
    if vcpu.msrs.apic_page == 0:
        own = vcpu.apic.rdmsr(X2APIC_LDR, 0)
        return own >> 16 == destination >> 16 and bool(own & destination & 0xFFFF)
    now = vcpu.clock.now()
    own, model = vcpu.apic.read(LDR, now) >> 24, vcpu.apic.read(DFR, now) >> 28
    if model == FLAT:
        return bool(own & destination)
    return own >> 4 == destination >> 4 and bool(own & destination & 0xF)
