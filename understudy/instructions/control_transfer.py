"""Near transfers of control, and what depends on conditions.

Source: SDM 1, "Control Transfer Instructions", "Procedure Calls, Interrupts, and Exceptions",
"EFLAGS Condition Codes"; SDM 2, the instructions' own pages.

A transfer reaches memory by linear addresses, and sets RIP itself; an instruction is decoded at
address 0, so that a relative target needs RIP added.
Invariants: nothing has changed when an access refuses; a target is canonical or inside the code
segment, or the transfer is NotHere.
"""

from collections.abc import Callable
from typing import Final

import iced_x86 as iced
from iced_x86 import Code, Mnemonic, OpKind

from understudy.guest import RSP
from understudy.instructions.access import NOPS, Action, Load, Store, getter, operand_size, putter
from understudy.instructions.conditions import CONDITIONS
from understudy.instructions.operands import LOW32, MASK64, MASKS, effective_address, source, target
from understudy.instructions.registers import NotHere, Program, Registers
from understudy.instructions.stack import Flow, Stack, stack_of

Jump = Callable[[Program, int], None]
RCX: Final = 1
ZF: Final = 1 << 6
LOOPS: Final = {Mnemonic.LOOP: None, Mnemonic.LOOPE: ZF, Mnemonic.LOOPNE: 0}
"""The value of ZF with which it goes on; None: either."""
ON_ZERO: Final = frozenset({Mnemonic.JCXZ, Mnemonic.JECXZ, Mnemonic.JRCXZ})
COUNT_16: Final = frozenset({
    Code.LOOP_REL8_16_CX, Code.LOOP_REL8_32_CX, Code.LOOPE_REL8_16_CX, Code.LOOPE_REL8_32_CX,
    Code.LOOPNE_REL8_16_CX, Code.LOOPNE_REL8_32_CX, Code.JCXZ_REL8_16, Code.JCXZ_REL8_32,
})  # fmt: skip
COUNT_64: Final = frozenset({
    Code.LOOP_REL8_16_RCX, Code.LOOP_REL8_64_RCX, Code.LOOPE_REL8_16_RCX, Code.LOOPE_REL8_64_RCX,
    Code.LOOPNE_REL8_16_RCX, Code.LOOPNE_REL8_64_RCX, Code.JRCXZ_REL8_16, Code.JRCXZ_REL8_64,
})  # fmt: skip
CANONICAL: Final = (0, 0x1_FFFF)  # bits 63:47
BRANCH_MASKS: Final = {
    OpKind.NEAR_BRANCH16: 0xFFFF, OpKind.NEAR_BRANCH32: LOW32, OpKind.NEAR_BRANCH64: MASK64,
}  # fmt: skip
RETURNS: Final = {
    Code.RETNW: 2, Code.RETNW_IMM16: 2, Code.RETND: 4, Code.RETND_IMM16: 4,
    Code.RETNQ: 8, Code.RETNQ_IMM16: 8,
}  # fmt: skip


def transfer(instruction: iced.Instruction, bits: int) -> Flow | None:
    """How to carry out what goes elsewhere, RIP included.  None: it is no near transfer."""
    if instruction.is_jcc_short_or_near:
        return _jcc(instruction, bits)
    if instruction.mnemonic in LOOPS or instruction.mnemonic in ON_ZERO:
        return _count(instruction, bits)
    if instruction.is_jmp_short_or_near or instruction.is_call_near:
        return _direct(instruction, bits)
    if instruction.is_jmp_near_indirect or instruction.is_call_near_indirect:
        return _indirect(instruction, bits)
    return _ret(instruction, bits) if instruction.mnemonic == Mnemonic.RET else None


def _go64(r: Program, to: int) -> None:
    to &= MASK64
    if to >> 47 not in CANONICAL:
        raise NotHere
    r.rip = to


def _go_within(r: Program, to: int) -> None:
    if to > r.code_limit:
        raise NotHere
    r.rip = to


def _going(bits: int) -> tuple[Jump, int]:
    """How to jump, and the mask of what comes behind an instruction."""
    return (_go64, MASK64) if bits == 64 else (_go_within, LOW32)


def _fits(instruction: iced.Instruction, bits: int) -> bool:
    """With an operand size of 16 bits in 64-bit code processors differ."""
    return bits != 64 or instruction.op0_kind == OpKind.NEAR_BRANCH64


def _jcc(instruction: iced.Instruction, bits: int) -> Flow | None:
    if not _fits(instruction, bits):
        return None
    holds, length = CONDITIONS[instruction.condition_code], instruction.len
    to, mask = instruction.near_branch_target, BRANCH_MASKS[instruction.op0_kind]
    go, next_mask = _going(bits)

    def jcc(r: Program, at: int, load: Load, store: Store) -> None:
        if holds(r.rflags):
            go(r, r.rip + to & mask)
        else:
            r.rip = r.rip + length & next_mask

    return jcc


def _count(instruction: iced.Instruction, bits: int) -> Flow | None:
    """LOOPcc, and JCXZ and its kin: the counter's width is the address size."""
    if not _fits(instruction, bits):
        return None
    width = 2 if instruction.code in COUNT_16 else 8 if instruction.code in COUNT_64 else 4
    count_mask, length, to = MASKS[width], instruction.len, instruction.near_branch_target
    mask, is_loop = BRANCH_MASKS[instruction.op0_kind], instruction.mnemonic in LOOPS
    wanted = LOOPS.get(instruction.mnemonic)
    go, next_mask = _going(bits)

    def loop(r: Program, at: int, load: Load, store: Store) -> None:
        old = r.gpr(RCX)
        left = old - 1 & count_mask
        if left and (wanted is None or wanted == r.rflags & ZF):
            go(r, r.rip + to & mask)
        else:
            r.rip = r.rip + length & next_mask
        r.set_gpr(RCX, left if width > 2 else old & ~0xFFFF | left)

    def on_zero(r: Program, at: int, load: Load, store: Store) -> None:
        if r.gpr(RCX) & count_mask:
            r.rip = r.rip + length & next_mask
        else:
            go(r, r.rip + to & mask)

    return loop if is_loop else on_zero


def _direct(instruction: iced.Instruction, bits: int) -> Flow | None:
    if not _fits(instruction, bits):
        return None
    to, length, is_call = instruction.near_branch_target, instruction.len, instruction.is_call_near
    mask, go, stack = BRANCH_MASKS[instruction.op0_kind], _going(bits)[0], stack_of(bits)
    if not is_call:
        return lambda r, at, load, store: go(r, r.rip + to & mask)
    return _call(lambda r, at, load: r.rip + to & mask, length, mask, bits, stack)


def _call(
    to: Callable[[Program, int, Load], int], length: int, mask: int, bits: int, stack: Stack
) -> Flow:
    size, go, (place, pointer) = mask.bit_length() >> 3, _going(bits)[0], stack

    def call(r: Program, at: int, load: Load, store: Store) -> None:
        here, sp = r.rip, r.gpr(RSP) - size
        go(r, to(r, at, load))
        try:
            store(place(r, sp, size, True), size, here + length & mask)
        except BaseException:
            r.rip = here
            raise
        r.set_gpr(RSP, pointer(r, sp))

    return call


def _indirect(instruction: iced.Instruction, bits: int) -> Flow | None:
    size, get = operand_size(instruction, 0), getter(instruction, 0)
    if get is None or (bits == 64) != (size == 8):
        return None
    go, stack = _going(bits)[0], stack_of(bits)
    if instruction.is_call_near_indirect:
        return _call(get, instruction.len, MASKS[size], bits, stack)
    return lambda r, at, load, store: go(r, get(r, at, load))


def _ret(instruction: iced.Instruction, bits: int) -> Flow | None:
    size = RETURNS[instruction.code]
    if (bits == 64) != (size == 8):
        return None
    drop = size + (instruction.immediate16 if instruction.op_count else 0)
    go, (place, pointer) = _going(bits)[0], stack_of(bits)

    def ret(r: Program, at: int, load: Load, store: Store) -> None:
        sp = r.gpr(RSP)
        go(r, load(place(r, sp, size, False), size))
        r.set_gpr(RSP, pointer(r, sp + drop))

    return ret


# --- what goes straight on, and accesses its operand at most ---


def straight(instruction: iced.Instruction) -> Action | None:
    """LEA, SETcc, CMOVcc and what does nothing.  None: it is none of these."""
    if instruction.mnemonic in NOPS:
        return _nothing
    if instruction.mnemonic == Mnemonic.LEA:
        write, address = target(instruction, 0), effective_address(instruction)
        assert write is not None
        return lambda r, at, load, store: write(r, address(r))
    if instruction.condition_code and instruction.op_count:
        return _conditional(instruction)
    return None


def _nothing(r: Registers, at: int, load: Load, store: Store) -> None:
    """NOP and hints; each access is in order already."""


def _conditional(instruction: iced.Instruction) -> Action | None:
    """SETcc and CMOVcc.  The latter reads its source, and clears the upper half, either way."""
    holds = CONDITIONS[instruction.condition_code]
    if instruction.op_count == 1:
        put = putter(instruction, 0)
        if put is None:
            return None  # a branch, which goes elsewhere
        return lambda r, at, load, store: put(r, at, store, int(holds(r.rflags)))
    write, get = target(instruction, 0), getter(instruction, 1)
    old = source(instruction, 0, operand_size(instruction, 0))
    if write is None or get is None or old is None:
        return None  # FCMOVcc

    def cmov(r: Registers, at: int, load: Load, store: Store) -> None:
        value = get(r, at, load)
        write(r, value if holds(r.rflags) else old(r))

    return cmov
