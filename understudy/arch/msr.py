"""Model-specific registers: their numbers and the layouts that the hypervisor looks into.

Source: SDM 4, "Architectural MSRs"; the KVM ones: the Linux kernel's documentation, "KVM-specific
MSRs".
"""

from enum import IntEnum
from typing import Final

from understudy.arch.address import TOP
from understudy.arch.bits import Bit, Bits, Field


class Msr(IntEnum):
    """SDM 4, "Architectural MSRs"."""

    IA32_TSC = 0x10
    KVM_WALL_CLOCK = 0x11
    KVM_SYSTEM_TIME = 0x12
    IA32_PLATFORM_ID = 0x17
    IA32_APIC_BASE = 0x1B
    SMI_COUNT = 0x34
    IA32_FEATURE_CONTROL = 0x3A
    IA32_TSC_ADJUST = 0x3B
    IA32_SPEC_CTRL = 0x48
    IA32_PRED_CMD = 0x49
    IA32_BIOS_SIGN_ID = 0x8B
    IA32_PMC0 = 0xC1
    PLATFORM_INFO = 0xCE
    IA32_MTRRCAP = 0xFE
    IA32_ARCH_CAPABILITIES = 0x10A
    MISC_FEATURES_ENABLES = 0x140
    IA32_SYSENTER_CS = 0x174
    IA32_SYSENTER_ESP = 0x175
    IA32_SYSENTER_EIP = 0x176
    IA32_MCG_CAP = 0x179
    IA32_MCG_STATUS = 0x17A
    IA32_PERFEVTSEL0 = 0x186
    IA32_MISC_ENABLE = 0x1A0
    IA32_DEBUGCTL = 0x1D9
    LASTBRANCHFROMIP = 0x1DB
    LASTBRANCHTOIP = 0x1DC
    LASTINTFROMIP = 0x1DD
    LASTINTTOIP = 0x1DE
    IA32_MTRR_PHYSBASE0 = 0x200
    IA32_MTRR_PHYSMASK7 = 0x20F
    IA32_MTRR_FIX64K_00000 = 0x250
    IA32_MTRR_FIX16K_80000 = 0x258
    IA32_MTRR_FIX16K_A0000 = 0x259
    IA32_MTRR_FIX4K_C0000 = 0x268
    IA32_MTRR_FIX4K_F8000 = 0x26F
    IA32_PAT = 0x277
    IA32_MTRR_DEF_TYPE = 0x2FF
    IA32_FIXED_CTR0 = 0x309
    IA32_PERF_CAPABILITIES = 0x345
    IA32_FIXED_CTR_CTRL = 0x38D
    IA32_PERF_GLOBAL_STATUS = 0x38E
    IA32_PERF_GLOBAL_CTRL = 0x38F
    IA32_PERF_GLOBAL_OVF_CTRL = 0x390
    IA32_VMX_BASIC = 0x480
    IA32_VMX_PINBASED_CTLS = 0x481
    IA32_VMX_PROCBASED_CTLS = 0x482
    IA32_VMX_EXIT_CTLS = 0x483
    IA32_VMX_ENTRY_CTLS = 0x484
    IA32_VMX_MISC = 0x485
    IA32_VMX_CR0_FIXED0 = 0x486
    IA32_VMX_CR0_FIXED1 = 0x487
    IA32_VMX_CR4_FIXED0 = 0x488
    IA32_VMX_CR4_FIXED1 = 0x489
    IA32_VMX_PROCBASED_CTLS2 = 0x48B
    IA32_VMX_EPT_VPID_CAP = 0x48C
    IA32_VMX_TRUE_PINBASED_CTLS = 0x48D
    IA32_VMX_TRUE_PROCBASED_CTLS = 0x48E
    IA32_VMX_TRUE_EXIT_CTLS = 0x48F
    IA32_VMX_TRUE_ENTRY_CTLS = 0x490
    IA32_A_PMC0 = 0x4C1
    IA32_TSC_DEADLINE = 0x6E0
    IA32_PKRS = 0x6E1
    X2APIC_FIRST = 0x800
    X2APIC_EOI = 0x80B
    X2APIC_SVR = 0x80F
    X2APIC_IRR0 = 0x820
    X2APIC_LVT_TIMER = 0x832
    X2APIC_LVT_PC = 0x834
    X2APIC_LAST = 0x8FF
    IA32_XSS = 0xDA0
    IA32_EFER = 0xC000_0080
    IA32_STAR = 0xC000_0081
    IA32_LSTAR = 0xC000_0082
    IA32_CSTAR = 0xC000_0083
    IA32_FMASK = 0xC000_0084
    IA32_FS_BASE = 0xC000_0100
    IA32_GS_BASE = 0xC000_0101
    IA32_KERNEL_GS_BASE = 0xC000_0102
    IA32_TSC_AUX = 0xC000_0103
    KVM_WALL_CLOCK_NEW = 0x4B56_4D00
    KVM_SYSTEM_TIME_NEW = 0x4B56_4D01
    KVM_ASYNC_PF_EN = 0x4B56_4D02
    KVM_STEAL_TIME = 0x4B56_4D03
    KVM_PV_EOI = 0x4B56_4D04
    KVM_POLL_CONTROL = 0x4B56_4D05
    KVM_ASYNC_PF_INT = 0x4B56_4D06
    KVM_ASYNC_PF_ACK = 0x4B56_4D07


class EFER(Bits, width=64):
    """IA32_EFER.  SDM 3A, "Extended Feature Enable Register"."""

    NXE = Bit(11)  # execute-disable enable
    LMA = Bit(10)  # IA-32e mode active
    LME = Bit(8)  # IA-32e mode enable
    SCE = Bit(0)  # SYSCALL enable


class ApicBase(Bits, width=64):
    """IA32_APIC_BASE.  SDM 3A, "Local APIC Status and Location"."""

    ADDR = Field(TOP, 12)
    EN = Bit(11)  # global enable
    EXTD = Bit(10)  # x2APIC mode
    BSP = Bit(8)  # bootstrap processor


class InterruptCommand(Bits, width=64):
    """The ICR.  SDM 3A, "Interrupt Command Register (ICR)"; the destination depends on the mode."""

    DESTINATION = Field(63, 32)
    SHORTHAND = Field(19, 18)  # 1 self, 2 all including self, 3 all excluding self
    TRIGGER = Bit(15)
    LEVEL = Bit(14)
    LOGICAL = Bit(11)
    DELIVERY_MODE = Field(10, 8)
    VECTOR = Field(7, 0)


class FeatureControl(Bits, width=64):
    """IA32_FEATURE_CONTROL.  SDM 3C, "Enabling and Entering VMX Operation"."""

    VMX_OUTSIDE_SMX = Bit(2)
    VMX_IN_SMX = Bit(1)
    LOCK = Bit(0)


class ArchCapabilities(Bits, width=64):
    """IA32_ARCH_CAPABILITIES.  SDM 4, "Architectural MSRs": what the processor is immune to."""

    ITS_NO = Bit(62)  # indirect target selection
    RFDS_NO = Bit(27)  # register file data sampling
    GDS_NO = Bit(26)  # gather data sampling
    PBRSB_NO = Bit(24)  # post-barrier return stack buffer prediction
    BHI_NO = Bit(20)  # branch history injection
    RRSBA = Bit(19)  # restricted RSB alternate
    FB_CLEAR = Bit(17)
    PSDP_NO = Bit(15)  # primary stale data propagator
    FBSDP_NO = Bit(14)  # fill buffer stale data propagator
    SBDR_SSDP_NO = Bit(13)  # shared buffers data read
    TAA_NO = Bit(8)  # TSX asynchronous abort
    TSX_CTRL = Bit(7)
    IF_PSCHANGE_MC_NO = Bit(6)  # machine check on a page-size change
    MDS_NO = Bit(5)  # microarchitectural data sampling
    SSB_NO = Bit(4)  # speculative store bypass
    SKIP_L1DFL_VMENTRY = Bit(3)
    RSBA = Bit(2)  # RSB alternate
    IBRS_ALL = Bit(1)  # enhanced IBRS
    RDCL_NO = Bit(0)  # rogue data cache load (Meltdown)


class SpecCtrl(Bits, width=64):
    """IA32_SPEC_CTRL.  SDM 4, "Architectural MSRs"."""

    BHI_DIS_S = Bit(10)  # branch history injection disabled in supervisor mode
    RRSBA_DIS_S = Bit(6)
    SSBD = Bit(2)
    STIBP = Bit(1)
    IBRS = Bit(0)


class MiscEnable(Bits, width=64):
    """IA32_MISC_ENABLE.  SDM 4, "Architectural MSRs"; turbo mode is not architectural."""

    TURBO_DISABLE = Bit(38)
    XD_DISABLE = Bit(34)
    XTPR_DISABLE = Bit(23)
    LIMIT_CPUID = Bit(22)
    MONITOR = Bit(18)
    SPEEDSTEP = Bit(16)
    PEBS_UNAVAILABLE = Bit(12)  # bits 12, 11 and 7 only read
    BTS_UNAVAILABLE = Bit(11)
    PERFMON = Bit(7)
    THERMAL_CONTROL = Bit(3)
    FAST_STRINGS = Bit(0)


class DebugCtl(Bits, width=64):
    """IA32_DEBUGCTL.  SDM 3B, "IA32_DEBUGCTL MSR"; there are no branch records."""

    FREEZE_PERFMON_ON_PMI = Bit(12)
    FREEZE_LBRS_ON_PMI = Bit(11)
    BTF = Bit(1)  # single-step on branches
    LBR = Bit(0)


class PerfEventSelect(Bits, width=64):
    """IA32_PERFEVTSELx.  SDM 3B, "Architectural Performance Monitoring Version 1"."""

    CMASK = Field(31, 24)
    INV = Bit(23)
    EN = Bit(22)
    INT = Bit(20)  # an overflow interrupts
    PC = Bit(19)
    EDGE = Bit(18)
    OS = Bit(17)  # count at level 0
    USR = Bit(16)  # count at levels 1 to 3
    EVENT = Field(15, 0)  # unit mask and number


class FixedCounterControl(Bits, width=4):
    """One fixed counter's part of IA32_FIXED_CTR_CTRL.  SDM 3B, the same, version 2."""

    PMI = Bit(3)  # an overflow interrupts
    USR = Bit(1)
    OS = Bit(0)


SERIES: Final = (
    (Msr.IA32_PMC0, 4), (Msr.IA32_PERFEVTSEL0, 4), (Msr.IA32_FIXED_CTR0, 3), (Msr.IA32_A_PMC0, 4),
)  # fmt: skip
"""Registers of which there are several: the first, and how many."""


def msr_name(index: int) -> str:
    """The register's name for counts and messages."""
    try:
        return Msr(index).name
    except ValueError:
        pass
    if Msr.IA32_MTRR_PHYSBASE0 <= index <= Msr.IA32_MTRR_PHYSMASK7:
        pair, is_mask = divmod(index - Msr.IA32_MTRR_PHYSBASE0, 2)
        return f"IA32_MTRR_PHYS{'MASK' if is_mask else 'BASE'}{pair}"
    for first, count in SERIES:
        if first < index < first + count:
            return f"{first.name.rstrip('0')}{index - first}"
    return f"MSR_{index:#x}"
