"""A vCPU's state in words, for whoever has to find out why a guest ended.

Source: the registers by the SDM's names, bits decoded, the code at RIP disassembled, the top of
the stack.  Invariant: describing changes nothing and never raises for what a guest has done.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import iced_x86 as iced

from understudy.arch.cr import CR0, CR4, RFLAGS
from understudy.arch.msr import EFER
from understudy.guest import Guest
from understudy.machine.frames import OutOfFrames
from understudy.paging.guest_walk import GuestFault, PhysicalMemory, Translation
from understudy.vcpu.loop import Vcpu

GENERAL = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip",
)  # fmt: skip
AVX = 1 << 2  # of XCR0


def describe(
    regs: Mapping[str, int], memory: PhysicalMemory, exits: Mapping[str, int], retired: int,
    unclaimed: Counter[tuple[str, int]], unknown_msrs: Counter[int], ymm: Sequence[bytes] = (),
) -> str:  # fmt: skip
    """Registers by name, control bits, segments, code and stack, and what went astray.

    exits, retired: what the virtual processor has counted.  unclaimed: accesses by (kind, address)
    that no device answered.  ymm: the YMM registers, if there are any; zeros are left out.
    """
    lines = [
        "  ".join(f"{name:>3}={regs[name]:016x}" for name in GENERAL[i : i + 4])
        for i in range(0, len(GENERAL), 4)
    ]
    lines.append(f"rflags={RFLAGS(regs['rflags'])!r}")
    lines.append(f"cr0={CR0(regs['cr0'])!r}  cr3={regs['cr3']:#x}")
    lines.append(f"cr4={CR4(regs['cr4'])!r}  efer={EFER(regs['efer'])!r}")
    lines += [
        f"{name:>4}={regs[name]:04x} base={regs[f'{name}_base']:016x} "
        f"limit={regs[f'{name}_limit']:08x} attr={regs[f'{name}_attr']:05x}"
        for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldtr")
    ]
    lines.append(
        f"gdtr={regs['gdtr_base']:#x}+{regs['gdtr_limit']:#x} "
        f"idtr={regs['idtr_base']:#x}+{regs['idtr_limit']:#x}"
    )
    values = [int.from_bytes(register, "little") for register in ymm]
    lines += [f"ymm{number}={value:064x}" for number, value in enumerate(values) if value]
    lines += _code(regs, memory) + _stack(regs, memory)
    lines.append(f"exits={exits}  retired={retired}")
    if stray := unclaimed.most_common(5):
        said = ", ".join(f"{kind} {where:#x}: {n}" for (kind, where), n in stray)
        lines.append(f"accesses that no device answered: {said}")
    if stray_msrs := unknown_msrs.most_common(5):
        lines.append("unknown MSRs: " + ", ".join(f"{m:#x}: {n}" for m, n in stray_msrs))
    return "\n".join("  " + line for line in lines)


def in_words(
    vcpus: Sequence[Vcpu], memory: PhysicalMemory, unclaimed: Counter[tuple[str, int]]
) -> str:
    """All virtual processors, one after the other."""
    return "\n".join(
        describe(
            vcpu.guest.registers(), vcpu.view.tables_memory(memory),
            vcpu.counts.named_exits(), vcpu.guest.retired, unclaimed, vcpu.msrs.state.unknown,
            ymm_of(vcpu.guest),
        )
        for vcpu in vcpus
    )  # fmt: skip


def ymm_of(guest: Guest) -> list[bytes]:
    """The YMM registers of a guest that has enabled them."""
    return [guest.ymm(number) for number in range(16)] if guest.xcr0 & AVX else []


def translation_of(regs: Mapping[str, int]) -> Translation:
    """How linear addresses translate under these registers, for a supervisor."""
    return Translation(regs["cr0"], regs["cr3"], regs["cr4"], regs["efer"])


def linear_bytes(memory: PhysicalMemory, regs: Mapping[str, int], gva: int, length: int) -> bytes:
    """As many of the bytes as can be read."""
    translation, out = translation_of(regs), b""
    while len(out) < length:
        part = min(length - len(out), 0x1000 - (gva & 0xFFF))
        try:
            gpa = translation.gpa(memory, gva, mark=False)
            out += memory.read(gpa, part)
        except (GuestFault, IndexError, OutOfFrames):  # the last: it is swapped out, and stays
            break
        gva += part
    return out


def _code(regs: Mapping[str, int], memory: PhysicalMemory) -> list[str]:
    code = linear_bytes(memory, regs, regs["cs_base"] + regs["rip"], 32)
    if not code:
        return ["code: the bytes at rip are not mapped to RAM"]
    bits = 64 if regs["cs_attr"] & 0x2000 else 32 if regs["cs_attr"] & 0x4000 else 16
    decoder = iced.Decoder(bits, code, ip=regs["rip"])
    formatter = iced.Formatter(iced.FormatterSyntax.NASM)
    lines = []
    for _, instruction in zip(range(4), decoder, strict=False):
        lines.append(f"{instruction.ip:#018x}  {formatter.format(instruction)}")
    return lines


def _stack(regs: Mapping[str, int], memory: PhysicalMemory) -> list[str]:
    raw = linear_bytes(memory, regs, regs["ss_base"] + regs["rsp"], 64)
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw) & ~7, 8)]
    if not words:
        return ["stack: the bytes at rsp are not mapped to RAM"]
    return ["stack: " + " ".join(f"{word:016x}" for word in words)]
