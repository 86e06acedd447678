"""The VMCS as set up from the capability MSRs."""

import pytest

from tests.unit.fakes import CAPABILITIES, FakeProcessor, fake_machine
from tests.unit.fixtures import bench
from understudy.arch.msr import Msr
from understudy.arch.vmcs import Vmcs
from understudy.arch.vmx_controls import (
    EntryControls,
    ExitControls,
    MissingControls,
    PinControls,
    PrimaryControls,
    SecondaryControls,
    allowed,
)
from understudy.execution.vmx.fields import with_defaults
from understudy.execution.vmx.operation import PASSED
from understudy.vm import VM


def test_controls_have_what_must_be_and_nothing_that_may_not() -> None:
    with bench() as b:
        for field, msr in (
            (Vmcs.PIN_CONTROLS, Msr.IA32_VMX_TRUE_PINBASED_CTLS),
            (Vmcs.PRIMARY_CONTROLS, Msr.IA32_VMX_TRUE_PROCBASED_CTLS),
            (Vmcs.SECONDARY_CONTROLS, Msr.IA32_VMX_PROCBASED_CTLS2),
            (Vmcs.EXIT_CONTROLS, Msr.IA32_VMX_TRUE_EXIT_CTLS),
            (Vmcs.ENTRY_CONTROLS, Msr.IA32_VMX_TRUE_ENTRY_CTLS),
        ):
            must, may = CAPABILITIES[msr] & 0xFFFF_FFFF, CAPABILITIES[msr] >> 32
            assert b.field(field) & must == must
            assert b.field(field) & ~may == 0
        primary = PrimaryControls(b.field(Vmcs.PRIMARY_CONTROLS))
        assert not primary.CR3_LOAD_EXITING
        assert not primary.INVLPG_EXITING
        assert not primary.RDTSC_EXITING
        assert primary.HLT_EXITING
        assert PinControls(b.field(Vmcs.PIN_CONTROLS)).ACTIVATE_PREEMPTION_TIMER
        assert SecondaryControls(b.field(Vmcs.SECONDARY_CONTROLS)).UNRESTRICTED_GUEST


@pytest.mark.parametrize(("clock", "kept"), [("virtual", True), ("wall", False)])
def test_only_virtual_time_keeps_the_timer_over_exits(clock: str, kept: bool) -> None:
    with bench(clock=clock) as b:
        assert ExitControls(b.field(Vmcs.EXIT_CONTROLS)).SAVE_PREEMPTION_TIMER is kept


def test_optional_controls_are_taken_if_there_and_required_ones_demanded() -> None:
    wanted, optional = PinControls(NMI_EXITING=1), PinControls(VIRTUAL_NMIS=1)
    assert allowed(wanted, optional, 0x3F << 32 | 0x16) == 0x3E
    assert allowed(wanted, optional, 0x1F << 32 | 0x16) == 0x1E
    with pytest.raises(MissingControls, match="NMI_EXITING"):
        allowed(wanted, optional, 0x17 << 32 | 0x16)


def test_hot_msrs_pass_and_all_others_exit() -> None:
    with bench() as b:
        bitmap = b.vm.host.memory.read(b.field(Vmcs.MSR_BITMAPS), 4096)
        clear = {
            (part, half, n)
            for part in (0, 1)
            for half in (0, 1)
            for n in range(0x2000)
            if not bitmap[part * 2048 + half * 1024 + n // 8] >> n % 8 & 1
        }
        expected = {(part, int(m >= 0xC000_0000), m & 0x1FFF) for m in PASSED for part in (0, 1)}
        assert clear == expected


def test_operation_is_entered_in_the_manuals_order() -> None:
    with bench() as b:
        assert b.processor.calls == ["vmxon", "vmclear", "vmptrld"]
        state = b.processor.root_registers
        assert state["cr4"] & 0x2000
        assert state["cr0"] & 0x8000_0021 == 0x8000_0021
        frames = b.vm.vcpus[0].guest.frames()
        assert b.vm.host.memory.read_u32(frames[0] << 12) == 0x11
        assert b.vm.host.memory.read_u32(frames[2] << 12) == 0x11


def test_firmware_without_vmx_is_named() -> None:
    class Locked(FakeProcessor):
        def rdmsr(self, index: int) -> int:
            return 1 if index == Msr.IA32_FEATURE_CONTROL else super().rdmsr(index)

    with fake_machine(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("understudy.machine.host.Processor", Locked)
        with pytest.raises(MissingControls, match="IA32_FEATURE_CONTROL"):
            VM("16M")


def test_registers_come_back_as_they_were_set() -> None:
    with bench() as b:
        values = {
            "rip": 0x1234, "rsp": 0x5678, "rax": 1, "r15": 15, "cr0": 0xE000_0011, "cr4": 0x20,
            "efer": 0x500, "cs": 8, "cs_attr": 0xA09B, "fs_base": 0x77, "lstar": 0x99, "tr": 0x18,
            "gdtr_limit": 0x2F, "sysenter_eip": 3, "kernel_gs_base": 5, "rflags": 0x202,
        }  # fmt: skip
        b.vm.vcpus[0].guest.set_registers(values)
        after = b.vm.vcpus[0].guest.registers()
        assert {name: after[name] for name in values} == values
        assert b.field(Vmcs.GUEST_CR0) == 0xE000_0031
        assert b.field(Vmcs.GUEST_CR4) == 0x2020
        assert b.field(Vmcs.VMCS_LINK_POINTER) == (1 << 64) - 1


def test_registers_that_are_none_are_refused() -> None:
    with bench() as b, pytest.raises(KeyError, match="no such register: rxx"):
        b.vm.vcpus[0].guest.set_registers({"rxx": 1})


@pytest.mark.parametrize(
    ("given", "code", "data", "limit"),
    [
        ({}, 0x9B, 0x93, 0xFFFF),
        ({"cr0": 0x11}, 0xC09B, 0xC093, 0xFFFF_FFFF),
        ({"cr0": 0x8000_0011, "efer": 0x100}, 0xA09B, 0xC093, 0xFFFF_FFFF),
    ],
)
def test_default_segments_fit_the_mode(
    given: dict[str, int], code: int, data: int, limit: int
) -> None:
    state = with_defaults(given)
    assert (state["cs_attr"], state["ds_attr"], state["ss_limit"]) == (code, data, limit)
    assert state["rflags"] == 2


def test_reset_begins_at_the_reset_vector() -> None:
    state = with_defaults({})
    assert (state["cs_base"], state["cs"], state["rip"]) == (0xFFFF_0000, 0xF000, 0xFFF0)
    assert with_defaults({"cs": 0x1000, "rip": 0})["cs_base"] == 0x1_0000


def test_the_guest_does_not_see_the_hosts_bits() -> None:
    with bench() as b:
        execution = b.vm.vcpus[0].guest
        assert execution.control().cr0 & 0x20 == 0
        assert execution.control().cr4 == 0x20
        mask = b.field(Vmcs.CR4_GUEST_HOST_MASK)
        assert mask & 1 << 13  # VMXE
        assert mask & 1 << 21  # SMAP, which is off
        assert not mask & (1 << 5 | 1 << 7 | 1 << 17)  # PAE, PGE and PCIDE do not exit
        assert EntryControls(b.field(Vmcs.ENTRY_CONTROLS)).IA32E_MODE_GUEST
