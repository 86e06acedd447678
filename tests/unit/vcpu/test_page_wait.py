"""The wait of a virtual processor for a page: how long, and what ends it."""

from understudy.clock import ManualClock
from understudy.vcpu.activity import Activity, VcpuState
from understudy.vcpu.page_wait import PageWait


class Vcpu:
    def __init__(self) -> None:
        self.state = VcpuState()


def made() -> tuple[Vcpu, ManualClock, PageWait]:
    vcpu, clock = Vcpu(), ManualClock(1000)
    return vcpu, clock, PageWait(vcpu, clock)


def test_pages_are_read_one_after_the_other() -> None:
    vcpu, clock, wait = made()
    wait.wait(50)
    wait.wait(50)
    assert vcpu.state.activity is Activity.WAIT_FOR_PAGE
    clock.advance(99)
    assert vcpu.state.activity is Activity.WAIT_FOR_PAGE
    clock.advance(1)
    assert vcpu.state.activity is Activity.ACTIVE and clock.next_deadline() is None
    clock.advance(1000)
    wait.wait(50)
    assert wait.state.at == clock.now() + 50, "what was waited for before does not count"


def test_one_that_does_not_execute_waits_for_no_page() -> None:
    for activity in (Activity.HLT, Activity.WAIT_FOR_SIPI):
        vcpu, clock, wait = made()
        vcpu.state.activity = activity
        assert not wait.wait(50)
        assert vcpu.state.activity is activity and clock.next_deadline() is None


def test_who_was_started_anew_meanwhile_is_left_alone() -> None:
    vcpu, clock, wait = made()
    wait.wait(50)
    vcpu.state.activity = Activity.WAIT_FOR_SIPI
    clock.advance(50)
    assert vcpu.state.activity is Activity.WAIT_FOR_SIPI


def test_a_snapshot_keeps_it() -> None:
    _vcpu, _clock, wait = made()
    wait.wait(50)
    other, its_clock, again = made()
    other.state.activity = Activity.WAIT_FOR_PAGE
    again.load(wait.save())
    its_clock.advance(49)
    assert other.state.activity is Activity.WAIT_FOR_PAGE
    its_clock.advance(1)
    assert other.state.activity is Activity.ACTIVE
