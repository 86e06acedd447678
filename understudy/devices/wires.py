"""The socket of a device: everything through which it reaches what is outside of it.

Source: ours.  A board fills in what the socket offers; a device takes what it needs.  A part that
is put on no wire drives one that leads nowhere, so every device works in every socket.

Invariants: a device learns no address and no interrupt number here; all its direct memory access
goes through `dma`, which belongs to this requester alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from understudy.clock import Clock
from understudy.devices.message import Message
from understudy.devices.pci_function import Function
from understudy.machine.bus import Bus, Line
from understudy.machine.physical import NoMemory, PhysicalMemory


def _no_slot(function: Function) -> None:
    raise ValueError("this socket is no PCI slot; put a row for the part pci before this one")


def _no_requester(requester: int) -> PhysicalMemory:
    return NoMemory()


@dataclass
class Wires:
    """What one device is given."""

    clock: Clock
    dma: PhysicalMemory = field(default_factory=NoMemory)
    lines: tuple[Line, ...] = ()
    deliver: Callable[[Message], None] = lambda message: None  # to the local APICs
    slot: Callable[[Function], None] = _no_slot
    bus: Bus = field(default_factory=Bus)  # for bridges, which claim regions for others
    requester: Callable[[int], PhysicalMemory] = _no_requester  # and reach memory for others
    function: Function | None = None

    def line(self, n: int = 0) -> Line:
        """The device's n-th interrupt wire."""
        return self.lines[n] if n < len(self.lines) else Line()

    def plug(self, function: Function) -> Function:
        """Be this function in the socket's PCI slot; DMA is a bus master's from now on."""
        self.slot(function)
        self.function, self.dma = function, function.dma
        return function

    def msi(self, n: int = 0) -> bool:
        """Send the n-th message-signaled interrupt; False if the guest has them turned off."""
        return self.function is not None and self.function.msi(n)
