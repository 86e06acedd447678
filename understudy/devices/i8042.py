"""Intel 8042: the keyboard controller of a PC, with nothing plugged in.

Source: IBM PC AT Technical Reference, "Keyboard Controller".  Ports 0x60 (data) and 0x64 (status,
command); IRQ 1.  Its output port can reset the processor, and gates address line 20.

Not modeled: a keyboard (bytes to it time out, as without one), the auxiliary port (commands for
it say that there is none), and address line 20, which is always open: the bit is only kept.

Invariants: every command that has an answer answers at once, so that no driver waits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Annotated, Any

from understudy.arch.bits import Bit, Bits
from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.machine.bus import ports
from understudy.state import U8

# --- The data sheet ---


class Status(Bits, width=8):
    """The status register, a read of port 0x64 on a PC."""

    PARITY = Bit(7)  # the keyboard's last byte had a parity error
    TIMEOUT = Bit(6)  # the keyboard did not answer
    AUX = Bit(5)  # the output buffer holds a byte of the auxiliary port
    UNLOCKED = Bit(4)  # the keyboard lock is open
    COMMAND = Bit(3)  # the last write was to port 0x64
    SYSTEM = Bit(2)  # the self-test has passed
    IBF = Bit(1)  # input buffer full
    OBF = Bit(0)  # output buffer full


class CommandByte(Bits, width=8):
    """The controller's command byte (byte 0 of its RAM)."""

    XLATE = Bit(6)  # translate scan codes
    AUX_OFF = Bit(5)
    KEYBOARD_OFF = Bit(4)
    SYSTEM = Bit(2)
    AUX_INT = Bit(1)
    KEYBOARD_INT = Bit(0)  # IRQ 1 when the output buffer is full


class Command(IntEnum):
    """Commands.  0x20-0x3F read RAM, 0x60-0x7F write it, 0xF0-0xFF pulse outputs."""

    AUX_DISABLE = 0xA7
    AUX_ENABLE = 0xA8
    AUX_TEST = 0xA9
    SELF_TEST = 0xAA
    KEYBOARD_TEST = 0xAB
    KEYBOARD_DISABLE = 0xAD
    KEYBOARD_ENABLE = 0xAE
    READ_INPUT = 0xC0
    READ_OUTPUT = 0xD0
    WRITE_OUTPUT = 0xD1
    KEYBOARD_LOOP = 0xD2
    AUX_LOOP = 0xD3
    WRITE_AUX = 0xD4


OBF, TIMEOUT, LAST_COMMAND = Status.OBF.mask, Status.TIMEOUT.mask, Status.COMMAND.mask
DATA, COMMAND = 0, 1  # regions
RESEND = 0xFE  # what the controller reports for a byte that got no answer


# --- The device ---


@dataclass
class I8042State:
    """Status, output buffer, output port and RAM."""

    status: U8 = int(Status(UNLOCKED=1, SYSTEM=1))
    data: U8 = 0
    output: U8 = 0x03  # output port: bit 0 low resets, bit 1 opens address line 20
    pending: U8 = 0  # the command that takes the next byte written to port 0x60
    ram: Annotated[bytearray, 32] = field(default_factory=lambda: bytearray([0x34]) + bytearray(31))


class I8042(Device, name="i8042"):
    """The controller.  `restart` is called when its output port pulls the processor's reset."""

    spans = (ports(1), ports(1))  # data; status and command
    state: I8042State

    def __init__(self, wires: Wires, *, restart: Callable[[], None] = lambda: None) -> None:
        super().__init__(wires)
        self.restart = restart
        self.irq = self.lines["irq"] = wires.line()
        self.state = self.power_on()

    def power_on(self) -> I8042State:
        return I8042State()

    def read(self, region: int, offset: int, size: int) -> int:
        s = self.state
        if region == COMMAND:
            return s.status
        s.status &= ~(OBF | TIMEOUT)
        self._update()
        return s.data

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        s = self.state
        if region == COMMAND:
            s.status |= LAST_COMMAND
            s.pending = 0
            self._command(value)
        else:
            s.status &= ~LAST_COMMAND
            pending, s.pending = s.pending, 0
            self._data(pending, value)
        self._update()

    def _command(self, value: int) -> None:
        s = self.state
        if 0x20 <= value < 0x40:
            self._answer(s.ram[value & 31])
        elif 0x60 <= value < 0x80:
            s.pending = value
        elif value >= 0xF0:
            if not value & 1:
                self.restart()
        else:
            match value:
                case Command.SELF_TEST:
                    self._answer(0x55)
                case Command.KEYBOARD_TEST:
                    self._answer(0x00)  # the port itself is well
                case Command.AUX_TEST:
                    self._answer(0x01)  # clock line stuck low: there is no such port
                case Command.KEYBOARD_DISABLE:
                    s.ram[0] |= CommandByte.KEYBOARD_OFF.mask
                case Command.KEYBOARD_ENABLE:
                    s.ram[0] &= ~CommandByte.KEYBOARD_OFF.mask
                case Command.READ_INPUT:
                    self._answer(0xA0)  # not locked, a color display, no manufacturing jumper
                case Command.READ_OUTPUT:
                    self._answer(s.output | (s.status & OBF) << 4)
                case (
                    Command.WRITE_OUTPUT
                    | Command.KEYBOARD_LOOP
                    | Command.AUX_LOOP
                    | Command.WRITE_AUX
                ):
                    s.pending = value

    def _data(self, pending: int, value: int) -> None:
        s = self.state
        if pending == Command.WRITE_OUTPUT:
            s.output = value | 1
            if not value & 1:
                self.restart()
        elif pending in (Command.KEYBOARD_LOOP, Command.AUX_LOOP):
            self._answer(value)  # without an auxiliary port both come back as the keyboard's
        elif 0x60 <= pending < 0x80:
            s.ram[pending & 31] = value
        else:  # for a keyboard or a mouse that is not there
            if pending != Command.WRITE_AUX:
                s.ram[0] &= ~CommandByte.KEYBOARD_OFF.mask
            self._answer(RESEND)
            s.status |= TIMEOUT

    def _answer(self, value: int) -> None:
        self.state.data = value
        self.state.status = self.state.status & ~TIMEOUT | OBF

    def _update(self) -> None:
        s = self.state
        self.irq.set(bool(s.status & OBF and s.ram[0] & CommandByte.KEYBOARD_INT.mask))

    def inspect(self) -> dict[str, Any]:
        s = self.state
        return {
            "status": repr(Status(s.status)),
            "command byte": repr(CommandByte(s.ram[0])),
            "data": f"{s.data:#04x}",
            "output port": f"{s.output:#04x}",
        }
