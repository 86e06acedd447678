"""8042: what a driver that probes it sees, and the reset."""

import pytest

from understudy.clock import ManualClock
from understudy.devices.i8042 import I8042
from understudy.devices.wires import Wires
from understudy.machine.bus import Line


class Bench:
    def __init__(self) -> None:
        self.resets = 0
        self.line = Line(lambda level: None)
        self.chip = I8042(Wires(ManualClock(), lines=(self.line,)), restart=self._reset)

    def _reset(self) -> None:
        self.resets += 1

    def command(self, *bytes_: int) -> int | None:
        self.chip.write(1, 0, bytes_[0], 1)
        for value in bytes_[1:]:
            self.chip.write(0, 0, value, 1)
        return self.chip.read(0, 0, 1) if self.chip.read(1, 0, 1) & 1 else None


@pytest.mark.parametrize(
    ("bytes_", "answer"),
    [
        ((0xAA,), 0x55),
        ((0xAB,), 0x00),
        ((0xA9,), 0x01),
        ((0xD3, 0x5A), 0x5A),
        ((0xD2, 0x77), 0x77),
        ((0xD0,), 0x03),
        ((0xA8,), None),
        ((0x60, 0x45), None),
    ],
)
def test_commands(bytes_: tuple[int, ...], answer: int | None) -> None:
    assert Bench().command(*bytes_) == answer


def test_command_byte_and_keyboard_enable() -> None:
    b = Bench()
    b.command(0x60, 0x61)
    assert b.command(0x20) == 0x61
    b.command(0xAD)
    assert b.command(0x20) == 0x71
    b.command(0xAE)
    assert b.command(0x20) == 0x61


def test_the_aux_loop_shows_that_there_is_no_aux_port() -> None:
    b = Bench()
    b.chip.write(1, 0, 0xD3, 1)
    b.chip.write(0, 0, 0x5A, 1)
    assert b.chip.read(1, 0, 1) & 0x21 == 0x01


def test_a_byte_for_the_missing_keyboard_times_out_at_once_with_an_interrupt() -> None:
    b = Bench()
    b.command(0x60, 0x01)
    b.chip.write(0, 0, 0xF2, 1)
    assert b.line.level and b.chip.read(1, 0, 1) & 0x41 == 0x41
    assert b.chip.read(0, 0, 1) == 0xFE
    assert not b.line.level and b.chip.read(1, 0, 1) & 0x41 == 0


@pytest.mark.parametrize("bytes_", [(0xFE,), (0xF0,), (0xD1, 0xDE)])
def test_reset(bytes_: tuple[int, ...]) -> None:
    b = Bench()
    b.command(*bytes_)
    assert b.resets == 1


@pytest.mark.parametrize("bytes_", [(0xFF,), (0xD1, 0xDF)])
def test_no_reset(bytes_: tuple[int, ...]) -> None:
    b = Bench()
    b.command(*bytes_)
    assert b.resets == 0
