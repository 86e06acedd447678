"""A Linux with two processors goes on under another technique of execution as it would have.

What: a booted guest, restored and switched, does something in parallel, and takes a processor
offline and online.  Source: none.  Invariant: each processor retires the same instructions under
every technique, and the guest says the same.
"""

from typing import NamedTuple

import pytest

from tests.guests.fetched import fetched
from understudy.linux import VM

CPU = "understudy,-pmu,-xsaves"
TECHNIQUES = [("bt", "lazy"), ("deprivileged", "lazy")]
SWITCH = "/sys/devices/system/cpu/cpu1/online"
COMMANDS = (
    "nproc; (for i in 1 2 3 4 5 6 7 8; do echo $i | md5sum; done) & (ls /bin | md5sum) & wait",
    f"echo 0 > {SWITCH}; nproc; echo 1 > {SWITCH}; nproc",
    "for n in 0 1; do (echo $n | sha1sum; wc -l < /proc/interrupts) & done; wait",
)  # fmt: skip
BAD = ("warp", "BUG", "WARN", "stall", "unchecked")


class Life(NamedTuple):
    """What a guest has done."""

    said: list[str]
    retired: list[int]
    now: int


def live(image: bytes, execution: str, paging: str) -> Life:
    with VM.restore(image) as vm:
        vm.execution, vm.paging = execution, paging
        said = [vm.run(command).output for command in COMMANDS]
        assert (vm.execution, vm.paging) == (execution, paging)
        lines = vm.run("dmesg").output.splitlines()
        assert not [line for line in lines if any(word in line for word in BAD)]
        return Life(said, [vcpu.retired for vcpu in vm.vcpus], vm.clock.now())


@pytest.fixture(scope="module")
def image() -> bytes:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", cpus=2, memory="128M", cpu=CPU, virtualizable_isa=True) as vm:
        vm.wait_for_prompt()
        return vm.save()


@pytest.fixture(scope="module")
def expected(image: bytes) -> Life:
    return live(image, "vmx", "ept")


@pytest.mark.real_guest
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("execution", "paging"), TECHNIQUES)
def test_two_processors(image: bytes, expected: Life, execution: str, paging: str) -> None:
    assert expected.said[0].startswith("2\n") and expected.said[1] == "1\n2\n"
    begun = live(image, execution, paging)
    assert begun == expected
