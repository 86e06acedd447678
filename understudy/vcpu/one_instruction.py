"""One instruction of the guest, executed by itself while an exit is being answered.

Source: SDM 3C, "Monitor Trap Flag".

Invariants: no event goes in before it; the exits that it takes are answered and counted as ever;
when it is over, the run loop looks around.
"""

from typing import Final

from understudy.vcpu.loop import Vcpu
from understudy.verdict import RESUME, Stop

FAR: Final = (1 << 32) - 1  # longer than any instruction takes, in units of the guest's timer


def execute_one(vcpu: Vcpu) -> Stop | None:
    """Have the guest execute the instruction that exited.  It has completed, or faulted, then."""
    guest, exits, table = vcpu.guest, vcpu.exits, vcpu.table
    retired, rip = guest.retired, guest.rip
    guest.single_step(True)
    guest.window(False, False)
    vcpu.is_stepping = True
    try:
        while guest.retired == retired and guest.rip == rip and not vcpu.events.has_staged:
            guest.arm(FAR)
            exit = guest.resume(0)
            exits[exit.reason] = exits.get(exit.reason, 0) + 1
            answer = table.get(exit.reason)
            verdict = vcpu.unknown(exit) if answer is None else answer(vcpu, exit)
            if verdict is not RESUME:
                return verdict
            vcpu.leave_guest()
    finally:
        vcpu.is_stepping = False
        vcpu.leave_guest()
        guest.single_step(False)
        vcpu.attention, vcpu.time.armed = True, 0
    return None
