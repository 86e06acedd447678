"""Shared folders that the real virtiofsd serves, under Debian's own driver.

Source: what Linux's tools say; the trees are compared with what is on this computer.
"""

import os
import signal
import stat
from pathlib import Path

import pytest

from tests.guests.fetched import fetched
from tests.guests.test_folders import sums, told, tree
from tests.guests.test_hotplug import TROUBLE, until, until_gone
from tests.unit.backends.real_virtiofsd import needs_virtiofsd
from understudy.backends.folder import ShareError
from understudy.backends.virtiofsd import Virtiofsd
from understudy.devices.virtio.fs import Fs
from understudy.linux import VM

__all__ = ["tree"]
pytestmark = [pytest.mark.real_guest, needs_virtiofsd]

SUMMED = "cd {} && find . -type f -exec sha256sum '{{}}' +"


def program(vm: VM, name: str) -> Virtiofsd:
    """That which serves a folder."""
    daemon = vm.pc.part(name, Fs).daemon
    assert daemon is not None and isinstance(daemon.program, Virtiofsd)
    return daemon.program


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_tree_is_read_and_one_is_written(cpus: int, tree: Path, tmp_path: Path) -> None:
    fetched("cloud-amd64")
    out = tmp_path / "out"
    out.mkdir()
    folders = [f"{tree}:/in,server=virtiofsd", f"{out}:/out,rw,server=virtiofsd"]
    with VM.linux("cloud-amd64", clock="wall", cpus=cpus, folders=folders) as vm:
        assert told(vm.run(SUMMED.format("/in")).check().output) == sums(tree)
        assert vm.run("/in/program").output == "it runs\n"
        assert vm.run("readlink /in/away; cat /in/away").output.startswith("../../outside")
        assert vm.run("mount -o remount,rw /in; echo x >/in/large").status != 0
        vm.run("cp -a /in /out/copied & cp -a /in /out/other & wait && sync").check()
        assert told(vm.run(SUMMED.format("/out/copied")).check().output) == sums(tree)
        vm.run("fallocate -l 5M /out/room && cp /in/program /out/p && chmod 6755 /out/p").check()
        assert "not permitted" in vm.run("mknod /out/d b 7 0").output
        assert vm.run("chown 1000 /out/p").status != 0
        assert vm.run("stat -c %u:%g /out/p").output == "0:0\n"
        assert vm.run(TROUBLE).output == ""
        pids = [program(vm, name).pid for name in ("share0", "share1")]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    for name in ("copied", "other"):
        assert sums(out / name) == sums(tree)
    assert (out / "room").stat().st_size == 5 << 20
    assert stat.S_IMODE((out / "p").stat().st_mode) == 0o755


def test_a_reset_mounts_again_and_a_snapshot_waits_until_it_is_unmounted(tree: Path) -> None:
    fetched("cloud-amd64")
    share = f"{tree}:/in,server=virtiofsd"
    with VM.linux("cloud-amd64", clock="wall", folders=[share]) as vm:
        for _ in range(2):
            assert vm.run("/in/program").output == "it runs\n"
            vm.reset()
        vm.run("/in/program").check()
        with pytest.raises(ShareError, match="unmount it in the guest before a snapshot"):
            vm.save()
        vm.run("umount /in").check()
        saved = vm.save()
    for folder in (share, f"{tree}:/in"):
        with VM.restore(saved, folders=[folder]) as again:
            assert again.run("mount -t virtiofs share0 /in && /in/program").output == "it runs\n"


def test_a_folder_comes_and_goes(tree: Path) -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", clock="wall", hotplug=True) as vm:
        for _ in range(2):
            vm.plug(f"share={tree},name=data,server=virtiofsd")
            pid = program(vm, "data").pid
            until(vm, "mount -t virtiofs data /mnt -o ro 2>/dev/null")
            assert vm.run("/mnt/program; umount /mnt").output == "it runs\n"
            until_gone(vm, "data")
            assert not Path(f"/proc/{pid}").exists()


def test_a_program_that_dies_leaves_errors_and_a_guest_that_goes_on(tree: Path) -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", clock="wall", folders=[f"{tree}:/in,server=virtiofsd"]) as vm:
        vm.run("/in/program").check()
        os.killpg(program(vm, "share0").pid, signal.SIGKILL)
        failed = vm.run("cat /in/large")
        assert failed.status != 0 and "error" in failed.output.lower()
        assert vm.run("echo still here").output == "still here\n"
