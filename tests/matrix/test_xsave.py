"""XSAVE and its kin in a VM: what the CPU model shows is there, and nothing else; and it is kept.

Source: SDM 1, "Managing State Using the XSAVE Feature Set"; SDM 2A, "CPUID", leaf 0DH.
Invariants: leaf 0DH tells the sizes for what is enabled at that moment; XCR0 takes what is shown.
"""

import pytest

from tests.matrix.programs import DATA, handle, start
from understudy import assembly
from understudy.paging import Paging
from understudy.silicon import host_features
from understudy.vm import VM

ENABLE = """
    0f 20 e0             | mov rax, cr4
    0d 00 02 04 00       | or eax, OSXSAVE | OSFXSR
    0f 22 e0             | mov cr4, rax
    31 c9                | xor ecx, ecx
    31 d2                | xor edx, edx
    b8 {xcr0}            | mov eax, XCR0
    0f 01 d1             | xsetbv
"""
LOOK = """
    bf 00 00 12 00       | mov edi, DATA
    31 c9                | xor ecx, ecx
    0f 01 d0             | xgetbv
    89 07                | mov [rdi], eax
    b8 01 00 00 00       | mov eax, 1
    0f a2                | cpuid
    89 4f 04             | mov [rdi + 4], ecx
    b8 0d 00 00 00       | mov eax, 13
    31 c9                | xor ecx, ecx
    0f a2                | cpuid
    89 47 08             | mov [rdi + 8], eax
    89 5f 0c             | mov [rdi + 12], ebx
    89 4f 10             | mov [rdi + 16], ecx
    b8 0d 00 00 00       | mov eax, 13
    b9 01 00 00 00       | mov ecx, 1
    0f a2                | cpuid
    89 47 14             | mov [rdi + 20], eax
    89 5f 18             | mov [rdi + 24], ebx
    b8 0d 00 00 00       | mov eax, 13
    b9 09 00 00 00       | mov ecx, 9
    0f a2                | cpuid
    89 47 1c             | mov [rdi + 28], eax
    89 5f 20             | mov [rdi + 32], ebx
    b0 00                | mov al, 0
    e6 f4                | out 0xf4, al
"""
SAVE_ALL = """
    66 0f ef c0          | pxor xmm0, xmm0
    66 0f 76 c9          | pcmpeqd xmm1, xmm1
    bf 00 00 13 00       | mov edi, 0x130000
    83 c8 ff             | or eax, -1
    83 ca ff             | or edx, -1
    {save}               | save to [rdi]
    66 0f 57 c9          | xorpd xmm1, xmm1
    83 c8 ff             | or eax, -1
    {restore}            | restore from [rdi]
    66 0f 7e c8          | movd eax, xmm1
    e6 f4                | out 0xf4, al
"""
OSXSAVE = 1 << 27
WITH_AVX = pytest.mark.skipif(
    not host_features().get("avx"), reason="this computer has no AVX to give"
)
FAULTED = "\n b0 {vector:02x} | mov al, vector\n e6 f4 | out 0xf4, al\n"


def faults(vm: VM) -> dict[str, int]:
    """#UD and #GP end the program with their numbers."""
    registers = handle(vm, 6, FAULTED.format(vector=6))
    return registers | handle(vm, 13, FAULTED.format(vector=13))


def enable(xcr0: int) -> str:
    return ENABLE.format(xcr0=xcr0.to_bytes(4, "little").hex(" "))


def words(vm: VM) -> list[int]:
    data = vm.memory.read(DATA, 36)
    return [int.from_bytes(data[n : n + 4], "little") for n in range(0, 36, 4)]


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
@pytest.mark.parametrize(
    ("cpu", "xcr0", "expected"),
    [
        ("understudy,-avx", 3, (3, 0x203, 576, 2696, 0xF, 576, 8, 2688)),
        ("understudy,-avx", 0x203, (0x203, 0x203, 2696, 2696, 0xF, 584, 8, 2688)),
        pytest.param("understudy", 3, (3, 0x207, 576, 2696, 0xF, 576, 8, 2688), marks=WITH_AVX),
        pytest.param("understudy", 7, (7, 0x207, 832, 2696, 0xF, 832, 8, 2688), marks=WITH_AVX),
        pytest.param(
            "understudy", 0x207, (0x207, 0x207, 2696, 2696, 0xF, 840, 8, 2688), marks=WITH_AVX
        ),
        ("baseline,-pku,-xsaves,-xsavec", 3, (3, 3, 576, 576, 5, 0, 0, 0)),
    ],
)
def test_what_is_shown_follows_what_is_enabled(
    paging: str, cpu: str, xcr0: int, expected: tuple[int, ...]
) -> None:
    with VM("16M", paging=paging, cpu=cpu) as vm:
        start(vm, enable(xcr0) + LOOK, **faults(vm))
        stop = vm.go()
        assert stop.status == 0, stop
        got = words(vm)
        assert got.pop(1) & OSXSAVE
        assert tuple(got) == expected
        saved = vm.save()
        assert vm.counts()["exits"]["XSETBV"] == 1
    with VM.restore(saved) as vm:
        assert vm.vcpus[0].guest.xcr0 == xcr0
        vm.vcpus[0].reset()
        assert vm.vcpus[0].guest.xcr0 == 1


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize(
    ("cpu", "xcr0", "status"),
    [
        ("understudy", 0x203, 0),
        ("understudy,-avx", 7, 13),
        ("baseline", 7, 13),
        pytest.param("understudy", 7, 0, marks=WITH_AVX),
        ("understudy", 2, 13),  # x87 must be
        ("understudy,-pku", 0x203, 13),
        ("understudy,-xsave", 3, 13),  # CR4.OSXSAVE does not exist
    ],
)
def test_xcr0_takes_what_is_shown(engine: str, cpu: str, xcr0: int, status: int) -> None:
    with VM("16M", engine=engine, cpu=cpu) as vm:
        start(vm, enable(xcr0) + LOOK, **faults(vm))
        assert vm.go().status == status


def test_a_computer_without_avx_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model is what `-avx` makes of it elsewhere."""
    poor = {name: there and name != "avx" for name, there in host_features().items()}
    monkeypatch.setattr(assembly, "host_features", lambda: poor)
    for xcr0, status in ((7, 13), (0x203, 0)):
        with VM("16M") as vm:
            assert vm.vcpus[0].model.shown.isdisjoint({"avx", "fma", "f16c", "avx2"})
            start(vm, enable(xcr0) + LOOK, **faults(vm))
            assert vm.go().status == status


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize(
    ("save", "restore", "cpu", "status"),
    [
        ("0f ae 27", "0f ae 2f", "understudy", 0xFF),  # xsave, xrstor
        ("0f ae 37", "0f ae 2f", "understudy", 0xFF),  # xsaveopt
        ("0f c7 27", "0f ae 2f", "understudy", 0xFF),  # xsavec
        ("0f c7 2f", "0f c7 1f", "understudy", 0xFF),  # xsaves, xrstors
        ("0f c7 2f", "0f c7 1f", "understudy,-xsaves", 6),
    ],
)
def test_state_comes_back(engine: str, save: str, restore: str, cpu: str, status: int) -> None:
    with VM("16M", engine=engine, cpu=cpu) as vm:
        program = enable(0x3) + SAVE_ALL.format(save=save, restore=restore)
        start(vm, program, **faults(vm))
        assert vm.go().status == status
