"""Sessions with a real Linux: over snapshots, and out of every way in which a wait can end."""

import os
import signal
import threading

import pytest

from tests.matrix.lockstep import linux
from understudy import GuestTimeout, Linux, LinuxError
from understudy import vm as machine
from understudy.linux import VM

pytestmark = pytest.mark.real_guest


@pytest.fixture(scope="module")
def saved() -> bytes:
    """A guest that has booted and run a command."""
    with linux("dbt") as vm:
        assert vm.run("echo first > /tmp/file; echo one").check().output == "one\n"
        return vm.save()


def test_a_restored_linux_takes_commands(saved: bytes) -> None:
    outputs = []
    for _ in range(2):
        with VM.restore(saved) as vm:
            assert "Linux version" in vm.console_text
            outputs.append((vm.run("cat /tmp/file; cat /proc/uptime").output, vm.instructions))
            again = vm.save()
        with VM.restore(again) as vm:  # of one that was restored
            assert vm.run("cat /tmp/file").output == "first\n"
            vm.power_off()
    assert outputs[0] == outputs[1]
    assert outputs[0][0].startswith("first\n")


def test_a_session_attaches_to_any_machine(saved: bytes) -> None:
    with machine.VM.restore(saved) as vm:
        kept = vm.save()  # nobody has asked for the session: it is kept
    with machine.VM.restore(kept) as vm:
        assert Linux(vm).run("cat /tmp/file").output == "first\n"


def test_a_snapshot_in_the_middle_of_a_command(saved: bytes) -> None:
    with VM.restore(saved) as vm:
        images: list[bytes] = []
        vm.run(
            "echo a; sleep 1; echo b", on_output=lambda d: vm.post(lambda: images.append(vm.save()))
        )
    with VM.restore(images[0]) as vm:
        assert vm.run("echo c").output == "c\n"


def test_every_way_out_of_a_command_leaves_a_guest_that_takes_the_next(saved: bytes) -> None:
    def fails(_data: bytes) -> None:
        raise ZeroDivisionError

    with VM.restore(saved) as vm:
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            vm.run("i=0; while [ $i -lt 3000000 ]; do i=$((i+1)); done")
        assert vm.run("echo interrupted").output == "interrupted\n"
        with pytest.raises(ZeroDivisionError):
            vm.run("echo one; sleep 1; echo two", on_output=fails)
        assert vm.run("echo failed").output == "failed\n"
        with pytest.raises(LinuxError, match="cannot run 'echo nested' now"):
            vm.run("echo outer", on_output=lambda data: vm.run("echo nested") and None)
        assert vm.run("echo nested").output == "nested\n"
        with pytest.raises(LinuxError, match="Kernel panic - not syncing: sysrq triggered crash"):
            vm.run("echo c > /proc/sysrq-trigger")


def test_a_command_that_never_ends_makes_way_for_the_next(saved: bytes) -> None:
    with VM.restore(saved) as vm:
        for endless in ("while :; do :; done", "while :; do echo noise; done", "sleep 1000000"):
            with pytest.raises(GuestTimeout):
                vm.run(endless, timeout_guest_s=2)
            assert vm.run("echo next", timeout_guest_s=5).output == "next\n"
        assert vm.run("sleep 1000 & echo left").output == "left\n"  # this one has ended
        assert "sleep 1000" in vm.run("ps").output
        assert [vm.run(f"exit {n}").status for n in (0, 7)] == [0, 7]


def test_a_guest_uses_what_its_processor_shows_and_nothing_else() -> None:
    flags = "grep -m1 ^flags /proc/cpuinfo"
    with VM.linux("cloud-amd64", memory="128M", cpu="max,-pcid,-popcnt,-x2apic") as vm:
        shown = vm.run(flags).output.split()
        assert {"smap", "umip", "aes"} <= set(shown)
        assert not {"pcid", "popcnt", "x2apic"} & set(shown)
        assert vm.config.cpu == "max,-pcid,-popcnt,-x2apic"
    with VM.linux("cloud-amd64", memory="128M", cpu="baseline") as vm:
        shown = vm.run(flags).output.split()
        assert not {"aes", "sse4_2", "popcnt", "smap", "bmi1"} & set(shown)
