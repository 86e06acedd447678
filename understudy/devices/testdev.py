"""Test device: what unit tests of kernels and of hypervisors want of a machine.

A register of four I/O ports that keeps what is written, a port for each interrupt request that
raises it (anything but 0) or lowers it (0), and a page of memory that is a device's.

Source: QEMU's `pc-testdev`, as kvm-unit-tests use it: the register at 0xE0, the ports from 0x2000
on, the memory at 0xFF000000.
Not modeled: ports beyond the interrupt requests of an AT; 2 is the cascade and has no wire.
Invariants: reads have no effect; the register's bytes are its four ports.
"""

from dataclasses import dataclass, field

from understudy.arch.address import PAGE
from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.machine.bus import mmio, ports

REQUESTS = tuple(irq for irq in range(16) if irq != 2)
REGISTER, REQUEST, MEMORY = range(3)


@dataclass
class TestDeviceState:
    """What was written."""

    register: int = 0
    memory: bytes = field(default_factory=lambda: bytes(PAGE))


class TestDevice(Device, name="testdev"):
    """The register, the interrupt requests and the memory."""

    spans = (ports(4, width=4), ports(16), mmio(PAGE))
    state: TestDeviceState

    def __init__(self, wires: Wires) -> None:
        super().__init__(wires)
        for n, irq in enumerate(REQUESTS):
            self.lines[f"irq{irq}"] = wires.line(n)
        self.state = self.power_on()

    def power_on(self) -> TestDeviceState:
        return TestDeviceState()

    def read(self, region: int, offset: int, size: int) -> int:
        if region == REGISTER:
            return self.state.register >> 8 * offset & (1 << 8 * size) - 1
        if region == MEMORY:
            return int.from_bytes(self.state.memory[offset : offset + size], "little")
        line = self.lines.get(f"irq{offset}")
        return int(line is not None and line.level)

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        if region == REGISTER:
            mask = (1 << 8 * size) - 1 << 8 * offset
            self.state.register = self.state.register & ~mask | value << 8 * offset & mask
        elif region == MEMORY:
            memory, data = self.state.memory, value.to_bytes(size, "little")
            self.state.memory = memory[:offset] + data + memory[offset + size :]
        elif (line := self.lines.get(f"irq{offset}")) is not None:
            line.set(value != 0)
