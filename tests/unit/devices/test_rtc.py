"""MC146818A: the time of day, its interrupts, and CMOS RAM."""

from datetime import UTC, datetime

import pytest

from understudy.clock import NS_PER_SECOND, ManualClock
from understudy.devices.rtc import Rtc, RtcState
from understudy.devices.wires import Wires
from understudy.machine.bus import Line
from understudy.state import plain, restore

EPOCH = int(datetime(2023, 12, 31, 23, 59, 58, tzinfo=UTC).timestamp()) * NS_PER_SECOND


class Bench:
    def __init__(self, epoch_ns: int = EPOCH) -> None:
        self.clock = ManualClock()
        self.irqs: list[int] = []
        wires = Wires(self.clock, lines=(Line(self._irq),))
        self.rtc = Rtc(wires, epoch_ns=epoch_ns, ram={0x15: 0x80})

    def _irq(self, level: bool) -> None:
        if level:
            self.irqs.append(self.clock.now())

    def __getitem__(self, index: int) -> int:
        self.rtc.write(0, 0, index, 1)
        return self.rtc.read(0, 1, 1)

    def __setitem__(self, index: int, value: int) -> None:
        self.rtc.write(0, 0, index, 1)
        self.rtc.write(0, 1, value, 1)

    def date(self) -> list[int]:
        return [self[i] for i in (0x32, 9, 8, 7, 4, 2, 0)]


def test_date_in_bcd_rolls_over() -> None:
    b = Bench()
    assert b.date() == [0x20, 0x23, 0x12, 0x31, 0x23, 0x59, 0x58]
    assert b[6] == 1  # a Sunday
    b.clock.advance(2 * NS_PER_SECOND)
    assert b.date() == [0x20, 0x24, 0x01, 0x01, 0x00, 0x00, 0x00]
    assert b[6] == 2


def test_binary_and_12_hours() -> None:
    b = Bench()
    b[0x0B] = 0x04
    assert b.date() == [20, 23, 12, 31, 0x80 | 11, 59, 58]
    b.clock.advance(2 * NS_PER_SECOND)
    assert b[4] == 12  # 12 AM


def test_setting_the_time() -> None:
    b = Bench()
    b[0x0B] = 0x82
    b.clock.advance(10 * NS_PER_SECOND)
    assert b.date()[-1] == 0x58  # halted
    for index, value in ((0x32, 0x19), (9, 0x99), (8, 2), (7, 0x28), (4, 1), (2, 2), (0, 3)):
        b[index] = value
    b[0x0B] = 0x02
    assert b.date() == [0x19, 0x99, 2, 0x28, 1, 2, 3]
    b.clock.advance(86400 * NS_PER_SECOND)
    assert b.date() == [0x19, 0x99, 3, 1, 1, 2, 3]


def test_the_last_years_survive_a_snapshot() -> None:
    """Their nanoseconds have more bits than a number of a snapshot."""
    b = Bench()
    b[0x0B] = 0x82
    b[0x32], b[9] = 0x99, 0x98
    b[0x0B] = 0x02
    other = Bench()
    other.rtc.state = restore(RtcState, plain(b.rtc.state))
    assert other.date()[:2] == b.date()[:2] == [0x99, 0x98]


def test_update_in_progress_is_announced() -> None:
    b = Bench()
    assert b[0x0A] == 0x26
    b.clock.advance(NS_PER_SECOND - 244_000)
    assert b[0x0A] == 0xA6
    b.clock.advance(244_000)
    assert b[0x0A] == 0x26


def test_periodic_interrupt_at_1024_hz() -> None:
    b = Bench()
    b[0x0B] = 0x42
    for _ in range(1024):
        b.clock.advance(NS_PER_SECOND // 1024 + 1)
        assert b[0x0C] & 0xC0 == 0xC0
    assert len(b.irqs) == 1024
    b[0x0B] = 0x02
    b.clock.advance(NS_PER_SECOND)
    assert len(b.irqs) == 1024


def test_the_line_stays_up_until_register_c_is_read() -> None:
    b = Bench()
    b[0x0B] = 0x12
    b.clock.advance(5 * NS_PER_SECOND)
    assert b.irqs == [NS_PER_SECOND]
    assert b[0x0C] & 0x90 == 0x90 and b[0x0C] == 0
    b.clock.advance(NS_PER_SECOND)
    assert b.irqs == [NS_PER_SECOND, 6 * NS_PER_SECOND]


@pytest.mark.parametrize(
    ("hour", "minute", "second", "after"),
    [
        (0x00, 0x00, 0x05, 7),
        (0xFF, 0xFF, 0xFF, 1),
        (0xFF, 0xFF, 0x58, 60),
        (0x23, 0x59, 0x57, 86399),
        (0xFF, 0x30, 0x00, 1802),
        (0x12, 0xFF, 0x00, 12 * 3600 + 2),
    ],
)
def test_alarm(hour: int, minute: int, second: int, after: int) -> None:
    b = Bench()
    b[5], b[3], b[1] = hour, minute, second
    b[0x0B] = 0x22
    assert b.clock.next_deadline() == after * NS_PER_SECOND
    b.clock.advance(after * NS_PER_SECOND)
    assert b.irqs == [after * NS_PER_SECOND] and b[0x0C] & 0xA0 == 0xA0


def test_an_alarm_that_never_matches_sets_no_timer() -> None:
    b = Bench()
    b[1] = 0x75
    b[0x0B] = 0x22
    assert b.clock.next_deadline() is None


def test_flags_are_set_without_their_interrupts() -> None:
    b = Bench()
    b[0x0C]
    assert b.clock.next_deadline() is None
    b.clock.advance(NS_PER_SECOND)
    assert b[0x0C] & 0x50 == 0x50 and not b.irqs


def test_cmos_ram_and_read_only_registers() -> None:
    b = Bench()
    assert b[0x15] == 0x80
    b[0x40] = 0x5A
    b[0x0D] = 0
    assert (b[0x40], b[0x0D]) == (0x5A, 0x80)
    assert b.rtc.read(0, 0, 1) == 0xFF
    b.rtc.write(0, 0, 0x80 | 0x40, 1)
    assert b.rtc.read(0, 1, 1) == 0x5A


def test_nonsense_in_the_date_is_survived() -> None:
    b = Bench()
    for index in (0, 2, 4, 6, 7, 8, 9, 0x32):
        for value in (0xFF, 0x00):
            b[index] = value
            b.date()
