"""A Debian with more memory than its host has is told of what its programs miss; all are right.

Source: Linux, arch/x86/kernel/kvm.c counts the interrupts as "Hypervisor callback interrupts".
"""

import hashlib

import pytest

from understudy.guests.entry import GuestError
from understudy.host import Host
from understudy.linux import VM
from understudy.overcommit.terms import Terms

pytestmark = pytest.mark.real_guest
LINES, SORTS = 100_000, 3


def expected(n: int) -> str:
    """What `sort` gives for these lines, as a checksum."""
    lines = sorted((f"{n}{line}" for line in range(1, LINES + 1)), reverse=True)
    return hashlib.md5("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def sorting(n: int) -> str:
    """Each line, which begins with a digit of this sort's own, in the program's own memory."""
    return f"seq 1 {LINES} | sed s/^/{n}/ | sort -r | md5sum | cut -d' ' -f1 > /tmp/{n}"


def callbacks(vm: VM) -> list[int]:
    """How often each processor was interrupted for a page, by Debian's own count."""
    words = vm.run("grep HYP: /proc/interrupts").output.partition("Hyper")[0].split()
    return [int(word) for word in words[1:]]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("paging", "cpus"), [("ept", 2), pytest.param("vtlb", 1, marks=pytest.mark.slow)]
)
def test_programs_of_a_guest_that_is_told_compute_what_they_should(paging: str, cpus: int) -> None:
    terms = Terms(balloons=False, scan=0)
    with Host(pcpus=1, ram="80M", overcommit=terms) as host:
        try:
            vm = host.linux(
                "cloud-amd64", memory="128M", cpus=cpus, cpu="understudy,+async_pf", paging=paging,
                table_memory="4M",
            )  # fmt: skip
        except GuestError as problem:
            pytest.skip(f"no guest: {problem}")
        numbers = range(1, SORTS + 1)
        for _ in range(2):
            vm.run(f"{' & '.join(map(sorting, numbers))} & wait").check()
            found = vm.run(f"cat {' '.join(f'/tmp/{n}' for n in numbers)}").output.split()
            assert found == [expected(n) for n in numbers]
        callbacks(vm)  # what that needs is there then
        seen, told = callbacks(vm), [vcpu.kvm.async_pf.state.counts for vcpu in vm.vcpus]
        assert seen == [counts["ready told"] for counts in told] and sum(seen) > 0
        assert [counts["not present told"] for counts in told] == seen
        assert not vm.run(
            "dmesg | grep -E 'WARNING|BUG|Oops|stall|Host injected|Unexpected'"
        ).output
