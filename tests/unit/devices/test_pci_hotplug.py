"""The registers of PCI slots: what came, what is to go, and when it goes."""

import pytest

from understudy.clock import ManualClock
from understudy.devices.acpi import Acpi
from understudy.devices.acpi_hotplug import HOTPLUGGED
from understudy.devices.board import Board
from understudy.devices.pc import HOTPLUG_PORT, PC
from understudy.devices.pci_hotplug import PciHotplug
from understudy.machine.physical import NoMemory

CAME, GOES, EJECT = 0, 4, 8


class Slots:
    """The part on a board of its own."""

    def __init__(self) -> None:
        self.told, self.ejected = 0, list[int]()
        row = {"at": 0x620, "notify": self._tell, "eject": self.ejected.append}
        self.board = Board(ManualClock(), rows=[("pci_hotplug", row)])
        self.part = self.board.part("pci_hotplug", PciHotplug)

    def _tell(self) -> None:
        self.told += 1

    def get(self, register: int, size: int = 4) -> int:
        return self.board.bus.port_read(0x620 + register, size)

    def put(self, register: int, value: int, size: int = 4) -> None:
        self.board.bus.port_write(0x620 + register, size, value)


def test_the_guest_hears_of_a_slot_and_clears_its_bit() -> None:
    s = Slots()
    s.part.arrive(3)
    s.part.arrive(31)
    assert s.told == 2 and (s.get(CAME), s.get(GOES)) == (1 << 31 | 1 << 3, 0)
    s.put(CAME, 1 << 3)
    assert s.get(CAME) == 1 << 31 and s.get(CAME + 3, 1) == 0x80
    s.put(CAME + 3, 0x80, 1)
    assert s.get(CAME) == 0


@pytest.mark.parametrize("bits", [1 << 3, 0xFFFF_FFFF])
def test_a_slot_is_given_up_only_if_that_was_asked_for(bits: int) -> None:
    s = Slots()
    s.put(EJECT, bits)
    s.part.arrive(3)
    s.put(EJECT, bits)
    assert s.ejected == []
    s.part.ask(3)
    s.put(GOES, s.get(GOES))
    assert s.get(GOES) == 0 and s.ejected == []
    s.put(EJECT, bits)
    s.put(EJECT, bits)
    assert s.ejected == [3]


def test_after_a_reset_nothing_was_asked_for() -> None:
    s = Slots()
    s.part.ask(3)
    s.board.reset()
    s.put(EJECT, 1 << 3)
    assert s.ejected == [] and s.get(GOES) == 0


def test_on_a_pc_an_event_of_acpi_tells_of_it() -> None:
    def nothing(*_: object) -> None:
        pass

    for eject in (None, nothing):
        pc = PC(
            ManualClock(), NoMemory(), power_off=nothing, reset=nothing, debug_exit=nothing,
            deliver=nothing, extint=nothing, com1=nothing, com2=nothing, eject=eject,
        )  # fmt: skip
        assert ("pci_hotplug" in pc.parts) == (eject is not None)
        assert pc.layout.hotplug_port == (None if eject is None else HOTPLUG_PORT)
    pc.part("pci_hotplug", PciHotplug).arrive(3)
    assert pc.part("acpi", Acpi).state.gpe_status == 1 << HOTPLUGGED
