"""KVM clock: the structures that the guest reads."""

import struct

import pytest

from understudy.clock import ManualClock
from understudy.devices.kvmclock import MSRS, KvmClock
from understudy.devices.wires import Wires


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock(5_000)
        self.memory = bytearray(4096)
        self.versions: list[int] = []
        self.device = KvmClock(
            Wires(self.clock, dma=self), epoch_ns=1_700_000_000_000_000_123, vcpus=2
        )

    def read(self, gpa: int, length: int, /) -> bytes:
        return bytes(self.memory[gpa : gpa + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        if gpa + len(data) > len(self.memory):
            raise IndexError(gpa)
        self.memory[gpa : gpa + len(data)] = data
        self.versions.append(data[0])


def guest_time(memory: bytes, gpa: int, tsc: int) -> int:
    """The guest's side of the protocol."""
    version, _, stamp, system, multiplier, shift, flags = struct.unpack_from(
        "<IIQQIbB", memory, gpa
    )
    assert version % 2 == 0 and flags == 1
    return system + ((tsc - stamp << shift) * multiplier >> 32)


@pytest.mark.parametrize("msr", [0x12, 0x4B564D01])
def test_system_time_is_the_tsc(msr: int) -> None:
    b = Bench()
    b.device.wrmsr(1, msr, 0x101)
    assert b.device.rdmsr(1, msr) == 0x101 and b.device.rdmsr(0, msr) == 0
    for tsc in (5_000, 123_456_789_012, 1 << 50):
        assert guest_time(b.memory, 0x100, tsc) == tsc
    assert [v % 2 for v in b.versions] == [1, 0]


@pytest.mark.parametrize("msr", [0x11, 0x4B564D00])
def test_wall_clock_is_the_time_at_power_on(msr: int) -> None:
    b = Bench()
    b.device.wrmsr(0, msr, 0x200)
    version, seconds, ns = struct.unpack_from("<III", b.memory, 0x200)
    assert version % 2 == 0 and (seconds, ns) == (1_700_000_000, 123)
    assert b.device.rdmsr(0, msr) == 0x200


def test_disabled_writes_nothing() -> None:
    b = Bench()
    b.device.wrmsr(0, 0x12, 0x100)
    assert not any(b.memory)


@pytest.mark.parametrize("value", [0xFFFF_FFFF_FFFF_FFFF, 4095])
def test_an_address_without_memory_is_ignored(value: int) -> None:
    b = Bench()
    for msr in MSRS - {0x4B564D03}:
        b.device.wrmsr(0, msr, value)


def test_other_msrs_are_not_ours() -> None:
    b = Bench()
    with pytest.raises(KeyError):
        b.device.rdmsr(0, 0x10)
    with pytest.raises(KeyError):
        b.device.wrmsr(0, 0x10, 0)


def test_steal_time_is_written_when_a_vcpu_goes_on() -> None:
    b = Bench()
    b.device.stolen(1, 7)
    assert not any(b.memory)
    b.device.wrmsr(1, 0x4B564D03, 0x241)
    assert (b.device.rdmsr(1, 0x4B564D03), b.device.rdmsr(0, 0x4B564D03)) == (0x241, 0)
    b.device.stolen(1, 1 << 40)
    ns, version, flags, preempted = struct.unpack_from("<QIIB", b.memory, 0x240)
    assert (ns, version % 2, flags, preempted) == (1 << 40, 0, 0, 0)
    b.device.stolen(0, 9)
    assert struct.unpack_from("<Q", b.memory, 0x240) == (1 << 40,)
    b.device.wrmsr(1, 0x4B564D03, 0xFFFF_FFC1)  # no memory there: ignored
    b.device.stolen(1, 5)
    with pytest.raises(KeyError):
        b.device.wrmsr(1, 0x4B564D03, 0x203)
