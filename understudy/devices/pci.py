"""PCI: configuration mechanism 1, the host bridge, and what every PCI function is made of.

Source: PCI Local Bus Specification 3.0, "Configuration Space" and "Software Generation of
Configuration Transactions"; the host bridge shows the identity of Intel's 82441FX, and the reset
register at 0xCF9 is that of Intel's 82371SB ("Reset Control Register").

Not modeled: other buses than 0, memory-mapped configuration, PCI's error reporting.

Invariants: a function answers at a BAR's address exactly while its command register lets it and
nobody else is there; registers keep their read-only bits whatever is written.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from understudy.arch.bits import Bit, Bits, Field
from understudy.devices import Device
from understudy.machine.bus import Bus, Line, SharedLine

# --- The specification ---


class ConfigAddress(Bits, width=32):
    """CONFIG_ADDRESS, port 0xCF8."""

    ENABLE = Bit(31)
    BUS = Field(23, 16)
    DEVICE = Field(15, 11)
    FUNCTION = Field(10, 8)
    REGISTER = Field(7, 2)


class Command(Bits, width=16):
    """The command register."""

    INTX_OFF = Bit(10)  # interrupt disable
    SERR = Bit(8)
    PERR = Bit(6)
    MASTER = Bit(2)  # bus master
    MEMORY = Bit(1)  # answers in memory space
    IO = Bit(0)  # answers in I/O space


VENDOR, DEVICE, COMMAND, STATUS, REVISION, CLASS = 0x00, 0x02, 0x04, 0x06, 0x08, 0x09
BAR0, SUBSYSTEM_VENDOR, SUBSYSTEM, CAPABILITIES = 0x10, 0x2C, 0x2E, 0x34
INTERRUPT_LINE, INTERRUPT_PIN = 0x3C, 0x3D
HAS_CAPABILITIES, INTX_STATUS = 0x10, 0x08  # in the status register

PIRQ = (10, 11, 14, 15)  # the IRQs of INTA# to INTD# of device 0; the next device begins one later
MMIO_WINDOW = range(0xC000_0000, 0xFEC0_0000)
PORT_WINDOW = range(0xC000, 0x1_0000)


def irq_of(device: int, pin: int) -> int:
    """The IRQ (and GSI) of a function's interrupt pin, 1 for INTA#."""
    return PIRQ[(device + pin - 1) % 4]


# --- A function ---


class Region(Protocol):
    """What stands behind a BAR.  Offsets are from its beginning."""

    def bar_read(self, bar: int, offset: int, size: int) -> int: ...
    def bar_write(self, bar: int, offset: int, value: int, size: int) -> None: ...


@dataclass
class FunctionState:
    """The registers of one function."""

    config: bytearray = field(default_factory=lambda: bytearray(256))


class Function:
    """The configuration space of one function: identity, BARs, capabilities, interrupt pin.

    A device model makes one, adds what it has, and plugs it into `Pci`.
    """

    def __init__(
        self,
        *,
        vendor: int,
        device: int,
        class_code: int,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
    ) -> None:
        self.state = FunctionState()
        self.writable = bytearray(256)
        self.bars: dict[int, tuple[int, bool, Region]] = {}  # number: size, is_port, owner
        self.irq: Line | None = None
        self.on_write: Callable[[int, int], None] = lambda offset, size: None
        self.remap: Callable[[], None] = lambda: None  # the bus's: BARs or command changed
        self._free = 0x40
        self._last = CAPABILITIES
        self.put(VENDOR, 2, vendor)
        self.put(DEVICE, 2, device)
        self.put(REVISION, 1, revision)
        self.put(CLASS, 3, class_code)
        self.put(SUBSYSTEM_VENDOR, 2, subsystem[0])
        self.put(SUBSYSTEM, 2, subsystem[1])
        self.let(COMMAND, 2, sum(f.mask for f in Command.FIELDS))
        self.let(INTERRUPT_LINE, 1, 0xFF)

    def get(self, offset: int, size: int) -> int:
        """A register's value."""
        return int.from_bytes(self.state.config[offset : offset + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """Set a register, read-only or not."""
        self.state.config[offset : offset + size] = value.to_bytes(size, "little")

    def let(self, offset: int, size: int, mask: int) -> None:
        """Let the guest write these bits."""
        self.writable[offset : offset + size] = mask.to_bytes(size, "little")

    def add_bar(self, number: int, size: int, owner: Region, *, is_port: bool = False) -> None:
        """A BAR of `size` bytes, a power of two; memory BARs are 32 bits wide."""
        least = 4 if is_port else 16
        if size < least or size & size - 1:
            raise ValueError(f"BAR{number} of {size} bytes: expected a power of two >= {least}")
        self.bars[number] = size, is_port, owner
        self.put(BAR0 + 4 * number, 4, 1 if is_port else 0)
        self.let(BAR0 + 4 * number, 4, -size & 0xFFFF_FFFF)

    def add_capability(self, id_: int, body: bytes, writable: bytes = b"") -> int:
        """Append to the list of capabilities; returns the offset of its first byte, the ID."""
        offset = self._free
        self._free = offset + 2 + len(body) + 3 & ~3
        if self._free > 256:
            raise ValueError("the configuration space has no room for another capability")
        self.put(self._last, 1, offset)
        self._last = offset + 1
        self.put(offset, 2, id_)
        self.state.config[offset + 2 : offset + 2 + len(body)] = body
        self.writable[offset + 2 : offset + 2 + len(writable)] = writable
        self.put(STATUS, 2, self.get(STATUS, 2) | HAS_CAPABILITIES)
        return offset

    def set_intx(self, level: bool) -> None:
        """Assert or release the function's interrupt pin."""
        status = self.get(STATUS, 2) & ~INTX_STATUS
        self.put(STATUS, 2, status | (INTX_STATUS if level else 0))
        self._drive()

    def _drive(self) -> None:
        if self.irq is not None:
            off = self.get(COMMAND, 2) & Command.INTX_OFF.mask
            self.irq.set(bool(self.get(STATUS, 2) & INTX_STATUS and not off))

    def window(self, number: int) -> range | None:
        """Where the BAR answers now, or None."""
        size, is_port, _ = self.bars[number]
        command = self.get(COMMAND, 2)
        if not command & (Command.IO.mask if is_port else Command.MEMORY.mask):
            return None
        start = self.get(BAR0 + 4 * number, 4) & -size
        if start == 0 or (is_port and start + size > 0x1_0000):
            return None
        return range(start, start + size)

    def config_read(self, offset: int, size: int) -> int:
        """The guest reads."""
        return self.get(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """The guest writes; only bits that `let` gave free change."""
        mask = int.from_bytes(self.writable[offset : offset + size], "little")
        self.put(offset, size, self.get(offset, size) & ~mask | value & mask)
        if offset < BAR0 + 24 and offset + size > COMMAND:
            self.remap()
            self._drive()
        self.on_write(offset, size)


# --- The bus ---


@dataclass
class PciState:
    """CONFIG_ADDRESS, the reset register, and all functions by number."""

    address: int = 0
    reset_control: int = 0
    functions: dict[str, FunctionState] = field(default_factory=dict)


class Pci(Device, name="pci"):
    """Bus 0 with its host bridge.  `irqs[n]` is the board's wire for PIRQ[n]."""

    port_width = 4
    state: PciState

    def __init__(
        self, bus: Bus, reset: Callable[[], None], set_irq: Callable[[int, bool], None]
    ) -> None:
        super().__init__()
        self.ports = (range(0xCF8, 0xD00),)
        self.bus, self.reset = bus, reset
        self.wires = {irq: SharedLine(lambda level, n=irq: set_irq(n, level)) for irq in PIRQ}  # type: ignore[misc]
        self.functions: dict[int, Function] = {}  # by device << 3 | function
        self.claimed: dict[tuple[int, int], range] = {}  # by (devfn, BAR)
        self._next_port, self._next_mmio = PORT_WINDOW.start, MMIO_WINDOW.start
        self.state = PciState()
        bridge = Function(vendor=0x8086, device=0x1237, class_code=0x060000, revision=2)
        self.plug(bridge, 0)

    def plug(self, function: Function, device: int, number: int = 0, *, pin: int = 0) -> None:
        """Put a function on the bus, give its BARs addresses, and wire its interrupt pin."""
        devfn = device << 3 | number
        if not 0 <= devfn < 256 or devfn in self.functions:
            raise ValueError(f"PCI 00:{device:02x}.{number} is taken or does not exist")
        self.functions[devfn] = function
        self.state.functions[f"{devfn:02x}"] = function.state
        for bar, (size, is_port, _) in function.bars.items():
            register = BAR0 + 4 * bar
            function.put(register, 4, self._place(size, is_port) | function.get(register, 4))
        if pin:
            irq = irq_of(device, pin)
            function.put(INTERRUPT_PIN, 1, pin)
            function.put(INTERRUPT_LINE, 1, irq)
            function.irq = self.wires[irq].input()
            self.lines[f"{devfn:02x}"] = function.irq
        function.remap = lambda: self._remap(devfn)

    def _place(self, size: int, is_port: bool) -> int:
        """The next free address, as firmware would choose it."""
        if is_port:
            start = -(-self._next_port // size) * size
            self._next_port = start + size
            window = PORT_WINDOW
        else:
            start = -(-self._next_mmio // size) * size
            self._next_mmio = start + size
            window = MMIO_WINDOW
        if start + size > window.stop:
            raise ValueError(f"no room for a BAR of {size} bytes below {window.stop:#x}")
        return start

    def _remap(self, devfn: int) -> None:
        """Answer where the function's BARs say now."""
        function = self.functions[devfn]
        windows = {bar: function.window(bar) for bar in function.bars}
        for bar, (_, is_port, _) in function.bars.items():
            old = self.claimed.get((devfn, bar))
            if old is not None and old != windows[bar]:
                (self.bus.release_ports if is_port else self.bus.release_mmio)(old)
                del self.claimed[devfn, bar]
        for bar, (_, is_port, owner) in function.bars.items():
            window = windows[bar]
            if window is None or (devfn, bar) in self.claimed:
                continue
            try:
                self._claim(window, is_port, owner, bar)
            except ValueError:
                continue  # somebody is there already: on a real bus both would fight
            self.claimed[devfn, bar] = window

    def _claim(self, window: range, is_port: bool, owner: Region, bar: int) -> None:
        start = window.start
        if is_port:
            self.bus.claim_ports(
                window,
                lambda port, size: owner.bar_read(bar, port - start, size),
                lambda port, value, size: owner.bar_write(bar, port - start, value, size),
                width=4,
            )
        else:
            self.bus.claim_mmio(
                window,
                lambda gpa, size: owner.bar_read(bar, gpa - start, size),
                lambda gpa, size, value: owner.bar_write(bar, gpa - start, value, size),
            )

    # --- ports ---

    def _target(self) -> Function | None:
        address = self.state.address
        if address & 0x80FF_0000 != 0x8000_0000:
            return None
        return self.functions.get(address >> 8 & 0xFF)

    def read(self, port: int, size: int) -> int:
        if port == 0xCF8 and size == 4:
            return self.state.address
        if port >= 0xCFC:
            function = self._target()
            if function is not None:
                return function.config_read(self.state.address & 0xFC | port & 3, size)
        elif port == 0xCF9 and size == 1:
            return self.state.reset_control
        return (1 << 8 * size) - 1

    def write(self, port: int, value: int, size: int) -> None:
        s = self.state
        if port == 0xCF8 and size == 4:
            s.address = value & 0x80FF_FFFC
        elif port >= 0xCFC:
            function = self._target()
            if function is not None:
                function.config_write(s.address & 0xFC | port & 3, size, value)
        elif port == 0xCF9 and size == 1:
            rises = value & ~s.reset_control & 4
            s.reset_control = value & 0x0E
            if rises:
                self.reset()

    # --- snapshots ---

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        names = {f"{devfn:02x}" for devfn in self.functions}
        if self.state.functions.keys() != names:
            raise ValueError("snapshot: pci was saved with other functions")
        for devfn, function in self.functions.items():
            function.state = self.state.functions[f"{devfn:02x}"]
            self._remap(devfn)

    def inspect(self) -> dict[str, Any]:
        return {
            f"00:{devfn >> 3:02x}.{devfn & 7}": {
                "id": f"{f.get(VENDOR, 2):04x}:{f.get(DEVICE, 2):04x}",
                "command": repr(Command(f.get(COMMAND, 2))),
                "bars": {n: str(f.window(n)) for n in f.bars},
            }
            for devfn, f in self.functions.items()
        }
