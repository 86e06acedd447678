"""The configuration space of a PCI function: identity, writable bits, lists of capabilities.

Source: PCI Local Bus Specification 3.0, "Configuration Space"; PCI Express Base Specification,
"PCI Express Extended Capabilities" for what lies from 0x100 on.

Invariants: registers keep their read-only bits whatever is written; both lists of capabilities
end, and lie inside the space.
"""

from dataclasses import dataclass, field

from understudy.arch.bits import Bit, Bits

# --- The specification ---


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
CONVENTIONAL, EXTENDED = 0x100, 0x1000  # sizes of the space, and where the second list begins


# --- The space ---


@dataclass
class FunctionState:
    """The registers of one function, and its MSI-X structures."""

    config: bytearray = field(default_factory=bytearray)
    table: bytearray = field(default_factory=bytearray)  # MSI-X table
    pending: bytearray = field(default_factory=bytearray)  # MSI-X pending bits

    def copy(self) -> "FunctionState":
        """Another one with the same content."""
        return FunctionState(self.config[:], self.table[:], self.pending[:])


class ConfigSpace:
    """Registers of 256 bytes, or of 4096 for a PCI Express function."""

    def __init__(self, size: int) -> None:
        self.state = FunctionState(config=bytearray(size))
        self.writable = bytearray(size)
        self._free, self._last = 0x40, CAPABILITIES
        self._free_extended, self._last_extended = CONVENTIONAL, 0

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return len(self.writable)

    def get(self, offset: int, size: int) -> int:
        """A register's value."""
        return int.from_bytes(self.state.config[offset : offset + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """Set a register, read-only or not."""
        self.state.config[offset : offset + size] = value.to_bytes(size, "little")

    def let(self, offset: int, size: int, mask: int) -> None:
        """Let the guest write these bits."""
        self.writable[offset : offset + size] = mask.to_bytes(size, "little")

    def store(self, offset: int, size: int, value: int) -> None:
        """The guest writes; only bits that `let` gave free change."""
        mask = int.from_bytes(self.writable[offset : offset + size], "little")
        self.put(offset, size, self.get(offset, size) & ~mask | value & mask)

    def add_capability(self, id_: int, body: bytes, writable: bytes = b"") -> int:
        """Append to the list of capabilities; returns the offset of its first byte, the ID."""
        offset = self._free
        self._free = offset + 2 + len(body) + 3 & ~3
        if self._free > CONVENTIONAL:
            raise ValueError("the configuration space has no room for another capability")
        self.put(self._last, 1, offset)
        self._last = offset + 1
        self.put(offset, 2, id_)
        self._fill(offset + 2, body, writable)
        self.put(STATUS, 2, self.get(STATUS, 2) | HAS_CAPABILITIES)
        return offset

    def add_extended_capability(
        self, id_: int, version: int, body: bytes, writable: bytes = b""
    ) -> int:
        """Append to the list that begins at 0x100; returns the offset of its header."""
        offset = self._free_extended
        self._free_extended = offset + 4 + len(body) + 3 & ~3
        if self._free_extended > self.size:
            raise ValueError(f"{self.size} bytes of configuration space have no room for this")
        if self._last_extended:
            header = self.get(self._last_extended, 4) & 0xF_FFFF
            self.put(self._last_extended, 4, header | offset << 20)
        self._last_extended = offset
        self.put(offset, 4, id_ | version << 16)
        self._fill(offset + 4, body, writable)
        return offset

    def _fill(self, offset: int, body: bytes, writable: bytes) -> None:
        self.state.config[offset : offset + len(body)] = body
        self.writable[offset : offset + len(writable)] = writable
