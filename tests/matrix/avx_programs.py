"""Programs that use YMM registers, made at random.

Source: SDM 1, "Programming with AVX, FMA, and AVX2"; the bytes are iced-x86's encoder's.
Invariant: a program ends by itself, through the debug-exit port, and leaves all YMM registers in
memory: they are a function of its seed.
"""

import random
from typing import Final

import iced_x86 as iced
from iced_x86 import Code, Instruction, MemoryOperand, Register

from tests.matrix import programs as p
from understudy.vm import VM

CPU: Final = "understudy,+avx2,+fma,+f16c,-pmu,-xsaves"
"""With what all techniques of execution can show."""
LEFT: Final = p.DATA + 0x800
"""Where a program leaves the registers, as XSAVE has them."""
LEFT_BYTES: Final = 576 + 256
ENABLE: Final = """
    0f 20 e0             | mov rax, cr4
    0d 00 06 04 00       | or eax, OSXSAVE | OSXMMEXCPT | OSFXSR
    0f 22 e0             | mov cr4, rax
    31 c9                | xor ecx, ecx
    31 d2                | xor edx, edx
    b8 07 00 00 00       | mov eax, x87, SSE and AVX
    0f 01 d1             | xsetbv
    bf 00 00 12 00       | mov edi, DATA
    be {turns}       | mov esi, turns
"""
CPUID: Final = "31 c0 0f a2 | xor eax, eax; cpuid: an exit\n"
XSAVE: Final = """
    b8 07 00 00 00       | mov eax, 7
    31 d2                | xor edx, edx
    0f c7 a7 00 04 00 00 | xsavec [rdi + 0x400]
"""
XRSTOR: Final = XSAVE + "    0f ae af 00 04 00 00 | xrstor [rdi + 0x400]\n"
END: Final = """
    b8 07 00 00 00       | mov eax, 7
    31 d2                | xor edx, edx
    0f ae a7 00 08 00 00 | xsave [rdi + 0x800]
    b0 00                | mov al, 0
    e6 f4                | out 0xf4, al
"""
THREE: Final = (
    Code.VEX_VPADDD_YMM_YMM_YMMM256, Code.VEX_VPADDD_XMM_XMM_XMMM128,
    Code.VEX_VPXOR_YMM_YMM_YMMM256, Code.VEX_VFMADD231PS_YMM_YMM_YMMM256,
    Code.VEX_VMULPD_YMM_YMM_YMMM256, Code.VEX_VPSHUFB_YMM_YMM_YMMM256,
    Code.VEX_VPMULLD_YMM_YMM_YMMM256,
)  # fmt: skip
TWO: Final = (
    (Code.PADDD_XMM_XMMM128, Register.XMM0, Register.XMM0),
    (Code.VEX_VCVTPH2PS_YMM_XMMM128, Register.YMM0, Register.XMM0),
    (Code.VEX_VPBROADCASTD_YMM_XMMM32, Register.YMM0, Register.XMM0),
    (Code.VEX_VMOVDQU_YMM_YMMM256, Register.YMM0, Register.YMM0),
)
MASKED_LOAD, MASKED_STORE = Code.VEX_VPMASKMOVD_YMM_YMM_M256, Code.VEX_VPMASKMOVD_M256_YMM_YMM


def program(seed: int, *, turns: int = 5, length: int = 60) -> str:
    """A loop of so many instructions, as text of `programs`; the registers are filled first."""
    chance = random.Random(seed)
    first = [
        Instruction.create_reg_mem(Code.VEX_VMOVDQU_YMM_YMMM256, Register.YMM0 + n, _data(32 * n))
        for n in range(16)
    ]
    lines = [_line(one) for one in first]
    body = [_one(chance) for _ in range(length)]
    size = len(p.assemble("".join(body)))
    back = -(size + 8) & 0xFFFF_FFFF  # DEC and JNZ are 8 bytes
    loop = f"ff ce | dec esi\n0f 85 {back.to_bytes(4, 'little').hex(' ')} | jnz\n"
    head = ENABLE.format(turns=turns.to_bytes(4, "little").hex(" "))
    return "\n".join([head, *lines, *body, loop, END])


def load(vm: VM, seed: int, **more: int) -> VM:
    """The program of a seed, and data of that seed, in a VM."""
    vm.memory.write(p.DATA, random.Random(seed).randbytes(0x400) + bytes(0x1000))
    p.start(vm, program(seed, **more))
    return vm


def upper(vm: VM) -> str:
    """What the guest has in its YMM registers now."""
    vm.vcpus[0].leave_guest()
    return b"".join(vm.vcpus[0].guest.ymm(n) for n in range(16)).hex()


def left(vm: VM) -> str:
    """What a program has left of its registers, and its data."""
    return vm.memory.read(p.DATA, LEFT - p.DATA + LEFT_BYTES).hex()


def _data(at: int) -> MemoryOperand:
    return MemoryOperand(Register.RDI, displ=at, displ_size=8)


def _line(instruction: Instruction) -> str:
    encoder = iced.Encoder(64)
    encoder.encode(instruction, 0)
    return f"{encoder.take_buffer().hex(' ')} | {instruction}\n"


def _one(chance: random.Random) -> str:
    one, two, three = (Register.YMM0 + chance.randrange(16) for _ in range(3))
    data = _data(chance.randrange(0x3E0 // 32) * 32)
    kind = chance.randrange(16)
    if kind == 0 and chance.randrange(8) == 0:
        return _line(Instruction.create(Code.VEX_VZEROUPPER))
    if kind in (0, 15):
        return _line(Instruction.create_reg_mem(Code.VEX_VMOVDQU_YMM_YMMM256, one, data))
    if kind == 1:
        return chance.choice([CPUID, XSAVE, XRSTOR])
    if kind == 2:
        return _line(Instruction.create_mem_reg(Code.VEX_VMOVDQU_YMMM256_YMM, data, one))
    if kind == 3:
        return _line(Instruction.create_reg_reg_mem(MASKED_LOAD, one, two, data))
    if kind == 4:
        return _line(Instruction.create_mem_reg_reg(MASKED_STORE, data, one, two))
    if kind in (5, 6, 7):
        code, first, then = chance.choice(TWO)
        return _line(
            Instruction.create_reg_reg(code, first + chance.randrange(16), then + two % 16)
        )
    code = chance.choice(THREE)
    if code is Code.VEX_VPADDD_XMM_XMM_XMMM128:
        one, two, three = (Register.XMM0 + n - Register.YMM0 for n in (one, two, three))
    if kind == 8:
        return _line(Instruction.create_reg_reg_mem(code, one, two, data))
    return _line(Instruction.create_reg_reg_reg(code, one, two, three))
