"""One instruction, carried out on a guest's registers and on memory that the caller reaches.

An instruction is decoded once, into a plan: functions that do what it does.  Plans are kept by the
instruction's bytes, because kernels run the same few instructions over and over.  A plan accesses
its memory operand by two functions of the caller: `load(place, bytes)` and `store(place, bytes,
value)`, where the place is whatever the caller's functions take (a gpa inside one page for devices
and page tables, a linear address for one who interprets a whole guest).

Source: SDM 2, the instructions' own pages.  The forms are those that kernels use on device memory
and on page tables; what has no plan is for the processor to execute.

Invariants: a plan is found by the bytes as they are now; the memory operand is accessed exactly as
often and as wide as hardware would access it, reads before writes.
"""

from typing import Final, NamedTuple

import iced_x86 as iced

from understudy.arch.segment import SegmentName
from understudy.guest import Guest
from understudy.instructions import arithmetic, conversion, data_transfer, multiplication, shifts
from understudy.instructions import bits as bit_instructions
from understudy.instructions.access import Action, Load, Make, Store, has_memory_operand
from understudy.instructions.control_transfer import straight
from understudy.instructions.operands import LONGEST, LOW32, Read, operand_address
from understudy.instructions.registers import Registers
from understudy.instructions.strings import StringPlan, string_plan

PLANS_KEPT: Final = 4096  # plans before all are forgotten


class Plan(NamedTuple):
    """A decoded instruction.  Either an action or, for a string instruction, `string`."""

    length: int
    size: int  # bytes of its memory operand
    action: Action
    address: Read  # the linear address of its memory operand
    string: StringPlan | None


_plans: dict[tuple[bytes, int], Plan | None] = {}


def plan_at(guest: Guest) -> Plan | None:
    """The plan of the instruction at RIP.  None: there is none for what it is."""
    bits, at = guest.code_bits(), guest.rip
    if bits != 64:
        at = at + guest.segment_base(SegmentName.CS) & LOW32
    code = guest.code_at(at, LONGEST)
    try:
        return _plans[code, bits]
    except KeyError:
        if len(_plans) >= PLANS_KEPT:
            _plans.clear()
        made = _plans[code, bits] = plan(decode(code, bits), bits)
        return made


def decode(code: bytes, bits: int, rip: int = 0) -> iced.Instruction:
    """The instruction at the beginning of `code`; INVALID if there is none, or a part of one."""
    return iced.Decoder(bits, code, ip=rip).decode()


def plan(instruction: iced.Instruction, bits: int) -> Plan | None:
    """How to carry it out.  None: not here."""
    string = string_plan(instruction, bits)
    action = _nothing if string is not None else _action(instruction)
    if action is None:
        return None
    size = iced.MemorySizeExt.size(instruction.memory_size)
    address = operand_address(instruction, bits) if has_memory_operand(instruction) else _nowhere
    return Plan(instruction.len, size, action, address, string)


def _nothing(guest: Registers, at: int, load: Load, store: Store) -> None:
    """String instructions are carried out element by element."""


def _nowhere(guest: Registers) -> int:
    return 0


# --- what instructions do ---


def _action(instruction: iced.Instruction) -> Action | None:
    make = MAKERS.get(instruction.mnemonic, straight)
    return make(instruction)


MAKERS: Final[dict[int, Make]] = {
    **data_transfer.MAKERS, **arithmetic.MAKERS, **shifts.MAKERS, **bit_instructions.MAKERS,
    **multiplication.MAKERS, **conversion.MAKERS,
}  # fmt: skip
"""What makes an action of an instruction, by its mnemonic."""
