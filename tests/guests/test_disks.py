"""Disks, driven by Debian's own drivers: what they see, write and read, in each kind of kernel.

Source: what Linux says of a disk in sysfs.  The content is checked by this computer's own reading
of the file.
"""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.guests.fetched import fetched
from tests.unit.backends.qcow2_file import content, make
from understudy.backends.opening import ImageError
from understudy.devices.virtio.console import VirtioConsole
from understudy.linux import VM, GuestStopped
from understudy.verdict import StopKind

pytestmark = pytest.mark.real_guest

SIZE = 16 << 20
FILL = "yes some words | head -c 3000000"
WORDS = (b"some words\n" * 300_000)[:3_000_000]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def _of_e2fsprogs(program: str, *arguments: str) -> None:
    """Run this computer's own program for the file system."""
    path = shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{program} (e2fsprogs) is not on this computer")
    subprocess.run([path, *arguments], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("kernel", "paging"),
    [
        ("cloud-amd64", "ept"),
        pytest.param("cloud-amd64-6.12", "vtlb", marks=pytest.mark.slow),
        pytest.param("686-pae", "lazy", marks=pytest.mark.slow),
    ],
)
def test_a_file_system_on_a_disk(kernel: str, paging: str, image: Path, tmp_path: Path) -> None:
    fetched(kernel)
    _of_e2fsprogs("mke2fs", "-q", "-t", "ext4", str(image))
    other = tmp_path / "other.img"
    other.write_bytes(b"\xabc" * 2048)
    with VM.linux(kernel, paging=paging, disks=[f"{image},serial=ONE", f"{other},ro"]) as vm:
        seen = "cd /sys/block; cat vda/serial vda/size vda/ro vdb/size vdb/ro vda/queue/write_cache"
        expected = f"ONE{SIZE >> 9} 0 8 1 write back"
        assert vm.run(seen).output.split() == expected.split()
        assert vm.run("md5sum /dev/vdb").output[:32] == hashlib.md5(other.read_bytes()).hexdigest()
        assert vm.run("echo x > /dev/vdb").status != 0
        vm.run("mount -t ext4 /dev/vda /mnt").check()
        vm.run(f"{FILL} > /mnt/words && sync && fstrim /mnt && umount /mnt").check()
        messages = vm.run("dmesg | grep -E 'vd[ab]|virtio'").output
        assert "error" not in messages, messages
        assert "virtio" in vm.run("cat /proc/interrupts").output
    _of_e2fsprogs("e2fsck", "-fn", str(image))
    raw = image.read_bytes()
    assert len(raw) == SIZE and WORDS[:1024] in raw
    with VM.linux(kernel, paging=paging, disks=[f"{image},overlay"]) as vm:
        vm.run("mount -t ext4 /dev/vda /mnt").check()
        assert vm.run("md5sum /mnt/words").output[:32] == hashlib.md5(WORDS).hexdigest()
        vm.run("rm /mnt/words && umount /mnt && blkdiscard /dev/vda").check()
        vm.run(f"dd if=/dev/zero of=/dev/vda bs=1M count={SIZE >> 20}").check()
        assert vm.run("tr -d '\\0' < /dev/vda | wc -c").output == "0\n"
    assert image.read_bytes() == raw


def test_a_queue_and_an_interrupt_for_each_processor(image: Path) -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", cpus=2, disks=[str(image)]) as vm:
        assert vm.run("ls /sys/block/vda/mq").output.split() == ["0", "1"]
        write = "taskset -c {0} dd if=/dev/zero of=/dev/vda bs=64k count=4 conv=fsync"
        for processor in range(2):
            vm.run(write.format(processor)).check()
        table = vm.run("grep req /proc/interrupts").output
        counts = [[int(n) for n in line.split()[1:3]] for line in table.splitlines()]
        assert counts[0][0] > 0 == counts[0][1] and counts[1][1] > 0 == counts[1][0], table


def test_a_limit_of_speed_is_one_in_the_guests_time(image: Path) -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", disks=[f"{image},rate=2M"]) as vm:
        vm.wait_for_agent()
        started = vm.clock.now()
        vm.run("dd if=/dev/zero of=/dev/vda bs=64k count=128 conv=fsync").check()
        took_ns = vm.clock.now() - started
    assert 8 << 20 <= took_ns * 2 // 1000 < 11 << 20


def test_a_qcow2_image_over_a_raw_one(image: Path, tmp_path: Path) -> None:
    fetched("cloud-amd64")
    pytest.importorskip("understudy._images", reason="the binding of imago is not compiled")
    image.write_bytes(b"below" * 1000 + bytes(SIZE - 5000))
    top = tmp_path / "top.qcow2"
    make(top, SIZE, {}, backing=image.name, backing_format="raw")
    with VM.linux("cloud-amd64", append="pci=nomsi", disks=[str(top)]) as vm:
        vm.run(f"{FILL} | dd of=/dev/vda bs=64k seek=16 && sync").check()
        assert vm.run("head -c 5 /dev/vda").output == "below"
        assert re.search(r"IO-APIC.*virtio0", vm.run("cat /proc/interrupts").output)
    expected = image.read_bytes()[: 1 << 20] + WORDS
    assert content(top, image.read_bytes())[: len(expected)] == expected


WRITER = "(while :; do dd if=/dev/urandom of=/dev/vda bs=64k count=64; sync; done) 2>/dev/null &"


def test_two_runs_and_a_snapshot_in_the_middle_of_traffic(image: Path) -> None:
    """Exact with a disk; what was saved while it wrote goes on, writing, as it would have."""
    fetched("cloud-amd64")
    ends = []
    for _ in range(2):
        with VM.linux("cloud-amd64", disks=[f"{image},overlay"]) as vm:
            vm.run(WRITER)
            vm.go(budget=30_000_001)
            saved = vm.save()
            again = type(vm).restore(saved, disks=[f"{image},overlay"])
            with again:
                sums = [one.run("md5sum /dev/vda").check().output for one in (vm, again)]
                assert sums[0] == sums[1]
                assert again.instructions == vm.instructions
                ends.append((sums[0], vm.instructions))
            with vm.snapshot() as moment:
                one, two = moment.fork(2)
                with one, two:
                    one.run("echo of its own > /dev/vda; sync").check()
                    assert two.run("head -c 3 /dev/vda").output != "of "
            vm.reset()
            assert vm.run("head -c 1000000 /dev/vda | tr -d '\\0' | wc -c").output != "0\n"
    assert ends[0] == ends[1]
    assert image.read_bytes() == bytes(SIZE)


def test_a_disk_that_is_written_cannot_be_cloned_and_is_not_restored_once_it_has_changed(
    image: Path,
) -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", disks=[str(image)]) as vm:
        vm.run("echo first > /dev/vda; sync").check()
        in_use = pytest.raises(ImageError, match=r"^[^(]* is in use by another virtual machine")
        with vm.snapshot() as moment, in_use:
            moment.fork(1)
        saved = vm.save()
    with pytest.raises(ValueError, match="opens no files by itself"):
        VM.restore(saved)
    with VM.restore(saved, disks=[str(image)]) as again:
        assert again.run("head -c 5 /dev/vda").output == "first"
        again.run("echo later > /dev/vda; sync").check()
    with pytest.raises(ValueError, match="has been written since the snapshot"):
        VM.restore(saved, disks=[str(image)])


def test_errors_of_the_computer_reach_the_guest_or_stop_it(image: Path, tmp_path: Path) -> None:
    fetched("cloud-amd64")
    other = tmp_path / "other.img"
    other.write_bytes(bytes(SIZE))
    disks = [str(image), f"{other},on-error=stop"]
    with VM.linux("cloud-amd64", disks=disks) as vm:
        for path in (image, other):
            path.write_bytes(bytes(4096))  # the rest of it has gone
        failed = vm.run("dd if=/dev/vda of=/dev/null bs=4k skip=8 count=1")
        assert failed.status != 0 and "Input/output error" in failed.output
        assert vm.run("echo alive").output == "alive\n"
        with pytest.raises(GuestStopped) as stopped:
            vm.run("dd if=/dev/vdb of=/dev/null bs=4k skip=8 count=1")
        assert stopped.value.stop.kind is StopKind.DISK
        assert "other.img has become shorter" in stopped.value.stop.detail
        other.write_bytes(bytes(SIZE))
        assert vm.go(budget=50_000_000).kind is StopKind.BUDGET  # it was tried again


def test_a_random_number_generator() -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", devices=[("virtio_rng", {})]) as vm:
        read = "head -c 1000 /dev/hwrng | md5sum"  # more than the driver has read ahead
        first = vm.run(read).check().output
        with vm.snapshot() as moment, moment.restore() as same, moment.fork(1)[0] as clone:
            outputs = {one: one.run(read).check().output for one in (vm, same, clone)}
        assert outputs[vm] == outputs[same] != first
        assert outputs[clone] not in (first, outputs[vm])


def test_disks_are_refused_before_anything_boots(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        VM("16M", disks=[str(tmp_path / "none.img")])


def test_a_console_and_a_named_port() -> None:
    fetched("cloud-amd64")
    ports = ["", "org.understudy.test"]
    with VM.linux("cloud-amd64", devices=[("virtio_console", {"ports": ports})]) as vm:
        part = vm.pc.part("virtio_console", VirtioConsole)
        said: list[tuple[int, bytes]] = []
        part.on_output.append(lambda port, data: said.append((port, data)))
        assert vm.run("cat /sys/class/virtio-ports/vport0p1/name").output == "org.understudy.test\n"
        vm.run("echo out > /dev/vport0p1; echo console > /dev/hvc0").check()
        written = [b"".join(data for port, data in said if port == n) for n in range(2)]
        assert written == [b"console\r\n", b"out\n"]
        part.send(1, b"in\n")
        assert vm.run("head -n 1 /dev/vport0p1").output == "in\n"


def test_user_data_on_a_disk_of_their_own(tmp_path: Path) -> None:
    fetched("cloud-amd64")
    file = tmp_path / "mine"
    file.write_bytes(b"#cloud-config\nhostname: a\n" * 1000)
    with VM.linux("cloud-amd64", disks=[f"{file},format=nocloud"]) as vm:
        assert vm.run("findfs LABEL=CIDATA").output == "/dev/vda\n"
        vm.run("mount -t vfat /dev/vda /mnt").check()
        assert vm.run("ls /mnt").output.split() == ["meta-data", "user-data"]
        assert vm.run("cat /mnt/user-data").raw == file.read_bytes()
        assert vm.run("cat /sys/block/vda/ro").output == "1\n"
