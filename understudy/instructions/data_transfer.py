"""Data transfer: moves, exchanges, compare-and-exchange.

Source: SDM 1, "Data Transfer Instructions", "Exchange Instructions"; SDM 2, the instructions' own
pages.

Invariant: a compare-and-exchange writes its destination in memory even if the comparison fails,
with what was there, as hardware does.
"""

from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind, Register

from understudy.arch.exception import Vector
from understudy.instructions.access import Action, Load, Make, Store, getter, operand_size, putter
from understudy.instructions.arithmetic import OPERATIONS, ZF, computer
from understudy.instructions.operands import ACCUMULATORS, LOW32, reader, source, target, writer
from understudy.instructions.registers import Registers
from understudy.paging.guest_walk import GuestFault

RAX, RCX, RDX, RBX = range(4)


def _move(instruction: iced.Instruction) -> Action | None:
    put, other = putter(instruction, 0), getter(instruction, 1)
    if put is None or other is None:
        return None  # segment, control and debug registers
    if instruction.op0_kind == OpKind.MEMORY:  # the two most frequent, without detours
        read = source(instruction, 1, size := operand_size(instruction, 0))
        assert read is not None
        return lambda guest, at, load, store: store(at, size, read(guest))
    write, size = target(instruction, 0), operand_size(instruction, 1)
    assert write is not None  # so `put` says
    if instruction.op1_kind == OpKind.MEMORY:
        return lambda guest, at, load, store: write(guest, load(at, size))
    value = source(instruction, 1, size)
    assert value is not None
    return lambda guest, at, load, store: write(guest, value(guest))


def _move_signed(instruction: iced.Instruction) -> Action | None:
    put, other = target(instruction, 0), getter(instruction, 1)
    sign = 1 << 8 * operand_size(instruction, 1) - 1
    if put is None or other is None:
        return None
    return lambda guest, at, load, store: put(guest, (other(guest, at, load) ^ sign) - sign)


def _exchange(instruction: iced.Instruction) -> Action | None:
    """XCHG and XADD, whose flags are those of an addition."""
    get, put = getter(instruction, 0), putter(instruction, 0)
    other, put_other = getter(instruction, 1), putter(instruction, 1)
    if get is None or put is None or other is None or put_other is None:
        return None
    add = computer(OPERATIONS[Mnemonic.ADD], 8 * operand_size(instruction, 0))
    is_addition = instruction.mnemonic == Mnemonic.XADD
    is_same = is_addition and instruction.op0_kind == OpKind.REGISTER  # the sum counts

    def exchange(guest: Registers, at: int, load: Load, store: Store) -> None:
        left, right = get(guest, at, load), other(guest, at, load)
        flags = guest.rflags
        if is_addition:
            right, flags = add(left, right, flags)
        put(guest, at, store, right)  # the only one that may be refused
        put_other(guest, at, store, left)
        if is_same:
            put(guest, at, store, right)
        guest.rflags = flags

    return exchange


def _cmpxchg(instruction: iced.Instruction) -> Action | None:
    size = operand_size(instruction, 0)
    get, put, other = getter(instruction, 0), putter(instruction, 0), getter(instruction, 1)
    if get is None or put is None or other is None:
        return None
    is_memory = instruction.op0_kind == OpKind.MEMORY
    compare = computer(OPERATIONS[Mnemonic.CMP], 8 * size)
    expected_of, keep = reader(ACCUMULATORS[size]), writer(ACCUMULATORS[size])

    def compare_exchange(guest: Registers, at: int, load: Load, store: Store) -> None:
        old, expected = get(guest, at, load), expected_of(guest)
        flags = compare(expected, old, guest.rflags)[1]
        if old == expected:
            put(guest, at, store, other(guest, at, load))
        else:
            if is_memory:
                put(guest, at, store, old)
            keep(guest, old)
        guest.rflags = flags

    return compare_exchange


def _cmpxchg8b(guest: Registers, at: int, load: Load, store: Store) -> None:
    flags, old = guest.rflags & ~ZF, load(at, 8)
    eax, ecx, edx, ebx = (guest.read_gpr(n) & LOW32 for n in (RAX, RCX, RDX, RBX))
    if old == edx << 32 | eax:
        store(at, 8, ecx << 32 | ebx)
        flags |= ZF
    else:
        store(at, 8, old)
        guest.write_gpr(RAX, old & LOW32)
        guest.write_gpr(RDX, old >> 32)
    guest.rflags = flags


def _cmpxchg16b(guest: Registers, at: int, load: Load, store: Store) -> None:
    if at & 15:
        raise GuestFault(0, 0, Vector.GP)
    flags, low, high = guest.rflags & ~ZF, load(at, 8), load(at + 8, 8)
    if (low, high) == (guest.read_gpr(RAX), guest.read_gpr(RDX)):
        store(at, 8, guest.read_gpr(RBX))
        store(at + 8, 8, guest.read_gpr(RCX))
        flags |= ZF
    else:
        store(at, 8, low)
        store(at + 8, 8, high)
        guest.write_gpr(RAX, low)
        guest.write_gpr(RDX, high)
    guest.rflags = flags


def _xlat(instruction: iced.Instruction) -> Action:
    write = writer(Register.AL)
    return lambda guest, at, load, store: write(guest, load(at, 1))


MAKERS: Final[dict[int, Make]] = {
    Mnemonic.MOV: _move, Mnemonic.MOVZX: _move, Mnemonic.MOVNTI: _move,
    Mnemonic.MOVSX: _move_signed, Mnemonic.MOVSXD: _move_signed,
    Mnemonic.XCHG: _exchange, Mnemonic.XADD: _exchange, Mnemonic.CMPXCHG: _cmpxchg,
    Mnemonic.CMPXCHG8B: lambda instruction: _cmpxchg8b,
    Mnemonic.CMPXCHG16B: lambda instruction: _cmpxchg16b, Mnemonic.XLATB: _xlat,
}  # fmt: skip
