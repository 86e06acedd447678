"""Task switches: CALL, JMP, IRET or an event to another task.

Source: SDM 3A, "Task Switching"; SDM 3C, "Treatment of Task Switches".
Invariant: nothing that a guest's tables contain raises here.
"""

from understudy.answers.instructions import triple_fault
from understudy.arch.exception import Vector
from understudy.arch.segment import SegmentName
from understudy.guest import Event, Kind
from understudy.instructions.task_switch import TaskFault, TaskSwitch
from understudy.machine.frames import OutOfFrames
from understudy.machine.p2m import GuestMemoryError
from understudy.paging.guest_walk import GuestFault
from understudy.vcpu.loop import Vcpu
from understudy.verdict import RESUME, Stop, Verdict


def task_switch(
    vcpu: Vcpu, selector: int, source: int, event: Event | None, length: int
) -> Verdict | Stop:
    """Every switch exits.  A fault while the double-fault task is entered is a triple fault.

    `source`: 0 CALL, 1 IRET, 2 JMP, 3 a task gate in the IDT.  `event`: what went through the gate.
    """
    task = vcpu.guest.segment(SegmentName.TR)
    try:
        TaskSwitch(vcpu, selector, source, event, length).carry_out()
    except TaskFault as fault:
        return vcpu.fault(fault.vector, fault.error)
    except GuestFault as fault:
        if event is not None and (event.kind, event.vector) == (Kind.EXCEPTION, Vector.DF):
            return triple_fault(vcpu)
        return vcpu.guest_fault(fault)
    except GuestMemoryError as problem:
        return vcpu.error(f"a task switch: {problem}")
    except OutOfFrames:
        if event is not None and vcpu.guest.segment(SegmentName.TR) == task:
            vcpu.events.requeue(event)  # all of it is done again
            vcpu.attention = True
        raise
    if event is None:
        vcpu.guest.note_skip()  # of CALL, JMP or IRET
    return RESUME
