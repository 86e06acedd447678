"""Intel 82093AA: I/O advanced programmable interrupt controller, with the later EOI register.

[DS] Intel 82093AA data sheet; the EOI register and version 0x20 as in Intel's 82806AA.  A PC has
it at 0xFEC00000 with 24 inputs; input 2 is the timer's.

Not modeled: the polarity bit (a wire knows only asserted and not asserted), the delivery status
(a message takes no time), the arbitration ID.

Invariants: a level-triggered entry sends one message and then waits for the EOI; an edge that
comes while the entry is masked is lost.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from understudy.arch.bits import Bit, Bits, Field
from understudy.devices import Device
from understudy.devices.message import Delivery, Message
from understudy.devices.wires import Wires
from understudy.machine.bus import mmio
from understudy.state import U8, U32, U64

# --- The data sheet ---

PINS = 24
VERSION = 0x20 | PINS - 1 << 16
REGSEL, WINDOW, EOI = 0x00, 0x10, 0x40  # offsets in the page
ID, VER, ARB, REDTBL = 0x00, 0x01, 0x02, 0x10  # indirect registers


class Redirection(Bits, width=64):
    """[DS] "I/O Redirection Table Registers"."""

    DEST = Field(63, 56)  # destination
    MASK = Bit(16)  # interrupt mask
    TM = Bit(15)  # trigger mode: 1 is level
    IRR = Bit(14)  # remote IRR: sent, EOI not yet seen
    POL = Bit(13)  # polarity: 1 is low active
    DS = Bit(12)  # delivery status: 1 is pending
    DM = Bit(11)  # destination mode: 1 is logical
    DELMOD = Field(10, 8)  # delivery mode
    VEC = Field(7, 0)  # vector


MASK, TM, IRR = Redirection.MASK.mask, Redirection.TM.mask, Redirection.IRR.mask
READ_ONLY = IRR | Redirection.DS.mask
WRITABLE = sum(f.mask for f in Redirection.FIELDS) & ~READ_ONLY


# --- The device ---


@dataclass
class IoApicState:
    """Registers, and the levels of the inputs."""

    id: U8 = 0
    select: U8 = 0
    pins: U32 = 0  # asserted inputs
    table: Annotated[list[U64], PINS] = field(default_factory=lambda: [MASK] * PINS)


class IoApic(Device, name="ioapic"):
    """The chip.  `id` is the identity that firmware gives it."""

    spans = (mmio(0x1000),)
    state: IoApicState

    def __init__(self, wires: Wires, *, id: int = 0) -> None:
        super().__init__(wires)
        self.deliver, self.id = wires.deliver, id & 15
        self.state = self.power_on()

    def power_on(self) -> IoApicState:
        return IoApicState(id=self.id)

    # --- wires ---

    def set_input(self, pin: int, level: bool) -> None:
        """An input is asserted or released."""
        s = self.state
        bit = 1 << pin
        if level:
            if not s.pins & bit:
                s.pins |= bit
                self._send(pin)
        else:
            s.pins &= ~bit

    def end_of_interrupt(self, vector: int) -> None:
        """The EOI of a level-triggered interrupt, broadcast by a local APIC."""
        for pin, entry in enumerate(self.state.table):
            if entry & IRR and entry & 0xFF == vector:
                self.state.table[pin] = entry & ~IRR
                if self.state.pins >> pin & 1:
                    self._send(pin)

    def _send(self, pin: int) -> None:
        entry = self.state.table[pin]
        if entry & MASK or entry & IRR:
            return
        delivery = entry >> 8 & 7
        level = bool(entry & TM) and delivery in (Delivery.FIXED, Delivery.LOWEST)
        if level:
            self.state.table[pin] = entry | IRR
        self.deliver(
            Message(entry & 0xFF, entry >> 56, bool(entry & Redirection.DM.mask), delivery, level)
        )

    # --- registers ---

    def read(self, region: int, offset: int, size: int) -> int:
        register = offset & ~3
        value = 0
        if register == REGSEL:
            value = self.state.select
        elif register == WINDOW:
            value = self._read_window()
        return value >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def _read_window(self) -> int:
        s = self.state
        index = s.select
        if index in (ID, ARB):
            return s.id << 24
        if index == VER:
            return VERSION
        if REDTBL <= index < REDTBL + 2 * PINS:
            entry = s.table[index - REDTBL >> 1]
            return entry >> 32 if index & 1 else entry & 0xFFFF_FFFF
        return 0xFFFF_FFFF

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        s = self.state
        if offset == REGSEL:
            s.select = value & 0xFF
        elif offset == WINDOW and size >= 4:  # [DS]: registers are accessed as 32 bits
            self._write_window(value & 0xFFFF_FFFF)
        elif offset == EOI:
            self.end_of_interrupt(value & 0xFF)

    def _write_window(self, value: int) -> None:
        s = self.state
        index = s.select
        if index == ID:
            s.id = value >> 24 & 15
        elif REDTBL <= index < REDTBL + 2 * PINS:
            pin = index - REDTBL >> 1
            entry = s.table[pin]
            shift = 32 * (index & 1)
            new = entry & ~(0xFFFF_FFFF << shift) | value << shift
            new = new & WRITABLE | entry & READ_ONLY
            if not new & TM:
                new &= ~IRR  # an edge-triggered entry waits for nothing
            s.table[pin] = new
            if new & TM and s.pins >> pin & 1:
                self._send(pin)

    def inspect(self) -> dict[str, Any]:
        s = self.state
        return {
            f"pin {pin}": f"{Redirection(entry)!r}{' asserted' if s.pins >> pin & 1 else ''}"
            for pin, entry in enumerate(s.table)
            if not entry & MASK or s.pins >> pin & 1
        }
