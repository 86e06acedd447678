"""A balloon, driven by Debian's own driver: memory goes to the host and comes back.

Source: VIRTIO 1.2, "Traditional Memory Balloon Device"; what Linux says of its memory.
"""

import pytest

from tests.guests.fetched import fetched
from understudy.clock import NS_PER_SECOND
from understudy.devices.virtio.balloon import PAGE_REPORTING, Balloon
from understudy.linux import VM
from understudy.overcommit.balloon import Standing, Steering
from understudy.overcommit.working_set import WorkingSet

pytestmark = pytest.mark.real_guest

PAGES = 8192
KB = 4


def memory_free(vm: VM) -> int:
    """In pages, as the guest says."""
    return int(vm.run("grep MemFree /proc/meminfo").check().output.split()[1]) // KB


@pytest.mark.parametrize(
    ("kernel", "paging"),
    [
        ("cloud-amd64", "ept"),
        pytest.param("cloud-amd64", "vtlb", marks=pytest.mark.slow),
        pytest.param("cloud-amd64-6.12", "eager", marks=pytest.mark.slow),
        pytest.param("686-pae", "lazy", marks=pytest.mark.slow),
    ],
)
def test_debians_driver_inflates_and_deflates(kernel: str, paging: str) -> None:
    fetched(kernel)
    with VM.linux(kernel, paging=paging, balloon=True) as vm:
        vm.run("head -c 3000000 /dev/urandom > /kept; md5sum /kept > /sum").check()
        part = vm.pc.part("virtio_balloon", Balloon)
        before, free = memory_free(vm), vm.host.frames.free_count
        part.target = PAGES
        vm.run("sleep 4").check()
        counts = vm.counts()["balloon"]
        assert counts["actual"] == counts["ballooned"] == PAGES and not counts["broken"]
        assert part.has(PAGE_REPORTING) and counts["reported"] > 0 and counts["free"] > 0
        gone = vm.host.frames.free_count - free
        assert gone >= PAGES
        assert before - PAGES - 1500 < memory_free(vm) < before - PAGES + 1500
        part.ask()
        vm.run("sleep 1").check()
        statistics = part.statistics
        assert abs(statistics["free_memory"] // 4096 - memory_free(vm)) < 1500
        with vm.snapshot() as moment, moment.fork(1)[0] as clone:
            other = clone.pc.part("virtio_balloon", Balloon)
            assert clone.counts()["balloon"]["ballooned"] == PAGES
            other.target = 0
            clone.run("sleep 2; md5sum -c /sum").check()
            assert clone.counts()["balloon"]["ballooned"] == 0 == other.actual
        assert vm.counts()["balloon"]["ballooned"] == PAGES
        part.target = 0
        vm.run("sleep 2").check()
        fill = "head -c 60000000 /dev/zero > /much; md5sum -c /sum && rm /much"
        assert vm.run(fill).check().output == "/kept: OK\n"
        counts = vm.counts()["balloon"]
        assert counts["ballooned"] == counts["broken"] == 0 < counts["fetched"]


def test_a_guest_takes_pages_out_before_it_kills_for_want_of_memory() -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", memory="128M", balloon=True) as vm:
        part = vm.pc.part("virtio_balloon", Balloon)
        part.target = pages = 12288
        vm.run("sleep 3").check()
        assert part.actual == pages
        assert vm.run("dd if=/dev/zero bs=40M count=1 2>/dev/null | wc -c").output == "41943040\n"
        assert part.actual < pages and "Out of memory" not in vm.console_text


@pytest.mark.parametrize(
    "paging",
    ["ept", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vtlb", "lazy", "eager"))],
)
def test_a_guest_is_steered_and_sampled_while_it_works(paging: str) -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", paging=paging, balloon=True) as vm:
        vm.run("head -c 3000000 /dev/urandom > /kept; md5sum /kept > /sum").check()
        steering = Steering(vm.clock, vm.pc.part("virtio_balloon", Balloon), rate=1500)
        sampler = WorkingSet(vm.memory)
        sampler.every(vm.clock, NS_PER_SECOND // 10)
        steering.goal = PAGES
        assert vm.run("sleep 9; md5sum -c /sum").check().output == "/kept: OK\n"
        assert (steering.standing, steering.given) == (Standing.OBEYS, PAGES)
        assert len(sampler.periods) >= 90 and sampler.faults <= 100 * len(sampler.periods) + 100
        idle = sampler.active
        work = "head -c 30000000 /dev/zero > /much; md5sum -c /sum; md5sum < /much"
        assert vm.run(work).check().output.startswith("/kept: OK")
        assert sampler.active > idle
        steering.goal = 0
        assert vm.run("sleep 9; md5sum -c /sum").check().output == "/kept: OK\n"
        assert (steering.standing, steering.given) == (Standing.OBEYS, 0)
        sampler.close()
        assert vm.run("md5sum -c /sum").check().output == "/kept: OK\n"
