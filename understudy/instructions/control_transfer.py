"""Near transfers of control, the stack, and what depends on conditions, in 64-bit code.

Source: SDM 1, "Procedure Calls, Interrupts, and Exceptions", "EFLAGS Condition Codes"; SDM 2, the
instructions' own pages.

A flow reaches memory by linear addresses, and sets RIP itself.
Invariants: nothing has changed when `load` or `store` refuses; a target is
canonical, or the flow refuses.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind

from understudy.arch.address import is_canonical
from understudy.guest import RSP
from understudy.instructions.conditions import CONDITIONS
from understudy.instructions.interpreter import Load, Store
from understudy.instructions.operands import (
    MASK64,
    MASKS,
    effective_address,
    operand_address,
    source,
    target,
)
from understudy.instructions.registers import Registers

Flow = Callable[[Registers, Load, Store], None]
"""Does all that an instruction does, RIP included."""
RCX: Final = 1
LOOPS: Final = {Mnemonic.LOOP: None, Mnemonic.LOOPE: True, Mnemonic.LOOPNE: False}
ZF: Final = 1 << 6
NOPS: Final = frozenset({Mnemonic.NOP, Mnemonic.ENDBR64, Mnemonic.ENDBR32})


class NotHere(Exception):
    """The processor has to execute this instruction."""


def flow(instruction: iced.Instruction) -> Flow | None:
    """How to carry out an instruction of 64-bit code, decoded at address 0.  None: not here."""
    mnemonic, length = instruction.mnemonic, instruction.len
    if mnemonic in NOPS:
        return lambda r, load, store: _go(r, r.rip + length)
    if instruction.is_jcc_short_or_near:
        return _jcc(instruction)
    if mnemonic in LOOPS:
        return _loop(instruction, LOOPS[mnemonic])
    if instruction.is_jmp_short_or_near or instruction.is_call_near:
        return _direct(instruction)
    if instruction.is_jmp_near_indirect or instruction.is_call_near_indirect:
        return _indirect(instruction)
    if mnemonic == Mnemonic.RET:
        return _ret(instruction)
    if mnemonic in (Mnemonic.PUSH, Mnemonic.POP):
        return _push(instruction) if mnemonic == Mnemonic.PUSH else _pop(instruction)
    if mnemonic == Mnemonic.LEA:
        write, address = target(instruction, 0), effective_address(instruction)
        assert write is not None

        def lea(r: Registers, load: Load, store: Store) -> None:
            write(r, address(r))
            r.rip = r.rip + length & MASK64

        return lea
    if instruction.condition_code and instruction.op_count:
        return _conditional(instruction)
    return None


def _go(r: Registers, to: int) -> None:
    r.rip = to & MASK64


def _value(instruction: iced.Instruction, n: int, size: int) -> Callable[[Registers, Load], int]:
    if instruction.op_kind(n) == OpKind.MEMORY:
        address = operand_address(instruction, 64)
        return lambda r, load: load(address(r), size)
    read = source(instruction, n, size)
    if read is None:
        raise NotHere
    return lambda r, load: read(r)


def _jump(r: Registers, to: int) -> None:
    to &= MASK64
    if not is_canonical(to):
        raise NotHere
    r.rip = to


def _jcc(instruction: iced.Instruction) -> Flow:
    holds, length = CONDITIONS[instruction.condition_code], instruction.len
    to = instruction.near_branch_target  # decoded at 0: from the beginning of the instruction
    to = to - (1 << 64) if to >> 63 else to

    def jcc(r: Registers, load: Load, store: Store) -> None:
        if holds(r.rflags):
            _jump(r, r.rip + to)
        else:
            r.rip = r.rip + length & MASK64

    return jcc


def _loop(instruction: iced.Instruction, wanted: bool | None) -> Flow:
    is_narrow = instruction.code in (
        iced.Code.LOOP_REL8_64_ECX, iced.Code.LOOPE_REL8_64_ECX, iced.Code.LOOPNE_REL8_64_ECX,
    )  # fmt: skip
    mask, length, to = MASKS[4 if is_narrow else 8], instruction.len, instruction.near_branch_target

    def loop(r: Registers, load: Load, store: Store) -> None:
        left = r.gpr(RCX) - 1 & mask
        zero = bool(r.rflags & ZF)
        if left and (wanted is None or wanted == zero):
            _jump(r, r.rip + to)
        else:
            r.rip = r.rip + length & MASK64
        r.set_gpr(RCX, left)

    return loop


def _pushed(r: Registers, store: Store, size: int, value: int) -> int:
    """Store it below the top of the stack; the stack pointer then."""
    sp = r.gpr(RSP) - size & MASK64
    store(sp, size, value & MASKS[size])
    return sp


def _direct(instruction: iced.Instruction) -> Flow | None:
    if instruction.op0_kind != OpKind.NEAR_BRANCH64:
        return None  # with an operand size of 16 bits processors differ
    to, length, is_call = instruction.near_branch_target, instruction.len, instruction.is_call_near

    def direct(r: Registers, load: Load, store: Store) -> None:
        here = r.rip
        if not is_canonical(here + to & MASK64):
            raise NotHere
        if is_call:
            r.set_gpr(RSP, _pushed(r, store, 8, here + length))
        r.rip = here + to & MASK64

    return direct


def _indirect(instruction: iced.Instruction) -> Flow | None:
    if instruction.memory_size not in (iced.MemorySize.QWORD_OFFSET, iced.MemorySize.UNKNOWN):
        return None
    if instruction.op0_kind == OpKind.REGISTER and iced.RegisterExt.size(
        instruction.op0_register) != 8:  # fmt: skip
        return None
    get, length, is_call = _value(instruction, 0, 8), instruction.len, (
        instruction.is_call_near_indirect
    )  # fmt: skip

    def indirect(r: Registers, load: Load, store: Store) -> None:
        to = get(r, load)
        if not is_canonical(to):
            raise NotHere
        if is_call:
            r.set_gpr(RSP, _pushed(r, store, 8, r.rip + length))
        r.rip = to

    return indirect


def _ret(instruction: iced.Instruction) -> Flow | None:
    if instruction.code not in (iced.Code.RETNQ, iced.Code.RETNQ_IMM16):
        return None
    drop = 8 + (instruction.immediate16 if instruction.op_count else 0)

    def ret(r: Registers, load: Load, store: Store) -> None:
        sp = r.gpr(RSP)
        _jump(r, load(sp, 8))
        r.set_gpr(RSP, sp + drop & MASK64)

    return ret


def _push(instruction: iced.Instruction) -> Flow | None:
    size, length = -instruction.stack_pointer_increment, instruction.len
    try:
        get = _value(instruction, 0, size)
    except NotHere:
        return None  # a segment register

    def push(r: Registers, load: Load, store: Store) -> None:
        r.set_gpr(RSP, _pushed(r, store, size, get(r, load)))
        r.rip = r.rip + length & MASK64

    return push


def _pop(instruction: iced.Instruction) -> Flow | None:
    write = target(instruction, 0)
    size, length = instruction.stack_pointer_increment, instruction.len
    if write is None:
        return None

    def pop(r: Registers, load: Load, store: Store) -> None:
        sp = r.gpr(RSP)
        value = load(sp, size)
        r.set_gpr(RSP, sp + size & MASK64)
        write(r, value)
        r.rip = r.rip + length & MASK64

    return pop


def _conditional(instruction: iced.Instruction) -> Flow | None:
    """SETcc and CMOVcc.  The latter reads its source, and clears the upper half, either way."""
    holds, length = CONDITIONS[instruction.condition_code], instruction.len
    write = target(instruction, 0)
    if instruction.op_count == 1:
        address = operand_address(instruction, 64) if write is None else None

        def setcc(r: Registers, load: Load, store: Store) -> None:
            value = int(holds(r.rflags))
            if write is not None:
                write(r, value)
            elif address is not None:
                store(address(r), 1, value)
            r.rip = r.rip + length & MASK64

        return setcc
    if write is None:
        return None
    size = iced.RegisterExt.size(instruction.op0_register)
    get, old = _value(instruction, 1, size), _value(instruction, 0, size)

    def cmov(r: Registers, load: Load, store: Store) -> None:
        value = get(r, load)
        write(r, value if holds(r.rflags) else old(r, load))
        r.rip = r.rip + length & MASK64

    return cmov
