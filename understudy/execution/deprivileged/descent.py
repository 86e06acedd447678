"""Down to the guest and back: its state, where VMX keeps it, and in the processor as it runs.

A guest's kernel runs at CPL 1, its programs at CPL 3.  The hypervisor owns the rest of the
processor: GDT and LDT are empty, so that no load of a segment register gets by; the TSS has no map
of ports; IA32_EFER.SCE, IA32_SYSENTER_CS, CR4.PCE and CR4.UMIP are clear, CR4.TSD is set.  CR3
names the shadow tables of `paging/`.  RFLAGS.IF is set, for the hypervisor's own timer, and IOPL 0.

Source: SDM 3A, "Protection"; lecture, "Dealing with problematic ISAs".
Invariants: what the guest has of RFLAGS.IF and IOPL is nowhere but in the VMCS; a segment register
that is loaded here has DPL and RPL of the level at which its code really runs.
"""

from typing import Final

from understudy.arch.cr import CR4, RFLAGS
from understudy.arch.msr import EFER
from understudy.arch.segment import Segment, SegmentName
from understudy.arch.vmcs import SEGMENTS, Vmcs
from understudy.execution.vmx.guest_state import GuestState

KERNEL: Final = 1
"""The CPL at which a guest's level 0 runs."""
PROGRAM: Final = 3
IOPL: Final = 3 << 12
OWN_FLAGS: Final = RFLAGS.IF.mask | IOPL
IF: Final = RFLAGS.IF.mask
DPL: Final = 3 << 5
RPL: Final = 3
LEVELS: Final = (SegmentName.CS, SegmentName.SS)
NAMES: Final = SEGMENTS[:6]
UNUSABLE: Final = 1 << 16
NO_TABLES: Final = {
    "gdtr_base": 0, "gdtr_limit": 0, "idtr_base": 0, "idtr_limit": 0, "sysenter_cs": 0,
    "ldtr": 0, "ldtr_base": 0, "ldtr_limit": 0, "ldtr_attr": UNUSABLE,
    "tr": 8, "tr_base": 0, "tr_limit": 0, "tr_attr": 0x8B, "dr7": 0x400, "debugctl": 0,
}  # fmt: skip
"""The hypervisor's own descriptor tables and TSS, while a guest runs."""
CR4_SET: Final = int(CR4(VMXE=1, TSD=1))
CR4_CLEAR: Final = int(CR4(PCE=1, UMIP=1, VME=1, PVI=1))


def real_level(cpl: int) -> int:
    """Where code of a guest's level runs."""
    return PROGRAM if cpl == PROGRAM else max(cpl, KERNEL)


def loaded(n: int, segment: Segment, level: int) -> dict[str, int]:
    """A segment register as the processor has it while the guest runs at this real level."""
    selector, base, limit, rights = segment
    if n in LEVELS:
        selector, rights = selector & ~RPL | level, rights & ~DPL | level << 5
    name = NAMES[n]
    return {name: selector, f"{name}_base": base, f"{name}_limit": limit, f"{name}_attr": rights}


def state(guest: GuestState, root: int, cr4: int) -> dict[str, int]:
    """All but RIP, RFLAGS and general registers, for `Processor.set_registers`.

    root: the hpa of the tables by which the guest runs.  cr4: further bits of it that are set.
    """
    real = guest.real_control()
    level = real_level(guest.cpl())
    values = NO_TABLES | {
        "cr0": real.cr0, "cr3": root, "cr4": real.cr4 & ~CR4_CLEAR | CR4_SET | cr4,
        "efer": real.efer & ~EFER.SCE.mask,
    }  # fmt: skip
    for n in range(len(NAMES)):
        values |= loaded(n, guest.segment(n), level)
    return values


def down(flags: int) -> int:
    """RFLAGS as the processor has them, of the guest's."""
    return flags & ~IOPL | IF


def up(flags: int, own: int) -> int:
    """The guest's RFLAGS, of the processor's and of those that it had before."""
    return flags & ~OWN_FLAGS | own & OWN_FLAGS


PRIVATE: Final = frozenset(int(field) for field in (
    Vmcs.GUEST_RIP, Vmcs.GUEST_RFLAGS, Vmcs.GUEST_RSP, Vmcs.PREEMPTION_TIMER_VALUE,
    Vmcs.GUEST_GDTR_BASE, Vmcs.GUEST_GDTR_LIMIT, Vmcs.GUEST_IDTR_BASE, Vmcs.GUEST_IDTR_LIMIT,
    Vmcs.GUEST_SYSENTER_CS, Vmcs.GUEST_SYSENTER_ESP, Vmcs.GUEST_SYSENTER_EIP, Vmcs.GUEST_PAT,
    Vmcs.TSC_OFFSET, Vmcs.PRIMARY_CONTROLS, Vmcs.ENTRY_EXCEPTION_ERROR_CODE,
    Vmcs.ENTRY_INSTRUCTION_LENGTH, Vmcs.ENTRY_INTERRUPTION_INFORMATION,
    Vmcs.GUEST_INTERRUPTIBILITY_STATE,
))  # fmt: skip
"""Fields that a write changes for the guest, and not for the processor as it runs."""
