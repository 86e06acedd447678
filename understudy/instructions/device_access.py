"""Instructions that access a device: decoded, carried out, skipped.

Source: SDM 2, the instructions' own pages; the forms are those that kernels use on device
memory (MOV, MOVZX, MOVSX, logic and arithmetic, TEST, CMP, XCHG, BT, STOS, MOVS, LODS).

The decoder is iced-x86.  A decoded instruction is kept by its bytes, because drivers run the
same few instructions over and over.

Invariants: the memory operand is accessed exactly as often and as wide as hardware would access
it; a page fault on the way leaves the guest's state as if the instruction had not begun (string
instructions: as after the last whole element).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind, Register

from understudy.instructions.arithmetic import OPERATIONS, flags_of
from understudy.instructions.port_strings import (
    BURST,
    CYCLE_NS,
    DF,
    RCX,
    RDI,
    RSI,
    advance,
    load,
    pieces,
    store,
)
from understudy.machine.p2m import GuestMemoryError
from understudy.paging.guest_walk import GuestFault, Translation

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Register as RegisterNumber

    from understudy.vcpu.loop import Vcpu

CS = 1
MEMORY_KINDS: Final = frozenset({OpKind.MEMORY})
SEGMENT: Final = {
    Register.ES: 0, Register.CS: 1, Register.SS: 2, Register.DS: 3, Register.FS: 4, Register.GS: 5,
}  # fmt: skip


class Unsupported(Exception):
    """An instruction that this module does not carry out; the message names it."""


@lru_cache(maxsize=512)
def decode(code: bytes, bits: int) -> iced.Instruction:
    """The instruction at the beginning of `code`; not valid if it is longer."""
    return iced.Decoder(bits, code).decode()


def access(vcpu: "Vcpu", gpa: int) -> None:
    """Carry out the instruction at RIP, whose memory operand is a device at `gpa`."""
    guest = vcpu.guest
    start, bits = guest.segment_base(CS) + guest.rip, guest.code_bits()
    translation = vcpu.translation()
    try:
        instruction = _fetch(vcpu, translation, start, bits)
        if instruction.mnemonic in STRINGS:
            done = string(vcpu, translation, instruction, bits, CYCLE_NS)
        else:
            _plain(vcpu, gpa, instruction)
            vcpu.spend(CYCLE_NS)
            done = True
    except GuestFault as fault:
        vcpu.guest_fault(fault)
        return
    except GuestMemoryError:
        raise Unsupported(f"the instruction at {start:#x} reaches over the end of RAM") from None
    if done:
        vcpu.skip(instruction.len)


def _fetch(vcpu: "Vcpu", translation: Translation, at: int, bits: int) -> iced.Instruction:
    code = b""
    for gva, part in pieces(at, 15):
        code += vcpu.memory.read(translation.gpa(vcpu.memory, gva, fetch=True), part)
        instruction = decode(code, bits)
        if instruction.mnemonic != Mnemonic.INVALID:
            return instruction
    raise Unsupported(f"the bytes {code.hex(' ')} at {at:#x} are no instruction")


def _refuse(instruction: iced.Instruction) -> Unsupported:
    text = iced.Formatter(iced.FormatterSyntax.NASM).format(instruction)
    return Unsupported(f"the instruction `{text}` on device memory is not emulated")


# --- operands ---


class _Operands:
    """The operands of one instruction, whose memory operand (if read) is read once."""

    def __init__(self, vcpu: "Vcpu", gpa: int, instruction: iced.Instruction) -> None:
        self.vcpu, self.gpa, self.instruction = vcpu, gpa, instruction
        self.memory_bytes = iced.MemorySizeExt.size(instruction.memory_size)

    def size(self, n: int) -> int:
        kind = self.instruction.op_kind(n)
        if kind == OpKind.REGISTER:
            return iced.RegisterExt.size(self.instruction.op_register(n))
        if kind == OpKind.MEMORY:
            return self.memory_bytes
        return self.size(0)

    def read(self, n: int) -> int:
        kind = self.instruction.op_kind(n)
        if kind == OpKind.REGISTER:
            return read_register(self.vcpu, self.instruction.op_register(n))
        if kind == OpKind.MEMORY:
            return self.vcpu.mmio_read(self.gpa, self.memory_bytes)
        return int(self.instruction.immediate(n)) & (1 << 8 * self.size(0)) - 1

    def write(self, n: int, value: int) -> None:
        value &= (1 << 8 * self.size(n)) - 1
        if self.instruction.op_kind(n) == OpKind.REGISTER:
            write_register(self.vcpu, self.instruction.op_register(n), value)
        else:
            self.vcpu.mmio_write(self.gpa, self.memory_bytes, value)


def read_register(vcpu: "Vcpu", register: "RegisterNumber") -> int:
    """The value of a general register of any width."""
    number, size, shift = _place(register)
    return vcpu.gpr(number) >> shift & (1 << 8 * size) - 1


def write_register(vcpu: "Vcpu", register: "RegisterNumber", value: int) -> None:
    """Set one: 32-bit writes clear the upper half, narrower ones keep the rest."""
    number, size, shift = _place(register)
    if size < 4:
        mask = (1 << 8 * size) - 1 << shift
        value = vcpu.gpr(number) & ~mask | value << shift
    vcpu.set_gpr(number, value)


def _place(register: "RegisterNumber") -> tuple[int, int, int]:
    """(number of the general register, bytes, shift)."""
    if not iced.RegisterExt.is_gpr(register):
        raise Unsupported("an operand on device memory is no general register")
    full = iced.RegisterExt.number(iced.RegisterExt.full_register(register))
    high = register in (Register.AH, Register.CH, Register.DH, Register.BH)
    return full, iced.RegisterExt.size(register), 8 if high else 0


# --- instructions ---


def _plain(vcpu: "Vcpu", gpa: int, instruction: iced.Instruction) -> None:
    kinds = [instruction.op_kind(n) for n in range(instruction.op_count)]
    if kinds.count(OpKind.MEMORY) != 1:
        raise _refuse(instruction)
    operands = _Operands(vcpu, gpa, instruction)
    mnemonic = instruction.mnemonic
    if (operation := OPERATIONS.get(mnemonic)) is not None:
        _compute(vcpu, operands, operation)
    elif (move := MOVES.get(mnemonic)) is not None:
        move(operands)
    else:
        raise _refuse(instruction)


def _compute(vcpu: "Vcpu", operands: _Operands, operation: object) -> None:
    """Read operand 0 (and 1), compute, set the flags, write operand 0 if the result is kept."""
    flags = vcpu.guest.rflags
    left = operands.read(0)
    right = operands.read(1) if operands.instruction.op_count > 1 else 0
    result, flags = flags_of(operation, left, right, 8 * operands.size(0), flags)
    if result is not None:
        operands.write(0, result)
    vcpu.guest.rflags = flags


def _mov(operands: _Operands) -> None:
    operands.write(0, operands.read(1))


def _movsx(operands: _Operands) -> None:
    bits = 8 * operands.size(1)
    value = operands.read(1)
    operands.write(0, value - (1 << bits) if value >> bits - 1 else value)


def _xchg(operands: _Operands) -> None:
    left, right = operands.read(0), operands.read(1)
    operands.write(0, right)
    operands.write(1, left)


MOVES: Final[dict[int, Callable[[_Operands], None]]] = {
    Mnemonic.MOV: _mov,
    Mnemonic.MOVZX: _mov,
    Mnemonic.MOVNTI: _mov,
    Mnemonic.MOVSX: _movsx,
    Mnemonic.MOVSXD: _movsx,
    Mnemonic.XCHG: _xchg,
}


# --- string instructions ---

STRINGS: Final = {
    Mnemonic.STOSB: 1, Mnemonic.STOSW: 2, Mnemonic.STOSD: 4, Mnemonic.STOSQ: 8,
    Mnemonic.LODSB: 1, Mnemonic.LODSW: 2, Mnemonic.LODSD: 4, Mnemonic.LODSQ: 8,
    Mnemonic.MOVSB: 1, Mnemonic.MOVSW: 2, Mnemonic.MOVSD: 4, Mnemonic.MOVSQ: 8,
}  # fmt: skip
LOADS: Final = frozenset({Mnemonic.LODSB, Mnemonic.LODSW, Mnemonic.LODSD, Mnemonic.LODSQ})
STORES: Final = frozenset({Mnemonic.STOSB, Mnemonic.STOSW, Mnemonic.STOSD, Mnemonic.STOSQ})
NARROW_KINDS: Final = {
    OpKind.MEMORY_ESDI: 0xFFFF, OpKind.MEMORY_SEG_SI: 0xFFFF,
    OpKind.MEMORY_ESEDI: 0xFFFF_FFFF, OpKind.MEMORY_SEG_ESI: 0xFFFF_FFFF,
}  # fmt: skip


def string(
    vcpu: "Vcpu", translation: Translation, instruction: iced.Instruction, bits: int, cost: int
) -> bool:
    """A burst of elements, each taking `cost` of time; False if the instruction is not finished."""
    kinds = [instruction.op_kind(n) for n in range(instruction.op_count)]
    if OpKind.REGISTER in kinds and instruction.mnemonic not in LOADS | STORES:
        raise _refuse(instruction)  # the SSE2 MOVSD
    size = STRINGS[instruction.mnemonic]
    mask = min(NARROW_KINDS.get(kind, (1 << 64) - 1) for kind in kinds)
    repeats = instruction.has_rep_prefix or instruction.has_repne_prefix
    left = vcpu.gpr(RCX) & mask if repeats else 1
    step = -size if vcpu.guest.rflags & DF else size
    source = _base(vcpu, instruction.memory_segment, bits)
    target = _base(vcpu, Register.ES, bits)
    has_source, has_target = instruction.mnemonic not in STORES, instruction.mnemonic not in LOADS
    vcpu.spend(min(left, BURST) * cost)
    for _ in range(min(left, BURST)):
        value = vcpu.gpr(0) & (1 << 8 * size) - 1
        places = []
        if has_target:
            gva = target + (vcpu.gpr(RDI) & mask)
            places = [(translation.gpa(vcpu.memory, at, write=True), n) for at, n in
                      pieces(gva, size)]  # fmt: skip
        if has_source:
            gva = source + (vcpu.gpr(RSI) & mask)
            data = b"".join(
                load(vcpu, translation.gpa(vcpu.memory, at), n) for at, n in pieces(gva, size)
            )
            value = int.from_bytes(data, "little")
            advance(vcpu, RSI, step, mask)
        if has_target:
            data = value.to_bytes(size, "little")
            for gpa, n in places:
                store(vcpu, gpa, data[:n])
                data = data[n:]
            advance(vcpu, RDI, step, mask)
        else:
            write_register(vcpu, instruction.op_register(0), value)
        if repeats:
            advance(vcpu, RCX, -1, mask)
            left -= 1
    return not repeats or left == 0


def _base(vcpu: "Vcpu", segment: "RegisterNumber", bits: int) -> int:
    if bits == 64 and segment not in (Register.FS, Register.GS):
        return 0
    return vcpu.guest.segment_base(SEGMENT[segment])
