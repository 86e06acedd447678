"""Each bound of docs/reference/bounds.md: is it what the code says, and does it hold?

Source: docs/reference/bounds.md.  Invariant: a constant of the package whose name has KEPT in it
has a row there.
"""

import importlib
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.matrix.programs import handle, start
from tests.tree import ROOT
from tests.walls.growth import GROW, MEMORY, ROUND, SKIP, growing
from understudy.arch.exit_reason import Reason
from understudy.clock import Alarm, ManualClock
from understudy.devices.ioapic import PINS
from understudy.execution.deprivileged import technique as trapping
from understudy.execution.emulate import linear, runs
from understudy.guest import Control
from understudy.guests.entry import PAGE_TABLES_GPA
from understudy.instructions import interpreter
from understudy.machine import bus
from understudy.machine.host import Host
from understudy.paging import guest_tables, roots, view
from understudy.paging.guest_walk import GuestFault
from understudy.vcpu import msrs
from understudy.verdict import StopKind
from understudy.vm import VM

PAGE_OF_BOUNDS = ROOT / "docs" / "reference" / "bounds.md"
ROW = re.compile(r"^\|.*?\| `(understudy[\w.]+)` \| (\d+) \|", re.MULTILINE)
CONSTANT = re.compile(r"^(\w*KEPT\w*)\s*(?::[^=]+)?=", re.MULTILINE)
SHADOWS = ("vtlb", "eager", "lazy")


def rows() -> dict[str, int]:
    """The bounds that the page names, with their values."""
    return {name: int(value) for name, value in ROW.findall(PAGE_OF_BOUNDS.read_text())}


def constants() -> Iterator[str]:
    """The constants that say how much is kept."""
    for path in sorted((ROOT / "understudy").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in CONSTANT.findall(path.read_text()):
            if name != "KEPT":  # of a VMCS: what a snapshot keeps
                yield f"{module}.{name}"


def test_the_page_says_what_the_code_does() -> None:
    assert set(constants()) <= set(rows())
    for name, value in rows().items():
        module, _, constant = name.rpartition(".")
        assert getattr(importlib.import_module(module), constant) == value, name


def test_each_test_of_the_page_exists() -> None:
    found = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE_OF_BOUNDS.read_text())
    assert len(found) > 10
    for path, name in found:
        assert f"def {name}(" in Path(ROOT / path).read_text(), f"{path} has no {name}"


# --- each of them ---


def test_places_without_a_device() -> None:
    one = bus.Bus()
    for n in range(2 * bus.PAGES_KEPT):
        one.port_read(n & 0xFFFF, 1)
        one.mmio_read(0xD000_0000 + (n << 12), 4)
    assert len(one.unclaimed) == bus.STRAYS_KEPT + 1
    assert sum(one.unclaimed.values()) == 4 * bus.PAGES_KEPT
    assert len(one._pages) <= bus.PAGES_KEPT


def test_msrs_that_do_not_exist() -> None:
    with VM("4M") as vm:
        registers = vm.vcpus[0].msrs
        for index in range(0x4000_0000, 0x4000_0000 + 2 * msrs.UNKNOWN_KEPT):
            with pytest.raises(KeyError):
                registers.read(index)
        assert len(registers.state.unknown) == msrs.UNKNOWN_KEPT


def test_instructions_decoded() -> None:
    for n in range(interpreter.PLANS_KEPT + 100):
        code = b"\xc7\x07" + n.to_bytes(4, "little") + bytes(9)  # mov dword [rdi], n
        guest: Any = SimpleNamespace(
            code_bits=lambda: 64, rip=0, is_code64=lambda: True, code_at=lambda at, n, c=code: c
        )
        assert interpreter.plan_at(guest) is not None
        assert len(interpreter._plans) <= interpreter.PLANS_KEPT


def test_what_the_interpreter_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instructions that are decoded, runs of them, and pages that walks have led to."""
    monkeypatch.setattr(runs, "RUNS_KEPT", 50)
    monkeypatch.setattr(runs, "CODES_KEPT", 5)
    monkeypatch.setattr(linear, "PAGES_KEPT", 50)
    monkeypatch.setattr(linear, "PRIVILEGES_KEPT", 4)
    with VM("4M", execution="emulate") as vm:
        guest: Any = vm.vcpus[0].guest
        kept, code = guest.runs, runs.Code(32, 0, 0xFFFF_FFFF)
        vm.memory.write(0x1000, b"\x90" * 0x20_0000)
        guest.linear.follow(Control(1, 0, 0, 0), (0, False, (0, 0)))
        for n in range(120):
            assert kept.step(b"\xb8" + n.to_bytes(4, "little") + bytes(10), 64)  # mov eax, n
            assert len(kept._steps) <= 50
            assert kept.find(code, 0x1000 * (n + 1)).count
            assert sum(map(len, kept._codes.values())) <= 50
            guest.linear.load(0x1000 * (n + 1), 4)
            assert len(guest.linear.reads) <= 50 and len(guest.linear.fetches) <= 50
            assert len(guest.linear.covered) <= 50
        vm.memory.write(0x8000, struct.pack("<1024I", *(n << 22 | 0x83 for n in range(1024))))
        guest.linear.follow(Control(0x8000_0011, 0x8000, 0x10, 0), (0, False, (0, 0)))
        for n in range(120):  # pages of 4 MBytes
            with suppress(GuestFault):
                guest.linear.load(n << 22, 4)
            assert len(guest.linear.large) <= 50
        for n in range(10):
            kept.of(runs.Code(16, n << 4, 0xFFFF))
            assert len(kept._codes) <= 5
            guest.linear.follow(Control(1, 0, 0, 0), (0, False, (n, 0)))
            assert len(guest.linear._all) <= 4


def test_steps_of_trap_and_emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trapping, "STEPS_KEPT", 50)
    with VM("4M", execution="deprivileged", paging="lazy") as vm:
        guest: Any = vm.vcpus[0].guest
        for n in range(120):
            assert guest._step(b"\xfa" + n.to_bytes(4, "little") + bytes(10), 64).name == "CLI"
            assert len(guest._steps) <= 50


@pytest.mark.parametrize("paging", SHADOWS)
def test_what_shadow_paging_remembers(paging: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller bounds, which this guest reaches soon."""
    monkeypatch.setattr(view, "REGIONS_KEPT", 50)
    monkeypatch.setattr(view, "DEVICES_KEPT", 50)
    most = [0, 0]
    with growing(paging=paging) as vm:
        for _ in range(40):
            vm.go(budget=10 * ROUND)
            own: Any = vm.vcpus[0].view
            most = [max(most[0], len(own.regions)), max(most[1], len(own.devices))]
    assert most[0] <= 50 and most[1] <= 50
    assert max(most) > 40


SWITCH = """
    0f 22 de             | next: mov cr3, rsi
    81 c6 00 10 00 00    | add esi, 0x1000
    ff c9                | dec ecx
    75 f3                | jnz next
    e6 f4                | out 0xf4, al
"""


@pytest.mark.parametrize("paging", SHADOWS)
def test_address_spaces(paging: str) -> None:
    spaces = 3 * roots.ROOTS_KEPT
    with VM("16M", paging=paging) as vm:
        start(vm, SWITCH, rsi=0x40_0000, rcx=spaces)
        root = vm.memory.read(PAGE_TABLES_GPA, 4096)
        vm.memory.write(0x40_0000, root * spaces)
        assert vm.go(budget=100 * spaces).kind is StopKind.DEBUG_EXIT
        pages: Any = vm.pages
        assert len(pages.theirs._regimes) <= guest_tables.REGIMES_KEPT
        assert vm.counts()["cr_accesses"] == {"CR3 write": spaces}
        if paging != "vtlb":
            assert len(pages.roots.by_key) == roots.ROOTS_KEPT


def test_timers() -> None:
    clock = ManualClock()
    alarms = [Alarm(clock, lambda: None) for _ in range(PINS)]
    for n in range(10_000):
        alarms[n % PINS].set(10 + n * 7919 % 1000)
        assert len(clock._queue) <= 2 * max(64, PINS)


STORE = """
    f3 0f 7f 07          | movdqu [rdi], xmm0      ; nobody emulates that
    e6 f4                | out 0xf4, al
"""


def test_lent_memory_is_set_aside() -> None:
    with Host("64M") as host:
        vm = VM("4M", host=host)
        start(vm, STORE, rdi=0xD000_0000, cr4=0x220)
        while host.frames.free_count:
            host.frames.allocate_runs(host.frames.free_count)
        assert vm.go(budget=100).kind is StopKind.DEBUG_EXIT
        assert vm.memory.spare.in_use == 0
        vm.close()


WRITE = """
    89 07                | mov [rdi], eax
    e6 f4                | out 0xf4, al
"""


@pytest.mark.parametrize("paging", ("ept", *SHADOWS))
def test_a_clone_that_finds_no_frame(paging: str) -> None:
    """Its run ends in words; with room, it goes on where it was."""
    with Host("64M") as host:
        vm = VM("4M", host=host, paging=paging)
        start(vm, WRITE, rdi=0x30_0000, rax=77)
        image = vm.snapshot()
        (clone,) = image.fork()
        taken = []
        while host.frames.free_count:
            taken += host.frames.allocate_runs(host.frames.free_count)
        stop = clone.go(budget=100)
        assert (stop.kind, "free" in stop.detail) == (StopKind.ERROR, True)
        host.frames.free_all(taken)
        assert clone.go(budget=100).kind is StopKind.DEBUG_EXIT
        assert vm.memory.read_u32(0x30_0000) == 0
        assert clone.memory.read_u32(0x30_0000) == 77
        clone.close()
        image.close()
        vm.close()


def test_the_program_is_what_it_says() -> None:
    """All that it asks for, it gets an answer to: none of the above is reached by an error."""
    with VM("16M") as vm:
        start(vm, GROW, rsi=1 << 20, rbx=0, **handle(vm, 13, SKIP))
        assert vm.go(budget=100 * ROUND).kind is StopKind.BUDGET
        assert vm.counts()["exits"]["RDMSR"] > 50


# --- by the RAM ---


def in_pieces(vm: VM) -> None:
    """No two frames of the guest in a row are alike: every other one is protected."""
    for start_gpa, end in vm.memory.ranges():
        for gfn in range(start_gpa >> 12, end >> 12, 2):
            vm.memory.p2m.protect(gfn)


def lists(table: dict[int, Any]) -> int:
    """How many blocks of a table have a number for each frame."""
    return sum(not isinstance(block, int) for block in table.values())


def test_tables_in_pieces() -> None:
    """The EPT has the tables that were set aside, the p2m a number for each frame; no more."""
    with Host("256M") as host:
        vm = VM("64M", host=host)
        ept: Any = vm.pages
        most, free, whole = ept.most_tables(), host.frames.free_count, len(ept.tables)
        in_pieces(vm)
        assert whole < len(ept.tables) <= most
        assert host.frames.free_count == free
        blocks = [block for giga in vm.memory.p2m._gigas.values() for block in giga]
        assert 8 * 512 * sum(not isinstance(block, int) for block in blocks) <= 8 * (64 << 20 >> 12)
        vm.close()


def test_frames_of_clones_in_pieces() -> None:
    """Counts of owners are kept for single frames only where a clone has written."""
    with Host("256M") as host:
        vm = VM("16M", host=host)
        image = vm.snapshot()
        clones = image.fork(4)
        counts: Any = host.frames._references
        before, free = lists(counts._blocks), host.frames.free_count
        for clone in clones:
            for gpa in range(0, 16 << 20, 0x2000):
                clone.memory.write(gpa, b"1")
        frames = 16 << 20 >> 12
        assert free - host.frames.free_count <= 4 * frames  # as many as it has RAM, at most
        assert 0 < lists(counts._blocks) - before <= (1 + 4) * frames // 512 + 8
        for clone in clones:
            clone.close()
        image.close()
        vm.close()


@pytest.mark.parametrize("paging", SHADOWS)
def test_where_frames_are(paging: str) -> None:
    """Of frames of RAM alone, however many others its tables name."""
    with growing(paging=paging) as vm:
        vm.go(budget=400 * ROUND)
        own: Any = vm.pages
        assert 1 < len(own.theirs.hpas) <= MEMORY >> 12


def test_counts_have_a_row_for_each_reason() -> None:
    """Whatever the guest does."""
    with growing(paging="vtlb") as vm:
        vm.go(budget=200 * ROUND)
        counted = vm.vcpus[0].counts.state
        assert 3 < len(counted.exits) <= max(Reason) + 1
        assert len(counted.cr_accesses) <= 2 * 16
        assert sum(counted.exits.values()) > 10 * len(counted.exits)
