"""The terminal's last line: taken, drawn at the right moments, given back."""

import pytest

from understudy.commands.last_line import LastLine, Rates

SAVE, RESTORE = b"\x1b7", b"\x1b8"


class Screen(bytearray):
    """What was written since the last look."""

    def __call__(self, data: bytes) -> None:
        self.extend(data)

    def taken(self) -> bytes:
        out = bytes(self)
        self.clear()
        return out


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def line(screen: Screen) -> LastLine:
    line = LastLine(screen)
    line.resized(24, 20)
    return line


def test_the_row_is_taken_and_given_back(line: LastLine, screen: Screen) -> None:
    assert (line.rows, screen.taken()) == (0, b"")
    assert line.show()
    assert line.rows == 1
    # A line feed and one up: should the cursor be in the last row, what is above scrolls.
    assert screen.taken() == b"\n\x1b[A" + SAVE + b"\x1b[1;23r" + RESTORE
    line.draw("counted")
    drawn = b"\x1b[24;1H\x1b[0;7m" + b"counted".ljust(20) + b"\x1b[0m"
    assert screen.taken() == SAVE + drawn + RESTORE
    line.hide()
    assert (line.rows, screen.taken()) == (0, SAVE + b"\x1b[r\x1b[24;1H\x1b[2K" + RESTORE)
    line.hide()
    line.draw("counted")
    assert screen.taken() == b""


def test_a_long_line_is_cut(line: LastLine, screen: Screen) -> None:
    line.show()
    line.draw("x" * 200)
    assert screen.count(b"x") == 20


@pytest.mark.parametrize(
    ("printed", "is_drawn"),
    [
        (b"text", True),
        (b"\x1b", False),
        (b"\x1b[", False),
        (b"\x1b[1;3", False),
        (b"\x1b[1;31m", True),
        (b"\x1b]0;title", False),
        (b"\x1b(", False),
        (b"\x1b[2J\x1b[?25", False),
    ],
)
def test_not_in_the_middle_of_the_guests_sequences(
    line: LastLine, screen: Screen, printed: bytes, is_drawn: bool
) -> None:
    line.show()
    screen.clear()
    for byte in printed:  # however it comes
        line.heard(bytes([byte]))
    line.draw("counted")
    assert bool(screen.taken()) == is_drawn


def test_a_new_size(line: LastLine, screen: Screen) -> None:
    line.show()
    line.draw("counted")
    screen.clear()
    line.resized(24, 20)
    assert screen.taken() == b""
    line.resized(40, 10)
    out = screen.taken()
    assert b"\x1b[1;39r" in out and b"\x1b[40;1H" in out and b"counted   \x1b[0m" in out


def test_a_window_that_is_too_small(screen: Screen) -> None:
    line = LastLine(screen)
    assert not line.show()  # nobody has told its size
    line.resized(3, 80)
    assert not line.show()
    assert (screen.taken(), line.rows) == (b"", 0)


def test_rates() -> None:
    times = iter([0.0, 2.0, 3.0, 4.0])
    rates = Rates(now=lambda: next(times))
    first = rates.line(1_500_000_000, {"instructions": 4_000_000, "exits": {"HLT": 8, "CPUID": 90}})
    assert first == " 1.5 s  4 M instructions  2 MIPS  49 exits/s: CPUID 45/s  HLT 4/s"
    counts = {"instructions": 24_000_000, "exits": {"HLT": 50_008, "CPUID": 90}}
    assert rates.line(0, counts).endswith("20 MIPS  50.0k exits/s: HLT 50.0k/s")
    assert rates.line(0, counts).endswith("0 MIPS  0 exits/s: none")
