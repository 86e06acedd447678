"""INVLPG: translations that are forgotten.

Source: SDM 2, "INVLPG"; SDM 3A, "Operations that Invalidate TLBs and Paging-Structure Caches".

Invariant: it accesses no memory, and no limit is checked.
"""

import iced_x86 as iced
from iced_x86 import Mnemonic

from understudy.instructions.access import Load, Store
from understudy.instructions.operands import operand_address
from understudy.instructions.registers import NotHere, Program
from understudy.instructions.stack import Flow


def flow(instruction: iced.Instruction, bits: int) -> Flow | None:
    """How to carry it out.  None: it is another instruction."""
    if instruction.mnemonic != Mnemonic.INVLPG:
        return None
    address = operand_address(instruction, bits)

    def invlpg(r: Program, at: int, load: Load, store: Store) -> None:
        if r.cpl:
            raise NotHere
        r.invalidate(address(r))

    return invlpg
