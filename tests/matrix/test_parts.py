"""A part that keeps state keeps all of it: a VM and its restored copy are compared, part by part.

Source: ours; `tests/parts.py` finds what there is to compare.
Invariant: no part is named here, but those that are broken on purpose.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.matrix.lockstep import linux
from tests.matrix.programs import (
    DEADLINE_HANDLER,
    DEADLINES,
    GP_HANDLER,
    PIT,
    PIT_HANDLER,
    UNKNOWN_MSR,
    handle,
    start,
)  # fmt: skip
from tests.parts import differences, held
from understudy import linux as friendly
from understudy.devices import Device, acpi_tables
from understudy.devices.wires import Wires
from understudy.image_file import SnapshotError
from understudy.machine.bus import ports
from understudy.machine.host import Host
from understudy.paging import Paging
from understudy.vcpu.events import Events
from understudy.vm import VM

PROGRAMS = {
    "PIT": (PIT, 0x20, PIT_HANDLER),
    "APIC timer": (DEADLINES, 0x40, DEADLINE_HANDLER),
    "unknown MSR": (UNKNOWN_MSR, 13, GP_HANDLER),
}


def worked(name: str, instructions: int, **options: Any) -> VM:
    """A VM that has done something."""
    program, vector, handler = PROGRAMS[name]
    vm = VM("16M", **options)
    start(vm, program, **handle(vm, vector, handler))
    vm.bus.port_read(0x999, 1)
    vm.go(budget=instructions)
    return vm


def copied(vm: VM) -> VM:
    """Restored from bytes, on another host, elsewhere in its memory."""
    host = Host("256M")
    host.frames.allocate(77)
    return type(vm).restore(vm.save(), host=host)


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_restored_vm_holds_what_the_saved_one_does(paging: str, name: str) -> None:
    for instructions in (15, 47):
        with worked(name, instructions, paging=paging) as vm, copied(vm) as copy:
            assert not differences(held(vm), held(copy))
            assert vm.go(budget=100) == copy.go(budget=100)
            left = differences(held(vm), held(copy))
            assert all(".counters[" in line for line in left)  # its TLB was empty


@pytest.mark.real_guest
@pytest.mark.parametrize(
    "paging", [pytest.param(n, marks=[pytest.mark.slow] * (n != "ept")) for n in sorted(Paging.ALL)]
)
def test_so_does_a_restored_linux(paging: str) -> None:
    with linux(paging=paging) as vm:
        vm.run("cat /proc/interrupts; sleep 1").check()
        with friendly.VM.restore(vm.save()) as copy:
            assert not differences(held(vm), held(copy))


def test_its_memory_is_what_the_guest_has_made_of_it() -> None:
    """Where a board puts its tables, too: a guest may use them, and then their memory."""
    with VM("16M") as vm:
        for gpa in (0, acpi_tables.BASE, 0x10_0000):
            vm.memory.write(gpa, b"the guest's")
        with vm.snapshot() as image:
            (clone,) = image.fork()
        for copy in (copied(vm), clone):
            with copy:
                for gpa in (0, acpi_tables.BASE, 0x10_0000):
                    assert copy.memory.read(gpa, 11) == b"the guest's"


def test_a_clone_does_too() -> None:
    with worked("PIT", 40) as vm, vm.snapshot() as image:
        (clone,) = image.fork()
        told = [line for line in differences(held(vm), held(clone)) if not is_identity(line)]
        assert not told
        clone.close()


def is_identity(line: str) -> bool:
    """A clone is told that it is one: another generation ID, and the event that says so."""
    return any(word in line for word in ("gpe_status", "vmgenid", "generation"))


# --- The check can fail ---


def leaves(state: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value in a snapshot, with the way to it."""
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, (*place, key))
    else:
        yield place, state


def at(state: Any, place: tuple[Any, ...]) -> Any:
    """The value there."""
    for key in place:
        state = state[key]
    return state


DERIVED = ("attention", "offset", "now", "armed")
"""What is made known again after a restore, whatever was saved."""


def test_each_value_of_a_snapshot_is_missed_when_it_is_forgotten() -> None:
    """As if a part had restored all but one value, which is as in a new VM."""
    forgotten = 0
    with worked("PIT", 40) as vm, VM("16M") as new:
        before, fresh = held(vm), dict(leaves(new._state()))
        image = vm.snapshot()
        changed = [
            place
            for place, value in leaves(image.state)
            if place in fresh and fresh[place] != value and place[-1] not in DERIVED
        ]
        random.Random(1).shuffle(changed)
        for place in changed[:40]:
            kept = at(image.state, place)
            at(image.state, place[:-1])[place[-1]] = fresh[place]
            try:
                (clone,) = image.fork()
            except SnapshotError:
                forgotten += 1
            else:
                assert differences(before, held(clone)), f"nobody misses {place}"
                forgotten += 1
                clone.close()
            at(image.state, place[:-1])[place[-1]] = kept
        image.close()
    assert forgotten >= 20


def forget_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Events.load
    monkeypatch.setattr(
        Events, "load", lambda self, saved: load(self, saved | {"injected": {}, "nmi": False})
    )


def keep_something_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    deliver = Events.deliver

    def counting(self: Any) -> None:
        self.delivered = getattr(self, "delivered", 0) + 1
        deliver(self)

    monkeypatch.setattr(Events, "deliver", counting)


@pytest.mark.parametrize("break_it", [forget_a_count, keep_something_aside])
def test_a_part_that_forgets_is_caught(
    monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None]
) -> None:
    break_it(monkeypatch)
    with worked("PIT", 40) as vm, copied(vm) as copy:
        lines = differences(held(vm), held(copy))
        assert lines
        assert all(line.startswith(("vcpu0.events.", "vcpu0 saved['events']")) for line in lines)


@dataclass
class NoteState:
    kept: int = 0


@pytest.fixture
def notebook() -> Iterator[None]:
    class Note(Device, name="note"):
        """Keeps one byte in its state, and one beside it."""

        spans = (ports(1),)

        def __init__(self, wires: Wires) -> None:
            super().__init__(wires)
            self.aside = 0
            self.state = self.power_on()

        def power_on(self) -> NoteState:
            return NoteState()

        def write(self, region: int, offset: int, value: int, size: int) -> None:
            self.state.kept, self.aside = value & 0xF, value >> 4

    yield
    del Device.ALL["note"]


@pytest.mark.usefixtures("notebook")
def test_a_device_that_keeps_something_aside_is_caught() -> None:
    with worked("PIT", 9, devices=[("note", {"at": 0x300})]) as vm:
        vm.bus.port_write(0x300, 1, 0x05)
        with copied(vm) as copy:
            assert not differences(held(vm), held(copy))
        vm.bus.port_write(0x300, 1, 0x25)
        with copied(vm) as copy:
            (line,) = differences(held(vm), held(copy))
            assert line == "board.parts['note'].aside: 2 and 0"
