"""PCI: the host bridge, configuration mechanism 1, and memory-mapped configuration (ECAM).

Source: PCI Local Bus Specification 3.0, "Software Generation of Configuration Transactions"; PCI
Express Base Specification, "PCI Express Enhanced Configuration Access Mechanism (ECAM)".  The
bridge shows the identity of Intel's 82441FX, and the reset register at 0xCF9 is that of Intel's
82371SB ("Reset Control Register").

Not modeled: other buses than 0, PCI's error reporting.

Invariants: a function answers at a BAR's address exactly while its command register lets it and
nobody else is there; both ways to a function's registers find the same ones.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from understudy.arch.bits import Bit, Bits, Field
from understudy.closed import let_go
from understudy.devices import Device
from understudy.devices.pci_config import (
    COMMAND,
    DEVICE,
    INTERRUPT_LINE,
    INTERRUPT_PIN,
    VENDOR,
    Command,
    FunctionState,
)
from understudy.devices.pci_function import Bar, Function
from understudy.devices.wires import Wires
from understudy.machine.bus import Region, SharedLine, mmio, ports
from understudy.state import U8, U32

# --- The specification ---


class ConfigAddress(Bits, width=32):
    """CONFIG_ADDRESS, port 0xCF8 of a PC."""

    ENABLE = Bit(31)
    BUS = Field(23, 16)
    DEVICE = Field(15, 11)
    FUNCTION = Field(10, 8)
    REGISTER = Field(7, 2)


ADDRESS, RESET, DATA = 0, 1, 4  # offsets in the ports
MECHANISM_1, ECAM = 0, 1  # regions
ECAM_BYTES = 1 << 28  # 256 buses of 256 functions of 4096 bytes
BUSES = 1  # of them, those that there are: a guest asks each device of each bus that it is told of
PINS = "ABCD"  # INTA# to INTD#

PIRQ = (10, 11, 14, 15)  # the IRQs of INTA# to INTD# of device 0; the next device begins one later
MMIO_WINDOW = range(0xC000_0000, 0xFEC0_0000)
ECAM_GPA = 0xE000_0000
BAR_WINDOW = range(MMIO_WINDOW.start, ECAM_GPA)  # where firmware puts memory BARs
PORT_WINDOW = range(0xC000, 0x1_0000)


def irq_of(device: int, pin: int) -> int:
    """The IRQ (and GSI) of a function's interrupt pin, 1 for INTA#."""
    return PIRQ[(device + pin - 1) % 4]


# --- The bus ---


@dataclass
class PciState:
    """CONFIG_ADDRESS, the reset register, and all functions by number."""

    address: U32 = 0
    reset_control: U8 = 0
    functions: dict[str, FunctionState] = field(default_factory=dict)


class Pci(Device, name="pci"):
    """Bus 0 with its host bridge.  Wire n is that of PIRQ[n].

    `restart` is called by the reset register; `high_window` is where 64-bit BARs go, if anywhere
    but below 4 GiB.
    """

    spans = (ports(8, width=4), mmio(ECAM_BYTES))
    state: PciState

    def __init__(
        self,
        wires: Wires,
        *,
        restart: Callable[[], None] = lambda: None,
        high_window: range | None = None,
    ) -> None:
        super().__init__(wires)
        self.bus, self.restart = wires.bus, restart
        pins = {f"INT{pin}#": wires.line(n) for n, pin in enumerate(PINS)}
        self.lines.update(pins)
        self.shared = [SharedLine(line.set) for line in pins.values()]
        self.functions: dict[int, Function] = {}  # by device << 3 | function
        self.wanted: list[Region] = []  # where BARs say that they answer
        self.claimed: list[Region] = []  # and those of them that do
        self.high_window = BAR_WINDOW if high_window is None else high_window
        self.state = self.power_on()
        self.plug(Function(vendor=0x8086, device=0x1237, class_code=0x060000, revision=2), 0)

    def power_on(self) -> PciState:
        return PciState(functions={f"{n:02x}": f.power_on() for n, f in self.functions.items()})

    def plug(self, function: Function, device: int, number: int = 0, *, pin: int = 0) -> None:
        """Put a function on the bus, give its BARs addresses, and wire its interrupt pin.

        ValueError if there is no such device, it is taken, or there is no room; nothing has
        changed then.
        """
        devfn = device << 3 | number
        if not 0 <= devfn < 256 or devfn in self.functions:
            raise ValueError(f"PCI 00:{device:02x}.{number} is taken or does not exist")
        starts: dict[int, int] = {}
        taken = [place for one in self.functions.values() for place in one.places()]
        for n, bar in function.bars.items():
            starts[n] = free_place(self._window(bar), bar, taken)
            taken.append((bar, starts[n]))
        for n, start in starts.items():
            function.move(n, start)
        if pin:
            function.put(INTERRUPT_PIN, 1, pin)
            function.put(INTERRUPT_LINE, 1, irq_of(device, pin))
            function.irq = self.shared[(device + pin - 1) % 4].input()
            self.lines[f"{devfn:02x}"] = function.irq
        function.remap = self._remap
        function.connect(self.wires.requester(devfn), self.wires.deliver)
        self.functions[devfn] = function
        self.state.functions[f"{devfn:02x}"] = function.state

    def unplug(self, devfn: int) -> None:
        """Take a function off the bus: nobody answers for it, and its addresses are free."""
        function = self.functions.pop(devfn)
        name = f"{devfn:02x}"
        del self.state.functions[name]
        if function.irq is not None:
            function.irq.lower()
            del self.lines[name]
            for shared in self.shared:
                shared.inputs[:] = [line for line in shared.inputs if line is not function.irq]
        self._remap()
        let_go(function)

    def free_device(self) -> int:
        """The first device number that is not taken."""
        taken = {devfn >> 3 for devfn in self.functions}
        for device in range(32):
            if device not in taken:
                return device
        raise ValueError("all 32 device numbers of PCI bus 0 are taken")

    def _window(self, bar: Bar) -> range:
        """Where firmware would put it."""
        if bar.is_port:
            return PORT_WINDOW
        return self.high_window if bar.is_wide else BAR_WINDOW

    def _remap(self) -> None:
        """Answer where the BARs say now.  Of two at one place, the first on the bus gets it."""
        found = (f.region(n) for _, f in sorted(self.functions.items()) for n in sorted(f.bars))
        wanted = [region for region in found if region is not None]
        if wanted == self.wanted:
            return
        for region in self.claimed:
            self.bus.release(region)
        self.wanted, self.claimed = wanted, []
        for region in wanted:
            try:
                self.bus.claim(region)
            except ValueError:
                continue  # somebody is there already: on a real bus both would fight
            self.claimed.append(region)

    # --- registers ---

    def _target(self) -> Function | None:
        address = self.state.address
        if address & 0x80FF_0000 != 0x8000_0000:
            return None
        return self.functions.get(address >> 8 & 0xFF)

    def read(self, region: int, offset: int, size: int) -> int:
        if region == ECAM:
            function = self.functions.get(offset >> 12)  # above bit 19: the bus, 0
            if function is not None:
                return function.config_read(offset & 0xFFF, size)
        elif offset >= DATA:
            function = self._target()
            if function is not None:
                return function.config_read(self.state.address & 0xFC | offset & 3, size)
        elif offset == ADDRESS and size == 4:
            return self.state.address
        elif offset == RESET and size == 1:
            return self.state.reset_control
        return (1 << 8 * size) - 1

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        s = self.state
        if region == ECAM:
            function = self.functions.get(offset >> 12)
            if function is not None:
                function.config_write(offset & 0xFFF, size, value)
        elif offset >= DATA:
            function = self._target()
            if function is not None:
                function.config_write(s.address & 0xFC | offset & 3, size, value)
        elif offset == ADDRESS and size == 4:
            s.address = value & 0x80FF_FFFC
        elif offset == RESET and size == 1:
            rises = value & ~s.reset_control & 4
            s.reset_control = value & 0x0E
            if rises:
                self.restart()

    # --- reset, snapshots ---

    def reset(self) -> None:
        super().reset()
        self._adopt()

    def close(self) -> None:
        let_go(*self.functions.values())
        super().close()

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        for devfn, function in self.functions.items():
            new = self.state.functions.get(f"{devfn:02x}")
            if new is None or not _has_same_shape(new, function.state):
                raise ValueError("snapshot: pci was saved with other functions")
        if len(self.state.functions) != len(self.functions):
            raise ValueError("snapshot: pci was saved with other functions")
        self._adopt()

    def _adopt(self) -> None:
        """The functions' registers are those of the state; answer where they say."""
        for devfn, function in self.functions.items():
            function.state = self.state.functions[f"{devfn:02x}"]
        self._remap()

    def inspect(self) -> dict[str, Any]:
        return {
            f"00:{devfn >> 3:02x}.{devfn & 7}": {
                "id": f"{f.get(VENDOR, 2):04x}:{f.get(DEVICE, 2):04x}",
                "command": repr(Command(f.get(COMMAND, 2))),
                "bars": {n: str(f.region(n)) for n in f.bars},
            }
            for devfn, f in self.functions.items()
        }


def free_place(window: range, bar: Bar, taken: Iterable[tuple[Bar, int]]) -> int:
    """An address of a window for a BAR: above all others there, or else in the first gap.

    `taken`: BARs and where they are.  ValueError if there is no room.
    """
    size = bar.size
    others = [(one, one + its.size) for its, one in taken if its.is_port == bar.is_port]
    others = [(one, end) for one, end in others if one < window.stop and window.start < end]
    ends = sorted(end for _, end in others)
    for end in (*ends[-1:], window.start, *ends):
        start = -(-max(end, window.start) // size) * size
        if start + size <= window.stop and not any(
            one < start + size and start < other for one, other in others
        ):
            return start
    raise ValueError(f"no room for a BAR of {size} bytes below {window.stop:#x}")


def _has_same_shape(a: FunctionState, b: FunctionState) -> bool:
    return [len(a.config), len(a.table), len(a.pending)] == [
        len(b.config), len(b.table), len(b.pending),
    ]  # fmt: skip
