"""Every feature of the CPU model: shown or hidden, with what goes with it; and how one chooses."""

import pytest

from tests.unit.fixtures import bench
from understudy.arch import cpuid
from understudy.arch.bits import Bits
from understudy.arch.cr import CR4
from understudy.arch.msr import Msr
from understudy.vcpu.cpu_features import ALIASES, FEATURES, MODELS, Choice, available
from understudy.vcpu.cpu_model import EFER_BITS, MSRS, CpuModel

RICH = {name: True for one in FEATURES.values() for name in one.host}
ALL_CR4 = (1 << 64) - 1
PLACES: dict[type[Bits], tuple[int, int, int]] = {
    cpuid.Leaf0AEax: (0xA, 0, 0),
    cpuid.Leaf1Ecx: (1, 0, 2), cpuid.Leaf1Edx: (1, 0, 3), cpuid.Leaf7Ebx: (7, 0, 1),
    cpuid.Leaf7Ecx: (7, 0, 2), cpuid.Leaf7Edx: (7, 0, 3), cpuid.Leaf7Sub2Edx: (7, 2, 3),
    cpuid.LeafDSub1Eax: (0xD, 1, 0), cpuid.KvmFeatures: (0x4000_0001, 0, 0),
    cpuid.LeafExt1Ecx: (0x8000_0001, 0, 2), cpuid.LeafExt1Edx: (0x8000_0001, 0, 3),
}  # fmt: skip
"""Leaf, sub-leaf and register of each word."""


def shows(model: CpuModel, name: str) -> bool:
    one = FEATURES[name]
    leaf, subleaf, register = PLACES[one.word]
    if leaf not in model.plain and leaf not in model.indexed:
        return False  # a processor answers such a leaf with another
    mask = getattr(one.word, one.bit).mask
    return bool(model.answer(leaf, subleaf)[register] & mask)


@pytest.mark.parametrize("name", sorted(FEATURES))
def test_a_feature_is_shown_or_hidden_with_all_that_goes_with_it(name: str) -> None:
    one = FEATURES[name]
    with_it, without = CpuModel(RICH, f"max,+{name}"), CpuModel(RICH, f"max,-{name}")
    assert shows(with_it, name) and not shows(without, name)
    assert int(with_it.cr4_allowed) & one.cr4 == one.cr4
    assert not int(without.cr4_allowed) & one.cr4
    indices = set(MSRS.get(name, ()))
    assert not with_it.hidden_msrs & indices and without.hidden_msrs >= indices
    efer = EFER_BITS.get(name, 0)
    assert with_it.efer_allowed & efer == efer and not without.efer_allowed & efer
    for other in FEATURES.values():  # what needs it went with it
        if name in other.needs:
            assert not shows(without, other.name)


@pytest.mark.parametrize("name", sorted(n for n, one in FEATURES.items() if one.host))
def test_what_the_computer_lacks_is_not_shown_and_cannot_be_asked_for(name: str) -> None:
    poor = {each: each not in FEATURES[name].host for each in RICH}
    assert not shows(CpuModel(poor, "max"), name)
    with pytest.raises(ValueError, match=f"^cpu feature '{name}': not on this computer, which has"):
        CpuModel(poor, f"baseline,+{name}")


@pytest.mark.parametrize("name", sorted(n for n, one in FEATURES.items() if one.cr4))
def test_what_the_machine_lacks_is_not_shown(name: str) -> None:
    lacking = ALL_CR4 & ~int(FEATURES[name].cr4)
    assert name not in available(RICH, lacking)
    assert not shows(CpuModel(RICH, "max", cr4_available=lacking), name)


def test_the_models_differ_as_said() -> None:
    poor, rich = ({text: CpuModel(host, text).shown for text in MODELS} for host in ({}, RICH))
    assert poor["baseline"] == rich["baseline"]
    assert rich["baseline"] < rich["understudy"] < rich["max"] == FEATURES.keys()
    assert {"smap", "pks", "sha"} <= rich["max"] - rich["understudy"]
    assert {"avx", "avx2", "fma", "f16c"} <= rich["understudy"] - rich["baseline"]
    assert CpuModel(RICH).shown == rich["understudy"]


def test_what_a_feature_needs_comes_and_goes_with_it() -> None:
    assert CpuModel(RICH, "understudy,-sse").shown.isdisjoint({"sse", "sse2", "aes", "sse4_2"})
    without = CpuModel(RICH).shown - CpuModel(RICH, "understudy,-avx").shown
    assert without == {"avx", "fma", "f16c", "avx2"}
    assert {"sse3", "ssse3"} <= CpuModel(RICH, "baseline,+ssse3").shown
    with pytest.raises(ValueError, match=r"^cpu: sse4_2 needs sse2, which is taken away$"):
        CpuModel(RICH, "max,-sse2,+sse4_2")


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_other_names_are_understood(alias: str) -> None:
    assert Choice.of(f"max,+{alias}") == Choice.of(f"max,+{ALIASES[alias]}")


def test_the_text_is_read_with_good_will() -> None:
    assert Choice.of("+SMAP, -sse4.1") == Choice.of("understudy,+smap,-sse4_1")
    assert Choice.of("max,-tsc-deadline").removed == {"tsc_deadline"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pentium", "^cpu 'pentium': expected one of understudy, max, baseline, then perhaps"),
        ("", "^cpu '': expected one of understudy, max"),
        ("max,smap", "^cpu 'max,smap': 'smap' must be .feature or -feature$"),
        ("max,", "must be .feature or -feature"),
        ("max,+avx512", "^cpu feature 'avx512': expected one of adx, aes, "),
        ("max,+smap,-smap", "smap added and taken away"),
    ],
)
def test_a_wrong_text_is_one_line_that_says_what_is_known(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Choice.of(text)
    assert "\n" not in str(caught.value)


def test_leaves_go_with_their_features() -> None:
    last = CpuModel().answer(0x16, 0)
    assert CpuModel().answer(0x4000_0000, 0)[0] == 0x4000_0001
    hidden = CpuModel(text="-hypervisor")
    assert [hidden.answer(0x4000_0000 + n, 0) for n in (0, 1, 0xFFFF)] == [last] * 3
    assert CpuModel().answer(0xB, 0)[2] == 1 << 8
    assert CpuModel(text="-x2apic").answer(0xB, 0) == (0, 0, 0, 0)


def test_msrs_of_hidden_features_do_not_exist() -> None:
    with bench(cpu="-x2apic,-tsc_deadline,-mtrr,-bhi_ctrl") as b:
        msrs = b.vm.vcpus[0].msrs
        for index in (0x802, Msr.IA32_TSC_DEADLINE, Msr.IA32_MTRRCAP, Msr.IA32_MTRR_PHYSBASE0):
            with pytest.raises(KeyError):
                msrs.read(index)
            with pytest.raises(KeyError):
                msrs.write(index, 0)
        with pytest.raises(KeyError):
            msrs.write(Msr.IA32_APIC_BASE, 0xFEE0_0000 | 1 << 11 | 1 << 10)
        with pytest.raises(KeyError):
            msrs.write(Msr.IA32_SPEC_CTRL, 1 << 10)
        msrs.write(Msr.IA32_SPEC_CTRL, 1)
    with bench() as b:
        b.vm.vcpus[0].msrs.write(Msr.IA32_APIC_BASE, 0xFEE0_0000 | 1 << 11 | 1 << 10)
        b.vm.vcpus[0].msrs.write(Msr.IA32_SPEC_CTRL, 1 << 10)


@pytest.mark.parametrize(("name", "bit"), [("syscall", 0), ("lm", 8), ("nx", 11)])
def test_efer_has_no_bit_of_a_hidden_feature(name: str, bit: int) -> None:
    with bench({"cr0": 0x11, "cr4": 0, "efer": 0}, cpu=f"-{name}") as b:
        with pytest.raises(KeyError):
            b.vm.vcpus[0].msrs.write(Msr.IA32_EFER, 1 << bit)
        b.vm.vcpus[0].msrs.write(Msr.IA32_EFER, 0)
    with bench({"cr0": 0x11, "cr4": 0, "efer": 0}) as b:
        b.vm.vcpus[0].msrs.write(Msr.IA32_EFER, 1 << bit)


def test_a_guest_may_set_smap_where_it_is_shown() -> None:
    with bench(cpu="understudy,+smap") as b:
        assert b.vm.vcpus[0].model.cr4_allowed & CR4.SMAP.mask
        assert b.vm.config.cpu == "understudy,+smap"
    with bench() as b:
        assert not b.vm.vcpus[0].model.cr4_allowed & CR4.SMAP.mask


@pytest.mark.parametrize("text", MODELS)
def test_what_no_processor_here_has_is_absent_consistently(text: str) -> None:
    """TSX: HLE, RTM, RTM_ALWAYS_ABORT, TSX_FORCE_ABORT and their MSRs; LA57 and wide addresses."""
    model = CpuModel(RICH, text)
    _, ebx, ecx, edx = model.answer(7, 0)
    assert not ebx & (1 << 4 | 1 << 11)
    assert not edx & (1 << 11 | 1 << 13)
    assert not ecx & 1 << 16
    assert not model.cr4_allowed.LA57
    assert model.answer(0x8000_0008, 0)[0] >> 8 & 0xFF == 48
    with bench(cpu=text) as b:
        msrs = b.vm.vcpus[0].msrs
        for index in (0x122, 0x10F):  # IA32_TSX_CTRL, IA32_TSX_FORCE_ABORT
            with pytest.raises(KeyError):
                msrs.read(index)
            with pytest.raises(KeyError):
                msrs.write(index, 0)
        if "arch_capabilities" in model.shown:
            assert msrs.read(Msr.IA32_ARCH_CAPABILITIES) & (1 << 7 | 1 << 8) == 1 << 8
