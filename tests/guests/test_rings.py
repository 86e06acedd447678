"""Packed rings and several queues, driven by Debian's own drivers.

Source: what Linux says in sysfs of the features that its drivers have accepted, and of queues.
"""

import hashlib
import re
from pathlib import Path

import pytest

from tests.guests.fetched import fetched
from understudy.devices.virtio.net import Net
from understudy.host import Host
from understudy.linux import VM

pytestmark = pytest.mark.real_guest

SIZE = 16 << 20
PACKED, NET_MQ = 34, 22
KERNELS = [
    "cloud-amd64",
    pytest.param("cloud-amd64-6.12", marks=pytest.mark.slow),
    pytest.param("686-pae", marks=pytest.mark.slow),
]


def _accepted(vm: VM, bit: int) -> list[bool]:
    """Whether the drivers have accepted a feature, device by device."""
    lines = vm.run("cat /sys/bus/virtio/devices/*/features").output.split()
    return [line[bit] == "1" for line in lines]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("hidden", ["", "packed", "packed,event-idx", "event-idx,indirect"])
def test_a_disk_by_each_kind_of_ring(kernel: str, hidden: str, tmp_path: Path) -> None:
    fetched(kernel)
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    names = tuple(filter(None, hidden.split(",")))
    with VM.linux(kernel, disks=[str(image)], hide_virtio=names) as vm:
        bits = {"packed": PACKED, "event-idx": 29, "indirect": 28}
        for name, bit in bits.items():
            assert all(_accepted(vm, bit)) == (name not in names), name
        vm.run("dd if=/dev/urandom of=/tmp/sent bs=64k count=96").check()
        vm.run("dd if=/tmp/sent of=/dev/vda bs=64k conv=fsync").check()
        vm.run("dd if=/tmp/sent of=/dev/vda bs=4k seek=2048 count=300 oflag=direct").check()
        sums = vm.run("md5sum </tmp/sent; head -c 6291456 /dev/vda | md5sum").output.split()
        assert sums[0] == sums[2]
        assert "error" not in vm.run("dmesg | grep -E 'vda|virtio'").output
    data = image.read_bytes()
    assert hashlib.md5(data[: 96 << 16]).hexdigest() == sums[0]
    assert data[8 << 20 :][: 300 << 12] == data[: 300 << 12]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_pair_of_queues_for_each_processor(kernel: str) -> None:
    fetched(kernel)
    with Host(pcpus=2) as host:
        one, two = (
            host.linux(kernel, name=name, net="lan=pairs", cpus=2, memory="192M") for name in "ab"
        )
        for number, vm in enumerate((one, two), 1):
            vm.run(f"ip addr add 10.0.0.{number}/24 dev eth0; ip link set eth0 up").check()
        queues = one.run("ls /sys/class/net/eth0/queues").output.split()
        assert queues == ["rx-0", "rx-1", "tx-0", "tx-1"] and any(_accepted(one, NET_MQ))
        card = one.pc.part("net0", Net)
        assert card.state.pairs == 2
        for processor in range(2):
            said = one.run(f"taskset -c {processor} ping -c3 -W2 10.0.0.2").output
            assert "3 packets received" in said
        assert {0, 1} == set(card.state.flows)
        table = one.run("grep -E 'virtio[0-9]+-input' /proc/interrupts").output
        counts = {
            row[1]: sum(map(int, row[0].split()))
            for row in re.findall(r":((?: +\d+)+) .*(input\.\d)", table)
        }
        assert counts["input.1"] > 0, table
        two.run("sleep 9 | nc -l -p 5000 >/tmp/came & sleep 0.1")
        sent = one.run(
            "head -c 1000000 /dev/urandom >/tmp/sent; md5sum </tmp/sent; "
            "taskset -c 1 nc 10.0.0.2 5000 </tmp/sent"
        )
        assert two.run("sleep 0.1; md5sum </tmp/came").output == sent.output
        assert [vm.counts()["net"][0]["lost"] for vm in (one, two)] == [0, 0]


def test_one_queue_where_several_are_hidden(tmp_path: Path) -> None:
    fetched("cloud-amd64")
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with VM.linux(
        "cloud-amd64", cpus="4,cores=2,threads=2", disks=[f"{image},ro"], net="lan=one",
        hide_virtio=("mq",),
    ) as vm:  # fmt: skip
        seen = vm.run("ls /sys/block/vda/mq /sys/class/net/eth0/queues").output.split()
        assert [name for name in seen if ":" not in name] == ["0", "rx-0", "tx-0"]
        assert vm.run("md5sum /dev/vda").status == 0
