"""VM generation ID: the number in memory, who changes it, and what survives."""

import json

import pytest

from understudy.clock import ManualClock
from understudy.devices.vmgenid import FIRST, VmGenId, derived
from understudy.devices.wires import Wires
from understudy.machine.physical import PhysicalMemory

GPA, OTHER = 0x30, bytes(range(16))


class Ram(PhysicalMemory):
    """A little memory."""

    def __init__(self) -> None:
        self.content = bytearray(0x100)

    def read(self, gpa: int, length: int, /) -> bytes:
        return bytes(self.content[gpa : gpa + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        self.content[gpa : gpa + len(data)] = data


class Bench:
    def __init__(self) -> None:
        self.ram, self.told = Ram(), 0
        self.part = VmGenId(Wires(ManualClock(), dma=self.ram), gpa=GPA, notify=self._tell)

    def _tell(self) -> None:
        self.told += 1
        assert self.number == self.part.state.generation  # it is there before the guest hears

    @property
    def number(self) -> bytes:
        return self.ram.read(GPA, 16)


def test_a_new_number_is_written_and_told() -> None:
    b = Bench()
    b.part.install()
    assert (b.number, b.told) == (FIRST, 0)
    b.part.renew(OTHER)
    assert (b.number, b.told) == (OTHER, 1)


def test_it_survives_a_reset_and_a_snapshot_without_a_word() -> None:
    b = Bench()
    b.part.renew(OTHER)
    b.part.reset()
    assert b.part.state.generation == OTHER
    other = Bench()
    other.part.load(json.loads(json.dumps(b.part.save())))
    other.part.install()
    assert (other.number, other.told) == (OTHER, 0)


def test_each_clone_of_each_clone_has_its_own() -> None:
    numbers = {FIRST} | {derived(FIRST, n) for n in range(1, 9)}
    numbers |= {derived(derived(FIRST, m), n) for m in range(1, 9) for n in range(1, 9)}
    assert len(numbers) == 1 + 8 + 64
    assert derived(FIRST, 3) == derived(FIRST, 3)


def test_a_number_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="15 bytes: expected 16"):
        Bench().part.renew(bytes(15))
    with pytest.raises(ValueError, match="17 bytes: expected 16"):
        VmGenId(Wires(ManualClock()), generation=bytes(17))
