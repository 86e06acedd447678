"""Exits of the memory-management unit: page faults, control registers, INVLPG, INVPCID.

Source: SDM 3C, "Exceptions", "Exit Qualification for Control-Register Accesses"; SDM 3A,
"Conditions for Generating a Double Fault", "Operations that Invalidate TLBs and
Paging-Structure Caches".

Invariants: nothing that a guest does raises here; an instruction that exits only because of the
paging technique counts as retired and takes a tick of virtual time, so that guest time is the same
under every technique.
"""

from typing import TYPE_CHECKING, Final

from understudy.answers.instructions import handles, triple_fault, unknown
from understudy.arch.cr import CR0, CR4, RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason
from understudy.arch.msr import Msr
from understudy.arch.vmcs import CrAccess, EventType, InterruptionInformation, Vmcs
from understudy.execution.vmx.control_registers import (
    FIXED,
    InHypervisor,
    Refused,
    UnrestrictedNeeded,
    check_cr0,
    check_cr4,
    check_efer,
    check_mode,
)
from understudy.instructions import device_access as mmio
from understudy.instructions.table_write import write_table
from understudy.machine.p2m import GuestMemoryError
from understudy.paging import Fault, PagingError
from understudy.paging.guest_walk import PAE_FORMAT, GuestFault, Regime, entries_of
from understudy.silicon import Exit
from understudy.verdict import RESUME, Stop, Verdict

if TYPE_CHECKING:
    from understudy.vcpu.loop import Vcpu

VALID: Final = InterruptionInformation.VALID.mask
TYPE_SHIFT: Final = InterruptionInformation.TYPE.low
PF_EXCEPTION: Final = VALID | EventType.HARDWARE_EXCEPTION << TYPE_SHIFT | Vector.PF
EVENT: Final = VALID | 0x7FF
LOW32: Final = 0xFFFF_FFFF
RF: Final = RFLAGS.RF.mask
RFLAGS_FIELD: Final = int(Vmcs.GUEST_RFLAGS)
RELOADS_CR0: Final = int(CR0(PG=1, CD=1, NW=1))
RELOADS_CR4: Final = int(CR4(SMEP=1, PGE=1, PAE=1, PSE=1))
NO_FLUSH: Final = 1 << 63  # of CR3, under PCIDs
CR3_BITS: Final = (1 << 46) - 1
MASK64: Final = (1 << 64) - 1


# --- page faults ---


@handles(Reason.EXCEPTION_OR_NMI)
def page_fault(vcpu: "Vcpu", exit: Exit) -> "Verdict | Stop":
    """A #PF reached the hypervisor.  In the order tried:

    1. *true fault*: the guest's own tables refuse the access: inject it;
    2. *hidden fault*: they allow it, the shadow had no entry yet and has it now: go on;
    3. *trace fault*: a write to one of its tables: carry it out and note what it changes;
    4. the gpa is no RAM: it is an access to a device, carry it out.
    """
    if exit.intr_info & EVENT != PF_EXCEPTION:
        return unknown(vcpu, exit)
    paging = vcpu.paging
    try:
        kind, gpa = paging.page_fault(exit.qualification, exit.intr_error)
    except GuestFault as fault:
        paging.faults[Fault.TRUE] += 1
        return _reflect(vcpu, exit, fault)
    except PagingError as problem:
        return vcpu.error(str(problem))
    paging.faults[kind] += 1
    if exit.idt_info & VALID:
        vcpu.deliver_again(exit)
        if exit.idt_info >> TYPE_SHIFT & 7 != EventType.HARDWARE_EXCEPTION:
            _clear_resume_flag(vcpu)
    if gpa is None:
        return RESUME
    if kind is Fault.TRACE:
        return _traced_write(vcpu, exit, gpa)
    if exit.idt_info & VALID:
        return vcpu.error(f"an event was delivered to gpa {gpa:#x}, where there is no RAM")
    if exit.intr_error & 0x10:
        return vcpu.error(f"the guest executes at gpa {gpa:#x}, where there is no RAM")
    _clear_resume_flag(vcpu)
    try:
        mmio.access(vcpu, gpa)
    except mmio.Unsupported as problem:
        return vcpu.error(f"gpa {gpa:#x}: {problem}")
    return RESUME


def _traced_write(vcpu: "Vcpu", exit: Exit, gpa: int) -> "Verdict | Stop":
    """Carry out the write to a table, or let the processor do it if it takes more than that."""
    try:
        if exit.idt_info & VALID or not write_table(vcpu, exit.qualification, gpa):
            vcpu.paging.single_step(exit.qualification, exit.intr_error)
            return RESUME
    except PagingError as problem:
        return vcpu.error(str(problem))
    _clear_resume_flag(vcpu)
    return RESUME


@handles(Reason.MONITOR_TRAP_FLAG)
def stepped(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """The instruction that was let through is done."""
    vcpu.paging.finish_step()
    return RESUME


def _clear_resume_flag(vcpu: "Vcpu") -> None:
    """The exit saved RF as a fault's frame would have it; an instruction that is done clears it."""
    flags = vcpu.execution.read(RFLAGS_FIELD)
    vcpu.execution.write(RFLAGS_FIELD, flags & ~RF)


def _reflect(vcpu: "Vcpu", exit: Exit, fault: GuestFault) -> "Verdict | Stop":
    """The guest's own fault; met while an exception was delivered, it may be a double fault."""
    info = exit.idt_info
    vcpu.processor.set_registers({"cr2": fault.gva})
    if info & VALID and info >> TYPE_SHIFT & 7 == EventType.HARDWARE_EXCEPTION:
        vector = info & 0xFF
        if vector == Vector.DF:
            return triple_fault(vcpu, exit)
        if vector == Vector.PF:
            return vcpu.fault(Vector.DF, 0)
    return vcpu.fault(Vector.PF, fault.error)


# --- control registers ---


@handles(Reason.CR_ACCESS)
def cr_access(vcpu: "Vcpu", exit: Exit) -> "Verdict | Stop":
    """A MOV to or from a control register, or LMSW or CLTS, that touches what the host owns."""
    access = CrAccess(exit.qualification & LOW32)
    number, kind, gpr = access.NUMBER, access.ACCESS, access.GPR
    if number == 3 and vcpu.paging.eptp:
        return unknown(vcpu, exit)  # with EPT, such exits are not asked for
    vcpu.cr_accesses[number, kind] += 1
    try:
        match number, kind:
            case 3, 0:
                _write_cr3(vcpu, vcpu.gpr(gpr))
                vcpu.retire()
            case 3, 1:
                vcpu.set_gpr(gpr, vcpu.execution.control.get().cr3)
                vcpu.retire()
            case 0, 0:
                _write_cr0(vcpu, vcpu.gpr(gpr))
            case 0, 3:
                old = vcpu.execution.control.get().cr0
                _write_cr0(vcpu, old & ~0xE | (access.LMSW_SOURCE & 0xF))
            case 4, 0:
                _write_cr4(vcpu, vcpu.gpr(gpr))
            case 8, 0:
                _write_cr8(vcpu, vcpu.gpr(gpr))
            case 8, 1:
                vcpu.set_gpr(gpr, vcpu.apic.tpr >> 4)
            case _:
                return unknown(vcpu, exit)
    except (Refused, GuestFault):
        return vcpu.fault(Vector.GP, 0)
    except UnrestrictedNeeded as problem:
        return vcpu.error(str(problem))
    vcpu.skip(exit.length)
    return RESUME


def _write_cr8(vcpu: "Vcpu", value: int) -> None:
    if value >> 4:
        raise Refused
    vcpu.apic.tpr = value << 4
    vcpu.attention = True


def _write_cr0(vcpu: "Vcpu", value: int) -> None:
    execution = vcpu.execution
    old = execution.control.get()
    new = value & ~int(CR0.ET.mask) | CR0.ET.mask
    efer = check_cr0(new, old, is_code64=execution.is_code64())
    values = old._replace(cr0=new, efer=efer)
    check_mode(new, vcpu.paging)
    if (new ^ old.cr0) & RELOADS_CR0:
        values = values._replace(pdptes=_pdptes(vcpu, Regime(*values)))
    execution.control.load(values)
    if not (new ^ old.cr0) & FIXED:
        vcpu.retire()  # with EPT, too, such a write would exit
    vcpu.paging.mode_change()


def _write_cr4(vcpu: "Vcpu", value: int) -> None:
    """With EPT the host owns exactly the bits that the CPU model does not offer."""
    execution = vcpu.execution
    old = execution.control.get()
    check_cr4(value, old, int(vcpu.model.cr4_allowed))
    values = old._replace(cr4=value)
    if (value ^ old.cr4) & RELOADS_CR4:
        values = values._replace(pdptes=_pdptes(vcpu, Regime(*values)))
    execution.control.load(values)
    vcpu.retire()
    vcpu.paging.mode_change()


def _write_cr3(vcpu: "Vcpu", value: int) -> None:
    control = vcpu.execution.control
    assert isinstance(control, InHypervisor)
    old = control.values
    if old.cr4 & CR4.PCIDE.mask:
        value &= ~NO_FLUSH
    if value & ~CR3_BITS:
        raise Refused
    pdptes = old.pdptes
    if not old.efer & 0x400 and old.cr4 & CR4.PAE.mask:
        pdptes = _pdptes(vcpu, Regime(old.cr0, value, old.cr4, old.efer))
    control.note_cr3(value, pdptes)
    vcpu.paging.cr3_write()


def _pdptes(vcpu: "Vcpu", regime: Regime) -> tuple[int, ...]:
    if regime.format is not PAE_FORMAT:
        return (0, 0, 0, 0)
    return regime.load_pdptes(entries_of(vcpu.memory))


def load_pdptes(vcpu: "Vcpu") -> None:
    """A guest that begins with PAE paging on: load what a MOV to CR3 would have."""
    control = vcpu.execution.control
    values = control.get()
    if Regime(*values).format is PAE_FORMAT:
        control.load(values._replace(pdptes=_pdptes(vcpu, Regime(*values))))
        vcpu.paging.mode_change()


def read_efer(vcpu: "Vcpu") -> int:
    """RDMSR of IA32_EFER."""
    vcpu.retire()
    return vcpu.execution.control.get().efer


def write_efer(vcpu: "Vcpu", value: int) -> None:
    """WRMSR of IA32_EFER.  KeyError is #GP(0)."""
    control = vcpu.execution.control
    old = control.get()
    try:
        control.load(old._replace(efer=check_efer(value, old)))
    except Refused:
        raise KeyError(Msr.IA32_EFER) from None
    vcpu.retire()
    vcpu.paging.mode_change()


# --- invalidation ---


@handles(Reason.INVLPG)
def invlpg(vcpu: "Vcpu", exit: Exit) -> Verdict:
    """The guest drops one page's translations."""
    vcpu.paging.invlpg(exit.qualification)
    vcpu.retire()
    vcpu.skip(exit.length)
    return RESUME


@handles(Reason.INVPCID)
def invpcid(vcpu: "Vcpu", exit: Exit) -> "Verdict | Stop":
    """One page (type 0), one address space (1), or all of them (2, 3).

    Only the current address space can hold anything, or anything that a load of CR3 keeps.
    """
    info = exit.instr_info
    kind = vcpu.gpr(info >> 28 & 0xF)
    translation = vcpu.translation()
    try:
        place = _operand(vcpu, exit.qualification, info)
        words = [int.from_bytes(translation.read(vcpu.memory, place + 8 * n, 8), "little")
                 for n in range(2)]  # fmt: skip
    except GuestFault as fault:
        return vcpu.guest_fault(fault)
    except GuestMemoryError as problem:
        return vcpu.error(f"the operand of INVPCID: {problem}")
    pcid, gva = words
    has_pcids = translation.cr4 & CR4.PCIDE.mask
    is_bad = (
        kind > 3 or pcid > 0xFFF or (kind == 0 and (gva + (1 << 47)) >> 48 & 0xFFFF)
        or (kind < 2 and not has_pcids and pcid)
    )  # fmt: skip
    if is_bad:
        return vcpu.fault(Vector.GP, 0)
    is_current = pcid == (translation.cr3 & 0xFFF if has_pcids else 0)
    if kind == 0 and is_current:
        vcpu.paging.invlpg(gva)
    elif kind > 0 and (is_current or kind > 1):
        vcpu.paging.flush()
    vcpu.retire()
    vcpu.skip(exit.length)
    return RESUME


def _operand(vcpu: "Vcpu", displacement: int, info: int) -> int:
    """The linear address of a memory operand.

    SDM 3C, "Information for VM Exits Due to Instruction Execution", the table for INVPCID.
    """
    offset = displacement
    if not info & 1 << 27:
        offset += vcpu.gpr(info >> 23 & 0xF)
    if not info & 1 << 22:
        offset += vcpu.gpr(info >> 18 & 0xF) << (info & 3)
    offset &= (0xFFFF, LOW32, (1 << 64) - 1)[min(info >> 7 & 3, 2)]
    segment = info >> 15 & 7
    if segment < 4 and vcpu.execution.is_code64():
        return offset
    linear = offset + vcpu.execution.read(Vmcs.GUEST_ES_BASE + 2 * segment)
    return linear & (MASK64 if vcpu.execution.is_code64() else LOW32)
