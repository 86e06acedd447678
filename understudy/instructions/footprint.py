"""What memory an instruction is going to touch: for those that the processor must execute itself.

Where an instruction has no plan, or its operand crosses from memory into a device, the hypervisor
lends the guest a page of memory in the device's place for one instruction, and carries what was
read and written over the bus (`answers/lent_memory.py`).  Here it is worked out which bytes.

Source: SDM 2, the instructions' own pages; SDM 1, "Bit Addressing for Register and Memory Bit
Offsets"; the operands and implied accesses are iced-x86's.

Invariant: a byte of a device is named for reading only if the instruction, once it does not fault,
reads it.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import iced_x86 as iced
from iced_x86 import Mnemonic, OpAccess, OpKind

from understudy.arch.cr import CR0, CR4
from understudy.arch.segment import SegmentName
from understudy.guest import Guest
from understudy.instructions.interpreter import decode
from understudy.instructions.operands import (
    LONGEST,
    LOW32,
    MASK64,
    MASKS,
    operand_address,
    reader,
    segment_base,
)

READS: Final = frozenset(
    {OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}
)
WRITES: Final = frozenset(
    {OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE}
)
BIT_TESTS: Final = frozenset({Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC})
MASKED: Final = frozenset({Mnemonic.MASKMOVQ, Mnemonic.MASKMOVDQU, Mnemonic.VMASKMOVDQU})
MASKED_WORDS: Final = {
    Mnemonic.VMASKMOVPS: 4, Mnemonic.VPMASKMOVD: 4, Mnemonic.VMASKMOVPD: 8, Mnemonic.VPMASKMOVQ: 8,
}  # fmt: skip
"""Moves of the elements that a mask names, by the bytes of one."""
FXSAVES: Final = frozenset({Mnemonic.FXSAVE, Mnemonic.FXSAVE64})
XSAVES: Final = frozenset({Mnemonic.XSAVE, Mnemonic.XSAVE64})
XSAVEOPTS: Final = frozenset({Mnemonic.XSAVEOPT, Mnemonic.XSAVEOPT64})
XSAVECS: Final = frozenset({
    Mnemonic.XSAVEC, Mnemonic.XSAVEC64, Mnemonic.XSAVES, Mnemonic.XSAVES64,
})  # fmt: skip
XRSTORS: Final = frozenset({
    Mnemonic.XRSTOR, Mnemonic.XRSTOR64, Mnemonic.XRSTORS, Mnemonic.XRSTORS64,
})  # fmt: skip
XSTATES: Final = XSAVES | XSAVEOPTS | XSAVECS | XRSTORS
HEADER_AT, HEADER_BYTES, HEADER_SAVED = 512, 64, 16  # of XSAVE's area
AVX_AT, AVX_BYTES = 576, 256
PKRU_STANDARD, PKRU_BYTES = 2688, 8  # in the compacted format it follows what there is before it
X87_BIT, SSE_BIT, AVX_BIT, PKRU_BIT = 1 << 0, 1 << 1, 1 << 2, 1 << 9  # of XCR0
UNTOUCHED: Final = frozenset({Mnemonic.CLFLUSH, Mnemonic.CLFLUSHOPT, Mnemonic.CLWB})
"""They access no data."""
ADDRESS_BYTES: Final = {iced.CodeSize.CODE16: 2, iced.CodeSize.CODE32: 4, iced.CodeSize.CODE64: 8}
FXSAVE_BYTES: Final = {16: 288, 32: 288, 64: 416}  # that are written, of 512; by the code's bits
XMM_AT: Final = 160  # in the image of FXSAVE
ST_AT: Final = 32

X87: Final = frozenset({
    iced.CpuidFeature.FPU, iced.CpuidFeature.FPU287, iced.CpuidFeature.FPU387,
    iced.CpuidFeature.FXSR,
})  # fmt: skip
STATE: Final = frozenset({Mnemonic.LDMXCSR, Mnemonic.STMXCSR})
UNALIGNED: Final = frozenset({
    Mnemonic.MOVUPS, Mnemonic.MOVUPD, Mnemonic.MOVDQU, Mnemonic.LDDQU, Mnemonic.PCMPESTRI,
    Mnemonic.PCMPESTRM, Mnemonic.PCMPISTRI, Mnemonic.PCMPISTRM, Mnemonic.PCMPESTRI64,
    Mnemonic.PCMPESTRM64,
})  # fmt: skip
"""SSE instructions that take 16 bytes from anywhere."""
AVX: Final = frozenset({
    iced.CpuidFeature.AVX, iced.CpuidFeature.AVX2, iced.CpuidFeature.FMA, iced.CpuidFeature.F16C,
})  # fmt: skip
ALIGNED: Final = frozenset({
    Mnemonic.VMOVAPS, Mnemonic.VMOVAPD, Mnemonic.VMOVDQA, Mnemonic.VMOVNTPS, Mnemonic.VMOVNTPD,
    Mnemonic.VMOVNTDQ, Mnemonic.VMOVNTDQA,
})  # fmt: skip
"""AVX instructions that do not."""

_factory: Final = iced.InstructionInfoFactory()


class Touch(NamedTuple):
    """Bytes that the instruction accesses, at a linear address.

    Neither read nor written: it may, or it only asks whether it could.
    """

    gva: int
    size: int
    reads: bool
    writes: bool


class NotDecoded(Exception):
    """No instruction is at RIP, for this decoder; the message shows its bytes."""


def instruction_at(guest: Guest) -> tuple[iced.Instruction, int]:
    """(the instruction at RIP, decoded where it is; the bits of its code)."""
    bits, rip = guest.code_bits(), guest.rip
    at = rip if bits == 64 else rip + guest.segment_base(SegmentName.CS) & LOW32
    code = guest.code_at(at, LONGEST)
    instruction = decode(code, bits, rip)
    if instruction.mnemonic == Mnemonic.INVALID:
        raise NotDecoded(f"the bytes {code.hex(' ')} at {at:#x} are no instruction")
    return instruction, bits


def footprint(guest: Guest, fxsave: Callable[[], bytes]) -> list[Touch]:
    """What the instruction at RIP touches; NotDecoded.  `fxsave`: the guest's x87 and SSE state."""
    instruction, bits = instruction_at(guest)
    mnemonic = instruction.mnemonic
    if mnemonic in UNTOUCHED:
        return []
    if instruction.is_vsib:
        return _gathered(instruction, guest, bits)
    is_bit_string = mnemonic in BIT_TESTS and instruction.op1_kind == OpKind.REGISTER
    beyond = _bit_offset(instruction, guest) if is_bit_string else 0
    used = _factory.info(instruction).used_memory()
    touches = [_touch(memory, guest, bits, beyond) for memory in used]
    if mnemonic in MASKED:
        return _masked(touches[0], instruction, fxsave())
    if mnemonic in MASKED_WORDS:
        return _masked_words(touches[0], instruction, guest)
    if mnemonic in XSTATES:
        return _xstate(touches[0].gva, mnemonic, guest, bits)
    if mnemonic in FXSAVES:
        area = touches[0]
        return [area._replace(size=FXSAVE_BYTES[bits]), area._replace(writes=False)]
    return touches


def faults_first(guest: Guest) -> bool:
    """Whether the instruction at RIP is sure to fault before it looks at its memory operand.

    #NM, by which kernels switch x87 and SSE state lazily, or #GP for an operand not aligned.
    """
    instruction, bits = instruction_at(guest)
    if instruction.mnemonic in XSTATES:
        is_off = guest.control().cr0 & CR0.TS.mask or not guest.control().cr4 & CR4.OSXSAVE.mask
        return bool(is_off or operand_address(instruction, bits)(guest) & 63)
    features = instruction.cpuid_features()
    if instruction.encoding == iced.EncodingKind.VEX and not AVX.isdisjoint(features):
        return _avx_faults(instruction, guest, bits)
    registers = [instruction.op_register(n) for n in range(instruction.op_count)
                 if instruction.op_kind(n) == OpKind.REGISTER]  # fmt: skip
    uses_xmm = any(iced.RegisterExt.is_xmm(register) for register in registers)
    if (
        uses_xmm
        or any(iced.RegisterExt.is_mm(register) for register in registers)
        or any(feature in X87 for feature in features)
        or instruction.mnemonic in STATE
    ) and guest.control().cr0 & (CR0.TS.mask | CR0.EM.mask):
        return True
    if not uses_xmm or iced.MemorySizeExt.size(instruction.memory_size) != 16:
        return False
    if instruction.mnemonic in UNALIGNED or instruction.is_ip_rel_memory_operand:
        return False
    if OpKind.MEMORY not in (instruction.op_kind(n) for n in range(instruction.op_count)):
        return False
    return bool(operand_address(instruction, bits)(guest) & 15)


def _avx_faults(instruction: iced.Instruction, guest: Guest, bits: int) -> bool:
    control, needed = guest.control(), SSE_BIT | AVX_BIT
    if not control.cr4 & CR4.OSXSAVE.mask or guest.xcr0 & needed != needed:
        return True
    if control.cr0 & CR0.TS.mask or instruction.mnemonic not in ALIGNED:
        return bool(control.cr0 & CR0.TS.mask)
    if OpKind.MEMORY not in (instruction.op_kind(n) for n in range(instruction.op_count)):
        return False
    size = iced.MemorySizeExt.size(instruction.memory_size)
    return bool(operand_address(instruction, bits)(guest) & size - 1)


def _xstate(area: int, mnemonic: int, guest: Guest, bits: int) -> list[Touch]:
    """XSAVE and its kin: the components that EDX:EAX and XCR0 name, and the header.

    Where a form leaves out a component that is in its initial configuration, the old bytes stay.
    """
    wanted = (guest.gpr(2) & LOW32) << 32 | guest.gpr(0) & LOW32
    wanted &= guest.xcr0
    parts: list[tuple[int, int]] = []
    if wanted & X87_BIT:
        parts += [(0, 24), (ST_AT, XMM_AT - ST_AT)]
    if wanted & (SSE_BIT | AVX_BIT):
        parts += [(24, 8)]
    if wanted & SSE_BIT:
        parts += [(XMM_AT, FXSAVE_BYTES[bits] - XMM_AT)]
    if wanted & AVX_BIT:
        parts += [(AVX_AT, FXSAVE_BYTES[bits] - XMM_AT)]
    if wanted & PKRU_BIT and mnemonic not in XSAVECS:
        parts += [(PKRU_STANDARD, PKRU_BYTES)]
    if wanted & PKRU_BIT and mnemonic not in XSAVES | XSAVEOPTS:
        has_avx = wanted & AVX_BIT or (mnemonic in XRSTORS and guest.xcr0 & AVX_BIT)
        parts += [(AVX_AT + AVX_BYTES, PKRU_BYTES)] if has_avx else []
        parts += [] if wanted & AVX_BIT else [(AVX_AT, PKRU_BYTES)]
    if mnemonic in XRSTORS:
        parts += [(HEADER_AT, HEADER_BYTES)]
        return [Touch(area + at, size, True, False) for at, size in parts]
    keeps = mnemonic not in XSAVES
    touches = [Touch(area + at, size, keeps, True) for at, size in parts]
    return [*touches, Touch(area + HEADER_AT, HEADER_SAVED, True, True)]


def _touch(used: iced.UsedMemory, guest: Guest, bits: int, beyond: int) -> Touch:
    offset = int(used.displacement) + beyond
    if used.base:
        offset += reader(used.base)(guest)
    if used.index:
        offset += reader(used.index)(guest) * used.scale
    offset &= MASKS[ADDRESS_BYTES.get(used.address_size, 8)]
    base = segment_base(used.segment, bits)
    gva = offset if base is None else base(guest) + offset & (MASK64 if bits == 64 else LOW32)
    size = iced.MemorySizeExt.size(used.memory_size)
    return Touch(gva, size, used.access in READS, used.access in WRITES)


def _bit_offset(instruction: iced.Instruction, guest: Guest) -> int:
    """How far from the operand a bit test's bytes are: the register counts, with its sign."""
    bits = 8 * iced.MemorySizeExt.size(instruction.memory_size)
    value, sign = reader(instruction.op1_register)(guest), 1 << bits - 1
    return ((value ^ sign) - sign) // bits * (bits // 8)


def _masked(touch: Touch, instruction: iced.Instruction, image: bytes) -> list[Touch]:
    """MASKMOVQ, MASKMOVDQU, VMASKMOVDQU: only the bytes that the mask names."""
    number = iced.RegisterExt.number(instruction.op2_register)
    if instruction.mnemonic != Mnemonic.MASKMOVQ:
        at = XMM_AT + 16 * number
    else:  # MMn is the physical register n, and the image begins with the top of the stack
        at = ST_AT + 16 * (number - (image[3] >> 3) & 7)
    mask = image[at : at + touch.size]
    written = [Touch(touch.gva + n, 1, False, True) for n, byte in enumerate(mask) if byte & 0x80]
    return [*written, touch._replace(writes=False)]


def _masked_words(touch: Touch, instruction: iced.Instruction, guest: Guest) -> list[Touch]:
    """The elements that the mask names, by their first bits."""
    size = MASKED_WORDS[instruction.mnemonic]
    mask = guest.ymm(iced.RegisterExt.number(instruction.op1_register))
    named = [at for at in range(0, touch.size, size) if mask[at + size - 1] & 0x80]
    return [touch._replace(gva=touch.gva + at, size=size) for at in named]


def _gathered(instruction: iced.Instruction, guest: Guest, bits: int) -> list[Touch]:
    """A gather: the elements that its mask names, each at an address of its own."""
    size = iced.MemorySizeExt.size(instruction.memory_size)
    wide = 8 if instruction.is_vsib64 else 4
    mask = guest.ymm(iced.RegisterExt.number(instruction.op2_register))
    indices = guest.ymm(iced.RegisterExt.number(instruction.memory_index))
    count = min(iced.RegisterExt.size(instruction.memory_index) // wide,
                iced.RegisterExt.size(instruction.op0_register) // size)  # fmt: skip
    named = iced.RegisterExt.size(instruction.memory_base) or instruction.memory_displ_size
    start = int(instruction.memory_displacement)
    if instruction.memory_base:
        start += reader(instruction.memory_base)(guest)
    base = segment_base(instruction.memory_segment, bits)
    touches = []
    for n in (n for n in range(count) if mask[size * (n + 1) - 1] & 0x80):
        index = int.from_bytes(indices[wide * n : wide * (n + 1)], "little", signed=True)
        offset = start + index * instruction.memory_index_scale & MASKS[named]
        gva = offset if base is None else base(guest) + offset & (MASK64 if bits == 64 else LOW32)
        touches.append(Touch(gva, size, True, False))
    return touches
