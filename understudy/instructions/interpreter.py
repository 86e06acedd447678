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

from collections.abc import Callable
from typing import Final, NamedTuple

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind

from understudy.arch.segment import SegmentName
from understudy.guest import Guest
from understudy.instructions.arithmetic import CF, OPERATIONS, ZF, Operation, computer
from understudy.instructions.operands import (
    ACCUMULATORS,
    IMMEDIATES,
    LONGEST,
    LOW32,
    Read,
    operand_address,
    reader,
    source,
    target,
    writer,
)
from understudy.instructions.registers import Registers
from understudy.instructions.strings import StringPlan, string_plan

PLANS_KEPT: Final = 4096  # plans before all are forgotten

Load = Callable[[int, int], int]
"""(place, bytes): the value there."""
Store = Callable[[int, int, int], None]
"""(place, bytes, value)."""
Action = Callable[[Registers, int, Load, Store], None]
"""Does what an instruction does; its memory operand is at this place."""
Get = Callable[[Registers, int, Load], int]
Put = Callable[[Registers, int, Store, int], None]


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
    has_operand = OpKind.MEMORY in (instruction.op_kind(n) for n in range(instruction.op_count))
    address = operand_address(instruction, bits) if has_operand else _nowhere
    return Plan(instruction.len, size, action, address, string)


def _nothing(guest: Registers, at: int, load: Load, store: Store) -> None:
    """String instructions are carried out element by element."""


def _nowhere(guest: Registers) -> int:
    return 0


# --- operands ---


def operand_size(instruction: iced.Instruction, n: int) -> int:
    """Bytes of an operand; of an immediate, those of the operand that it goes with."""
    kind = instruction.op_kind(n)
    if kind == OpKind.REGISTER:
        return iced.RegisterExt.size(instruction.op_register(n))
    if kind == OpKind.MEMORY:
        return iced.MemorySizeExt.size(instruction.memory_size)
    return operand_size(instruction, 0)


def _getter(instruction: iced.Instruction, n: int) -> Get | None:
    size = operand_size(instruction, n)
    if instruction.op_kind(n) == OpKind.MEMORY:
        return lambda guest, at, load: load(at, size)
    read = source(instruction, n, size)
    return None if read is None else lambda guest, at, load: read(guest)


def _putter(instruction: iced.Instruction, n: int) -> Put | None:
    if instruction.op_kind(n) == OpKind.MEMORY:
        size = operand_size(instruction, n)
        mask = (1 << 8 * size) - 1
        return lambda guest, at, store, value: store(at, size, value & mask)
    write = target(instruction, n)
    return None if write is None else lambda guest, at, store, value: write(guest, value)


# --- what instructions do ---


def _action(instruction: iced.Instruction) -> Action | None:
    mnemonic = instruction.mnemonic
    if mnemonic == Mnemonic.CMPXCHG8B:
        return _cmpxchg8b
    if mnemonic not in KNOWN:
        return None
    get, put = _getter(instruction, 0), _putter(instruction, 0)
    other = _getter(instruction, 1) if instruction.op_count > 1 else _one
    if get is None or put is None or other is None:
        return None
    if mnemonic in MOVES:
        return _move(instruction, put, other)
    if mnemonic in (Mnemonic.XCHG, Mnemonic.XADD):
        return _exchange(instruction, get, put, other)
    if mnemonic == Mnemonic.CMPXCHG:
        return _cmpxchg(instruction, get, put, other)
    if mnemonic in BIT_OPERATIONS:
        return _bit(instruction, get, put, other)
    return _compute(instruction, OPERATIONS[mnemonic], get, put, other)


def _one(guest: Registers, at: int, load: Load) -> int:
    return 1


MOVES: Final = frozenset(
    {Mnemonic.MOV, Mnemonic.MOVZX, Mnemonic.MOVNTI, Mnemonic.MOVSX, Mnemonic.MOVSXD}
)


def _move(instruction: iced.Instruction, put: Put, other: Get) -> Action:
    size = operand_size(instruction, 1)
    if instruction.mnemonic in (Mnemonic.MOVSX, Mnemonic.MOVSXD):
        sign = 1 << 8 * size - 1
        return lambda guest, at, load, store: put(
            guest, at, store, (other(guest, at, load) ^ sign) - sign
        )
    if instruction.op0_kind == OpKind.MEMORY:  # the two most frequent, without detours
        read = source(instruction, 1, size := operand_size(instruction, 0))
        assert read is not None
        return lambda guest, at, load, store: store(at, size, read(guest))
    write = target(instruction, 0)
    if instruction.op1_kind == OpKind.MEMORY and write is not None:
        return lambda guest, at, load, store: write(guest, load(at, size))
    return lambda guest, at, load, store: put(guest, at, store, other(guest, at, load))


def _exchange(instruction: iced.Instruction, get: Get, put: Put, other: Get) -> Action | None:
    """XCHG and XADD, whose flags are those of an addition."""
    put_other = _putter(instruction, 1)
    if put_other is None:
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


def _cmpxchg(instruction: iced.Instruction, get: Get, put: Put, other: Get) -> Action:
    """It writes even if the comparison fails."""
    size = operand_size(instruction, 0)
    compare = computer(OPERATIONS[Mnemonic.CMP], 8 * size)
    expected_of, keep = reader(ACCUMULATORS[size]), writer(ACCUMULATORS[size])

    def compare_exchange(guest: Registers, at: int, load: Load, store: Store) -> None:
        old, expected = get(guest, at, load), expected_of(guest)
        flags = compare(expected, old, guest.rflags)[1]
        if old == expected:
            put(guest, at, store, other(guest, at, load))
        else:
            put(guest, at, store, old)
            keep(guest, old)
        guest.rflags = flags

    return compare_exchange


BIT_OPERATIONS: Final[dict[int, Callable[[int, int], int] | None]] = {
    Mnemonic.BT: None,
    Mnemonic.BTS: lambda old, bit: old | bit,
    Mnemonic.BTR: lambda old, bit: old & ~bit,
    Mnemonic.BTC: lambda old, bit: old ^ bit,
}


def _bit(instruction: iced.Instruction, get: Get, put: Put, other: Get) -> Action | None:
    if instruction.op0_kind == OpKind.MEMORY and instruction.op1_kind not in IMMEDIATES:
        return None  # the bit may be anywhere in memory
    change, bits = BIT_OPERATIONS[instruction.mnemonic], 8 * operand_size(instruction, 0)

    def change_bit(guest: Registers, at: int, load: Load, store: Store) -> None:
        old, bit = get(guest, at, load), 1 << other(guest, at, load) % bits
        if change is not None:
            put(guest, at, store, change(old, bit))
        flags = guest.rflags
        guest.rflags = flags | CF if old & bit else flags & ~CF

    return change_bit


def _compute(
    instruction: iced.Instruction, operation: Operation, get: Get, put: Put, other: Get
) -> Action:
    compute = computer(operation, 8 * operand_size(instruction, 0))
    if not operation.keeps_result:

        def test(guest: Registers, at: int, load: Load, store: Store) -> None:
            left, right = get(guest, at, load), other(guest, at, load)
            guest.rflags = compute(left, right, guest.rflags)[1]

        return test

    def change(guest: Registers, at: int, load: Load, store: Store) -> None:
        left, right = get(guest, at, load), other(guest, at, load)
        result, flags = compute(left, right, guest.rflags)
        put(guest, at, store, result)
        guest.rflags = flags

    return change


def _cmpxchg8b(guest: Registers, at: int, load: Load, store: Store) -> None:
    """It writes even if the comparison fails."""
    flags, old = guest.rflags & ~ZF, load(at, 8)
    eax, ecx, edx, ebx = (guest.read_gpr(n) & LOW32 for n in range(4))
    if old == edx << 32 | eax:
        store(at, 8, ecx << 32 | ebx)
        flags |= ZF
    else:
        store(at, 8, old)
        guest.write_gpr(0, old & LOW32)
        guest.write_gpr(2, old >> 32)
    guest.rflags = flags


KNOWN: Final = frozenset(
    {*MOVES, *BIT_OPERATIONS, *OPERATIONS, Mnemonic.XCHG, Mnemonic.XADD, Mnemonic.CMPXCHG}
)
