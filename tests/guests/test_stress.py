"""stress-ng finds nothing wrong under any paging technique.

Source: stress-ng(1).  Invariant: a moment is one of virtual time, and so the same work under every
technique; in the long runs guest time is wall time, so that twenty seconds of it take as long under
a shadow technique as under EPT (`python -m tests.guests.stress 20 virtual` runs the same in virtual
time, for much longer).
"""

from collections.abc import Iterator

import pytest

from tests.guests import stress
from tests.guests.fetched import fetched
from tests.windows import window_counts
from understudy.guests import packages
from understudy.guests.entry import GuestError

SAID = """\
stress-ng: info:  [102] setting to a 2 second run per stressor
stress-ng: info:  [102] dispatching hogs: 1 vm
stress-ng: metrc: [102] stressor       bogo ops real time  usr time
stress-ng: metrc: [102] vm                 7364      2.02      1.56
stress-ng: info:  [102] successful run completed in 2.02s
"""


@pytest.fixture(scope="module", autouse=True)
def package() -> Iterator[None]:
    fetched(stress.GUEST)
    try:
        packages.tree("stress-ng")
    except GuestError as error:
        pytest.skip(f"stress-ng cannot be fetched here: {error}")
    yield


def test_what_stress_ng_prints_is_judged() -> None:
    assert stress.judge(SAID, ["vm"]) == ({"vm": 7364}, ())
    assert stress.judge(SAID.replace(" vm  ", " tlb-shootdown "), ["tlb-shootdown"]) == (
        {"tlb-shootdown": 7364}, ()
    )  # fmt: skip
    assert stress.judge(SAID, ["vm", "fork"])[1] == ("fork did nothing",)
    killed = "stress-ng: info:  [104] stressor terminated with unexpected signal signal 4 'SIGILL'"
    failed = "stress-ng: fail:  [104] vm: detected 4 bit errors while stressing memory"
    assert stress.judge(f"{SAID}{killed}\n{failed}\n", ["vm"])[1] == (killed, failed)


@pytest.fixture(scope="module")
def work() -> dict[str, dict[str, int]]:
    """What each technique's run has done, filled by the runs."""
    return {}


@pytest.mark.real_guest
@pytest.mark.parametrize("technique", stress.TECHNIQUES)
def test_all_classes_at_once_for_a_moment(technique: str, work: dict[str, dict[str, int]]) -> None:
    with stress.boot(technique) as vm:
        end = stress.stress(vm, stress.CLASSES, stress.BRIEFLY)
    assert (end.status, end.complaints) == (0, ())
    work[technique] = end.work
    assert len({tuple(done.items()) for done in work.values()}) == 1, work  # none sees a difference


@pytest.mark.real_guest
def test_all_classes_with_windows_for_a_moment(work: dict[str, dict[str, int]]) -> None:
    with_windows("ept", work)


@pytest.mark.real_guest
@pytest.mark.slow
@pytest.mark.timeout(3600)  # each change of the root of shadow tables takes a window's pages
@pytest.mark.parametrize("technique", sorted({*stress.TECHNIQUES} - {"ept"}))
def test_all_classes_with_windows_on_shadow_tables(
    technique: str, work: dict[str, dict[str, int]]
) -> None:
    with_windows(technique, work)


def with_windows(technique: str, work: dict[str, dict[str, int]]) -> None:
    """The same work is done as without, and each process that was forked had a window."""
    with stress.boot(technique, windows=True) as vm:
        end = stress.stress(vm, stress.CLASSES, stress.BRIEFLY)
        assert (end.status, end.complaints) == (0, ())
        counts = window_counts(vm)
    print(f"{technique}: {counts}, {end.work}, {end.wall_s:.0f} s")
    assert counts["windows_opened"] > end.work["fork"] and counts["window_drops"] > 1000
    work[f"{technique}, windows"] = end.work
    assert len({tuple(done.items()) for done in work.values()}) == 1, work  # none sees a difference


@pytest.mark.real_guest
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("technique", stress.TECHNIQUES)
def test_each_class_with_windows_for_two_virtual_seconds(technique: str) -> None:
    with stress.boot(technique, windows=True) as vm:
        for name in stress.CLASSES:
            end = stress.stress(vm, [name], f"{stress.SMALL} -t 2s")
            print(f"{technique}, {name}: {end.work}, {end.wall_s:.0f} s, {window_counts(vm)}")
            assert (end.status, end.complaints) == (0, ()), name
        assert window_counts(vm)["window_drops"] > 1000


@pytest.mark.real_guest
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("technique", stress.TECHNIQUES)
def test_each_class_for_twenty_seconds(technique: str) -> None:
    with stress.boot(technique, "wall") as vm:
        for name in stress.CLASSES:
            end = stress.stress(vm, [name], f"{stress.SMALL} -t 20s")
            assert (end.status, end.complaints) == (0, ()), name
            assert end.guest_s >= 20, name


@pytest.mark.real_guest
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("clock", "seconds"), [("wall", 20), ("virtual", 5)])
@pytest.mark.parametrize("name", stress.PARALLEL)
def test_each_class_on_four_processors(name: str, clock: str, seconds: int) -> None:
    each, more = (1, "--pathological") if name == "cpu-online" else (4, "")  # says its manual
    with stress.boot("ept", clock, cpus=4) as vm:
        end = stress.stress(vm, [name], f"{stress.SMALL} -t {seconds}s {more}", each)
        assert (end.status, end.complaints) == (0, ())
        assert end.guest_s >= seconds
        assert vm.run("nproc").output == "4\n"
