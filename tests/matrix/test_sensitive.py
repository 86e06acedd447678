"""Each sensitive instruction of IA-32 that no level forbids: silent as it is, trapped by option.

Those of the published list that lead through a descriptor trap as it is, for the hypervisor's GDT
is empty and no gate of its IDT leads to the guest.

What: one of them in a kernel at CPL 1, on IA-32 as it is, on a processor whose sensitive
instructions all trap, and in VMX operation, which shows what it is to do.  Source: Robin and
Irvine, "Analysis of the Intel Pentium's Ability to Support a Secure Virtual Machine Monitor".
Invariant: on IA-32 what is stored is asserted to be wrong, not only to be noted as wrong.
"""

import re
from typing import NamedTuple

import pytest

from tests.matrix import programs as p
from understudy.execution.deprivileged import Deprivileged
from understudy.guests import kallsyms
from understudy.guests.entry import CODE_32, Entry, protected_mode, write_gdt
from understudy.linux import VM as LinuxVM
from understudy.verdict import StopKind
from understudy.vm import VM

OUT = "e6 f4 | out 0xf4, al"
STORED = 16
LDTR = {"ldtr": 0x28, "ldtr_limit": 7, "ldtr_attr": 0x82}
TARGET = p.CODE + 0x100
TARGET_BYTES = TARGET.to_bytes(4, "little").hex(" ")
ARRIVED = "c7 07 2a 00 00 00 | mov dword [rdi], 42"
VECTOR = 0x20


class Row(NamedTuple):
    """A program of 64-bit code that leaves what it has found at [RDI]."""

    name: str
    program: str
    harm: str


ROWS = [
    Row("SGDT", "0f 01 07 | sgdt [rdi]", "stored the hypervisor's GDTR"),
    Row("SIDT", "0f 01 0f | sidt [rdi]", "stored the hypervisor's IDTR"),
    Row("SLDT", "0f 00 07 | sldt [rdi]", "stored 0x0, not 0x28"),
    Row("STR", "0f 00 0f | str [rdi]", "stored 0x8, not 0x20"),
    Row(
        "SMSW",
        "0f 01 e0 | smsw eax\n48 89 07 | mov [rdi], rax",
        "stored CR0=0x80010031, not 0x80000031",
    ),
    Row("PUSHFQ", "9c | pushfq\n58 | pop rax\n48 89 07 | mov [rdi], rax", "pushed IF=1, not 0"),
    Row("PUSHF", "66 9c | pushf\n66 58 | pop ax\n66 89 07 | mov [rdi], ax", "pushed IF=1, not 0"),
    Row(
        "POPFQ",
        "68 02 30 00 00 | push 3002h\n9d | popfq\n9c | pushfq\n8f 07 | pop qword [rdi]",
        "left IOPL=0, not 3",
    ),
    Row("POPF", "66 68 02 30 | push word 3002h\n66 9d | popf\n9c | pushfq\n8f 07 | pop [rdi]",
        "left IOPL=0, not 3"),
    Row("LAR", "b9 10 00 00 00 | mov ecx, 16\n0f 02 c1 | lar eax, ecx\n48 89 07 | mov [rdi], rax",
        "found no descriptor for selector 0x10"),
    Row("LSL", "b9 10 00 00 00 | mov ecx, 16\n0f 03 c1 | lsl eax, ecx\n48 89 07 | mov [rdi], rax",
        "found no descriptor for selector 0x10"),
    Row("VERR", "b9 18 00 00 00 | mov ecx, 24\n0f 00 e1 | verr cx\n0f 94 07 | setz [rdi]",
        "found no descriptor for selector 0x18"),
    Row("VERW", "b9 18 00 00 00 | mov ecx, 24\n0f 00 e9 | verw cx\n0f 94 07 | setz [rdi]",
        "found no descriptor for selector 0x18"),
    Row("MOV Sreg", "8c c8 | mov eax, cs\n48 89 07 | mov [rdi], rax", "read CS=0x11, not 0x10"),
    Row("MOV Sreg", "8c 17 | mov [rdi], ss", "read SS=0x19, not 0x18"),
]  # fmt: skip
ROWS_32 = [
    Row("PUSH Sreg", "0e | push cs\n8f 07 | pop dword [edi]", "read CS=0x11, not 0x10"),
    Row("PUSH Sreg", "16 | push ss\n8f 07 | pop dword [edi]", "read SS=0x19, not 0x18"),
]

DESCRIPTORS_32 = [
    ("POP Sreg", "6a 18 | push 18h\n07 | pop es\n26 c7 07 2a 00 00 00 | mov dword [es:edi], 42"),
    ("MOV Sreg", "b8 18 00 00 00 | mov eax, 18h\n8e d0 | mov ss, ax\n68 2a 00 00 00 | push 42\n"
            "8f 07 | pop dword [edi]"),
    ("CALL", f"9a {TARGET_BYTES} 10 00 | call 10h:target"),
    ("JMP", f"ea {TARGET_BYTES} 10 00 | jmp 10h:target"),
    ("RETF", f"6a 10 | push 10h\n68 {TARGET_BYTES} | push target\ncb | retf"),
    ("IRETD", f"6a 02 | push 2\n6a 10 | push 10h\n68 {TARGET_BYTES} | push target\ncf | iretd"),
    ("LES", "89 3f | mov [edi], edi\nc7 47 04 18 00 00 00 | mov dword [edi + 4], 18h\n"
            "c4 07 | les eax, [edi]\n26 c7 00 2a 00 00 00 | mov dword [es:eax], 42"),
]  # fmt: skip
"""What goes through a descriptor, by its name among the traps: each leaves 42."""


def run(vm: VM, program: str, bits: int) -> bytes:
    """What was stored."""
    code = f"{program}\n{OUT}"
    idt = p.handle(vm, VECTOR, f"{ARRIVED}\n48 cf | iretq")
    vm.memory.write(TARGET, p.assemble(f"{ARRIVED}\n{OUT}"))
    if bits == 64:
        p.start(vm, code, rdi=p.DATA, **idt, **LDTR)
    else:
        vm.memory.write(p.CODE, p.assemble(code))
        write_gdt(vm.memory, CODE_32)
        entry = protected_mode("test", p.CODE, rdi=p.DATA)
        vm.enter(Entry(entry.registers, "test"))
    stop = vm.go(budget=1000)
    assert stop.kind == StopKind.DEBUG_EXIT
    return vm.memory.read(p.DATA, STORED)


CASES = [(row, 64) for row in ROWS] + [(row, 32) for row in ROWS_32]


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize(("row", "bits"), CASES, ids=[f"{row.name}-{row.harm}" for row, _ in CASES])
def test_it_is_silent_as_it_is_and_traps_by_option(row: Row, bits: int, engine: str) -> None:
    made = {"engine": engine, "paging": "lazy", "cpu": "understudy,-pmu,-xsaves"}
    with VM("16M", **made) as vm:
        expected = run(vm, row.program, bits)
    with VM("16M", execution="deprivileged", **made) as vm:
        assert run(vm, row.program, bits) != expected
        guest = vm.vcpus[0].guest
        assert isinstance(guest, Deprivileged)
        assert guest.slips is not None
        assert row.name not in guest.traps
        (words,) = [words for (_, name), (words, _) in guest.slips.harmful.items()
                    if name == row.name]  # fmt: skip
        assert re.search(row.harm, words)
    with VM("16M", execution="deprivileged", virtualizable_isa=True, **made) as vm:
        assert run(vm, row.program, bits) == expected
        guest = vm.vcpus[0].guest
        assert isinstance(guest, Deprivileged)
        assert guest.traps[row.name] == 1
        assert guest.slips is None


def arrived(vm: VM) -> bool:
    return vm.memory.read(p.DATA, 1) == b"\x2a"


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize(("name", "program"), DESCRIPTORS_32, ids=[n for n, _ in DESCRIPTORS_32])
def test_what_needs_a_descriptor_traps_on_both(name: str, program: str, engine: str) -> None:
    made = {"engine": engine, "paging": "lazy", "cpu": "understudy,-pmu,-xsaves"}
    with VM("16M", **made) as vm:
        expected = run(vm, program, 32)
        assert arrived(vm)
    for virtualizable in (False, True):
        with VM("16M", execution="deprivileged", virtualizable_isa=virtualizable, **made) as vm:
            assert run(vm, program, 32) == expected
            guest = vm.vcpus[0].guest
            assert isinstance(guest, Deprivileged)
            assert guest.traps == {name: 1, "OUT": 1}
            assert guest.slips is None or not guest.slips.harmful


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize("virtualizable", [False, True])
def test_an_interrupt_by_software_traps_on_both(virtualizable: bool, engine: str) -> None:
    """INT n needs a gate, and those are the hypervisor's: it is an event, and delivered from there.

    The IRET of its handler is a trap of its own.
    """
    made = {"engine": engine, "paging": "lazy", "cpu": "understudy,-pmu,-xsaves"}
    came = []
    for times in (1, 4):
        with VM("16M", execution="deprivileged", virtualizable_isa=virtualizable, **made) as vm:
            run(vm, "\n".join([f"cd {VECTOR:02x} | int 20h"] * times), 64)
            guest = vm.vcpus[0].guest
            assert isinstance(guest, Deprivileged)
            assert arrived(vm)
            assert guest.traps == {"IRETQ": times, "OUT": 1}
            assert guest.slips is None or not guest.slips.harmful
            looks = guest.slips.harmless if guest.slips is not None else 0  # at IRETQ
            came.append(guest.crossings - guest.traps.total() - looks)
    assert came[1] - came[0] == 3


@pytest.mark.real_guest
@pytest.mark.parametrize("name", ["cloud-amd64", "686"])
def test_a_kernel_on_the_isa_as_it_is(name: str) -> None:
    """Linux patches its code early, and comes back from there by a CS that it has pushed."""
    with LinuxVM.linux(name, execution="deprivileged", paging="lazy") as vm:
        stop = vm.go(budget=100_000_000)
        assert stop.kind == StopKind.ERROR
        assert "text_poke_early" in stop.detail
        assert re.search(r"read CS=0x\w1, not 0x\w0", stop.detail)
        assert re.search(r"PUSHF.*: pushed IF=1, not 0", stop.detail)
        symbols = kallsyms.find(vm.memory.read, vm.memory.size)
    assert len(symbols.rows) > 40_000
