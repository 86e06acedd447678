"""What VM exits say: from a basic exit reason and its fields to a question that `answers/` decides.

Source: SDM 3C, "VM Exits", "Information for VM Exits"; SDM 3D, "VMX Basic Exit Reasons".

A function gets the vCPU and the exit, takes the fields apart, and returns the answer's verdict: go
on, or a `Stop`.  The run loop in `vcpu/loop.py` is the only caller and the only place that counts.
A reason without a function stops the machine loudly, with the whole state decoded.

Invariants: nothing that a guest does raises here; nothing is decided here.
"""

from collections.abc import Callable
from typing import Final

from understudy.answers import control_registers as registers
from understudy.answers import instructions, memory, ports, task_switch
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason, reason_name
from understudy.arch.vmcs import CrAccess, EptViolation, InterruptionInformation, IoAccess
from understudy.guest import Event, Kind
from understudy.silicon import Exit
from understudy.vcpu.loop import Vcpu
from understudy.verdict import RESUME, Stop, StopKind, Verdict

LOW32: Final = 0xFFFF_FFFF
MASK64: Final = (1 << 64) - 1
VALID: Final = InterruptionInformation.VALID.mask
ERROR_CODE: Final = InterruptionInformation.ERROR_CODE.mask
TYPE_SHIFT: Final = InterruptionInformation.TYPE.low
PF_EXCEPTION: Final = VALID | Kind.EXCEPTION << TYPE_SHIFT | Vector.PF
EVENT: Final = VALID | 0x7FF
NMI_UNBLOCKING: Final = EptViolation.NMI_UNBLOCKING.mask
NMI_UNBLOCKED: Final = InterruptionInformation.NMI_UNBLOCKING.mask
TRANSLATED: Final = EptViolation.LINEAR_VALID.mask | EptViolation.TRANSLATED.mask
LINEAR_VALID: Final = EptViolation.LINEAR_VALID.mask
FETCH: Final = EptViolation.FETCH.mask
WRITE: Final = EptViolation.WRITE.mask
STRING: Final = IoAccess.STRING.mask
IN: Final = IoAccess.IN.mask
REP: Final = IoAccess.REP.mask
FS: Final = 4  # the first segment that has a base in 64-bit code

Handler = Callable[[Vcpu, Exit], Verdict | Stop]
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


def event_of(info: int, error: int, length: int) -> Event:
    """The event that the IDT-vectoring information describes."""
    kind = Kind(info >> TYPE_SHIFT & 7)
    code = error if info & ERROR_CODE else None
    return Event(info & 0xFF, kind, code, length if kind.is_software else 0)


def interrupted(exit: Exit) -> Event | None:
    """The event in whose delivery the exit came."""
    if not exit.idt_info & VALID:
        return None
    return event_of(exit.idt_info, exit.idt_error, exit.length)


def of_unblocking_iret(exit: Exit) -> bool:
    """Whether an IRET met this, which has ended the blocking of NMIs, and begins again."""
    if exit.idt_info & VALID:
        return False
    if exit.reason == Reason.EPT_VIOLATION:
        return bool(exit.qualification & NMI_UNBLOCKING)
    return exit.reason == Reason.EXCEPTION_OR_NMI and bool(exit.intr_info & NMI_UNBLOCKED)


# --- instructions ---


# That they came to exit is all that an exit says of these, so their answers take it as it is.
handles(Reason.CPUID)(instructions.cpuid)
handles(Reason.HLT)(instructions.hlt)
handles(Reason.RDMSR)(instructions.rdmsr)  # of an MSR whose bit in the MSR bitmap is set
handles(Reason.WRMSR)(instructions.wrmsr)
handles(Reason.VMCALL)(instructions.vmcall)
handles(Reason.RDPMC)(instructions.rdpmc)
handles(Reason.RDTSC)(instructions.rdtsc)
handles(Reason.RDTSCP)(instructions.rdtscp)
handles(Reason.XSETBV)(instructions.xsetbv)
handles(Reason.INVD)(instructions.invd)
handles(Reason.WBINVD)(instructions.wbinvd)
handles(
    Reason.GETSEC, Reason.VMCLEAR, Reason.VMLAUNCH, Reason.VMPTRLD, Reason.VMPTRST, Reason.VMREAD,
    Reason.VMRESUME, Reason.VMWRITE, Reason.VMXOFF, Reason.VMXON, Reason.INVEPT, Reason.INVVPID,
    Reason.VMFUNC, Reason.MONITOR, Reason.MWAIT, Reason.RDRAND, Reason.RDSEED, Reason.RSM,
    Reason.ENCLS,
)(instructions.not_offered)  # fmt: skip


@handles(Reason.IO_INSTRUCTION)
def io_instruction(vcpu: Vcpu, exit: Exit) -> Verdict | Stop:
    """ "Unconditional I/O exiting" is set."""
    access = exit.qualification
    if access & STRING:
        address_bits = (16, 32, 64, 64)[exit.instr_info >> 7 & 3]
        return ports.string(
            vcpu, access >> 16 & 0xFFFF, (access & 7) + 1, exit.gla, address_bits, exit.length,
            is_in=bool(access & IN), repeats=bool(access & REP),
        )  # fmt: skip
    if access & IN:
        return ports.read(vcpu, access >> 16 & 0xFFFF, (access & 7) + 1, exit.length)
    return ports.write(vcpu, access >> 16 & 0xFFFF, (access & 7) + 1, exit.length)


@handles(Reason.TASK_SWITCH)
def switch(vcpu: Vcpu, exit: Exit) -> Verdict | Stop:
    """SDM 3C, "Exit Qualification for Task Switches"."""
    selector, source = exit.qualification & 0xFFFF, exit.qualification >> 30 & 3
    return task_switch.task_switch(vcpu, selector, source, interrupted(exit), exit.length)


# --- control registers, translations ---


@handles(Reason.CR_ACCESS)
def cr_access(vcpu: Vcpu, exit: Exit) -> Verdict | Stop:
    """SDM 3C, "Exit Qualification for Control-Register Accesses"."""
    access = CrAccess(exit.qualification & LOW32)
    number, kind = access.NUMBER, access.ACCESS
    vcpu.cr_accesses[number << 4 | kind] += 1
    match kind:
        case 0 if number in registers.WRITES:
            return registers.write(vcpu, number, vcpu.gpr(access.GPR), exit.length)
        case 1 if number in registers.READS:
            return registers.read(vcpu, number, access.GPR, exit.length)
        case 3:
            return registers.lmsw(vcpu, access.LMSW_SOURCE, exit.length)
    return vcpu.unknown(exit)


@handles(Reason.INVLPG)
def invlpg(vcpu: Vcpu, exit: Exit) -> Verdict:
    """The qualification is the linear address."""
    return registers.invlpg(vcpu, exit.qualification, exit.length)


@handles(Reason.INVPCID)
def invpcid(vcpu: Vcpu, exit: Exit) -> Verdict | Stop:
    """SDM 3C, "Information for VM Exits Due to Instruction Execution", the table for INVPCID."""
    info = exit.instr_info
    offset = exit.qualification
    if not info & 1 << 27:
        offset += vcpu.gpr(info >> 23 & 0xF)
    if not info & 1 << 22:
        offset += vcpu.gpr(info >> 18 & 0xF) << (info & 3)
    offset &= (0xFFFF, LOW32, MASK64)[min(info >> 7 & 3, 2)]
    segment, is_code64 = info >> 15 & 7, vcpu.guest.is_code64()
    if segment >= FS or not is_code64:
        offset = offset + vcpu.guest.segment_base(segment) & (MASK64 if is_code64 else LOW32)
    return registers.invpcid(vcpu, vcpu.gpr(info >> 28 & 0xF), offset, exit.length)


# --- memory ---


@handles(Reason.EXCEPTION_OR_NMI)
def exception(vcpu: Vcpu, exit: Exit) -> Verdict | Stop:
    """Without EPT page faults come to the hypervisor; no other exception does."""
    if exit.intr_info & EVENT != PF_EXCEPTION:
        return vcpu.unknown(exit)
    event, of_iret = interrupted(exit), of_unblocking_iret(exit)
    return memory.page_fault(vcpu, exit.qualification, exit.intr_error, event, of_iret=of_iret)


@handles(Reason.EPT_VIOLATION)
def ept_violation(vcpu: Vcpu, exit: Exit) -> Verdict | Stop:
    """SDM 3C, "Exit Qualification for EPT Violations"."""
    qualification, event = exit.qualification, interrupted(exit)
    if of_unblocking_iret(exit):
        vcpu.guest.block_nmis()
    if qualification & FETCH:
        kind = memory.Access.FETCH
    elif qualification & TRANSLATED == LINEAR_VALID:
        kind = memory.Access.WALK
    else:
        kind = memory.Access.WRITE if qualification & WRITE else memory.Access.READ
    return memory.ept_violation(vcpu, exit.gpa, qualification, kind, event)


@handles(Reason.EPT_MISCONFIGURATION)
def ept_misconfiguration(vcpu: Vcpu, exit: Exit) -> Stop:
    """SDM 3C, "EPT Misconfigurations"."""
    return memory.ept_misconfiguration(vcpu, exit.gpa)


@handles(Reason.MONITOR_TRAP_FLAG)
def stepped(vcpu: Vcpu, exit: Exit) -> Verdict:
    """The instruction that was let through is done."""
    vcpu.view.finish_step()
    return RESUME


handles(Reason.PAUSE)(instructions.pause)  # of a loop that is longer than PLE_WINDOW


# --- when several processors run in threads ---


def put_off(vcpu: Vcpu, exit: Exit) -> Verdict:
    """What the exit says of memory may be wrong by now: the guest is to try again."""
    event = interrupted(exit)
    if event is not None:
        memory.put_back(vcpu, event)
    elif of_unblocking_iret(exit):
        vcpu.guest.block_nmis()
    return RESUME


PUT_OFF: Final[dict[int, Handler]] = {int(reason): put_off for reason in (
    Reason.EXCEPTION_OR_NMI, Reason.EPT_VIOLATION, Reason.EPT_MISCONFIGURATION, Reason.CR_ACCESS,
    Reason.INVLPG, Reason.INVPCID, Reason.TASK_SWITCH,
)}  # fmt: skip
# --- events, and the processor's own stops ---


@handles(Reason.PREEMPTION_TIMER)
def preemption_timer(vcpu: Vcpu, exit: Exit) -> Verdict:
    """The deadline has come, or the counter was too short for it: look, and set it anew."""
    vcpu.time.armed = 0
    vcpu.attention = True
    return RESUME


@handles(Reason.EXTERNAL_INTERRUPT)
def external_interrupt(vcpu: Vcpu, exit: Exit) -> Verdict:
    """A counter of the guest's has overflowed; without a vector: another thread wants something."""
    vcpu.attention = True
    if exit.intr_info & VALID:
        vcpu.guest.take_pmu_interrupt()
        vcpu.pmu.interrupt()
    return RESUME


@handles(Reason.INTERRUPT_WINDOW, Reason.NMI_WINDOW)
def look_around(vcpu: Vcpu, exit: Exit) -> Verdict:
    """The guest can take an event."""
    vcpu.attention = True
    return RESUME


@handles(Reason.TRIPLE_FAULT)
def triple_fault(vcpu: Vcpu, exit: Exit) -> Stop:
    """The guest could deliver neither an exception nor a double fault."""
    return instructions.triple_fault(vcpu)


@handles(Reason.INVALID_GUEST_STATE, Reason.MSR_LOADING, Reason.MACHINE_CHECK)
def entry_failure(vcpu: Vcpu, exit: Exit) -> Verdict | Stop:
    """The entry did not come about.

    It may be that the guest is in a state that needs "unrestricted guest", which can be helped.
    Else the hypervisor, or a loader, has set a state that cannot be.
    """
    if exit.reason == Reason.INVALID_GUEST_STATE and vcpu.guest.bend():
        return RESUME
    return vcpu.error(
        f"VM entry failed: {reason_name(exit.reason)}, qualification {exit.qualification:#x}; "
        'expected guest state that passes SDM 3C, "Checks on the Guest State Area"'
    )


@handles(Reason.BUDGET)
def budget(vcpu: Vcpu, exit: Exit) -> Stop:
    """The instructions that the run was given are used up."""
    return Stop(StopKind.BUDGET)


@handles(Reason.KICK)
def kick(vcpu: Vcpu, exit: Exit) -> Verdict:
    """Another thread wants something, and the processor is still in the guest."""
    return RESUME
