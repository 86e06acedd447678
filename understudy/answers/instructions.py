"""What each VM exit means: a table from basic exit reason to the function that answers it.

Source: SDM 3C, "VM Exits"; SDM 3D, "VMX Basic Exit Reasons".

A function gets the vCPU and the exit and returns a verdict: go on, or a `Stop`.  The run loop in
`vcpu.py` is the only caller and the only place that counts.  Exits of the memory-management unit
are in `mmu_exits`.  A reason without a function stops
the machine loudly, with the whole state decoded.

Invariants: nothing that a guest does raises here; whatever a guest may not do ends as the
exception that hardware would raise.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from understudy.arch.cpuid import LeafExt1Edx
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason, reason_name
from understudy.arch.vmcs import EptViolation, EventType, InterruptionInformation, Vmcs
from understudy.instructions import device_access as mmio
from understudy.instructions import port_strings as portio
from understudy.instructions.task_switch import TaskFault, TaskSwitch
from understudy.machine.p2m import GuestMemoryError
from understudy.paging import PagingError
from understudy.paging.guest_walk import GuestFault
from understudy.silicon import Exit
from understudy.verdict import RESUME, Stop, Verdict

if TYPE_CHECKING:
    from understudy.vcpu.loop import Vcpu

LOW32: Final = 0xFFFF_FFFF
VALID: Final = InterruptionInformation.VALID.mask
DOUBLE_FAULT: Final = EventType.HARDWARE_EXCEPTION << 8 | Vector.DF
EXTENDED_FEATURES: Final = 0x8000_0001
SYSCALL: Final = LeafExt1Edx.SYSCALL.mask
KVM_ENOSYS: Final = (-1000) & (1 << 64) - 1
KVM_EPERM: Final = (-1) & (1 << 64) - 1


Handler = Callable[["Vcpu", Exit], "Verdict | Stop"]
TABLE: Final[dict[int, Handler]] = {}


def handles(*reasons: Reason) -> Callable[[Handler], Handler]:
    """Put a function into the table."""

    def register(function: Handler) -> Handler:
        for reason in reasons:
            if reason in TABLE:
                raise TypeError(f"exit reason {reason.name} has two handlers")
            TABLE[int(reason)] = function
        return function

    return register


# --- instructions that ask about or wait in the machine ---


@handles(Reason.CPUID)
def cpuid(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """CPUID always exits; the VM's CPU model answers.

    Intel's processors have SYSCALL in 64-bit mode only, and show it there only.
    """
    gpr, set_gpr = vcpu.read_gpr, vcpu.write_gpr
    leaf = gpr(0) & LOW32
    eax, ebx, ecx, edx = vcpu.answer(leaf, gpr(1) & LOW32)
    if leaf == EXTENDED_FEATURES and not vcpu.execution.is_code64():
        edx &= ~SYSCALL
    set_gpr(0, eax)
    set_gpr(3, ebx)
    set_gpr(1, ecx)
    set_gpr(2, edx)
    vcpu.skip(exit.length)
    return RESUME


@handles(Reason.HLT)
def hlt(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """Nothing to do until an event comes: the run loop lets the time pass."""
    vcpu.skip(exit.length)
    vcpu.state.halted = vcpu.attention = True
    return RESUME


@handles(Reason.IO_INSTRUCTION)
def io_instruction(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """Every port access exits: it is for a device model."""
    access = exit.qualification
    if access & 0x10:
        portio.string(vcpu, exit)
        return RESUME
    size = (access & 7) + 1
    if access & 8:
        value = vcpu.bus.port_read(access >> 16 & 0xFFFF, size)
        if size < 4:
            kept = (1 << 8 * size) - 1
            value = vcpu.read_gpr(0) & ~kept | value & kept
        vcpu.write_gpr(0, value)
    else:
        mask = (1 << 8 * size) - 1
        vcpu.bus.port_write(access >> 16 & 0xFFFF, size, vcpu.read_gpr(0) & mask)
    vcpu.spend(portio.CYCLE_NS)
    vcpu.skip(exit.length)
    return RESUME


@handles(Reason.RDMSR)
def rdmsr(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """An MSR that the processor does not hold for the guest; an unknown one is #GP(0)."""
    try:
        value = vcpu.msrs.read(vcpu.read_gpr(1) & LOW32)
    except KeyError:
        return vcpu.fault(Vector.GP, 0)
    vcpu.write_gpr(0, value & LOW32)
    vcpu.write_gpr(2, value >> 32)
    vcpu.skip(exit.length)
    return RESUME


@handles(Reason.WRMSR)
def wrmsr(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """A write to an MSR that the processor does not hold for the guest; a bad one is #GP(0)."""
    gpr = vcpu.read_gpr
    try:
        vcpu.msrs.write(gpr(1) & LOW32, gpr(2) << 32 & LOW32 << 32 | gpr(0) & LOW32)
    except KeyError:
        return vcpu.fault(Vector.GP, 0)
    vcpu.skip(exit.length)
    return RESUME


@handles(Reason.VMCALL)
def vmcall(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """KVM's hypercall ABI, of which no call is offered."""
    allowed = vcpu.execution.cpl() == 0
    vcpu.write_gpr(0, KVM_ENOSYS if allowed else KVM_EPERM)
    vcpu.skip(exit.length)
    return RESUME


@handles(
    Reason.GETSEC, Reason.VMCLEAR, Reason.VMLAUNCH, Reason.VMPTRLD, Reason.VMPTRST, Reason.VMREAD,
    Reason.VMRESUME, Reason.VMWRITE, Reason.VMXOFF, Reason.VMXON, Reason.INVEPT, Reason.INVVPID,
    Reason.VMFUNC, Reason.MONITOR, Reason.MWAIT, Reason.RDRAND, Reason.RDSEED, Reason.XSETBV,
    Reason.RSM, Reason.ENCLS,
)  # fmt: skip
def not_offered(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """An instruction of a feature that the CPU model does not show."""
    return vcpu.fault(Vector.UD)


@handles(Reason.RDPMC)
def rdpmc(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """There are no performance counters."""
    return vcpu.fault(Vector.GP, 0)


@handles(Reason.INVD, Reason.WBINVD)
def cache_control(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """There is no cache to see."""
    vcpu.skip(exit.length)
    return RESUME


@handles(Reason.TASK_SWITCH)
def task_switch(vcpu: "Vcpu", exit: Exit) -> "Verdict | Stop":
    """CALL, JMP, IRET or an event to another task: every switch exits.

    A fault while the double-fault task is entered is a triple fault.
    """
    try:
        TaskSwitch(vcpu, exit).carry_out()
    except TaskFault as fault:
        return vcpu.fault(fault.vector, fault.error)
    except GuestFault as fault:
        if exit.idt_info & VALID and exit.idt_info & 0x7FF == DOUBLE_FAULT:
            return triple_fault(vcpu, exit)
        return vcpu.guest_fault(fault)
    except GuestMemoryError as problem:
        return vcpu.error(f"a task switch: {problem}")
    return RESUME


# --- memory ---


@handles(Reason.EPT_MISCONFIGURATION)
def ept_misconfiguration(vcpu: "Vcpu", exit: Exit) -> Stop:
    """An entry of the EPT that no processor accepts is a defect of ours, never a device."""
    return vcpu.error(str(vcpu.paging.misconfiguration(exit.gpa)))


@handles(Reason.EPT_VIOLATION)
def ept_violation(vcpu: "Vcpu", exit: Exit) -> "Verdict | Stop":
    """The EPT refused an access.  In the order tried:

    1. RAM that the tables lack: the paging technique adds it, the guest goes on;
    2. an access by the delivery of an event, a fetch, or a page walk: no device can answer it;
    3. the access of an instruction to a device: carry it out.
    """
    if exit.idt_info & VALID:
        vcpu.deliver_again(exit)
    elif exit.qualification & EptViolation.NMI_UNBLOCKING.mask:
        vcpu.execution.block_nmis()
    try:
        if vcpu.paging.violation(exit.gpa, exit.qualification):
            return RESUME
    except PagingError as problem:
        return vcpu.error(str(problem))
    access = EptViolation(exit.qualification & LOW32)
    if exit.idt_info & VALID:
        return vcpu.error(f"an event was delivered to gpa {exit.gpa:#x}, where there is no RAM")
    if access.FETCH:
        return vcpu.error(f"the guest executes at gpa {exit.gpa:#x}, where there is no RAM")
    if access.LINEAR_VALID and not access.TRANSLATED:
        return vcpu.error(f"a page table of the guest lies at gpa {exit.gpa:#x}, which is no RAM")
    try:
        mmio.access(vcpu, exit.gpa)
    except mmio.Unsupported as problem:
        return vcpu.error(f"gpa {exit.gpa:#x}: {problem}")
    return RESUME


# --- events ---


@handles(Reason.PREEMPTION_TIMER)
def preemption_timer(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """The deadline has come, or the counter was too short for it: look, and set it anew."""
    vcpu.state.armed = 0
    vcpu.attention = True
    return RESUME


@handles(Reason.INTERRUPT_WINDOW, Reason.NMI_WINDOW, Reason.EXTERNAL_INTERRUPT)
def look_around(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """The guest can take an event, or another thread wants something."""
    vcpu.attention = True
    return RESUME


@handles(Reason.TRIPLE_FAULT)
def triple_fault(vcpu: "Vcpu", exit: Exit) -> Stop:
    """A PC resets now; a hypervisor can say where it happened."""
    return Stop("triple-fault", "the guest's double-fault delivery failed\n" + vcpu.describe())


@handles(Reason.INVALID_GUEST_STATE, Reason.MSR_LOADING, Reason.MACHINE_CHECK)
def entry_failure(vcpu: "Vcpu", exit: Exit) -> Stop:
    """The entry did not come about: the hypervisor, or a loader, has set a state that cannot be."""
    return vcpu.error(
        f"VM entry failed: {reason_name(exit.reason)}, qualification {exit.qualification:#x}; "
        'expected guest state that passes SDM 3C, "Checks on the Guest State Area"'
    )


@handles(Reason.BUDGET)
def budget(vcpu: "Vcpu", exit: Exit) -> Stop:
    """The instructions that the run was given are used up."""
    return Stop("budget")


@handles(Reason.KICK)
def kick(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """Another thread wants something, and the processor is still in the guest."""
    return RESUME


def unknown(vcpu: "Vcpu", exit: Exit) -> Stop:
    """No function answers this exit: name it, show everything, stop."""
    rip = vcpu.processor.vmread(Vmcs.GUEST_RIP) if not vcpu.processor.in_guest else 0
    return vcpu.error(
        f"exit {reason_name(exit.reason)} ({exit.reason}) at rip {rip:#x} has no handler: "
        f"qualification {exit.qualification:#x} length {exit.length} gla {exit.gla:#x} "
        f"gpa {exit.gpa:#x} intr_info {exit.intr_info:#x} idt_info {exit.idt_info:#x}"
    )
