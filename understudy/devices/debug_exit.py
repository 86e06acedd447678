"""Debug-exit port: a guest program ends its machine with a number.

Source: the habit of test kernels, QEMU's isa-debug-exit device; PCs have no such part.
Invariants: a write of any size reports the whole value once; reads give the last value.
"""

from collections.abc import Callable
from dataclasses import dataclass

from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.machine.bus import ports
from understudy.state import U32


@dataclass
class DebugExitState:
    """The last value written."""

    value: U32 = 0


class DebugExit(Device, name="debug_exit"):
    """Calls `debug_exit(value)` for each write to its ports."""

    spans = (ports(4, width=4),)
    state: DebugExitState

    def __init__(
        self, wires: Wires, *, debug_exit: Callable[[int], None] = lambda value: None
    ) -> None:
        super().__init__(wires)
        self.debug_exit = debug_exit
        self.state = self.power_on()

    def power_on(self) -> DebugExitState:
        return DebugExitState()

    def read(self, region: int, offset: int, size: int) -> int:
        return self.state.value & (1 << 8 * size) - 1

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        self.state.value = value
        self.debug_exit(value)
