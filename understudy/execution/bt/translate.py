"""The translator: a few of the guest's instructions to code that runs in their stead.

IDENT, a copy, for most; a sequence for calls, returns and indirect branches; a trap (a *callout*)
for whatever is sensitive, and for what is rare.

Source: Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization",
"Software Virtualization"; Robin and Irvine, "Analysis of the Intel Pentium's Ability to Support a
Secure Virtual Machine Monitor", for what is sensitive.
Invariant: what is copied does at CPL 1 what it does at level 0, or faults.
"""

from collections.abc import Container
from typing import Final

import iced_x86 as iced
from iced_x86 import FlowControl, Mnemonic, OpKind, Register

from understudy.arch.address import is_canonical
from understudy.execution.bt import flags
from understudy.execution.bt.layout import CS, SS, Layout
from understudy.execution.bt.sequences import Code
from understudy.execution.deprivileged.instructions import EVERYBODY, KERNEL
from understudy.instructions.operands import LONGEST, MASK64

MOST: Final = 12
"""Guest instructions of a unit."""
LOOKED_AT: Final = frozenset(KERNEL.keys() | EVERYBODY.keys())
X87: Final = frozenset({
    iced.CpuidFeature.FPU, iced.CpuidFeature.FPU287, iced.CpuidFeature.FPU387,
    iced.CpuidFeature.FPU287XL_ONLY,
})  # fmt: skip
X87_CONTROL: Final = frozenset({
    Mnemonic.FNINIT, Mnemonic.FNCLEX, Mnemonic.FNSTCW, Mnemonic.FLDCW, Mnemonic.FNSTSW,
    Mnemonic.FNSTENV, Mnemonic.FLDENV, Mnemonic.FNSAVE, Mnemonic.FRSTOR, Mnemonic.WAIT,
})  # fmt: skip
"""Those that leave alone where the last x87 instruction was (SDM 1, "x87 FPU Instruction and Data
(Operand) Pointers"), which a copy elsewhere would give away."""
SEGMENTS: Final = (
    Register.ES, Register.CS, Register.SS, Register.DS, Register.FS, Register.GS
)  # fmt: skip
AS_THEY_ARE: Final = (Register.ES, Register.DS, Register.FS, Register.GS)
"""Selectors that the processor has as the guest has them."""
JUMPS: Final = {
    32: (iced.Code.JMP_RM32, iced.Code.CALL_RM32), 64: (iced.Code.JMP_RM64, iced.Code.CALL_RM64),
}  # fmt: skip
RETURNS: Final = {
    32: (iced.Code.RETND, iced.Code.RETND_IMM16), 64: (iced.Code.RETNQ, iced.Code.RETNQ_IMM16),
}  # fmt: skip
PUSHF: Final = {32: iced.Code.PUSHFD, 64: iced.Code.PUSHFQ}
POPF: Final = {32: iced.Code.POPFD, 64: iced.Code.POPFQ}
IRET: Final = {32: iced.Code.IRETD, 64: iced.Code.IRETQ}
TIME: Final = {Mnemonic.RDTSC: flags.RDTSC, Mnemonic.RDTSCP: flags.RDTSCP}
READABLE: Final = {Register.CS: CS, Register.SS: SS}
"""Selectors of which the guest must see its own."""
HIDDEN: Final = {
    "rdrand": Mnemonic.RDRAND, "rdseed": Mnemonic.RDSEED, "rdtscp": Mnemonic.RDPID,
}  # fmt: skip
"""What VMX keeps from a guest that is not shown the feature, and nothing else does."""
NEAR: Final = {32: OpKind.NEAR_BRANCH32, 64: OpKind.NEAR_BRANCH64}
LOOPS: Final = frozenset({
    Mnemonic.LOOP, Mnemonic.LOOPE, Mnemonic.LOOPNE, Mnemonic.JCXZ, Mnemonic.JECXZ, Mnemonic.JRCXZ,
})  # fmt: skip
SEGMENT_PREFIXES: Final = b"\x26\x2e\x36\x3e\x64\x65"
PREFIXES: Final = SEGMENT_PREFIXES + b"\x66\x67\xf0\xf2\xf3"
REX_W, REX_R, REX_X = 8, 4, 2
INDIRECT: Final = 0xFF
"""The opcode of an indirect branch."""
VEX2: Final = 0xC5
"""The VEX prefix that has no X."""
NOT_X: Final = 1 << 6  # of the second byte of other VEX and EVEX prefixes
LOAD_AX: Final = {32: b"\x8b\x04\x24", 64: b"\x48\x8b\x04\x24"}  # from the top of the stack


class Untranslated(Exception):
    """This is left to the hypervisor."""


class Cut(Exception):
    """Not even the first instruction is there to its end."""


def hidden_from(shown: Container[str]) -> frozenset[int]:
    """Mnemonics that a guest has not got which is shown these features."""
    return frozenset(mnemonic for name, mnemonic in HIDDEN.items() if name not in shown)


def translate(
    layout: Layout, pc: int, code: bytes, rip: int, *, is_virtual: bool,
    hidden: Container[int] = (), called_out: Container[int] = (),
) -> Code:  # fmt: skip
    """A unit: as many instructions at `rip` as there are in `code`, to be put at `pc`.

    is_virtual: time is, and what is executed beyond the guest's instructions takes none.
    hidden: mnemonics that are called out, for the guest has not got them.
    called_out: where instructions are that would be copied, and are not to be.
    Cut: more code is needed.
    """
    out, decoder = Code(layout, pc), iced.Decoder(layout.bits, code, ip=rip)
    at, has_invalid = 0, False
    for count in range(MOST):
        instruction = decoder.decode()
        length = instruction.len
        if decoder.last_error == iced.DecoderError.NO_MORE_BYTES or (
            instruction.is_invalid and len(code) - at < LONGEST
        ):  # a part of it is in the next page
            if not count:
                raise Cut
            out.leave(rip + at & layout.mask)
            out.seen = len(code)
            break
        has_invalid |= instruction.is_invalid
        raw = code[at : at + length]
        out.begin(rip + at & layout.mask)
        at += length
        try:
            if (plain := TIME.get(instruction.mnemonic)) is None:
                if instruction.mnemonic in hidden:
                    raise Untranslated
                is_over, is_copy = _one(out, decoder, instruction, raw, called_out)
            elif is_virtual:
                flags.read_time(out, plain)
                is_over, is_copy = False, False
            else:
                out.plain(plain)
                is_over, is_copy = False, True
        except Untranslated:
            is_over, is_copy = False, False
            out.trap()
        out.copies += is_copy
        if is_over:
            break
    else:
        out.leave(rip + at & layout.mask)
    out.seen = out.seen or (len(code) if has_invalid else at)
    out.stubs()
    return out


def _one(
    out: Code, decoder: iced.Decoder, instruction: iced.Instruction, raw: bytes,
    called_out: Container[int],
) -> tuple[bool, bool]:  # fmt: skip
    """Whether it ends the unit, and whether it is a copy.  Untranslated: a callout is needed."""
    flow, bits = instruction.flow_control, out.layout.bits
    if flow == FlowControl.NEXT:
        if _inline(out, instruction):
            return False, False
        if is_sensitive(instruction) or instruction.ip in called_out:
            raise Untranslated
        out.plain(_copy(out, decoder, instruction, raw))
        return False, True
    back = instruction.next_ip & out.layout.mask
    if bits == 64 and not is_canonical(instruction.near_branch_target):
        raise Untranslated
    if flow == FlowControl.CONDITIONAL_BRANCH:
        if instruction.mnemonic in LOOPS or instruction.op0_kind != NEAR[bits]:
            raise Untranslated
        opcode = bytes((0x0F, 0x7F + instruction.condition_code))
        out.jump(opcode, instruction.near_branch_target)
        return False, False
    if flow == FlowControl.UNCONDITIONAL_BRANCH and instruction.op0_kind == NEAR[bits]:
        out.jump(b"\xe9", instruction.near_branch_target)
        return True, False
    if flow == FlowControl.CALL and instruction.op0_kind == NEAR[bits] and _fits(back, bits):
        out.call(instruction.near_branch_target, back)
        return True, False
    if instruction.code == IRET[bits]:
        flags.iret(out)
        return True, False
    if instruction.code in RETURNS[bits]:
        extra = instruction.immediate16 if instruction.op_count else 0
        out.indirect(LOAD_AX[bits], drops=bits // 8 + extra)
        return True, False
    if instruction.code == JUMPS[bits][0]:
        out.indirect(_target(out, decoder, instruction, raw))
        return True, False
    if instruction.code == JUMPS[bits][1] and _fits(back, bits):
        out.indirect(_target(out, decoder, instruction, raw), back=back)
        return True, False
    raise Untranslated


def _inline(out: Code, instruction: iced.Instruction) -> bool:
    """A sensitive instruction that needs no trap; False: it is none."""
    mnemonic = instruction.mnemonic
    if mnemonic in (Mnemonic.CLI, Mnemonic.STI):
        out.set_if(mnemonic == Mnemonic.STI)
        return True
    if instruction.code == PUSHF[out.layout.bits]:
        out.pushf()
        return True
    if instruction.code == POPF[out.layout.bits]:
        flags.popf(out)
        return True
    if instruction.code == iced.Code.PUSHD_CS:
        out.read_datum(b"\xff\x35", CS)
        return True
    if mnemonic != Mnemonic.MOV or instruction.op0_kind != OpKind.REGISTER:
        return False
    if instruction.op1_kind != OpKind.REGISTER or instruction.op1_register not in READABLE:
        return False
    register = instruction.op0_register
    if not iced.RegisterExt.is_gpr(register):
        return False
    number = iced.RegisterExt.number(register)
    prefix = b"\x66" if iced.RegisterExt.is_gpr16(register) else b""
    if out.layout.bits == 64:
        prefix += bytes((0x40 | (number >> 3) << 2,))
    opcode = prefix + bytes((0x8B, 0x05 | (number & 7) << 3))
    out.read_datum(opcode, READABLE[instruction.op1_register])
    return True


def _fits(address: int, bits: int) -> bool:
    """Whether a sign-extended immediate of 32 bits can be this address."""
    return bits == 32 or not 1 << 31 <= address < MASK64 + 1 - (1 << 31)


def is_sensitive(instruction: iced.Instruction) -> bool:
    """Whether it shows or changes what a guest's kernel must not have."""
    if instruction.mnemonic in LOOKED_AT or notes_its_place(instruction):
        return True
    if instruction.mnemonic not in (Mnemonic.MOV, Mnemonic.PUSH, Mnemonic.POP):
        return False
    for n in range(instruction.op_count):
        if instruction.op_kind(n) != OpKind.REGISTER:
            continue
        register = instruction.op_register(n)
        if register in SEGMENTS:
            reads = n == 1 or instruction.mnemonic == Mnemonic.PUSH
            return not reads or register not in AS_THEY_ARE
        if iced.RegisterExt.is_cr(register) or iced.RegisterExt.is_dr(register):
            return True
    return False


def notes_its_place(instruction: iced.Instruction) -> bool:
    """Whether the processor keeps where this instruction was, for the guest to see."""
    return instruction.mnemonic not in X87_CONTROL and not X87.isdisjoint(
        instruction.cpuid_features()
    )


def _copy(out: Code, decoder: iced.Decoder, instruction: iced.Instruction, raw: bytes) -> bytes:
    """The same bytes; what is relative to RIP becomes absolute."""
    if not instruction.is_ip_rel_memory_operand:
        return raw
    if instruction.memory_base != Register.RIP:
        raise Untranslated
    at = decoder.get_constant_offsets(instruction).displacement_offset
    address = instruction.ip_rel_memory_address
    if not _fits(address, 64) or _has_index(instruction, raw) or len(raw) == LONGEST:
        raise Untranslated
    modrm = bytes((raw[at - 1] & 0x38 | 4, 0x25))
    return raw[: at - 1] + modrm + (address & 0xFFFF_FFFF).to_bytes(4, "little") + raw[at + 4 :]


def _has_index(instruction: iced.Instruction, raw: bytes) -> bool:
    """Whether a prefix's X, which an operand relative to RIP ignores, would select an index."""
    n = rex = 0
    while raw[n] in PREFIXES or raw[n] >> 4 == 4:
        rex = raw[n] if raw[n] >> 4 == 4 else 0  # of several the last counts, right before the code
        n += 1
    if instruction.encoding == iced.EncodingKind.LEGACY:
        return bool(rex & REX_X)
    return raw[n] != VEX2 and not raw[n + 1] & NOT_X


def _target(out: Code, decoder: iced.Decoder, instruction: iced.Instruction, raw: bytes) -> bytes:
    """MOV to the accumulator from the operand of an indirect branch."""
    raw = _copy(out, decoder, instruction, raw)
    n, prefixes = 0, b""
    while raw[n] in PREFIXES:
        if raw[n] == 0x66:
            raise Untranslated
        if raw[n] in SEGMENT_PREFIXES or raw[n] == 0x67:
            prefixes += raw[n : n + 1]
        n += 1
    if out.layout.bits == 64:
        rex = REX_W | 0x40
        if raw[n] >> 4 == 4:
            rex |= raw[n] & ~REX_R
            n += 1
        prefixes += bytes((rex,))
    if raw[n] != INDIRECT:  # a REX before other prefixes means nothing
        raise Untranslated
    modrm = raw[n + 1]
    return prefixes + bytes((0x8B, modrm & 0xC7)) + raw[n + 2 :]
