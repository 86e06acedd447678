"""Writes to write-protected page tables, carried out in the guest's stead.

Source: SDM 2, the instructions' own pages.  The forms are those with which kernels edit their
tables: MOV, XCHG, CMPXCHG, CMPXCHG8B, XADD, logic and arithmetic, BTS/BTR/BTC, STOS, MOVS.

An instruction is decoded once and kept by its bytes.

Invariants: what cannot be carried out here changes nothing and is left to the processor, one step
at a time; the tables change only through `GuestMemory`, whose watchers hear of it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind, Register

from understudy.arch.cr import RFLAGS
from understudy.instructions.arithmetic import OPERATIONS, flags_of
from understudy.instructions.device_access import (
    SEGMENT,
    STORES,
    STRINGS,
    Unsupported,
    read_register,
    string,
    write_register,
)
from understudy.instructions.port_strings import DF, RCX, RDI, RSI
from understudy.machine.p2m import GuestMemoryError
from understudy.paging.guest_walk import GuestFault

if TYPE_CHECKING:
    from understudy.vcpu.loop import Vcpu

CS = 1
LONGEST: Final = 15
PAGE: Final = 4096
KEPT: Final = 4096  # plans before all are forgotten
ZF: Final = RFLAGS.ZF.mask
CF: Final = RFLAGS.CF.mask
MOVES: Final = frozenset({Mnemonic.MOVSB, Mnemonic.MOVSW, Mnemonic.MOVSD, Mnemonic.MOVSQ})
LOW32: Final = 0xFFFF_FFFF
MASK64: Final = (1 << 64) - 1
BIT_OPERATIONS: Final[dict[int, Callable[[int, int], int]]] = {
    Mnemonic.BTS: lambda old, bit: old | bit,
    Mnemonic.BTR: lambda old, bit: old & ~bit,
    Mnemonic.BTC: lambda old, bit: old ^ bit,
}
IMMEDIATES: Final = frozenset({
    OpKind.IMMEDIATE8, OpKind.IMMEDIATE8TO16, OpKind.IMMEDIATE8TO32, OpKind.IMMEDIATE8TO64,
    OpKind.IMMEDIATE16, OpKind.IMMEDIATE32, OpKind.IMMEDIATE32TO64, OpKind.IMMEDIATE64,
})  # fmt: skip

ADDRESSES: Final = {OpKind.MEMORY_ESRDI: MASK64, OpKind.MEMORY_ESEDI: LOW32}

Action = Callable[["Vcpu", int], None]
"""Does what the instruction does; its memory operand is at this gpa."""


class Plan(NamedTuple):
    """A decoded instruction."""

    length: int
    size: int  # bytes of its memory operand
    action: Action
    instruction: iced.Instruction


_plans: dict[tuple[bytes, int], Plan | None] = {}


def write_table(vcpu: "Vcpu", gva: int, gpa: int) -> bool:
    """Carry out the instruction at RIP, which writes to a table at `gpa`.  False: not done."""
    guest = vcpu.guest
    bits, at = guest.code_bits(), guest.rip
    if bits != 64:
        at += guest.segment_base(CS)
    code = guest.code_at(at & (1 << 64) - 1, LONGEST)
    try:
        plan = _plans[code, bits]
    except KeyError:
        if len(_plans) >= KEPT:
            _plans.clear()
        plan = _plans[code, bits] = _plan(code, bits)
    if plan is None:
        return False
    length, size, action, instruction = plan
    if instruction.mnemonic in STRINGS:
        return _string(vcpu, plan, bits)
    if gva & PAGE - 1 == 0 and _begins_before(vcpu, instruction, gva):
        return False
    if (gpa & PAGE - 1) + size > PAGE:
        return False
    action(vcpu, gpa)
    vcpu.retire()
    vcpu.skip(length)
    return True


def _string(vcpu: "Vcpu", plan: Plan, bits: int) -> bool:
    if plan.instruction.mnemonic in STORES | MOVES and _run(vcpu, plan, bits):
        return True
    try:
        done = string(vcpu, vcpu.translation(), plan.instruction, bits, 0)
    except GuestFault as fault:
        vcpu.guest_fault(fault)
        return True
    except (Unsupported, GuestMemoryError):
        return False
    if done:
        vcpu.retire()
        vcpu.skip(plan.length)
    return True


def _run(vcpu: "Vcpu", plan: Plan, bits: int) -> bool:
    """REP STOS or MOVS up to the end of a page, or of the run, at once.  False: one by one."""
    instruction = plan.instruction
    size, is_move = STRINGS[instruction.mnemonic], instruction.mnemonic in MOVES
    mask = ADDRESSES.get(instruction.op0_kind)
    if mask is None or not instruction.has_rep_prefix:
        return False
    if vcpu.guest.rflags & DF:
        return False
    if is_move and instruction.memory_segment in (Register.FS, Register.GS):
        return False
    if bits != 64 and not _is_flat(vcpu, instruction, is_move):
        return False
    target, source, left = (vcpu.gpr(n) & mask for n in (RDI, RSI, RCX))
    room = PAGE - (target & PAGE - 1)
    if is_move:
        room = min(room, PAGE - (source & PAGE - 1))
        if abs(target - source) < PAGE:
            return False  # what is written may be what is read next
    count = min(left, room // size)
    if not count:
        return False
    translation, memory = vcpu.translation(), vcpu.memory
    try:
        gpa = translation.gpa(memory, target, write=True)
        if is_move:
            data = memory.read(translation.gpa(memory, source), count * size)
        else:
            data = (vcpu.gpr(0) & (1 << 8 * size) - 1).to_bytes(size, "little") * count
        memory.write(gpa, data)
    except GuestFault as fault:
        vcpu.guest_fault(fault)
        return True
    except GuestMemoryError:
        return False
    vcpu.set_gpr(RDI, target + count * size & mask)
    vcpu.set_gpr(RCX, left - count)
    if is_move:
        vcpu.set_gpr(RSI, source + count * size & mask)
    if count == left:
        vcpu.retire()
        vcpu.skip(plan.length)
    return True


def _is_flat(vcpu: "Vcpu", instruction: iced.Instruction, is_move: bool) -> bool:
    """Whether the segments of a string instruction begin at 0."""
    segments = [Register.ES, instruction.memory_segment] if is_move else [Register.ES]
    return not any(vcpu.guest.segment_base(SEGMENT[segment]) for segment in segments)


def _begins_before(vcpu: "Vcpu", instruction: iced.Instruction, gva: int) -> bool:
    """Whether the operand begins in the page before the one in which it faulted."""

    is_64 = instruction.code_size == iced.CodeSize.CODE64
    address = instruction.memory_displacement
    base, index = instruction.memory_base, instruction.memory_index
    if base not in (Register.NONE, Register.RIP, Register.EIP):
        address += read_register(vcpu, base)
    if index != Register.NONE:
        address += read_register(vcpu, index) * instruction.memory_index_scale
    if base == Register.RIP:
        return True  # the displacement is relative to an address that was not decoded with it
    if not is_64:
        address &= LOW32
    segment = instruction.memory_segment
    if not is_64 or segment in (Register.FS, Register.GS):
        address += vcpu.guest.segment_base(SEGMENT[segment])
    return address & (MASK64 if is_64 else LOW32) != gva


# --- what instructions do ---


def _plan(code: bytes, bits: int) -> Plan | None:
    instruction = iced.Decoder(bits, code).decode()
    mnemonic = instruction.mnemonic
    size = iced.MemorySizeExt.size(instruction.memory_size)
    if mnemonic in STRINGS:
        kinds = [instruction.op_kind(n) for n in range(instruction.op_count)]
        is_of_sse = mnemonic in MOVES and OpKind.REGISTER in kinds
        action: Action | None = None if is_of_sse else _nothing
    elif mnemonic == Mnemonic.CMPXCHG8B:
        action = _cmpxchg8b
    elif instruction.op_count != 2 or instruction.op0_kind != OpKind.MEMORY or size > 8:
        return None
    else:
        action = _two_operands(instruction, mnemonic, size)
    if action is None:
        return None
    return Plan(instruction.len, size, action, instruction)


def _nothing(vcpu: "Vcpu", gpa: int) -> None:
    """String instructions are carried out element by element."""


def _two_operands(instruction: iced.Instruction, mnemonic: int, size: int) -> Action | None:
    mask = (1 << 8 * size) - 1
    source = _source(instruction, mask)
    if source is None:
        return None
    if mnemonic in (Mnemonic.MOV, Mnemonic.MOVNTI):
        return lambda vcpu, gpa: store(vcpu, gpa, size, source(vcpu))
    register = instruction.op1_register
    if mnemonic == Mnemonic.XCHG:

        def exchange(vcpu: "Vcpu", gpa: int) -> None:
            old, new = load(vcpu, gpa, size), source(vcpu)
            store(vcpu, gpa, size, new)
            write_register(vcpu, register, old)

        return exchange
    if mnemonic in BIT_OPERATIONS and instruction.op1_kind in IMMEDIATES:
        change, bit = BIT_OPERATIONS[mnemonic], 1 << int(instruction.immediate(1)) % (8 * size)

        def change_bit(vcpu: "Vcpu", gpa: int) -> None:
            old = load(vcpu, gpa, size)
            store(vcpu, gpa, size, change(old, bit))
            flags = vcpu.guest.rflags & ~CF
            vcpu.guest.rflags = flags | CF if old & bit else flags

        return change_bit
    if mnemonic == Mnemonic.CMPXCHG:
        return _cmpxchg(instruction, size, source)
    operation = OPERATIONS.get(mnemonic)
    if operation is None:
        return None

    def compute(vcpu: "Vcpu", gpa: int) -> None:
        flags = vcpu.guest.rflags
        old, other = load(vcpu, gpa, size), source(vcpu)
        result, flags = flags_of(operation, old, other, 8 * size, flags)
        if result is not None:
            store(vcpu, gpa, size, result & mask)
        vcpu.guest.rflags = flags

    return compute


def _source(instruction: iced.Instruction, mask: int) -> Callable[["Vcpu"], int] | None:
    kind = instruction.op1_kind
    if kind in IMMEDIATES:
        value = int(instruction.immediate(1)) & mask
        return lambda vcpu: value
    register = instruction.op1_register
    if kind != OpKind.REGISTER or not iced.RegisterExt.is_gpr(register):
        return None
    full = iced.RegisterExt.number(iced.RegisterExt.full_register(register))
    if full != 4 and register not in (Register.AH, Register.BH, Register.CH, Register.DH):
        return lambda vcpu: vcpu.read_gpr(full) & mask
    return lambda vcpu: read_register(vcpu, register)


def _cmpxchg(instruction: iced.Instruction, size: int, source: Callable[["Vcpu"], int]) -> Action:
    accumulator = (Register.AL, Register.AX, Register.EAX, Register.RAX)[size.bit_length() - 1]
    compare = OPERATIONS[Mnemonic.CMP]

    def action(vcpu: "Vcpu", gpa: int) -> None:
        flags = vcpu.guest.rflags
        old, expected = load(vcpu, gpa, size), read_register(vcpu, accumulator)
        _, flags = flags_of(compare, expected, old, 8 * size, flags)
        if old == expected:
            store(vcpu, gpa, size, source(vcpu))
        else:
            store(vcpu, gpa, size, old)
            write_register(vcpu, accumulator, old)
        vcpu.guest.rflags = flags

    return action


def _cmpxchg8b(vcpu: "Vcpu", gpa: int) -> None:
    flags = vcpu.guest.rflags & ~ZF
    old = load(vcpu, gpa, 8)
    low = 0xFFFF_FFFF
    eax, ecx, edx, ebx = (vcpu.read_gpr(n) & low for n in range(4))
    if old == edx << 32 | eax:
        store(vcpu, gpa, 8, ecx << 32 | ebx)
        flags |= ZF
    else:
        store(vcpu, gpa, 8, old)
        vcpu.write_gpr(0, old & low)
        vcpu.write_gpr(2, old >> 32)
    vcpu.guest.rflags = flags


def load(vcpu: "Vcpu", gpa: int, size: int) -> int:
    """Bytes of RAM, inside one page."""
    return int.from_bytes(vcpu.memory.read(gpa, size), "little")


def store(vcpu: "Vcpu", gpa: int, size: int, value: int) -> None:
    """Write bytes of RAM, inside one page."""
    vcpu.paging.store(gpa, size, value)
