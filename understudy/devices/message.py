"""Interrupt messages: what an I/O APIC, or a device with MSI, sends to the local APICs.

Source: SDM 3A, "Message Signalled Interrupts"; Intel 82093AA data sheet, "Redirection Table".
Invariants: a message is plain and immutable.
"""

from enum import IntEnum
from typing import NamedTuple


class Delivery(IntEnum):
    """Delivery modes."""

    FIXED = 0
    LOWEST = 1
    SMI = 2
    NMI = 4
    INIT = 5
    START_UP = 6  # from a local APIC only
    EXTINT = 7


class Message(NamedTuple):
    """One interrupt on its way to one or more local APICs."""

    vector: int
    destination: int  # an APIC ID, or a set of logical ones
    logical: bool = False
    delivery: int = Delivery.FIXED
    level: bool = False  # level-triggered: the I/O APIC waits for the EOI

    @classmethod
    def from_msi(cls, address: int, data: int) -> "Message":
        """The message that a write of `data` to 0xFEExxxxx means."""
        return cls(
            vector=data & 0xFF,
            destination=address >> 12 & 0xFF,
            logical=bool(address & 4),
            delivery=data >> 8 & 7,
            level=bool(data & 0x8000),
        )
