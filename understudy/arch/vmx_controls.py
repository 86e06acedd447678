"""The control words of the VMCS and the MSRs that say which bits of them may be set.

Source: SDM 3C, "VM-Execution Control Fields", "VM-Exit Control Fields", "VM-Entry Control
Fields"; SDM 3D, "VMX Capability Reporting Facility".

Invariant: a control word is only made by `allowed`, so that a reserved bit is never wrong.
"""

from typing import TypeVar

from understudy.arch.bits import Bit, Bits, Field


class PinControls(Bits, width=32):
    """SDM 3C, "Pin-Based VM-Execution Controls"."""

    PROCESS_POSTED_INTERRUPTS = Bit(7)
    ACTIVATE_PREEMPTION_TIMER = Bit(6)
    VIRTUAL_NMIS = Bit(5)
    NMI_EXITING = Bit(3)
    EXTERNAL_INTERRUPT_EXITING = Bit(0)


class PrimaryControls(Bits, width=32):
    """SDM 3C, "Processor-Based VM-Execution Controls", primary."""

    ACTIVATE_SECONDARY_CONTROLS = Bit(31)
    PAUSE_EXITING = Bit(30)
    MONITOR_EXITING = Bit(29)
    USE_MSR_BITMAPS = Bit(28)
    MONITOR_TRAP_FLAG = Bit(27)
    USE_IO_BITMAPS = Bit(25)
    UNCONDITIONAL_IO_EXITING = Bit(24)
    MOV_DR_EXITING = Bit(23)
    NMI_WINDOW_EXITING = Bit(22)
    USE_TPR_SHADOW = Bit(21)
    CR8_STORE_EXITING = Bit(20)
    CR8_LOAD_EXITING = Bit(19)
    CR3_STORE_EXITING = Bit(16)
    CR3_LOAD_EXITING = Bit(15)
    RDTSC_EXITING = Bit(12)
    RDPMC_EXITING = Bit(11)
    MWAIT_EXITING = Bit(10)
    INVLPG_EXITING = Bit(9)
    HLT_EXITING = Bit(7)
    USE_TSC_OFFSETTING = Bit(3)
    INTERRUPT_WINDOW_EXITING = Bit(2)


class SecondaryControls(Bits, width=32):
    """SDM 3C, "Processor-Based VM-Execution Controls", secondary."""

    USE_TSC_SCALING = Bit(25)
    MODE_BASED_EXECUTE = Bit(22)
    ENABLE_XSAVES = Bit(20)
    EPT_VIOLATION_VE = Bit(18)
    ENABLE_PML = Bit(17)
    RDSEED_EXITING = Bit(16)
    ENABLE_ENCLS_EXITING = Bit(15)
    VMCS_SHADOWING = Bit(14)
    ENABLE_VM_FUNCTIONS = Bit(13)
    ENABLE_INVPCID = Bit(12)
    RDRAND_EXITING = Bit(11)
    PAUSE_LOOP_EXITING = Bit(10)
    VIRTUAL_INTERRUPT_DELIVERY = Bit(9)
    APIC_REGISTER_VIRTUALIZATION = Bit(8)
    UNRESTRICTED_GUEST = Bit(7)
    WBINVD_EXITING = Bit(6)
    ENABLE_VPID = Bit(5)
    VIRTUALIZE_X2APIC_MODE = Bit(4)
    ENABLE_RDTSCP = Bit(3)
    DESCRIPTOR_TABLE_EXITING = Bit(2)
    ENABLE_EPT = Bit(1)
    VIRTUALIZE_APIC_ACCESSES = Bit(0)


class ExitControls(Bits, width=32):
    """SDM 3C, "VM-Exit Controls"."""

    LOAD_PKRS = Bit(29)
    SAVE_PREEMPTION_TIMER = Bit(22)
    LOAD_EFER = Bit(21)
    SAVE_EFER = Bit(20)
    LOAD_PAT = Bit(19)
    SAVE_PAT = Bit(18)
    ACKNOWLEDGE_INTERRUPT_ON_EXIT = Bit(15)
    LOAD_PERF_GLOBAL_CTRL = Bit(12)
    HOST_ADDRESS_SPACE_SIZE = Bit(9)
    SAVE_DEBUG_CONTROLS = Bit(2)


class EntryControls(Bits, width=32):
    """SDM 3C, "VM-Entry Controls"."""

    LOAD_PKRS = Bit(22)
    LOAD_EFER = Bit(15)
    LOAD_PAT = Bit(14)
    LOAD_PERF_GLOBAL_CTRL = Bit(13)
    DEACTIVATE_DUAL_MONITOR = Bit(11)
    ENTRY_TO_SMM = Bit(10)
    IA32E_MODE_GUEST = Bit(9)
    LOAD_DEBUG_CONTROLS = Bit(2)


class VmxBasic(Bits, width=64):
    """IA32_VMX_BASIC.  SDM 3D, "Basic VMX Information"."""

    TRUE_CONTROLS = Bit(55)  # the IA32_VMX_TRUE_… MSRs exist
    INS_OUTS = Bit(54)  # the exit says which INS/OUTS it was
    MEMTYPE = Field(53, 50)
    ADDRESS_32BIT = Bit(48)
    REGION_SIZE = Field(44, 32)
    REVISION = Field(30, 0)


class VmxMisc(Bits, width=64):
    """IA32_VMX_MISC.  SDM 3D, "Miscellaneous Data"."""

    ENTRY_LENGTH_ZERO = Bit(30)  # software interrupts may be injected with length 0
    CR3_TARGETS = Field(24, 16)
    ACTIVITY_WAIT_FOR_SIPI = Bit(8)
    ACTIVITY_SHUTDOWN = Bit(7)
    ACTIVITY_HLT = Bit(6)
    STORE_LMA = Bit(5)  # exits store EFER.LMA into "IA-32e mode guest"
    TIMER_RATE = Field(4, 0)  # the preemption timer counts changes of this bit of the TSC


class EptVpidCap(Bits, width=64):
    """IA32_VMX_EPT_VPID_CAP.  SDM 3D, "VPID and EPT Capabilities"."""

    INVVPID = Bit(32)
    INVEPT_ALL = Bit(26)
    INVEPT_SINGLE = Bit(25)
    ACCESSED_DIRTY = Bit(21)
    INVEPT = Bit(20)
    PAGE_1G = Bit(17)
    PAGE_2M = Bit(16)
    MEMTYPE_WB = Bit(14)
    WALK_4 = Bit(6)
    EXECUTE_ONLY = Bit(0)


Controls = TypeVar("Controls", bound=Bits)


class MissingControls(Exception):
    """The processor lacks a VMX control that the hypervisor cannot do without."""


def allowed(wanted: Controls, optional: Controls, capability: int) -> Controls:
    """The control word with all of `wanted`, what there is of `optional`, and the default bits.

    `capability` is the control's (TRUE) capability MSR: the low half has the bits that must be
    1, the high half those that may be (SDM 3D, "VM-Execution Controls").
    """
    must, may = capability & 0xFFFF_FFFF, capability >> 32
    kind = type(wanted)
    if missing := wanted & ~may:
        raise MissingControls(f"the processor does not allow {kind(missing)!r}")
    return kind(int(wanted) | int(optional) & may | must)
