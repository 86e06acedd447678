"""A guest that resets itself starts again, as if it had been switched on, however it asks.

What: a kernel that panics at once and reboots by each of Linux's methods, and a guest that has used
every device.  Source: Linux, Documentation/admin-guide/kernel-parameters.txt, "reboot=".
Invariant: what goes on over a reset is counted, remembered by a battery, or is time.

`reboot=b`, which jumps to the BIOS in real-address mode, is for those who have a BIOS.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.matrix.lockstep import linux
from tests.matrix.programs import CODE, UD2, assemble
from tests.parts import differences, held
from tests.test_run import run
from understudy import linux as friendly
from understudy.guests.entry import CODE_64, Entry, GuestError, long_mode, write_gdt
from understudy.linux import GuestStopped
from understudy.machine.machine import Machine
from understudy.paging import Paging
from understudy.verdict import StopKind
from understudy.vm import VM

METHODS = ("k", "t", "a", "p", "f")  # keyboard controller, triple fault, ACPI, PCI's port, any
FIVE, TWICE = 5, 2


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RAM disk without a file."""
    path = tmp_path_factory.mktemp("ramdisk") / "empty.cpio"
    path.write_bytes(bytes(512))
    return path


class Rebooting:
    """A Linux without a user land: it panics, and reboots at once."""

    def __init__(self, ramdisk: Path, method: str, **options: Any) -> None:
        append = f"reboot={method} panic=-1 quiet"
        try:
            self.vm = friendly.VM.linux(
                "cloud-amd64", memory="128M", initrd=ramdisk, append=append, **options
            )
        except GuestError as problem:
            pytest.skip(f"no guest: {problem}")
        self.resets: list[tuple[Any, ...]] = []
        self.vm.on_reset.append(self._note)

    def _note(self) -> None:
        counts = self.vm.counts()
        counts["exits"].pop("EPT_VIOLATION", 0)  # a frame that is shared costs one when written
        self.resets.append((self.vm.clock.now(), counts["instructions"], counts["exits"]))

    def go(self, times: int) -> None:
        """Until it has been reset so often."""
        assert self.vm.go(until=lambda: len(self.resets) == times).kind is StopKind.UNTIL


@pytest.mark.real_guest
@pytest.mark.parametrize("method", METHODS)
def test_it_starts_again_and_again(nothing: Path, method: str) -> None:
    guest, times = Rebooting(nothing, method), FIVE if method == "k" else TWICE
    with guest.vm as vm:
        guest.go(times)
        assert vm.console_text.count("Kernel panic") == times
        steps = [now[1] - before[1] for before, now in zip(guest.resets, guest.resets[1:])]  # noqa: B905
        assert min(steps) > 0.9 * guest.resets[0][1]
        for before, now in zip(guest.resets, guest.resets[1:]):  # noqa: B905
            assert now[0] > before[0]
            assert all(now[2][name] >= count for name, count in before[2].items())


@pytest.mark.real_guest
@pytest.mark.slow
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_five_times_by_each_method_under_each_technique(nothing: Path, paging: str) -> None:
    for method in METHODS:
        guest = Rebooting(nothing, method, paging=paging)
        with guest.vm:
            guest.go(FIVE)


@pytest.mark.real_guest
def test_two_runs_over_resets_are_one_and_a_clone_made_between_is_the_third(nothing: Path) -> None:
    one, two = Rebooting(nothing, "k"), Rebooting(nothing, "k")
    with one.vm, two.vm:
        one.go(3)
        two.go(1)
        two.vm.go(budget=300_000_000)
        with two.vm.snapshot() as image:
            clone = image.restore(
                host=two.vm.host
            )  # the same VM: a fork is told that it is another
        two.go(3)
        assert one.resets == two.resets
        three = Rebooting.__new__(Rebooting)
        three.vm, three.resets = clone, []
        clone.on_reset.append(three._note)
        with clone:
            three.go(2)
        assert three.resets == one.resets[1:]


@pytest.mark.real_guest
def test_no_reboot_ends_instead(nothing: Path) -> None:
    guest = Rebooting(nothing, "k", reboot=False)
    with guest.vm as vm:
        assert vm.go().kind is StopKind.RESET
        assert not guest.resets
        assert vm.console_text.count("Kernel panic") == 1


@pytest.mark.real_guest
def test_a_reset_linux_is_as_a_new_one_and_takes_commands_again() -> None:
    with linux() as vm, linux() as new:
        vm.run("cat /proc/interrupts; echo 30 > /sys/class/rtc/rtc0/wakealarm").check()
        vm.reset()
        left = [line for line in differences(held(vm), held(new)) if not GOES_ON.match(line)]
        assert not left
        assert vm.run("echo again").output == "again\n"


GOES_ON = re.compile(
    r".*(clock|board)\.(now|next)|.*pit8254.*(\bedge\b|\['start'\])"
    r"|.*\.tsc|.*['\].]injected|.*exits|.*counters\[|.*cr_accesses|.*unknown"
    r"|bus|board.bus._strays|sessions|paging( saved)?[.\[']*(counts|fills|faults|flushes)"
    r"|.*rtc.*(ram|seen_ns)|.*_queue"
    r"|.*registers\['(ldtr_|rip)|.*vmcs\[TSC_OFFSET|vcpu0\.(exits|guest\.processor\.retired)"
)
"""Time, counts, what a battery keeps; and registers of the hypervisor after an exit."""


@pytest.mark.real_guest
def test_a_reset_ends_a_command_that_is_waited_for() -> None:
    with linux() as vm:
        with pytest.raises(GuestStopped, match="reset") as error:
            vm.run("reboot -f")
        assert error.value.stop.kind is StopKind.RESET
        vm.reset()
        assert vm.run("echo again").output == "again\n"


@pytest.mark.real_guest
def test_the_command_line_ends_a_command_and_obeys_no_reboot(nothing: Path) -> None:
    linux().close()  # skips if there is no guest
    done = run("--guest", "cloud-amd64", "--exec", "reboot -f")
    assert done.returncode != 0
    assert b"reset" in done.stderr
    done = run(
        "--guest", "cloud-amd64", "--append", "rdinit=/none root=none panic=-1 quiet", "--no-reboot"
    )
    assert done.stdout.count(b"Kernel panic") == 1


# --- Triple faults ---

MEANT = """
    0f 01 1c 25 00 00 12 00 | lidt [DATA]            ; an empty table
    cc                      | int3
"""


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
@pytest.mark.parametrize(
    ("policy", "program", "is_reset"),
    [
        ("auto", MEANT, True), ("auto", UD2, False),
        ("reset", MEANT, True), ("reset", UD2, True),
        ("stop", MEANT, False), ("stop", UD2, False),
    ],
    ids=["auto-meant", "auto-not", "reset-meant", "reset-not", "stop-meant", "stop-not"],
)  # fmt: skip
def test_what_a_triple_fault_does(paging: str, policy: str, program: str, is_reset: bool) -> None:
    starts: list[int] = []

    def load(machine: Machine) -> Entry:
        starts.append(1)
        machine.memory.write(CODE, assemble(program))
        write_gdt(machine.memory, CODE_64)
        return long_mode(machine.memory, "test", CODE)

    with VM("16M", paging=paging, triple_fault=policy) as vm:
        vm.boot(load)
        stop = vm.go(until=lambda: len(starts) == 3)
        assert stop.kind is (StopKind.UNTIL if is_reset else StopKind.TRIPLE_FAULT)
        assert vm.counts()["exits"]["TRIPLE_FAULT"] == (2 if is_reset else 1)


def test_a_guest_that_does_nothing_but_reset_itself_can_be_ended() -> None:
    """It makes no exit after which one would look at the limits, and each reset clears requests."""

    def load(machine: Machine) -> Entry:
        machine.memory.write(CODE, assemble(MEANT))
        write_gdt(machine.memory, CODE_64)
        return long_mode(machine.memory, "test", CODE)

    with VM("16M") as vm:
        vm.boot(load)
        assert vm.go(wall_seconds=0.2).kind is StopKind.WALL
        vm.on_reset.append(lambda: vm.stop("enough"))
        assert vm.go().kind is StopKind.STOPPED
        vm.on_reset[:] = [lambda: vm.fail(ValueError("mine"))]
        with pytest.raises(ValueError, match="mine"):
            vm.go()
