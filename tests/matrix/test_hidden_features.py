"""A feature that the CPU model hides is as hidden under each technique as it is in VMX operation.

What: an instruction of each feature that has one, in a kernel and in a program, where the feature
is hidden: it executes, or is #UD or #GP.  Not every instruction can be hidden at all: where no
control and no bit of CR4 is about it, VMX executes it, too.
Source: SDM 2, the instructions' own pages; docs/decisions/0043.
"""

from pathlib import Path

import pytest

from tests.matrix import programs as p
from understudy.arch.cr import CR4
from understudy.execution import Execution
from understudy.vcpu.cpu_features import FEATURES
from understudy.vm import VM

INSTRUCTIONS = {
    "adx": ["66 0f 38 f6 c1"],
    "aes": ["66 0f 38 dc c1"],
    "avx": ["c5 fc 77"],
    "avx2": ["c5 fd 75 c0"],
    "bmi1": ["c4 e2 78 f2 c1"],
    "bmi2": ["c4 e2 7b f7 c1"],
    "clflushopt": ["66 0f ae 3f"],
    "clfsh": ["0f ae 3f"],
    "clwb": ["66 0f ae 37"],
    "cmov": ["0f 44 c1"],
    "cx16": ["48 0f c7 0f"],
    "cx8": ["0f c7 0f"],
    "erms": ["f3 aa"],
    "f16c": ["c4 e2 79 13 c0"],
    "fma": ["c4 e2 71 98 c2"],
    "fpu": ["d9 ee"],
    "fsgsbase": ["f3 48 0f ae c0"],
    "fxsr": ["0f ae 07"],
    "invpcid": ["66 0f 38 82 0f"],
    "lahf64": ["9f"],
    "lzcnt": ["f3 0f bd c1"],
    "mmx": ["0f ef c0"],
    "movbe": ["0f 38 f0 07"],
    "msr": ["0f 32"],
    "pclmulqdq": ["66 0f 3a 44 c1 00"],
    "pku": ["0f 01 ee"],
    "pmu": ["0f 33"],
    "popcnt": ["f3 0f b8 c1"],
    "prefetchw": ["0f 0d 0f"],
    "rdpid": ["f3 0f c7 f8"],
    "rdrand": ["0f c7 f0", "66 0f c7 f1", "49 0f c7 f7"],
    "rdseed": ["0f c7 f8", "49 0f c7 ff"],
    "rdtscp": ["0f 01 f9", "f3 0f c7 f8", "f3 41 0f c7 ff"],
    "sep": ["0f 34"],
    "sha": ["0f 38 c8 c1"],
    "smap": ["0f 01 ca"],
    "sse": ["0f 58 c1"],
    "sse2": ["66 0f 58 c1"],
    "sse3": ["f2 0f 7c c1"],
    "sse4_1": ["66 0f 38 17 c1"],
    "sse4_2": ["f2 0f 38 f0 c1"],
    "ssse3": ["66 0f 38 1c c1"],
    "syscall": ["0f 05"],
    "tsc": ["0f 31"],
    "umip": ["0f 01 e0"],
    "xgetbv1": ["0f 01 d0"],
    "xsave": ["0f ae 27", "0f 01 d0", "0f 01 d1"],
    "xsavec": ["0f c7 27"],
    "xsaveopt": ["0f ae 37"],
    "xsaves": ["0f c7 2f", "0f c7 1f"],
}  # fmt: skip
"""By feature; DATA is in RDI, and RAX, RCX and RDX are 0."""
WITHOUT = {
    "apic", "arch_capabilities", "async_pf", "async_pf_int", "bhi_ctrl", "clocksource",
    "clocksource2", "clocksource_stable_bit", "de", "fsrm", "hypervisor", "ibrs_ibpb", "lm",
    "mca", "mce", "mtrr", "nop_io_delay", "nx", "pae", "page_1g", "pat", "pcid", "pdcm", "pge",
    "pks", "poll_control", "pse", "pse36", "pv_eoi", "pv_tlb_flush", "pv_unhalt", "smep", "ss",
    "steal_time", "tsc_adjust", "tsc_deadline", "vme", "x2apic",
}  # fmt: skip
"""Features that bring no instruction."""
UNTRAPPED = {code for name in ("rdrand", "rdseed") for code in INSTRUCTIONS[name]}
UNTRAPPED |= {"f3 0f c7 f8", "f3 41 0f c7 ff"}
"""RDRAND, RDSEED and RDPID: nothing keeps a program, or a kernel that runs as it is, from them."""
ROWS = [(name, code) for name, codes in INSTRUCTIONS.items() for code in codes]
PAIRS = [("bt", "lazy"), ("bt", "vtlb"), ("deprivileged", "lazy"), ("emulate", "ept")]
ENABLED = int(CR4(PKE=1, OSXSAVE=1, FSGSBASE=1, PCE=1, OSXMMEXCPT=1, OSFXSR=1, PAE=1))

EXECUTED, UD, GP = 0, 6, 13
BEGIN = "bf 00 00 12 00 31 c9 31 c0 31 d2 | mov edi, DATA; xor ecx, ecx; xor eax, eax; xor edx, edx"
END = "31 c9 f7 f1 | xor ecx, ecx; div ecx"
HANDLER = "b0 {:02x} e6 f4 | mov al, VECTOR; out 0xf4, al"
STACK, TSS, RSP0 = 0x1E_0000, 0x13_0000, 4


def test_each_feature_has_a_row() -> None:
    assert INSTRUCTIONS.keys() | WITHOUT == FEATURES.keys()
    assert not INSTRUCTIONS.keys() & WITHOUT


def found(execution: str, paging: str, name: str, code: str, *, is_program: bool) -> int:
    """The vector of what the instruction has met."""
    is_isa = Execution.ALL[execution].needs_all_traps
    cpu = f"max,-pmu,-xsaves,-{name}"
    with VM("16M", execution=execution, paging=paging, cpu=cpu, virtualizable_isa=is_isa) as vm:
        registers: dict[str, int] = {}
        for vector in (EXECUTED, UD, GP):
            registers = p.handle(vm, vector, HANDLER.format(vector))
        cr4 = ENABLED & (int(vm.vcpus[0].model.cr4_allowed) | int(CR4(PAE=1)))
        whole = f"{BEGIN}\n{code} | it\n{END}"
        begin = p.start_program if is_program else p.start
        begin(vm, whole, cr4=cr4, tr_base=TSS, **registers)
        vm.memory.write(TSS + RSP0, STACK.to_bytes(8, "little"))
        stop = vm.go(budget=1000)
        assert stop.status is not None, stop
        return stop.status


@pytest.mark.parametrize("is_program", [False, True])
@pytest.mark.parametrize(("name", "code"), ROWS)
def test_it_is_as_hidden_as_under_vmx(name: str, code: str, is_program: bool) -> None:
    expected = found("vmx", "ept", name, code, is_program=is_program)
    is_open = code in UNTRAPPED and expected == UD
    for execution, paging in PAIRS:
        if name in Execution.ALL[execution].cannot_hide:
            continue
        goes_on = is_open and (execution == "deprivileged" or (execution == "bt" and is_program))
        got = found(execution, paging, name, code, is_program=is_program)
        assert got == (EXECUTED if goes_on else expected), execution


@pytest.mark.parametrize("name", ["rdrand", "rdseed"])
@pytest.mark.parametrize(("execution", "paging"), [("deprivileged", "lazy"), ("pv", "pv")])
def test_what_a_technique_cannot_hide_is_refused(execution: str, paging: str, name: str) -> None:
    cpu = f"max,-pmu,-xsaves,-{name}"
    words = f"cpu '{cpu}': execution {execution} cannot hide {name}, which .* one of bt, emulate"
    with pytest.raises(ValueError, match=words):
        VM("16M", execution=execution, paging=paging, cpu=cpu)
    isa = execution == "deprivileged"
    if isa:
        with VM("16M", paging=paging, cpu=cpu, virtualizable_isa=isa) as vm:
            with pytest.raises(ValueError, match=words):
                vm.execution = execution
            vm.execution = "bt"


def test_translations_with_and_without_a_feature_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that has RDRAND leaves its copy on disk, which one without it must not find."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cpu, status in (("", EXECUTED), ("-rdrand", UD), ("+rdrand", EXECUTED), ("-rdrand", UD)):
        with VM(
            "16M", execution="bt", paging="lazy", cpu=cpu or "understudy", keep_translations=True
        ) as vm:
            for vector in (EXECUTED, UD):
                registers = p.handle(vm, vector, HANDLER.format(vector))
            p.start(vm, f"{BEGIN}\n0f c7 f0 | rdrand eax\n{END}", **registers)
            assert vm.go(budget=1000).status == status
    assert len(list((tmp_path / "understudy" / "translations").iterdir())) == 2
