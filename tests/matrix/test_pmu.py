"""Performance counters of a guest: each of its instructions counts once, whoever carried it out.

Source: SDM 3B, "Performance Monitoring".  The programs have instructions of every kind: those that
run, those that always exit, those that exit under some techniques of memory, accesses to devices.
"""

import pytest

from tests.matrix.programs import CODE, assemble, handle, start
from understudy.arch.exception import Vector
from understudy.arch.msr import Msr
from understudy.paging import Paging
from understudy.verdict import StopKind
from understudy.vm import VM

TECHNIQUES = sorted(Paging.ALL)
ENGINES = ("reference", "dbt")
EVERYWHERE = [(engine, paging) for engine in ENGINES for paging in TECHNIQUES]

ENABLE = """
    b9 8d 03 00 00       | mov ecx, 0x38d   ; IA32_FIXED_CTR_CTRL
    b8 0b 00 00 00       | mov eax, 0xb     ; PMI, USR, OS
    31 d2                | xor edx, edx
    0f 30                | wrmsr
    b9 8f 03 00 00       | mov ecx, 0x38f   ; IA32_PERF_GLOBAL_CTRL
    31 c0                | xor eax, eax
    ba 01 00 00 00       | mov edx, 1
    0f 30                | wrmsr
"""
MIXED = """
    90                   | nop
    31 c0                | xor eax, eax
    0f a2                | cpuid
    e4 64                | in al, 0x64
    0f 20 d8             | mov rax, cr3
    0f 22 d8             | mov cr3, rax
    bf 00 00 12 00       | mov edi, 0x120000
    b9 64 00 00 00       | mov ecx, 100
    f3 aa                | rep stosb
    be 00 00 e0 fe       | mov esi, 0xfee00000
    8b 46 30             | mov eax, [rsi+0x30]
    0f 01 3e             | invlpg [rsi]
    50                   | push rax
    5a                   | pop rdx
    0f 09                | wbinvd
"""
READ = """
    b9 00 00 00 40       | mov ecx, 0x40000000
    0f 33                | rdpmc
"""
COUNTED = f"""{ENABLE}{READ}
    41 89 c0             | mov r8d, eax
{MIXED}{READ}
    44 29 c0             | sub eax, r8d
    41 89 c1             | mov r9d, eax
    e6 f4                | out 0xf4, al
"""
ARM = """
    be 00 00 e0 fe                | mov esi, 0xfee00000
    c7 86 40 03 00 00 00 04 00 00 | mov dword [rsi+0x340], 0x400 ; LVT PC: NMI
    b9 09 03 00 00                | mov ecx, 0x309               ; IA32_FIXED_CTR0
    44 89 f0                      | mov eax, r14d
    ba ff ff 00 00                | mov edx, 0xffff
    0f 30                         | wrmsr
"""
OVERFLOWS = (
    ARM
    + ENABLE
    + MIXED
    + """
    48 ff c2             | again: inc rdx
    eb fb                | jmp again
"""
)
HANDLER = """
    4c 8b 3c 24          | mov r15, [rsp]
    b9 8e 03 00 00       | mov ecx, 0x38e   ; IA32_PERF_GLOBAL_STATUS
    0f 32                | rdmsr
    41 89 d5             | mov r13d, edx
    b0 07                | mov al, 7
    e6 f4                | out 0xf4, al
"""


def lengths(program: str) -> list[int]:
    """The bytes of each instruction."""
    return [
        len(bytes.fromhex(line.partition("|")[0])) for line in program.split("\n") if "|" in line
    ]


@pytest.mark.parametrize(("engine", "paging"), EVERYWHERE)
def test_each_instruction_counts_once(engine: str, paging: str) -> None:
    """From the first RDPMC to before the second: it, a MOV, those of MIXED, a MOV."""
    with VM("16M", engine=engine, paging=paging) as vm:
        start(vm, COUNTED)
        assert vm.go().kind is StopKind.DEBUG_EXIT
        registers = vm.vcpus[0].registers()
        assert registers["r8"] == 2  # the WRMSR that enabled it, and a MOV
        assert registers["r9"] == 1 + 1 + 15 + 1


@pytest.mark.parametrize(("engine", "paging"), EVERYWHERE)
def test_an_overflow_comes_at_the_end_of_its_instruction(engine: str, paging: str) -> None:
    """Whoever carried it out: the NMI's handler finds the address of the next one."""
    sizes = lengths(OVERFLOWS)
    before = len(lengths(ARM + ENABLE)) - 1  # the WRMSR that enables counts already
    loop = sum(sizes[:-2])
    for n in range(1, 21):
        with VM("16M", engine=engine, paging=paging) as vm:
            idt = handle(vm, Vector.NMI, HANDLER)
            start(vm, OVERFLOWS, r14=(1 << 32) - n, **idt)
            assert vm.go().kind is StopKind.DEBUG_EXIT
            registers = vm.vcpus[0].registers()
        at = sum(sizes[: before + n])
        if before + n > len(sizes) - 2:
            at = loop + (0, 3)[(before + n - len(sizes)) % 2]
        assert (registers["r15"], registers["r13"]) == (CODE + at, 1), n


@pytest.mark.parametrize("paging", TECHNIQUES)
@pytest.mark.parametrize("n", [4, 19])
def test_an_overflow_freezes_the_counters(paging: str, n: int) -> None:
    """The fourth instruction is CPUID, which the hypervisor carries out; the 19th is not."""
    freeze = """
        b9 d9 01 00 00       | mov ecx, 0x1d9   ; IA32_DEBUGCTL
        b8 00 10 00 00       | mov eax, 0x1000  ; FREEZE_PERFMON_ON_PMI
        31 d2                | xor edx, edx
        0f 30                | wrmsr
    """
    enables = HANDLER.replace("b9 8e 03", "b9 8f 03")  # IA32_PERF_GLOBAL_CTRL
    with VM("16M", paging=paging) as vm:
        idt = handle(vm, Vector.NMI, enables)
        start(vm, freeze + OVERFLOWS, r14=(1 << 32) - n, **idt)
        assert vm.go().kind is StopKind.DEBUG_EXIT
        vcpu = vm.vcpus[0]
        assert vcpu.registers()["r13"] == 0
        assert vcpu.msrs.read(Msr.IA32_FIXED_CTR0) == 0
        assert vcpu.msrs.read(Msr.IA32_PERF_GLOBAL_STATUS) == 1 << 32


@pytest.mark.parametrize("paging", TECHNIQUES)
def test_a_snapshot_keeps_the_counters(paging: str) -> None:
    """What a clone counts goes on from what was counted."""
    with VM("16M", paging=paging) as vm:
        idt = handle(vm, Vector.NMI, HANDLER)
        start(vm, OVERFLOWS, r14=(1 << 32) - 5000, **idt)
        vm.go(budget=1000)
        with VM.restore(vm.save()) as other:
            ends = []
            for each in (vm, other):
                assert each.go().kind is StopKind.DEBUG_EXIT
                ends.append((each.vcpus[0].registers(), each.instructions))
            assert ends[0] == ends[1]


@pytest.mark.parametrize("name", ["pmu", "arch_perfmon"])
def test_without_the_feature_there_is_nothing(name: str) -> None:
    """No leaf, no register, no RDPMC; without PDCM only no IA32_PERF_CAPABILITIES."""
    with VM("16M", cpu=f"max,-{name}") as vm:
        assert vm.vcpus[0].answer(0xA, 0) == (0, 0, 0, 0)
        idt = handle(vm, Vector.GP, HANDLER.replace("0f 32 ", "90 90"))
        start(vm, READ, **idt)
        assert vm.go().kind is StopKind.DEBUG_EXIT
        assert vm.vcpus[0].registers()["r15"] == 0  # the error code
        with pytest.raises(KeyError):
            vm.vcpus[0].msrs.read(Msr.IA32_PERF_GLOBAL_CTRL)
    with VM("16M", cpu="max,-pdcm") as vm:
        assert vm.vcpus[0].msrs.read(Msr.IA32_PERF_GLOBAL_CTRL) == 0xF
        with pytest.raises(KeyError):
            vm.vcpus[0].msrs.read(Msr.IA32_PERF_CAPABILITIES)


def test_programs_are_what_they_say() -> None:
    assert len(lengths(COUNTED)) == 8 + 2 + 1 + 15 + 2 + 3
    assert sum(lengths(OVERFLOWS)) == len(assemble(OVERFLOWS))
