"""The virtual-machine control structure: field encodings and the formats of its fields.

Source: SDM 3C, "Virtual Machine Control Structures"; SDM 3D, "Field Encoding in VMCS" and
"Capability Reporting Facility".  Names are the SDM's phrases in capitals.  The control words
are in `arch/vmx_controls.py`.

Invariant: an encoding names width and type by itself (bits 14:13 and 11:10), so that a field
list needs no second table.
"""

from enum import IntEnum

from understudy.arch.address import TOP
from understudy.arch.bits import Bit, Bits, Field


class Vmcs(IntEnum):
    """SDM 3D, "Field Encoding in VMCS"."""

    # 16-bit control fields
    VPID = 0x0000
    POSTED_INTERRUPT_NOTIFICATION_VECTOR = 0x0002
    EPTP_INDEX = 0x0004
    # 16-bit guest-state fields
    GUEST_ES = 0x0800
    GUEST_CS = 0x0802
    GUEST_SS = 0x0804
    GUEST_DS = 0x0806
    GUEST_FS = 0x0808
    GUEST_GS = 0x080A
    GUEST_LDTR = 0x080C
    GUEST_TR = 0x080E
    GUEST_INTERRUPT_STATUS = 0x0810
    PML_INDEX = 0x0812
    # 16-bit host-state fields
    HOST_ES = 0x0C00
    HOST_CS = 0x0C02
    HOST_SS = 0x0C04
    HOST_DS = 0x0C06
    HOST_FS = 0x0C08
    HOST_GS = 0x0C0A
    HOST_TR = 0x0C0C
    # 64-bit control fields
    IO_BITMAP_A = 0x2000
    IO_BITMAP_B = 0x2002
    MSR_BITMAPS = 0x2004
    EXIT_MSR_STORE_ADDRESS = 0x2006
    EXIT_MSR_LOAD_ADDRESS = 0x2008
    ENTRY_MSR_LOAD_ADDRESS = 0x200A
    EXECUTIVE_VMCS_POINTER = 0x200C
    PML_ADDRESS = 0x200E
    TSC_OFFSET = 0x2010
    VIRTUAL_APIC_ADDRESS = 0x2012
    APIC_ACCESS_ADDRESS = 0x2014
    POSTED_INTERRUPT_DESCRIPTOR = 0x2016
    VM_FUNCTION_CONTROLS = 0x2018
    EPT_POINTER = 0x201A
    EOI_EXIT_BITMAP_0 = 0x201C
    EOI_EXIT_BITMAP_1 = 0x201E
    EOI_EXIT_BITMAP_2 = 0x2020
    EOI_EXIT_BITMAP_3 = 0x2022
    EPTP_LIST_ADDRESS = 0x2024
    VMREAD_BITMAP = 0x2026
    VMWRITE_BITMAP = 0x2028
    XSS_EXITING_BITMAP = 0x202C
    TSC_MULTIPLIER = 0x2032
    # 64-bit read-only data field
    GUEST_PHYSICAL_ADDRESS = 0x2400
    # 64-bit guest-state fields
    VMCS_LINK_POINTER = 0x2800
    GUEST_DEBUGCTL = 0x2802
    GUEST_PAT = 0x2804
    GUEST_EFER = 0x2806
    GUEST_PERF_GLOBAL_CTRL = 0x2808
    GUEST_PDPTE0 = 0x280A
    GUEST_PDPTE1 = 0x280C
    GUEST_PDPTE2 = 0x280E
    GUEST_PDPTE3 = 0x2810
    GUEST_PKRS = 0x2818
    # 64-bit host-state fields
    HOST_PAT = 0x2C00
    HOST_EFER = 0x2C02
    HOST_PERF_GLOBAL_CTRL = 0x2C04
    HOST_PKRS = 0x2C06
    # 32-bit control fields
    PIN_CONTROLS = 0x4000
    PRIMARY_CONTROLS = 0x4002
    EXCEPTION_BITMAP = 0x4004
    PAGE_FAULT_ERROR_CODE_MASK = 0x4006
    PAGE_FAULT_ERROR_CODE_MATCH = 0x4008
    CR3_TARGET_COUNT = 0x400A
    EXIT_CONTROLS = 0x400C
    EXIT_MSR_STORE_COUNT = 0x400E
    EXIT_MSR_LOAD_COUNT = 0x4010
    ENTRY_CONTROLS = 0x4012
    ENTRY_MSR_LOAD_COUNT = 0x4014
    ENTRY_INTERRUPTION_INFORMATION = 0x4016
    ENTRY_EXCEPTION_ERROR_CODE = 0x4018
    ENTRY_INSTRUCTION_LENGTH = 0x401A
    TPR_THRESHOLD = 0x401C
    SECONDARY_CONTROLS = 0x401E
    PLE_GAP = 0x4020
    PLE_WINDOW = 0x4022
    # 32-bit read-only data fields
    VM_INSTRUCTION_ERROR = 0x4400
    EXIT_REASON = 0x4402
    EXIT_INTERRUPTION_INFORMATION = 0x4404
    EXIT_INTERRUPTION_ERROR_CODE = 0x4406
    IDT_VECTORING_INFORMATION = 0x4408
    IDT_VECTORING_ERROR_CODE = 0x440A
    EXIT_INSTRUCTION_LENGTH = 0x440C
    EXIT_INSTRUCTION_INFORMATION = 0x440E
    # 32-bit guest-state fields
    GUEST_ES_LIMIT = 0x4800
    GUEST_CS_LIMIT = 0x4802
    GUEST_SS_LIMIT = 0x4804
    GUEST_DS_LIMIT = 0x4806
    GUEST_FS_LIMIT = 0x4808
    GUEST_GS_LIMIT = 0x480A
    GUEST_LDTR_LIMIT = 0x480C
    GUEST_TR_LIMIT = 0x480E
    GUEST_GDTR_LIMIT = 0x4810
    GUEST_IDTR_LIMIT = 0x4812
    GUEST_ES_ACCESS_RIGHTS = 0x4814
    GUEST_CS_ACCESS_RIGHTS = 0x4816
    GUEST_SS_ACCESS_RIGHTS = 0x4818
    GUEST_DS_ACCESS_RIGHTS = 0x481A
    GUEST_FS_ACCESS_RIGHTS = 0x481C
    GUEST_GS_ACCESS_RIGHTS = 0x481E
    GUEST_LDTR_ACCESS_RIGHTS = 0x4820
    GUEST_TR_ACCESS_RIGHTS = 0x4822
    GUEST_INTERRUPTIBILITY_STATE = 0x4824
    GUEST_ACTIVITY_STATE = 0x4826
    GUEST_SMBASE = 0x4828
    GUEST_SYSENTER_CS = 0x482A
    PREEMPTION_TIMER_VALUE = 0x482E
    # 32-bit host-state field
    HOST_SYSENTER_CS = 0x4C00
    # Natural-width control fields
    CR0_GUEST_HOST_MASK = 0x6000
    CR4_GUEST_HOST_MASK = 0x6002
    CR0_READ_SHADOW = 0x6004
    CR4_READ_SHADOW = 0x6006
    CR3_TARGET_VALUE_0 = 0x6008
    CR3_TARGET_VALUE_1 = 0x600A
    CR3_TARGET_VALUE_2 = 0x600C
    CR3_TARGET_VALUE_3 = 0x600E
    # Natural-width read-only data fields
    EXIT_QUALIFICATION = 0x6400
    IO_RCX = 0x6402
    IO_RSI = 0x6404
    IO_RDI = 0x6406
    IO_RIP = 0x6408
    GUEST_LINEAR_ADDRESS = 0x640A
    # Natural-width guest-state fields
    GUEST_CR0 = 0x6800
    GUEST_CR3 = 0x6802
    GUEST_CR4 = 0x6804
    GUEST_ES_BASE = 0x6806
    GUEST_CS_BASE = 0x6808
    GUEST_SS_BASE = 0x680A
    GUEST_DS_BASE = 0x680C
    GUEST_FS_BASE = 0x680E
    GUEST_GS_BASE = 0x6810
    GUEST_LDTR_BASE = 0x6812
    GUEST_TR_BASE = 0x6814
    GUEST_GDTR_BASE = 0x6816
    GUEST_IDTR_BASE = 0x6818
    GUEST_DR7 = 0x681A
    GUEST_RSP = 0x681C
    GUEST_RIP = 0x681E
    GUEST_RFLAGS = 0x6820
    GUEST_PENDING_DEBUG_EXCEPTIONS = 0x6822
    GUEST_SYSENTER_ESP = 0x6824
    GUEST_SYSENTER_EIP = 0x6826
    # Natural-width host-state fields
    HOST_CR0 = 0x6C00
    HOST_CR3 = 0x6C02
    HOST_CR4 = 0x6C04
    HOST_FS_BASE = 0x6C06
    HOST_GS_BASE = 0x6C08
    HOST_TR_BASE = 0x6C0A
    HOST_GDTR_BASE = 0x6C0C
    HOST_IDTR_BASE = 0x6C0E
    HOST_SYSENTER_ESP = 0x6C10
    HOST_SYSENTER_EIP = 0x6C12
    HOST_RSP = 0x6C14
    HOST_RIP = 0x6C16


SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
"""In the order of their encodings: selector 0x800 + 2n, limit 0x4800 + 2n, access rights
0x4814 + 2n, base 0x6806 + 2n."""


class AccessRights(Bits, width=32):
    """SDM 3C, "Guest Register State", table "Format of Access Rights"."""

    UNUSABLE = Bit(16)
    G = Bit(15)  # granularity
    DB = Bit(14)  # default operation size
    L = Bit(13)  # 64-bit mode active (CS only)
    AVL = Bit(12)  # available to software
    P = Bit(7)  # present
    DPL = Field(6, 5)
    S = Bit(4)  # 0 system, 1 code or data
    TYPE = Field(3, 0)


class InterruptionInformation(Bits, width=32):
    """SDM 3C, "VM-Entry Controls for Event Injection"; the exit and IDT-vectoring fields alike."""

    VALID = Bit(31)
    NMI_UNBLOCKING = Bit(12)  # exit information only: due to IRET
    ERROR_CODE = Bit(11)  # deliver error code
    TYPE = Field(10, 8)
    VECTOR = Field(7, 0)


class EventType(IntEnum):
    """Field TYPE of the interruption information."""

    EXTERNAL_INTERRUPT = 0
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    SOFTWARE_EXCEPTION = 6
    OTHER_EVENT = 7


class Interruptibility(Bits, width=32):
    """SDM 3C, "Guest Non-Register State", table "Format of Interruptibility State"."""

    ENCLAVE = Bit(4)
    NMI = Bit(3)  # blocking by NMI
    SMI = Bit(2)
    MOV_SS = Bit(1)  # blocking by MOV SS
    STI = Bit(0)  # blocking by STI


class EptPointer(Bits, width=64):
    """SDM 3C, "Extended-Page-Table Pointer (EPTP)"."""

    ADDR = Field(TOP, 12)  # physical address of the PML4 table, >> 12
    ACCESSED_DIRTY = Bit(6)  # enable accessed and dirty flags
    WALK = Field(5, 3)  # page-walk length - 1
    MEMTYPE = Field(2, 0)  # of the tables themselves: 0 UC, 6 WB


class EptViolation(Bits, width=64):
    """SDM 3C, "Exit Qualification for EPT Violations"."""

    NMI_UNBLOCKING = Bit(12)
    TRANSLATED = Bit(8)  # 1: the final access; 0: a reference to a guest paging structure
    LINEAR_VALID = Bit(7)  # the guest-linear address is valid
    EXECUTABLE = Bit(5)  # what the EPT entries allowed
    WRITABLE = Bit(4)
    READABLE = Bit(3)
    FETCH = Bit(2)
    WRITE = Bit(1)
    READ = Bit(0)


class IoAccess(Bits, width=64):
    """SDM 3C, "Exit Qualification for I/O Instructions"."""

    PORT = Field(31, 16)
    IMMEDIATE = Bit(6)
    REP = Bit(5)
    STRING = Bit(4)
    IN = Bit(3)
    SIZE = Field(2, 0)  # bytes - 1


class CrAccess(Bits, width=64):
    """SDM 3C, "Exit Qualification for Control-Register Accesses"."""

    LMSW_SOURCE = Field(31, 16)
    GPR = Field(11, 8)
    LMSW_MEMORY = Bit(6)
    ACCESS = Field(5, 4)  # 0 MOV to CR, 1 MOV from CR, 2 CLTS, 3 LMSW
    NUMBER = Field(3, 0)
