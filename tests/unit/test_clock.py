"""Clock: timers fire in order, once, and survive a snapshot in their order."""

from understudy.clock import Alarm, ManualClock, SourceClock


def test_timers_fire_in_order_of_time_then_of_arming() -> None:
    clock, fired = ManualClock(), list[str]()
    clock.at(20, lambda: fired.append("late"))
    clock.at(10, lambda: fired.append("first"))
    clock.at(10, lambda: fired.append("second"))
    assert clock.next_deadline() == 10
    clock.ns = 9
    assert clock.run_due() == 0
    clock.ns = 20
    assert clock.run_due() == 3
    assert fired == ["first", "second", "late"]
    assert clock.next_deadline() is None
    assert clock.run_due() == 0


def test_canceled_timer_never_fires_and_leaves_no_deadline() -> None:
    clock = ManualClock()
    timer = clock.at(5, lambda: 1 / 0)
    timer.cancel()
    assert clock.next_deadline() is None
    clock.advance(10)


def test_canceled_timers_do_not_pile_up() -> None:
    clock = ManualClock()
    alarm = Alarm(clock, lambda: None)
    for i in range(10_000):
        alarm.set(1_000_000 + i)
    assert len(clock._queue) <= 128
    assert clock.next_deadline() == 1_009_999


def test_a_callback_may_arm_the_next_timer() -> None:
    clock, times = ManualClock(), list[int]()

    def tick() -> None:
        times.append(clock.now())
        if len(times) < 3:
            alarm.set(clock.now() + 10)

    alarm = Alarm(clock, tick)
    alarm.set(10)
    clock.advance(100)
    assert times == [10, 20, 30]
    assert clock.now() == 100


def test_alarms_keep_their_order_through_a_snapshot() -> None:
    clock, fired = ManualClock(), list[str]()
    first, second = (Alarm(clock, lambda n=n: fired.append(n)) for n in ("a", "b"))
    second.set(10)
    first.set(10)
    saved = first.save(), second.save()
    other = ManualClock()
    first, second = (Alarm(other, lambda n=n: fired.append(n)) for n in ("a", "b"))
    first.load(saved[0])
    second.load(saved[1])
    third = Alarm(other, lambda: fired.append("c"))
    third.set(10)
    assert third.when == 10
    other.advance(10)
    assert fired == ["b", "a", "c"]
    assert first.when is None and first.save() is None


def test_source_clock_reads_elsewhere() -> None:
    now = [7]
    clock = SourceClock(lambda: now[0])
    assert clock.now() == 7
    now[0] = 9
    assert clock.now() == 9


def test_what_may_be_hurried_fires_once_in_order_and_the_rest_stays() -> None:
    clock, fired = ManualClock(), list[str]()
    rows = (("late", 20, True), ("early", 10, True), ("patient", 5, False), ("off", 1, True))
    alarms = {n: Alarm(clock, lambda n=n: fired.append(n), hurries=h) for n, _, h in rows}
    for name, when, _ in rows:
        alarms[name].set(when)
    alarms["off"].set(None)
    clock.hurry()
    clock.hurry()
    assert fired == ["early", "late"]
    clock.advance(100)
    assert fired == ["early", "late", "patient"]


def test_what_may_be_hurried_does_not_pile_up() -> None:
    clock = ManualClock()
    alarm = Alarm(clock, lambda: None, hurries=True)
    for i in range(1000):
        alarm.set(i + 1)
        clock.advance(1 if i % 2 else 0)
    assert len(clock._eager) <= 1
