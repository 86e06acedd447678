"""A PCI function: BARs, interrupts, and its way to memory.

Source: PCI Local Bus Specification 3.0, "Base Addresses" and "Device Control"; PCI Express Base
Specification, "PCI Express Capability Structure" for a root complex integrated endpoint.

Not modeled: expansion ROMs, error reporting, power management.

Invariants: it reaches memory, by DMA or by a message, only while it is bus master; its interrupt
pin is released while it may send messages instead.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from understudy.devices.message import Message
from understudy.devices.pci_config import (
    BAR0,
    CLASS,
    COMMAND,
    CONVENTIONAL,
    DEVICE,
    EXTENDED,
    INTERRUPT_LINE,
    INTX_STATUS,
    REVISION,
    STATUS,
    SUBSYSTEM,
    SUBSYSTEM_VENDOR,
    VENDOR,
    Command,
    ConfigSpace,
    FunctionState,
)
from understudy.devices.pci_msi import Msi, Msix
from understudy.machine.bus import PORTS, Line, Owner, Region, Space
from understudy.machine.physical import DmaError, NoMemory, PhysicalMemory

MASTER = Command.MASTER.mask
IO_BAR, WIDE_BAR, PREFETCHABLE = 1, 4, 8  # low bits of a BAR
LOCAL_APICS = 0xFEE  # bits 31:20 of an address that is an interrupt message

EXPRESS_ID = 0x10
# "PCI Express Capabilities Register": version 2, root complex integrated endpoint.
EXPRESS = 2 | 9 << 4
ROLE_BASED_ERRORS = 1 << 15  # "Device Capabilities Register"; every device sets it
DEVICE_CONTROL = 0x2810, 0x78FF  # after reset: relaxed ordering, no snoop, reads of 512 bytes


class Bar(NamedTuple):
    """What stands behind a base address register."""

    size: int
    is_port: bool
    is_wide: bool  # 64 bits, so that the next BAR is its upper half
    owner: Owner

    @property
    def width(self) -> int:
        """Bytes of the register."""
        return 8 if self.is_wide else 4


class BusMaster(PhysicalMemory):
    """Memory as one function reaches it: only while its command register lets it."""

    def __init__(self, function: "Function", memory: PhysicalMemory) -> None:
        self.function, self.memory = function, memory

    def read(self, gpa: int, length: int, /) -> bytes:
        """DmaError unless the function is bus master."""
        if not self.function.state.config[COMMAND] & MASTER:  # `is_master`, and quickly
            raise DmaError(f"gpa {gpa:#x}: the guest has not made this function bus master")
        return self.memory.read(gpa, length)

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        """DmaError unless the function is bus master."""
        if not self.function.state.config[COMMAND] & MASTER:  # `is_master`, and quickly
            raise DmaError(f"gpa {gpa:#x}: the guest has not made this function bus master")
        self.memory.write(gpa, data)

    def gather(self, runs: Sequence[tuple[int, int]], /) -> bytes:
        """DmaError unless the function is bus master."""
        return self.memory.gather(runs) if self.function.is_master else super().gather(runs)

    def scatter(
        self, runs: Sequence[tuple[int, int]], data: bytes | bytearray | memoryview, /
    ) -> int:
        """The same."""
        if self.function.is_master:
            return self.memory.scatter(runs, data)
        return super().scatter(runs, data)


class Function(ConfigSpace):
    """The registers of one function, and what they switch.

    A device model makes one, adds what it has, and plugs it in (`Wires.plug`).  `on_write` is told
    of every write by the guest.
    """

    def __init__(
        self,
        *,
        vendor: int,
        device: int,
        class_code: int,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
        is_express: bool = False,
    ) -> None:
        super().__init__(EXTENDED if is_express else CONVENTIONAL)
        self.bars: dict[int, Bar] = {}
        self.msi_capability: Msi | None = None
        self.msix: Msix | None = None
        self.irq: Line | None = None
        self.dma: PhysicalMemory = NoMemory()
        self.on_write: Callable[[int, int], None] = lambda offset, size: None
        self.remap: Callable[[], None] = lambda: None  # the bus's: BARs or command changed
        self._deliver: Callable[[Message], None] = lambda message: None
        self._initial: FunctionState | None = None
        self.put(VENDOR, 2, vendor)
        self.put(DEVICE, 2, device)
        self.put(REVISION, 1, revision)
        self.put(CLASS, 3, class_code)
        self.put(SUBSYSTEM_VENDOR, 2, subsystem[0])
        self.put(SUBSYSTEM, 2, subsystem[1])
        self.let(COMMAND, 2, sum(f.mask for f in Command.FIELDS))
        self.let(INTERRUPT_LINE, 1, 0xFF)
        if is_express:
            control, writable = DEVICE_CONTROL
            self.add_capability(
                EXPRESS_ID,
                struct.pack("<HIH50x", EXPRESS, ROLE_BASED_ERRORS, control),
                struct.pack("<HIH", 0, 0, writable),
            )

    # --- what a device model adds ---

    def add_capability(self, id_: int, body: bytes, writable: bytes = b"") -> int:
        """As of every configuration space; all must be there when it is plugged in."""
        self._check_unplugged()
        return super().add_capability(id_, body, writable)

    def add_bar(
        self,
        number: int,
        size: int,
        owner: Owner,
        *,
        is_port: bool = False,
        is_wide: bool = False,
        is_prefetchable: bool = False,
    ) -> None:
        """A BAR of `size` bytes, a power of two.  Its owner sees it as the region `number`."""
        self._check_unplugged()
        least, most = (4, 0x100) if is_port else (16, 1 << 40 if is_wide else 1 << 31)
        if not least <= size <= most or size & size - 1:
            raise ValueError(
                f"BAR{number} of {size} bytes: expected a power of two from {least} to {most}"
            )
        taken = {n + half for n, bar in self.bars.items() for half in range(1 + bar.is_wide)}
        wanted = set(range(number, number + 1 + is_wide))
        if wanted & taken or not wanted <= set(range(6)) or (is_port and is_wide):
            raise ValueError(f"BAR{number} is taken, or does not exist with this width")
        self.bars[number] = Bar(size, is_port, is_wide, owner)
        flags = IO_BAR if is_port else WIDE_BAR * is_wide | PREFETCHABLE * is_prefetchable
        width = 8 if is_wide else 4
        self.put(BAR0 + 4 * number, width, flags)
        self.let(BAR0 + 4 * number, width, -size & (1 << 8 * width) - 1)

    def add_msi(self, count: int = 1) -> None:
        """Let it send MSI."""
        self.msi_capability = Msi(self, count, self._send)

    def add_msix(self, bar: int, count: int) -> None:
        """Let it send MSI-X; the table and the pending bits get a BAR for themselves."""
        self.msix = Msix(self, bar, count, self._send)
        self.add_bar(bar, self.msix.bar_bytes, self.msix)

    def _check_unplugged(self) -> None:
        if self._initial is not None:
            raise ValueError("the function is plugged in: what it has can no longer change")

    # --- the bus ---

    def connect(self, memory: PhysicalMemory, deliver: Callable[[Message], None]) -> None:
        """It is plugged in, and has this state after every reset from now on."""
        self.dma, self._deliver = BusMaster(self, memory), deliver
        self._initial = self.state.copy()

    def power_on(self) -> FunctionState:
        """The state in which it starts."""
        return (self._initial or self.state).copy()

    @property
    def is_master(self) -> bool:
        """Whether it may begin transactions of its own."""
        return bool(self.state.config[COMMAND] & MASTER)

    def reach(self) -> PhysicalMemory:
        """Memory as it reaches it until the guest goes on, with nothing between if that may be."""
        dma = self.dma
        may = self.state.config[COMMAND] & MASTER  # `is_master`, and quickly
        return dma.memory if may and isinstance(dma, BusMaster) else dma

    def places(self) -> Iterator[tuple[Bar, int]]:
        """Its BARs and where they point, now and after a reset, whether they answer or not."""
        for number, bar in self.bars.items():
            first = BAR0 + 4 * number
            for state in (self.state, self.power_on()):
                value = int.from_bytes(state.config[first : first + bar.width], "little")
                yield bar, value & -bar.size

    def move(self, number: int, start: int) -> None:
        """Point a BAR at an address that is a multiple of its size."""
        register, bar = BAR0 + 4 * number, self.bars[number]
        self.put(register, bar.width, start | self.get(register, bar.width) & bar.size - 1)

    def region(self, number: int) -> Region | None:
        """Where the BAR answers now, or None."""
        bar = self.bars[number]
        size, is_port, _, owner = bar
        if not self.get(COMMAND, 2) & (Command.IO.mask if is_port else Command.MEMORY.mask):
            return None
        start = self.get(BAR0 + 4 * number, bar.width) & -size
        if start == 0 or (is_port and start + size > PORTS):
            return None
        return Region(Space.PORT if is_port else Space.MMIO, start, size, owner, number, 4)

    def config_read(self, offset: int, size: int) -> int:
        """The guest reads; beyond the end it finds ones."""
        if offset + size > self.size:
            return (1 << 8 * size) - 1
        return self.get(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """The guest writes."""
        if offset + size > self.size:
            return
        self.store(offset, size, value)
        if offset < BAR0 + 24 and offset + size > COMMAND:
            self.remap()
            self._drive()
        for capability in (self.msi_capability, self.msix):
            if (
                capability is not None
                and offset < capability.end
                and offset + size > capability.offset
            ):
                capability.changed()
                self._drive()
        self.on_write(offset, size)

    # --- interrupts ---

    def set_intx(self, level: bool) -> None:
        """Assert or release the function's interrupt pin."""
        status = self.get(STATUS, 2) & ~INTX_STATUS
        self.put(STATUS, 2, status | (INTX_STATUS if level else 0))
        self._drive()

    def _drive(self) -> None:
        if self.irq is not None:
            off = self.get(COMMAND, 2) & Command.INTX_OFF.mask or self.messages is not None
            self.irq.set(bool(self.get(STATUS, 2) & INTX_STATUS and not off))

    @property
    def messages(self) -> Msi | Msix | None:
        """The capability by which it interrupts now; None means by its pin."""
        for capability in (self.msix, self.msi_capability):
            if capability is not None and capability.is_enabled:
                return capability
        return None

    def msi(self, n: int) -> bool:
        """Interrupt with message n; False if the guest wants the pin instead."""
        messages = self.messages
        if messages is not None:
            messages.trigger(n)
        return messages is not None

    def _send(self, address: int, data: int) -> None:
        """A message is a write by the function: to the local APICs, or wherever it was told to."""
        if not self.is_master:
            return
        if address >> 20 == LOCAL_APICS:
            self._deliver(Message.from_msi(address, data))
            return
        with suppress(IndexError):  # an address without memory: on a bus, nobody takes the write
            self.dma.write(address, data.to_bytes(4, "little"))
