"""Accesses to memory that came to the hypervisor: faults, and addresses that only a device has.

Source: SDM 3A, "Interrupt 14 - Page-Fault Exception", "Conditions for Generating a Double Fault";
Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization", for
true, hidden and trace faults.

Invariant: nothing that a guest does raises here.
"""

from enum import IntEnum
from typing import Final

import iced_x86 as iced

from understudy.answers import lent_memory
from understudy.answers.instructions import triple_fault
from understudy.arch.exception import Vector
from understudy.guest import Event, Guest, Kind
from understudy.instructions import device_access
from understudy.instructions.footprint import NotDecoded, instruction_at
from understudy.instructions.table_write import write_table
from understudy.machine.frames import OutOfFrames
from understudy.paging import Fault, PagingError
from understudy.paging.guest_walk import E_FETCH, E_WRITE, GuestFault
from understudy.vcpu.loop import Vcpu
from understudy.verdict import RESUME, Stop, Verdict

BD: Final = 1 << 13  # of DR6: a MOV of a debug register was refused


class Access(IntEnum):
    """Who accesses: an instruction's operand, its fetch, or a page walk."""

    READ = 0
    WRITE = 1
    FETCH = 2
    WALK = 3


NOT_BY_DEVICES: Final = {
    Access.FETCH: "the guest executes at gpa {:#x}, where there is no RAM",
    Access.WALK: "a page table of the guest lies at gpa {:#x}, which is no RAM",
}


def page_fault(
    vcpu: Vcpu, gva: int, error: int, event: Event | None, *, of_iret: bool = False
) -> Verdict | Stop:
    """A #PF reached the hypervisor.  In the order tried:

    1. *true fault*: the guest's own tables refuse the access: inject it;
    2. *hidden fault*: they allow it, the shadow had no entry yet and has it now: go on;
    3. *trace fault*: a write to one of its tables: carry it out and note what it changes;
    4. the gpa is no RAM: it is an access to a device, carry it out.

    `event`: the one in whose delivery the fault came.  `of_iret`: an IRET has met it, and NMIs are
    not blocked any more, as is right if the guest is to see the fault.
    """
    view, was = vcpu.view, vcpu.state.activity
    if of_iret:
        vcpu.guest.block_nmis()
    faults = view.paging.faults
    try:
        kind, gpa = view.page_fault(gva, error)
    except GuestFault as fault:
        if of_iret:
            vcpu.guest.unblock_nmis()
        faults[Fault.TRUE] += 1
        return _reflect(vcpu, fault, event)
    except PagingError as problem:
        return vcpu.error(str(problem))
    except OutOfFrames:
        put_back(vcpu, event)
        raise
    faults[kind] += 1
    put_back(vcpu, event)
    if gpa is None:
        return RESUME if vcpu.state.activity == was else _missed(vcpu, event)
    if kind is Fault.TRACE:
        return _traced_write(vcpu, gva, error, gpa, event)
    access = Access.FETCH if error & E_FETCH else Access(bool(error & E_WRITE))
    return device(vcpu, gpa, access, event)


def _missed(vcpu: Vcpu, event: Event | None) -> Verdict:
    """An instruction that is executed again has to wait for a page: perhaps the guest need not."""
    if event is None and not vcpu.is_stepping and (token := vcpu.kvm.async_pf.tell_missed()):
        return vcpu.guest_fault(GuestFault(token, 0))
    return RESUME


def put_back(vcpu: Vcpu, event: Event | None) -> None:
    """The event in whose delivery the exit came goes in with the next entry."""
    if event is not None:
        vcpu.deliver_again(event)
        _restore_resume_flag(vcpu, event)


def _restore_resume_flag(vcpu: Vcpu, event: Event) -> None:
    """RF as the event's frame will have it: the exit saved that of the page fault.

    Interrupts and NMIs are injected by nobody but the hypervisor.  A #DB is a trap, or an
    instruction breakpoint, whose handler sets RF itself, or general detection.  Of a trap within a
    repeated instruction that the processor executes, nobody knows here that it is one.
    """
    guest = vcpu.guest
    if event.kind in (Kind.INTERRUPT, Kind.NMI):
        guest.set_resume_flag(vcpu.events.state.resume)
    elif event.kind.is_software or event.vector == Vector.DF:
        guest.set_resume_flag(False)
    elif event.vector == Vector.DB:
        guest.set_resume_flag(vcpu.events.traps_within or _is_general_detect(guest))


def _is_general_detect(guest: Guest) -> bool:
    """Whether a #DB is due to DR7.GD, which it has cleared: the MOV is still ahead."""
    if not guest.add_dr6(0) & BD:
        return False
    try:
        instruction, _ = instruction_at(guest)
    except NotDecoded:
        return False
    registers = instruction.op0_register, instruction.op1_register
    return instruction.mnemonic == iced.Mnemonic.MOV and any(map(iced.RegisterExt.is_dr, registers))


def _traced_write(
    vcpu: Vcpu, gva: int, error: int, gpa: int, event: Event | None
) -> Verdict | Stop:
    """Carry out the write to a table, or let the processor do it if it takes more than that."""
    try:
        if event is not None or not write_table(vcpu, gva, gpa):
            vcpu.view.single_step(gva, error)
    except GuestFault as fault:
        return vcpu.guest_fault(fault)
    except PagingError as problem:
        return vcpu.error(str(problem))
    return RESUME


def _reflect(vcpu: Vcpu, fault: GuestFault, event: Event | None) -> Verdict | Stop:
    """The guest's own fault; met while an exception was delivered, it may be a double fault."""
    vcpu.guest.set_cr2(fault.gva)
    if event is not None and event.kind is Kind.EXCEPTION:
        if event.vector == Vector.DF:
            return triple_fault(vcpu)
        if event.vector == Vector.PF:
            return vcpu.fault(Vector.DF, 0)
    return vcpu.fault(Vector.PF, fault.error)


def ept_violation(
    vcpu: Vcpu, gpa: int, qualification: int, access: Access, event: Event | None
) -> Verdict | Stop:
    """The EPT refused an access.  In the order tried:

    1. RAM that the tables lack: the paging technique adds it, the guest goes on;
    2. no RAM: it is an access to a device.
    """
    was = vcpu.state.activity
    if event is not None:
        vcpu.deliver_again(event)
    try:
        if vcpu.view.violation(gpa, qualification):
            return RESUME if vcpu.state.activity == was else _missed(vcpu, event)
    except PagingError as problem:
        return vcpu.error(str(problem))
    return device(vcpu, gpa, access, event)


def ept_misconfiguration(vcpu: Vcpu, gpa: int) -> Stop:
    """An entry of the EPT that cannot be: a defect of ours, which must not pass for a device."""
    return vcpu.error(str(vcpu.view.misconfiguration(gpa)))


def device(vcpu: Vcpu, gpa: int, access: Access, event: Event | None) -> Verdict | Stop:
    """There is no RAM at this gpa: only an instruction's operand can be meant for a device."""
    if event is not None:
        return vcpu.error(f"an event was delivered to gpa {gpa:#x}, where there is no RAM")
    if (words := NOT_BY_DEVICES.get(access)) is not None:
        return vcpu.error(words.format(gpa))
    try:
        if not device_access.access(vcpu, gpa):
            return lent_memory.execute(vcpu, gpa)
    except GuestFault as fault:
        return vcpu.guest_fault(fault)
    return RESUME
