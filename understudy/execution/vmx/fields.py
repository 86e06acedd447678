"""A guest's registers by name: where VMX keeps them, and what they are before a loader sets them.

Source: SDM 3A, "Processor State After Reset", table "IA-32 and Intel 64 Processor States"; SDM
3C, "Guest Register State".

Invariants: `with_defaults` gives a state that passes the entry checks on guest state if what it
was given is consistent; segments are flat and fit the mode that CR0 and EFER choose.
"""

from typing import Final

from understudy.arch.cr import CR0
from understudy.arch.msr import EFER, Msr
from understudy.arch.vmcs import SEGMENTS, Vmcs

REGISTER_FIELDS: Final[dict[str, int]] = {
    "rsp": Vmcs.GUEST_RSP,
    "rip": Vmcs.GUEST_RIP,
    "rflags": Vmcs.GUEST_RFLAGS,
    "cr3": Vmcs.GUEST_CR3,
    "dr7": Vmcs.GUEST_DR7,
    "efer": Vmcs.GUEST_EFER,
    "pat": Vmcs.GUEST_PAT,
    "debugctl": Vmcs.GUEST_DEBUGCTL,
    "sysenter_cs": Vmcs.GUEST_SYSENTER_CS,
    "sysenter_esp": Vmcs.GUEST_SYSENTER_ESP,
    "sysenter_eip": Vmcs.GUEST_SYSENTER_EIP,
    "gdtr_base": Vmcs.GUEST_GDTR_BASE,
    "gdtr_limit": Vmcs.GUEST_GDTR_LIMIT,
    "idtr_base": Vmcs.GUEST_IDTR_BASE,
    "idtr_limit": Vmcs.GUEST_IDTR_LIMIT,
    **{
        f"{name}{suffix}": first + 2 * n
        for n, name in enumerate(SEGMENTS)
        for suffix, first in (
            ("", int(Vmcs.GUEST_ES)),
            ("_limit", int(Vmcs.GUEST_ES_LIMIT)),
            ("_attr", int(Vmcs.GUEST_ES_ACCESS_RIGHTS)),
            ("_base", int(Vmcs.GUEST_ES_BASE)),
        )
    },
}
"""Registers that the VMCS holds, by the names of `Processor.registers`."""

MSR_NAMES: Final[dict[str, int]] = {
    "star": Msr.IA32_STAR,
    "lstar": Msr.IA32_LSTAR,
    "cstar": Msr.IA32_CSTAR,
    "fmask": Msr.IA32_FMASK,
    "kernel_gs_base": Msr.IA32_KERNEL_GS_BASE,
    "tsc_aux": Msr.IA32_TSC_AUX,
}
"""Registers that stay in the processor while it is in root operation."""

RESET_PAT: Final = 0x0007_0406_0007_0406
GPR_NAMES: Final = (
    "rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip


def with_defaults(values: dict[str, int]) -> dict[str, int]:
    """All registers: those given, the others as after reset, with flat segments for the mode."""
    state = dict.fromkeys(REGISTER_FIELDS, 0) | dict.fromkeys(MSR_NAMES, 0)
    state |= dict.fromkeys(GPR_NAMES, 0)
    state |= {"cr0": 0x6000_0010, "cr4": 0, "rip": 0xFFF0, "rflags": 2, "dr7": 0x400}
    state |= {"pat": RESET_PAT, "gdtr_limit": 0xFFFF, "idtr_limit": 0xFFFF}
    cr0 = CR0(values.get("cr0", state["cr0"]))
    is_long = cr0.PG and EFER(values.get("efer", 0)).LME
    code, data, limit = 0x9B, 0x93, 0xFFFF
    if cr0.PE:
        code, data, limit = (0xA09B if is_long else 0xC09B), 0xC093, 0xFFFF_FFFF
    for name in ("es", "cs", "ss", "ds", "fs", "gs"):
        state[f"{name}_limit"], state[f"{name}_attr"] = limit, code if name == "cs" else data
        if cr0.PE:
            state[name] = 0x08 if name == "cs" else 0x10
    state |= {"ldtr_attr": 0x1_0082, "tr_attr": 0x8B, "tr_limit": 0xFFFF}
    if not cr0.PE and "cs" not in values and "rip" not in values:
        state |= {"cs": 0xF000, "cs_base": 0xFFFF_0000}  # the reset vector
    state |= values
    state["rflags"] |= 2
    if not cr0.PE:
        for name in ("es", "cs", "ss", "ds", "fs", "gs"):
            if name in values and f"{name}_base" not in values:
                state[f"{name}_base"] = values[name] << 4
    state["efer"] = state["efer"] & ~EFER.LMA.mask | (EFER.LMA.mask if is_long else 0)
    return state


BY_CONTROL: Final = frozenset({"cr3", "efer"})
"""Registers that come with `Guest.control`: the VMCS may have the hypervisor's own."""

KEPT: Final[dict[str, int]] = {
    **{name: field for name, field in REGISTER_FIELDS.items() if name not in BY_CONTROL},
    "interruptibility": Vmcs.GUEST_INTERRUPTIBILITY_STATE,
    "activity": Vmcs.GUEST_ACTIVITY_STATE,
    "pending_debug": Vmcs.GUEST_PENDING_DEBUG_EXCEPTIONS,
    "perf_global_ctrl": Vmcs.GUEST_PERF_GLOBAL_CTRL,
    "timer": Vmcs.PREEMPTION_TIMER_VALUE,
    "tsc_offset": Vmcs.TSC_OFFSET,
    "event": Vmcs.ENTRY_INTERRUPTION_INFORMATION,
    "event_error": Vmcs.ENTRY_EXCEPTION_ERROR_CODE,
    "event_length": Vmcs.ENTRY_INSTRUCTION_LENGTH,
}
"""Fields that a snapshot keeps; all others follow from the techniques that the VM was given."""


GPRS: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
LIVE: Final = frozenset({"cr2", "dr0", "dr1", "dr2", "dr3", "dr6"})
"""Registers that neither entries nor exits touch."""
