"""MSI and MSI-X: interrupts that a PCI function sends as memory writes.

Source: PCI Local Bus Specification 3.0, "Message Signaled Interrupts"; what address and data mean
to a processor is in SDM 3A, "Message Signalled Interrupts".

Not modeled: MSI without 64-bit addresses or without per-vector masks, which are optional.

Invariants: a masked vector is pending until it is unmasked, and is then sent once, however often
it came; while it is enabled, a vector that is not masked is never pending.
"""

import struct
from collections.abc import Callable

from understudy.arch.bits import Bit, Bits, Field
from understudy.devices.pci_config import ConfigSpace

Send = Callable[[int, int], None]  # address, data

# --- The specification ---


class MsiControl(Bits, width=16):
    """ "Message Control for MSI"."""

    MASKS = Bit(8)  # per-vector masking capable
    WIDE = Bit(7)  # 64-bit address capable
    MME = Field(6, 4)  # multiple message enable: log2 of the vectors in use
    MMC = Field(3, 1)  # multiple message capable: log2 of the vectors wanted
    ENABLE = Bit(0)


class MsixControl(Bits, width=16):
    """ "Message Control for MSI-X"."""

    ENABLE = Bit(15)
    MASK = Bit(14)  # function mask: all vectors
    SIZE = Field(10, 0)  # of the table, minus 1


MSIX_ENABLE, MSIX_MASK = MsixControl.ENABLE.mask, MsixControl.MASK.mask
MSI_ID, MSIX_ID = 0x05, 0x11
CONTROL, ADDRESS, DATA, MASK, PENDING = 2, 4, 12, 16, 20  # offsets in the MSI capability
ENTRY = struct.Struct("<QII")  # "MSI-X Table Structure": address, data, vector control
MASKED = ENTRY.pack(0, 0, 1)  # an entry after reset


# --- The capabilities ---


class Msi:
    """The MSI capability, with 1 to 32 vectors."""

    def __init__(self, space: ConfigSpace, count: int, send: Send) -> None:
        if count not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"{count} MSI vectors: expected a power of two up to 32")
        self.space, self.count, self.send = space, count, send
        control = MsiControl(MASKS=1, WIDE=1, MMC=count.bit_length() - 1)
        masks = (1 << count) - 1
        self.offset = space.add_capability(
            MSI_ID,
            struct.pack("<HQHHII", int(control), 0, 0, 0, 0, 0),
            struct.pack("<HQHHII", 0x71, (1 << 64) - 4, 0xFFFF, 0, masks, 0),
        )

    @property
    def end(self) -> int:
        """The offset after it."""
        return self.offset + 24

    @property
    def is_enabled(self) -> bool:
        return bool(self.space.get(self.offset + CONTROL, 1) & 1)

    def trigger(self, n: int) -> None:
        """Send vector n, or the one it falls on if the guest has enabled fewer."""
        enabled = self.space.get(self.offset + CONTROL, 1) >> 4 & 7
        n %= min(1 << enabled, self.count)
        if self.space.get(self.offset + MASK, 4) >> n & 1:
            self._set_pending(self.space.get(self.offset + PENDING, 4) | 1 << n)
        else:
            self._send(n)

    def changed(self) -> None:
        """The guest wrote to its registers: what waits and is no longer masked, goes."""
        pending = self.space.get(self.offset + PENDING, 4)
        ready = pending & ~self.space.get(self.offset + MASK, 4)
        if ready and self.is_enabled:
            self._set_pending(pending & ~ready)
            for n in range(self.count):
                if ready >> n & 1:
                    self._send(n)

    def _set_pending(self, bits: int) -> None:
        self.space.put(self.offset + PENDING, 4, bits)

    def _send(self, n: int) -> None:
        # The number of the vector replaces the low bits of the data that the guest wrote.
        data = self.space.get(self.offset + DATA, 2)
        enabled = self.space.get(self.offset + CONTROL, 1) >> 4 & 7
        low = min(1 << enabled, self.count) - 1
        self.send(self.space.get(self.offset + ADDRESS, 8), data & ~low | n & low)


class Msix:
    """The MSI-X capability; what stands behind its BAR, table first, is this object."""

    def __init__(self, space: ConfigSpace, bar: int, count: int, send: Send) -> None:
        if not 1 <= count <= 2048:
            raise ValueError(f"{count} MSI-X vectors: expected 1 to 2048")
        self.space, self.count, self.send = space, count, send
        self.pba = count * ENTRY.size
        space.state.table[:] = MASKED * count
        space.state.pending[:] = bytes(-(-count // 64) * 8)
        self.bar_bytes = max(0x1000, 1 << (self.pba + len(space.state.pending) - 1).bit_length())
        self.offset = space.add_capability(
            MSIX_ID, struct.pack("<HII", count - 1, bar, self.pba | bar), b"\x00\xc0"
        )

    @property
    def end(self) -> int:
        """The offset after it."""
        return self.offset + 12

    @property
    def is_enabled(self) -> bool:
        return bool(self.space.get(self.offset + CONTROL, 2) & MSIX_ENABLE)

    def trigger(self, n: int) -> None:
        """Send vector n, or keep it pending while it is masked."""
        address, data, control = ENTRY.unpack_from(self.space.state.table, n * ENTRY.size)
        if control & 1 or self._is_masked:
            self.space.state.pending[n >> 3] |= 1 << (n & 7)
        else:
            self.send(address, data)

    @property
    def _is_masked(self) -> bool:
        return bool(self.space.get(self.offset + CONTROL, 2) & MSIX_MASK)

    def changed(self) -> None:
        """The guest wrote to its registers."""
        if any(self.space.state.pending):
            self._release(range(self.count))

    def _release(self, vectors: range) -> None:
        """Send those of the vectors that wait and may go now."""
        if not self.is_enabled or self._is_masked:
            return
        state = self.space.state
        for n in vectors:
            if state.pending[n >> 3] >> (n & 7) & 1:
                address, data, control = ENTRY.unpack_from(state.table, n * ENTRY.size)
                if not control & 1:
                    state.pending[n >> 3] &= ~(1 << (n & 7))
                    self.send(address, data)

    # --- the BAR ---

    def read(self, region: int, offset: int, size: int) -> int:
        """A load from the table, or from the pending bits behind it."""
        state = self.space.state
        if offset < self.pba:
            return int.from_bytes(state.table[offset : offset + size], "little")
        offset -= self.pba
        return int.from_bytes(state.pending[offset : offset + size], "little")

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        """A store to the table; the pending bits are read-only."""
        end = min(offset + size, self.pba)
        if offset >= end:
            return
        table = self.space.state.table
        table[offset:end] = value.to_bytes(size, "little")[: end - offset]
        self._release(range(offset // ENTRY.size, (end - 1) // ENTRY.size + 1))
