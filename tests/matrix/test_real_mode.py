"""Real-address mode under every paging technique: VMX runs it by EPT only, and so do we.

What: a guest that goes from real-address mode to protected mode, to paging and back, again and
again, editing its page directory where no shadow sees it; and one of two processors that does so
while the other uses the directory.
Source: SDM 3A, "Switching to Protected Mode", "Switching Back to Real-Address Mode"; SDM 3C,
"Unrestricted Guests".
Invariant: no technique makes a difference, but in what is counted of it.
"""

from typing import Any

import pytest

from tests.matrix.programs import assemble
from understudy.arch.msr import EFER
from understudy.guests.entry import CODE_32, DATA_32, Entry
from understudy.machine.frames import OutOfFrames
from understudy.paging import Paging
from understudy.paging.real_mode import RealMode
from understudy.vcpu.activity import Activity
from understudy.verdict import StopKind
from understudy.vm import VM

TECHNIQUES = sorted(Paging.ALL)
SHADOWS = [name for name in TECHNIQUES if name != "ept"]
CODE, GDT, DIRECTORY, COUNTS = 0x1000, 0x2000, 0x4000, 0x800
ROUNDS = 6
ROUND_AND_ROUND = """
    fa                         | cli
    31 c0                      | xor ax, ax
    8e d8                      | mov ds, ax
    8e d0                      | mov ss, ax
    bc 00 0f                   | mov sp, 0xf00
    0f 01 16 a8 10             | lgdt [gdtr]
    0f 20 c0                   | mov eax, cr0
    0c 01                      | or al, 1
    0f 22 c0                   | mov cr0, eax
    66 ea 1f 10 00 00 08 00    | jmp dword 8:prot
    66 b8 10 00                | mov ax, 16
    8e d8                      | mov ds, ax
    8e c0                      | mov es, ax
    8e e0                      | mov fs, ax
    8e e8                      | mov gs, ax
    8e d0                      | mov ss, ax
    ff 05 04 08 00 00          | inc dword [0x804]
    b8 00 40 00 00             | mov eax, 0x4000
    0f 22 d8                   | mov cr3, eax
    0f 20 e0                   | mov eax, cr4
    0c 10                      | or al, 0x10
    0f 22 e0                   | mov cr4, eax
    0f 20 c0                   | mov eax, cr0
    0d 00 00 00 80             | or eax, 0x80000000
    0f 22 c0                   | mov cr0, eax
    ff 05 08 08 40 00          | inc dword [0x400808]
    0f 01 3d 00 00 40 00       | invlpg [0x400000]
    0f 20 c0                   | mov eax, cr0
    25 ff ff ff 7f             | and eax, 0x7fffffff
    0f 22 c0                   | mov cr0, eax
    ff 05 0c 08 00 00          | inc dword [0x80c]
    ea 73 10 00 00 18 00       | jmp 24:low
    b8 20 00                   | mov ax, 32
    8e d8                      | mov ds, ax
    8e c0                      | mov es, ax
    8e e0                      | mov fs, ax
    8e e8                      | mov gs, ax
    8e d0                      | mov ss, ax
    0f 20 c0                   | mov eax, cr0
    24 fe                      | and al, 0xfe
    0f 22 c0                   | mov cr0, eax
    ea 8d 10 00 00             | jmp 0:real
    31 c0                      | xor ax, ax
    8e d8                      | mov ds, ax
    ff 06 00 08                | inc word [0x800]
    66 81 36 04 40 00 00 40 00 | xor dword [0x4004], 0x400000
    ff 0e 10 08                | dec word [0x810]
    0f 85 5a ff                | jnz start
    e6 f4                      | out 0xf4, al
    27 00                      | gdtr: dw 39
    00 20 00 00                | dd 0x2000
"""
DESCRIPTORS = (0, 0x00CF9B00_0000FFFF, 0x00CF9300_0000FFFF, 0x00009B00_0000FFFF,
               0x00009300_0000FFFF)  # fmt: skip
REAL = {"cr0": 0x10, "cs": 0, "cs_base": 0, "rip": CODE, "rflags": 2}


def lay(vm: VM, rounds: int) -> None:
    """The program, its descriptors and its page directory: 4 MBytes twice."""
    vm.memory.write(CODE, assemble(ROUND_AND_ROUND))
    for n, descriptor in enumerate(DESCRIPTORS):
        vm.memory.write_u64(GDT + 8 * n, descriptor)
    vm.memory.write_u32(DIRECTORY, 0x83)
    vm.memory.write_u32(DIRECTORY + 4, 0x83)
    vm.memory.write_u32(COUNTS + 0x10, rounds)


def outcome(vm: VM) -> dict[str, Any]:
    """What the guest could tell."""
    words = [
        vm.memory.read_u32(base + at) for base in (0, 0x40_0000) for at in range(0x800, 0x814, 4)
    ]
    directory = vm.memory.read(DIRECTORY, 8)
    registers = vm.vcpus[0].registers()
    return {"words": words, "directory": directory, "instructions": vm.instructions,
            "now": vm.clock.now(), "registers": registers}  # fmt: skip


def run(paging: str, chop: int = 0, *, save: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """What came of it, and what was counted."""
    vm = VM("16M", paging=paging)
    try:
        lay(vm, ROUNDS)
        vm.enter(Entry(REAL, "test"))
        while (stop := vm.go(budget=chop or 10_000)).kind is StopKind.BUDGET:
            assert vm.instructions < 10_000
            if save:
                saved = vm.save()
                vm.close()
                vm = VM.restore(saved)
        assert stop.kind is StopKind.DEBUG_EXIT, stop
        return outcome(vm), vm.counts()
    finally:
        vm.close()


def test_every_technique_makes_the_same_of_it() -> None:
    expected, _ = run("ept")
    assert expected["words"][0] == expected["words"][1] == ROUNDS
    assert expected["words"][2] == expected["words"][7] == ROUNDS // 2  # by one page or the other
    for paging in SHADOWS:
        found, counts = run(paging)
        assert found == expected, paging
        assert counts["real_mode"] == 1 + ROUNDS, paging  # it begins there, and comes back


@pytest.mark.parametrize("paging", SHADOWS)
def test_in_pieces_and_elsewhere(paging: str) -> None:
    whole, counts = run(paging)
    for other in (run(paging, 7), run(paging, 11, save=True)):
        assert other[0] == whole
        for name in ("exits", "faults", "fills", "flushes", "real_mode"):
            assert other[1][name] == counts[name], name


SHOW = """
    0f 01 3d 00 00 40 00 | again: invlpg [0x400000]
    8b 1d 08 08 40 00    | mov ebx, [0x400808]
    a1 00 08 00 00       | mov eax, [0x800]
    85 c0                | test eax, eax
    74 ea                | jz again
    0f 01 3d 00 00 40 00 | invlpg [0x400000]
    8b 1d 08 08 40 00    | mov ebx, [0x400808]
    e6 f4                | out 0xf4, al
"""
EDIT = """
    66 81 36 04 40 00 00 40 00 | xor dword [0x4004], 0x400000
    ff 06 00 08                | inc word [0x800]
    f4                         | hlt
"""


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_what_one_writes_there_the_other_believes(paging: str) -> None:
    with VM("16M", paging=paging, cpus=2) as vm:
        lay(vm, ROUNDS)
        vm.memory.write_u32(0x808, 1)
        vm.memory.write_u32(0x40_0808, 2)
        vm.memory.write(0x3000, assemble(SHOW))
        vm.memory.write(0x5000, assemble(EDIT))
        vm.enter(Entry({
            "cr0": 0x8000_0031, "cr3": DIRECTORY, "cr4": 0x10, "rip": 0x3000, "rflags": 2,
            "efer": int(EFER(0)), "cs": 8, "cs_attr": CODE_32, "ds": 16, "ds_attr": DATA_32,
        }, "test"))  # fmt: skip
        vm.go(budget=1000)
        assert vm.vcpus[0].registers()["rbx"] == 1
        other = vm.vcpus[1]
        other.set_registers(REAL | {"rip": 0x5000})
        other.state.activity = Activity.ACTIVE
        assert vm.go(budget=200_000).kind is StopKind.DEBUG_EXIT
        assert vm.vcpus[0].registers()["rbx"] == 2


def test_without_room_for_it_the_technique_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any) -> None:
        raise OutOfFrames("no room")

    with VM("16M") as vm:
        lay(vm, ROUNDS)
        vm.enter(Entry(REAL, "test"))
        monkeypatch.setattr(RealMode, "prepare", full)
        for paging in SHADOWS:
            with pytest.raises(OutOfFrames):
                vm.change_paging(paging)
        assert vm.paging == "ept"
        assert vm.go(budget=10_000).kind is StopKind.DEBUG_EXIT
