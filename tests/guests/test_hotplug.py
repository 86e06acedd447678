"""Disks and network cards that come and go under Debian's own drivers, also while they are busy.

Source: what Linux says in sysfs and in its log.
"""

import hashlib
from pathlib import Path

import pytest

from tests.guests.fetched import fetched
from understudy.backends.raw import Raw
from understudy.disk import Disk
from understudy.host import Host
from understudy.linux import VM

pytestmark = pytest.mark.real_guest

SIZE = 16 << 20
KERNELS = [
    "cloud-amd64",
    pytest.param("cloud-amd64-6.12", marks=pytest.mark.slow),
    pytest.param("686-pae", marks=pytest.mark.slow),
]
WRITER = (
    "(while [ -b /dev/vda ]; do dd if=/dev/urandom of=/dev/vda bs=64k count=64; sync; done) "
    ">/dev/null 2>&1 &"
)
TROUBLE = "dmesg | grep -E 'BUG|Oops|Call Trace|hung|ACPI Error'"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def until(vm: VM, condition: str) -> None:
    """Let the guest run until the shell says yes."""
    for _ in range(100):
        if vm.run(f"sleep 0.1; {condition}").status == 0:
            return
    raise AssertionError(condition)


def until_gone(vm: VM, name: str) -> None:
    """Ask the guest for it, and let it run until it has agreed."""
    vm.unplug(name)
    for _ in range(100):
        vm.run("sleep 0.1")
        if name not in vm.plugged:
            return
    raise AssertionError(f"{name} is there still")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_disk_comes_is_used_and_goes_while_it_is_written(kernel: str, image: Path) -> None:
    fetched(kernel)
    with VM.linux(kernel, hotplug=True) as vm:
        for turn in range(3):
            vm.run("rm -f /dev/vda")  # the writer may have made a file of that name
            vm.plug(Disk(str(image), name="data", serial=f"turn-{turn}"))
            until(vm, "[ -b /dev/vda ]")
            assert vm.run("cat /sys/block/vda/serial").output == f"turn-{turn}"
            vm.run("head -c 1000000 /dev/urandom >/tmp/w; cat /tmp/w >/dev/vda; sync").check()
            digest = vm.run("md5sum </tmp/w").output[:32]
            assert hashlib.md5(image.read_bytes()[:1_000_000]).hexdigest() == digest
            vm.run(WRITER)
            until_gone(vm, "data")
            assert vm.run("[ ! -e /sys/block/vda ]").status == 0
            Raw(image).close()  # nobody has it locked
        assert vm.run("ls /sys/bus/pci/devices | wc -l").output == "2\n", "the bridge and the agent"
        assert vm.run(TROUBLE).output == ""


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_card_comes_and_goes_while_frames_pass(kernel: str) -> None:
    fetched(kernel)
    with Host(pcpus=2) as host:
        one, two = (
            host.linux(kernel, name=name, memory="128M", hotplug=True, net=net)
            for name, net in (("a", ()), ("b", "lan=hot"))
        )
        two.run("ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up").check()
        for _ in range(2):
            assert one.plug("net=lan=hot") == "net0"
            until(one, "[ -e /sys/class/net/eth0 ]")
            one.run("ip addr add 10.0.0.1/24 dev eth0; ip link set eth0 up").check()
            assert "3 packets received" in one.run("ping -c3 -W2 10.0.0.2").output
            two.run("ping -q -i 0.01 10.0.0.1 >/dev/null &")
            one.run("yes | nc 10.0.0.2 9 >/dev/null 2>&1 & ping -q -i 0.01 10.0.0.2 >/dev/null &")
            until_gone(one, "net0")
            assert one.run("[ ! -e /sys/class/net/eth0 ]").status == 0
            two.run("kill %1")
        assert one.run(TROUBLE).output == two.run(TROUBLE).output == ""


def test_a_snapshot_with_a_plugged_disk_goes_on_writing(image: Path) -> None:
    fetched("cloud-amd64")
    ends = []
    with VM.linux("cloud-amd64", hotplug=True) as vm:
        vm.plug(Disk(str(image), is_overlay=True, name="data"))
        until(vm, "[ -b /dev/vda ]")
        vm.run(WRITER)
        vm.go(budget=20_000_001)
        saved = vm.save()
        again = type(vm).restore(saved, disks=[f"{image},overlay"])
        with again:
            for one in (vm, again):
                one.go(budget=10_000_000)
                one.unplug("data")
                one.go(until=lambda one=one: not one.plugged, budget=2_000_000_000)  # type: ignore[misc]
                assert one.plugged == []
                counts = one.counts()
                ends.append((counts["instructions"], counts["exits"]))
    assert ends[0][1] == ends[1][1], "what was restored goes the same way"


def test_a_guest_finds_what_came_while_it_started(image: Path) -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", hotplug=True) as vm:
        vm.go(budget=50_000_000)
        vm.plug(f"disk={image},ro")
        until(vm, "[ -b /dev/vda ]")
        vm.reset()
        vm.wait_for_prompt()
        until(vm, "[ -b /dev/vda ]")
