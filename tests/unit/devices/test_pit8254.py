"""8254: modes, latches, read-back, the gate, and counter 0's interrupt."""

import pytest

from understudy.clock import ManualClock
from understudy.devices.pit8254 import Pit8254, ns_at, ticks_at
from understudy.devices.wires import Wires
from understudy.machine.bus import Line


class Bench:
    """A timer whose clock is moved by ticks."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.edges: list[int] = []
        self.line = Line(self._edge)
        self.pit = Pit8254(Wires(self.clock, lines=(self.line,)))

    def _edge(self, level: bool) -> None:
        if level:
            self.edges.append(ticks_at(self.clock.now()))

    def to(self, tick: int) -> None:
        self.clock.advance(ns_at(tick) - self.clock.now())

    def program(self, n: int, mode: int, count: int, bcd: int = 0) -> None:
        self.pit.write(0, 3, n << 6 | 0x30 | mode << 1 | bcd, 1)
        self.pit.write(0, n, count & 0xFF, 1)
        self.pit.write(0, n, count >> 8, 1)

    def count(self, n: int) -> int:
        self.pit.write(0, 3, n << 6, 1)
        return self.pit.read(0, n, 1) | self.pit.read(0, n, 1) << 8

    def out(self, n: int) -> int:
        self.pit.write(0, 3, 0xE0 | 2 << n, 1)
        return self.pit.read(0, n, 1) >> 7


@pytest.mark.parametrize("tick", [0, 1, 17, 1193182, 10**15])
def test_ticks_and_nanoseconds_agree(tick: int) -> None:
    assert ticks_at(ns_at(tick)) == tick
    assert tick == 0 or ticks_at(ns_at(tick) - 1) == tick - 1


def test_mode_0_counts_once_and_its_output_stays_high() -> None:
    b = Bench()
    b.program(0, 0, 100)
    b.to(40)
    assert (b.count(0), b.out(0)) == (60, 0)
    b.to(99)
    assert (b.count(0), b.out(0), b.edges) == (1, 0, [])
    b.to(1000)
    assert (b.count(0), b.out(0), b.edges) == (65536 - 900, 1, [100])
    assert b.line.level


@pytest.mark.parametrize("mode", [2, 3, 6, 7])
def test_periodic_modes_interrupt_every_period(mode: int) -> None:
    b = Bench()
    b.program(0, mode, 1000)
    b.edges.clear()
    b.to(5500)
    assert b.edges == [1000, 2000, 3000, 4000, 5000]
    assert b.count(0) == (500 if mode & 1 == 0 else 1000)


def test_missed_periods_make_one_edge() -> None:
    b = Bench()
    b.program(0, 2, 10)
    b.edges.clear()
    b.clock.ns = ns_at(12345)
    assert b.clock.run_due() == 1
    assert b.edges == [12345]
    b.to(12350)
    assert b.edges == [12345, 12350]


def test_count_0_is_65536_and_bcd_0_is_10000() -> None:
    b = Bench()
    b.program(0, 2, 0)
    b.edges.clear()
    b.to(65536)
    assert b.edges == [65536]
    b = Bench()
    b.program(2, 2, 0, bcd=1)
    b.pit.write(1, 0, 1, 1)
    b.to(1)
    assert b.count(2) == 0x9999


def test_mode_2_new_count_waits_for_the_end_of_the_period() -> None:
    b = Bench()
    b.program(0, 2, 100)
    b.edges.clear()
    b.to(250)
    b.pit.write(0, 0, 30, 1)
    b.pit.write(0, 0, 0, 1)
    b.to(340)
    assert b.edges == [100, 200, 300, 330]


def test_mode_3_new_count_waits_for_the_half_cycle() -> None:
    b = Bench()
    b.program(0, 3, 100)
    b.edges.clear()
    b.to(110)
    b.pit.write(0, 0, 20, 1)
    b.pit.write(0, 0, 0, 1)
    b.to(200)
    assert b.edges == [100, 160, 180, 200]


def test_mode_3_is_a_square() -> None:
    b = Bench()
    b.pit.write(1, 0, 1, 1)
    b.program(2, 3, 5)
    levels = []
    for tick in range(10):
        b.to(tick)
        levels.append(b.out(2))
    assert levels == [1, 1, 1, 0, 0] * 2


def test_latch_holds_until_both_bytes_are_read() -> None:
    b = Bench()
    b.program(0, 2, 0x1000)
    b.pit.write(0, 3, 0x00, 1)
    b.to(0x234)
    b.pit.write(0, 3, 0x00, 1)
    assert [b.pit.read(0, 0, 1), b.pit.read(0, 0, 1)] == [0x00, 0x10]
    assert [b.pit.read(0, 0, 1), b.pit.read(0, 0, 1)] == [0xCC, 0x0D]


def test_read_back_gives_status_before_count() -> None:
    b = Bench()
    b.program(2, 4, 7)
    b.pit.write(0, 3, 0xC8, 1)
    assert b.pit.read(0, 2, 1) == 0x80 | 0x30 | 4 << 1
    assert b.pit.read(0, 2, 1) == 7
    b.pit.write(0, 3, 0xB0, 1)
    b.pit.write(0, 3, 0xE8, 1)
    assert b.pit.read(0, 2, 1) == 0x40 | 0x30  # OUT low, null count
    assert b.pit.read(0, 3, 1) == 0xFF


def test_the_gate_of_counter_2_pauses_and_port_61_shows_its_output() -> None:
    b = Bench()
    b.program(2, 0, 100)
    b.to(50)
    assert b.count(2) == 100
    b.pit.write(1, 0, 1, 1)
    b.to(120)
    assert b.pit.read(1, 0, 1) & 0x21 == 0x01
    b.pit.write(1, 0, 0, 1)
    b.to(500)
    b.pit.write(1, 0, 3, 1)
    b.to(529)
    assert b.pit.read(1, 0, 1) & 0x23 == 0x03
    b.to(530)
    assert b.pit.read(1, 0, 1) & 0x23 == 0x23


def test_mode_1_starts_with_the_gate_and_starts_again_with_it() -> None:
    b = Bench()
    b.program(2, 1, 10)
    b.to(5)
    assert b.out(2) == 1
    b.pit.write(1, 0, 1, 1)
    b.to(14)
    assert b.out(2) == 0
    b.pit.write(1, 0, 0, 1)
    b.pit.write(1, 0, 1, 1)
    b.to(23)
    assert b.out(2) == 0
    b.to(24)
    assert b.out(2) == 1


@pytest.mark.parametrize("mode", [4, 5])
def test_strobes_are_low_for_one_tick(mode: int) -> None:
    b = Bench()
    if mode == 4:
        b.pit.write(1, 0, 1, 1)
    b.program(2, mode, 3)
    if mode == 5:
        b.pit.write(1, 0, 1, 1)
    levels = []
    for tick in range(6):
        b.to(tick)
        levels.append(b.out(2))
    assert levels == [1, 1, 1, 0, 1, 1]


def test_mode_4_interrupts_once() -> None:
    b = Bench()
    b.program(0, 4, 50)
    b.edges.clear()
    b.to(500)
    assert b.edges == [51]


def test_refresh_bit_toggles() -> None:
    b = Bench()
    seen = set()
    for tick in range(0, 100, 9):
        b.to(tick)
        seen.add(b.pit.read(1, 0, 1) & 0x10)
    assert seen == {0, 0x10}
