"""The PCI function of a virtio device: its identity, its BARs, and where its structures lie.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "PCI Device Layout" and "Virtio Structure PCI
Capabilities".

Invariant: the window of the configuration space does what an access to the BAR does, no more.
"""

import struct
from typing import Final

from understudy.devices.pci_function import Function
from understudy.machine.bus import Owner

# --- The specification ---

VENDOR_ID: Final = 0x1AF4
FIRST_DEVICE: Final = 0x1040  # PCI device ID of virtio device 0, "PCI Device Discovery"
CAPABILITY: Final = 0x09  # vendor-specific
COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = range(1, 6)  # VIRTIO_PCI_CAP_*
WINDOW_WRITABLE: Final = bytes(2) + b"\xff" + bytes(3) + b"\xff" * 12  # of VIRTIO_PCI_CAP_PCI_CFG

# --- Ours: what lies where ---

REGISTERS, MSIX_BAR = 0, 2  # BARs
COMMON, ISR, SPECIFIC, NOTIFY = 0, 0x1000, 0x2000, 0x3000  # in the first
PAGE_BYTES, BAR_BYTES = 0x1000, 0x4000
NOTIFY_UNIT: Final = 4  # notify_off_multiplier


class VirtioFunction(Function):
    """It has a window of its BAR in the configuration space, too."""

    def __init__(
        self, kind: int, class_code: int, queues: int, registers: Owner, common_bytes: int
    ) -> None:
        """`kind`: "Device Types".  What stands behind BAR 0 is `registers`."""
        super().__init__(
            vendor=VENDOR_ID, device=FIRST_DEVICE + kind, class_code=class_code, revision=1,
            subsystem=(VENDOR_ID, FIRST_DEVICE + kind), is_express=True,
        )  # fmt: skip
        self.registers = registers
        self.add_bar(REGISTERS, BAR_BYTES, registers)
        self.add_msix(MSIX_BAR, queues + 1)
        unit = NOTIFY_UNIT.to_bytes(4, "little")
        for type_, offset, size, more in (
            (COMMON_CFG, COMMON, common_bytes, b""),
            (NOTIFY_CFG, NOTIFY, NOTIFY_UNIT * queues, unit),
            (ISR_CFG, ISR, 1, b""),
            (DEVICE_CFG, SPECIFIC, PAGE_BYTES, b""),
        ):
            self.add_capability(CAPABILITY, _capability(type_, offset, size, more))
        self.window = self.add_capability(
            CAPABILITY, _capability(PCI_CFG, 0, 0, bytes(4)), WINDOW_WRITABLE
        )

    def _target(self) -> tuple[int, int] | None:
        """Where the window is: (offset, bytes) in BAR 0."""
        at = self.window
        bar, offset, size = self.get(at + 4, 1), self.get(at + 8, 4), self.get(at + 12, 4)
        if bar != REGISTERS or size not in (1, 2, 4) or offset % size or offset >= BAR_BYTES:
            return None
        return offset, size

    def _is_data(self, offset: int, size: int) -> bool:
        data = self.window + 16
        return offset < data + 4 and offset + size > data

    def config_read(self, offset: int, size: int) -> int:
        if self._is_data(offset, size) and (target := self._target()):
            self.put(self.window + 16, 4, self.registers.read(REGISTERS, *target))
        return super().config_read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        super().config_write(offset, size, value)
        if self._is_data(offset, size) and (target := self._target()):
            at, width = target
            self.registers.write(REGISTERS, at, self.get(self.window + 16, width), width)


def _capability(type_: int, offset: int, size: int, more: bytes) -> bytes:
    """ "Virtio Structure PCI Capabilities", from cap_len on."""
    return struct.pack("<BBBBHII", 16 + len(more), type_, REGISTERS, 0, 0, offset, size) + more
