"""What came back from the guest, in the shape of a VM exit.

Where a trapped instruction, or a fault, asks of the hypervisor what the same one would ask in VMX
operation, the same function answers (`execution/vmx/exits.py`), and it is counted under the same
reason.  Source: SDM 3C, "Information for VM Exits".
"""

from typing import NamedTuple, cast

from understudy.arch.exit_reason import Reason
from understudy.silicon import Exit


class Shape(NamedTuple):
    """As `silicon.Exit`."""

    reason: int
    qualification: int = 0
    length: int = 0
    gla: int = 0
    gpa: int = 0
    intr_info: int = 0
    intr_error: int = 0
    idt_info: int = 0
    idt_error: int = 0
    instr_info: int = 0
    entry_failure: bool = False


def question(
    reason: Reason, qualification: int = 0, *, length: int = 0, gla: int = 0, intr_info: int = 0,
    intr_error: int = 0, instr_info: int = 0,
) -> Exit:  # fmt: skip
    """What `answers/` is asked."""
    return cast(Exit, Shape(
        int(reason), qualification, length, gla, intr_info=intr_info, intr_error=intr_error,
        instr_info=instr_info,
    ))  # fmt: skip
