"""The slots of the PCI bus, while the guest runs: what has come, what is to go, and what went.

Source: ours; the shape is that of QEMU's "ACPI PCI hotplug interface".  The ACPI tables tell a
guest where it is and what to do with it (`acpi_hotplug`): a general-purpose event says that bits
have appeared here.

Not modeled: a device that is pulled without asking.

Invariants: a slot is given up only if that was asked for and the guest has agreed; a bit is cleared
by the guest, by writing a 1, or by a reset.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from understudy.devices import Device
from understudy.devices.acpi_hotplug import CAME, EJECT, GOES, HOTPLUG_PORTS
from understudy.devices.wires import Wires
from understudy.machine.bus import ports
from understudy.state import U32

SLOTS: Final = range(1, 32)  # 0 is the host bridge


@dataclass
class PciHotplugState:
    """Slots, as bits."""

    came: U32 = 0  # the guest has not looked at them yet
    goes: U32 = 0  # the guest has not heard of it yet
    asked: U32 = 0  # and those of which it has not agreed yet


class PciHotplug(Device, name="pci_hotplug"):
    """The registers.  `notify` tells the guest to look; `eject` takes out what is in a slot."""

    spans = (ports(HOTPLUG_PORTS, width=4),)
    state: PciHotplugState

    def __init__(
        self,
        wires: Wires,
        *,
        notify: Callable[[], None] = lambda: None,
        eject: Callable[[int], None] = lambda slot: None,
    ) -> None:
        super().__init__(wires)
        self.notify, self.eject = notify, eject
        self.state = self.power_on()

    def power_on(self) -> PciHotplugState:
        return PciHotplugState()

    def arrive(self, slot: int) -> None:
        """Something was put into it."""
        self.state.came |= 1 << slot
        self.notify()

    def ask(self, slot: int) -> None:
        """The guest is to give it up."""
        self.state.goes |= 1 << slot
        self.state.asked |= 1 << slot
        self.notify()

    def read(self, region: int, offset: int, size: int) -> int:
        s = self.state
        block = s.came << 8 * CAME | s.goes << 8 * GOES
        return block >> 8 * offset & (1 << 8 * size) - 1

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        s, start = self.state, offset & -4
        bits = value << 8 * (offset - start) & 0xFFFF_FFFF
        if start == CAME:
            s.came &= ~bits
        elif start == GOES:
            s.goes &= ~bits
        elif start == EJECT:
            for slot in SLOTS:
                if bits & s.asked & 1 << slot:
                    s.asked &= ~(1 << slot)
                    s.goes &= ~(1 << slot)
                    self.eject(slot)
