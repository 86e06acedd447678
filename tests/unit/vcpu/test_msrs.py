"""The MSRs that exit, and the CPU model beside them."""

import pytest

from tests.unit.fixtures import bench
from understudy.arch.cpuid import Leaf1Ecx, Leaf1Edx, Leaf7Ebx, Leaf7Edx
from understudy.arch.msr import ArchCapabilities, Msr
from understudy.arch.vmcs import Vmcs
from understudy.vcpu.cpu_model import CpuModel
from understudy.vcpu.msrs import ARCH_CAPABILITIES, MTRR_TYPES


def test_the_processor_has_none_of_the_known_defects() -> None:
    """What the bug tables of Linux 6.1 and 6.12 look at."""
    for name in ("RDCL_NO", "IBRS_ALL", "SSB_NO", "MDS_NO", "TAA_NO", "IF_PSCHANGE_MC_NO",
                 "SBDR_SSDP_NO", "FBSDP_NO", "PSDP_NO", "BHI_NO", "PBRSB_NO", "GDS_NO", "RFDS_NO",
                 "ITS_NO"):  # fmt: skip
        assert getattr(ARCH_CAPABILITIES, name), name
    assert not ARCH_CAPABILITIES.RSBA
    assert not ARCH_CAPABILITIES.RRSBA
    with bench() as b:
        assert b.vm.vcpus[0].msrs.read(Msr.IA32_ARCH_CAPABILITIES) == ARCH_CAPABILITIES
        assert isinstance(ARCH_CAPABILITIES, ArchCapabilities)


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        (Msr.IA32_SPEC_CTRL, 1 << 3),
        (Msr.IA32_PRED_CMD, 2),
        (Msr.IA32_MTRR_DEF_TYPE, 0x1006),
        (Msr.IA32_MTRR_DEF_TYPE, 0x802),
        (Msr.IA32_MTRR_PHYSBASE0, 0x106),
        (Msr.IA32_MTRR_PHYSBASE0 + 1, 1 << 46),
        (Msr.IA32_MTRR_FIX4K_C0000, 0x07),
        (Msr.IA32_ARCH_CAPABILITIES, 0),
        (Msr.IA32_MCG_CAP, 0),
        (Msr.IA32_VMX_BASIC, 0),
        (Msr.IA32_MISC_ENABLE, 1 << 40),
        (0xC001_0015, 0),
    ],
)
def test_reserved_bits_and_read_only_registers_are_refused(msr: int, value: int) -> None:
    with bench() as b, pytest.raises(KeyError):
        b.vm.vcpus[0].msrs.write(msr, value)


@pytest.mark.parametrize("msr", [Msr.IA32_VMX_BASIC, 0x346, 0xC001_0015, 0x606, 0x4B56_4D02])
def test_hidden_registers_do_not_exist(msr: int) -> None:
    with bench() as b, pytest.raises(KeyError):
        b.vm.vcpus[0].msrs.read(msr)


def test_what_is_kept_is_kept() -> None:
    with bench() as b:
        msrs = b.vm.vcpus[0].msrs
        msrs.write(Msr.IA32_SPEC_CTRL, 1 | 1 << 10)
        assert msrs.read(Msr.IA32_SPEC_CTRL) == 0x401
        msrs.write(Msr.IA32_BIOS_SIGN_ID, 0)
        assert msrs.read(Msr.IA32_BIOS_SIGN_ID) >> 32 != 0
        msrs.write(Msr.IA32_PRED_CMD, 1)
        with pytest.raises(KeyError):
            msrs.read(Msr.IA32_PRED_CMD)


def test_mtrrs_leave_the_devices_uncached() -> None:
    with bench() as b:
        read = b.vm.vcpus[0].msrs.read
        assert read(Msr.IA32_MTRR_DEF_TYPE) == 0xC06
        base, mask = read(Msr.IA32_MTRR_PHYSBASE0), read(Msr.IA32_MTRR_PHYSBASE0 + 1)
        assert mask & 0x800
        for gpa in (0xC000_0000, 0xFEE0_0000, 0xFFFF_FFFF):
            assert gpa & mask & ~0xFFF == base & mask & ~0xFFF
        for gpa in (0xBFFF_FFFF, 0x1_0000_0000):
            assert gpa & mask & ~0xFFF != base & mask & ~0xFFF
        assert base & 0xFF == 0 and base & 0xFF in MTRR_TYPES


def test_the_guest_may_set_its_tsc() -> None:
    with bench() as b:
        msrs = b.vm.vcpus[0].msrs
        b.processor.tsc = 1000
        msrs.write(Msr.IA32_TSC, 5000)
        assert msrs.read(Msr.IA32_TSC) == 5000
        assert msrs.read(Msr.IA32_TSC_ADJUST) == 4000
        assert b.field(Vmcs.TSC_OFFSET) == 4000
        msrs.write(Msr.IA32_TSC_DEADLINE, 6000)
        assert b.apic.timer == 2000  # the APIC counts guest time
        assert msrs.read(Msr.IA32_TSC_DEADLINE) == 6000
        msrs.write(Msr.IA32_TSC_DEADLINE, 0)
        assert b.apic.deadline() == (1 << 64) - 1


def test_the_apic_page_follows_its_base() -> None:
    with bench() as b:
        msrs = b.vm.vcpus[0].msrs
        assert msrs.is_apic_page(0xFEE0_0080)
        assert not msrs.is_apic_page(0)
        msrs.write(Msr.IA32_APIC_BASE, 0xFEE0_0D00)  # x2APIC mode
        assert not msrs.is_apic_page(0xFEE0_0080)
        assert b.vm.vcpus[0].attention


def test_an_eoi_goes_on_to_the_io_apics() -> None:
    with bench() as b:
        msrs, heard = b.vm.vcpus[0].msrs, list[int]()
        msrs.eoi = heard.append
        b.apic.eois = [0x31]
        msrs.write(Msr.X2APIC_EOI, 0)
        b.apic.eois = [0x32]
        msrs.apic_write(0xFEE0_00B0, 4, 0)
        assert heard == [0x31, 0x32]


def test_kvms_clock_is_reached_by_its_msrs() -> None:
    with bench() as b:
        b.vm.vcpus[0].msrs.write(Msr.KVM_SYSTEM_TIME_NEW, 0x6001)
        assert b.vm.vcpus[0].msrs.read(Msr.KVM_SYSTEM_TIME_NEW) == 0x6001
        assert b.vm.memory.read(0x6000, 32) != bytes(32)


def test_unknown_msrs_are_counted_within_bounds() -> None:
    with bench() as b:
        for index in range(0x2000, 0x2400):
            with pytest.raises(KeyError):
                b.vm.vcpus[0].msrs.read(index)
        assert len(b.vm.vcpus[0].msrs.state.unknown) == 256


# --- the CPU model ---


def test_nothing_is_shown_that_the_computer_lacks() -> None:
    poor, rich = CpuModel(), CpuModel({"sse42": True, "popcnt": True, "bmi1": True, "aes": True})
    assert not Leaf1Ecx(poor.answer(1, 0)[2]).SSE4_2
    assert Leaf1Ecx(rich.answer(1, 0)[2]).SSE4_2
    assert Leaf7Ebx(rich.answer(7, 0)[1]).BMI1
    assert not Leaf7Ebx(rich.answer(7, 0)[1]).BMI2
    old = CpuModel(cr4_available=0x2000 | 0x6F8)
    assert not Leaf7Ebx(old.answer(7, 0)[1]).SMEP
    assert not Leaf1Ecx(old.answer(1, 0)[2]).PCID


def test_what_is_hidden_is_hidden() -> None:
    model = CpuModel(dict.fromkeys(["avx", "avx2", "rdrand", "vmx", "sha"], True), "baseline")
    ecx, edx = Leaf1Ecx(model.answer(1, 0)[2]), Leaf1Edx(model.answer(1, 0)[3])
    assert not (ecx.AVX or ecx.OSXSAVE or ecx.VMX or ecx.MONITOR)
    assert ecx.HYPERVISOR and ecx.X2APIC and ecx.TSC_DEADLINE
    assert edx.SSE2 and edx.APIC and not edx.HTT
    assert not model.answer(7, 0)[2] & (1 << 16 | 1 << 4)  # LA57, OSPKE
    assert Leaf7Edx(model.answer(7, 0)[3]).ARCH_CAPABILITIES
    assert model.answer(7, 2)[3] == 1 << 4  # BHI_CTRL: no software clearing of branch history
    assert model.answer(0xD, 0)[0] == 0x203  # no component of AVX


def test_ranges_end_as_on_intel_processors() -> None:
    model = CpuModel()
    last = model.answer(model.answer(0, 0)[0], 0)
    assert model.answer(0x17, 0) == model.answer(0x8000_0009, 0) == last != (0, 0, 0, 0)
    assert model.answer(3, 0) == (0, 0, 0, 0)
    assert model.answer(0x8000_0000, 0)[0] == 0x8000_0008
    assert model.answer(4, 99) == (0, 0, 0, 0)
    assert model.answer(0xB, 5) == (0, 0, 5, 0)


def test_the_tsc_is_the_crystal_clock() -> None:
    denominator, numerator, hertz, _ = CpuModel().answer(0x15, 0)
    assert hertz * numerator // denominator == 1_000_000_000
