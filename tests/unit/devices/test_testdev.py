"""The test device, on a board where kernels' unit tests look for it.

Source: kvm-unit-tests' use of QEMU's `pc-testdev`.
"""

import pytest

from understudy.devices.testdev import REQUESTS
from understudy.vm import VM


def test_the_register_keeps_what_its_four_ports_are_written() -> None:
    with VM("1M", devices=[("testdev", {})]) as vm:
        vm.bus.port_write(0xE0, 4, 0x4433_2211)
        assert [vm.bus.port_read(0xE0 + n, 1) for n in range(4)] == [0x11, 0x22, 0x33, 0x44]
        vm.bus.port_write(0xE2, 2, 0xABCD)
        assert vm.bus.port_read(0xE0, 4) == 0xABCD_2211


@pytest.mark.parametrize("irq", REQUESTS)
def test_a_port_raises_and_lowers_an_interrupt_request(irq: int) -> None:
    with VM("1M", devices=[("testdev", {})]) as vm:
        heard: list[tuple[int, bool]] = []
        vm.bus.port_write(0x43, 1, 0x30)  # the timer lets go of its request, too
        vm.pc.interrupt = lambda *change: heard.append(change)
        vm.bus.port_write(0x2000 + irq, 1, 1)
        assert vm.bus.port_read(0x2000 + irq, 1) == 1
        vm.bus.port_write(0x2000 + irq, 1, 0)
        assert heard == [(irq, True), (irq, False)]


def test_its_page_of_memory_is_a_devices() -> None:
    with VM("1M", devices=[("testdev", {})]) as vm:
        vm.bus.mmio_write(0xFF00_0FF8, 8, 0x8877_6655_4433_2211)
        assert vm.bus.mmio_read(0xFF00_0FFC, 4) == 0x8877_6655
        assert vm.memory.hpa(0xFF00_0000) is None
