"""How a balloon is steered: at which rate, and what is said of guests that do not play along."""

import struct
from collections.abc import Callable

import pytest

from tests.unit.devices.virtio.driver import Driver
from understudy.clock import NS_PER_SECOND
from understudy.devices.virtio.balloon import Balloon
from understudy.machine.ballooned import Ballooned
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.overcommit.balloon import PATIENCE, Standing, Steering

FEATURES = 1 << 32 | 1 << 1
FRAMES = 4096


class Guest:
    """A driver on a balloon with real pages; what it does each second is up to the test."""

    def __init__(self, *, rate: int = 300) -> None:
        self.driver = Driver("virtio_balloon")
        part = self.driver.device
        assert isinstance(part, Balloon)
        self.memory = GuestMemory(Host("32M"), FRAMES * 4096)
        self.memory.populate()
        part.pages = Ballooned(self.memory)
        self.balloon = part
        self.steering = Steering(self.driver.clock, part, rate=rate)
        self.said: list[Standing] = []
        self.steering.on_change.append(lambda standing, why: self.said.append(standing))
        self.inside = 0

    def start(self) -> None:
        self.driver.start(FEATURES)

    def move(self, most: int, *, name: bool = True) -> None:
        """Go so many pages towards the target, as a driver does, and say so."""
        by = max(-most, min(most, self.balloon.target - self.inside))
        pages = range(min(self.inside, self.inside + by), max(self.inside, self.inside + by))
        if pages and name:
            self.driver.request(0 if by > 0 else 1, struct.pack(f"<{len(pages)}I", *pages), 0)
        self.inside += by
        self.say(self.inside)

    def say(self, actual: int) -> None:
        self.driver.put(0x2004, actual)

    def pass_by(self, seconds: int, each: Callable[[], None] = lambda: None) -> None:
        for _ in range(seconds):
            self.driver.clock.advance(NS_PER_SECOND)
            each()


def test_it_goes_no_faster_than_it_may_and_comes_back() -> None:
    guest = Guest()
    guest.start()
    guest.steering.goal = 1000
    targets: list[int] = []

    def each() -> None:
        targets.append(guest.balloon.target)
        guest.move(1000)

    guest.pass_by(5, each)
    assert targets == [300, 600, 900, 1000, 1000]
    assert guest.steering.given == 1000 and guest.said == [Standing.OBEYS]
    guest.steering.goal = 100
    guest.pass_by(4, each)
    assert targets[5:] == [700, 400, 100, 100]
    assert guest.steering.given == 100 and guest.said == [Standing.OBEYS]


def test_a_slow_driver_is_not_left_behind() -> None:
    guest = Guest()
    guest.start()
    guest.steering.goal = 1000
    guest.pass_by(4, lambda: guest.move(10))
    assert guest.balloon.target == 30 + 300 and guest.said == [Standing.OBEYS]


def test_without_a_driver() -> None:
    guest = Guest()
    guest.steering.goal = 1000
    guest.pass_by(3)
    assert guest.said == [] and guest.steering.standing is Standing.NO_DRIVER
    guest.start()
    guest.pass_by(2, lambda: guest.move(1000))
    assert guest.said == [Standing.OBEYS]
    guest.driver.put(0x14, 0, 1)
    guest.pass_by(1)
    assert guest.said[-1] is Standing.NO_DRIVER


def test_one_that_refuses_and_then_does_not() -> None:
    guest = Guest()
    guest.start()
    guest.steering.goal = 200
    guest.pass_by(PATIENCE)
    assert guest.said == [Standing.OBEYS]
    guest.pass_by(1)
    assert guest.said == [Standing.OBEYS, Standing.REFUSES]
    assert guest.steering.why == "of 200 pages 0 are in the balloon, and no more since 5 s"
    guest.pass_by(2, lambda: guest.move(100))
    guest.pass_by(1)
    assert guest.said[-1] is Standing.OBEYS


def test_one_that_takes_pages_out_by_itself() -> None:
    guest = Guest()
    guest.start()
    guest.steering.goal = 200
    guest.pass_by(3, lambda: guest.move(200))
    guest.driver.request(1, struct.pack("<50I", *range(50)), 0)
    guest.say(150)
    guest.pass_by(1)
    assert guest.said == [Standing.OBEYS, Standing.REFUSES]
    assert guest.steering.why == "it has taken 50 pages out by itself"


def test_one_that_says_what_is_not_so() -> None:
    guest = Guest(rate=3000)
    guest.start()
    guest.steering.goal = 3000
    guest.pass_by(2, lambda: guest.move(3000, name=False))
    assert guest.said == [Standing.OBEYS]
    guest.pass_by(1)
    assert guest.said == [Standing.OBEYS, Standing.LIES]
    assert "says that 3000 pages are in the balloon, and the host has 0" in guest.steering.why


def test_one_that_uses_what_it_has_given() -> None:
    guest = Guest()
    guest.start()
    guest.steering.goal = 200
    guest.pass_by(2, lambda: guest.move(200))
    guest.memory.write(7 * 4096, b"x")
    guest.pass_by(1)
    assert guest.said == [Standing.OBEYS, Standing.LIES]
    assert guest.steering.why == "it has used 1 pages that are in the balloon"
    guest.pass_by(1)
    assert guest.said[-1] is Standing.OBEYS


def test_the_statistics_are_asked_for_and_it_ends() -> None:
    guest = Guest()
    guest.start()
    d = guest.driver
    d.describe(2, 0, 0x1_8000, 0, 0)
    d.offer(2, 0)
    d.kick(2)
    guest.pass_by(1)
    assert d.finished(2) == [(0, 0)] and guest.steering.steps == 1
    guest.steering.close()
    guest.pass_by(3)
    assert guest.steering.steps == 1
    with pytest.raises(ValueError, match="at least one"):
        Steering(d.clock, guest.balloon, rate=0)
