"""System control port A: a PC's second way to address line 20 and to a reset, at port 0x92.

Source: IBM PS/2 Hardware Interface Technical Reference, "System Control Port A"; Intel 82371SB
(PIIX3), "PORT 92".  Firmware leaves address line 20 open.

Not modeled: address line 20, which is always open: the bit is only kept.

Invariants: a reset is asked for when its bit becomes 1, and only then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from understudy.arch.bits import Bit, Bits
from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.machine.bus import ports
from understudy.state import U8


class ControlA(Bits, width=8):
    """The register."""

    A20 = Bit(1)  # address line 20 is open
    RESET = Bit(0)  # 0 to 1: reset the processor


A20, RESET = ControlA.A20.mask, ControlA.RESET.mask


@dataclass
class Port92State:
    """The register."""

    control: U8 = A20


class Port92(Device, name="port92"):
    """The register.  `restart` is called when it resets the processor."""

    spans = (ports(1),)
    state: Port92State

    def __init__(self, wires: Wires, *, restart: Callable[[], None] = lambda: None) -> None:
        super().__init__(wires)
        self.restart = restart
        self.state = self.power_on()

    def power_on(self) -> Port92State:
        return Port92State()

    def read(self, region: int, offset: int, size: int) -> int:
        return self.state.control

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        is_new = value & ~self.state.control & RESET
        self.state.control = value & (A20 | RESET)
        if is_new:
            self.restart()

    def inspect(self) -> dict[str, Any]:
        return {"A20": bool(self.state.control & A20)}
