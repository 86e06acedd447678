"""Random instructions, interpreted and executed by the processor: the same must come of them.

What: short pieces of random code of 16, 32 or 64 bits, with random registers, segments and memory,
run in two VMs; a piece ends where it faults, where it goes astray, or at its end.
Source: none.  Invariant: registers, flags, time, what was retired and all memory are the same.
"""

import random
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import iced_x86 as iced
from iced_x86 import Mnemonic, OpKind, Register

from understudy.arch.cr import CR0, RFLAGS
from understudy.execution.emulate import Emulate
from understudy.vcpu.activity import Activity
from understudy.vm import VM

IDT, HANDLER, CODE, WINDOW, TABLES, GDT = 0x1_0000, 0x1_1000, 0x2_0000, 0x3_0000, 0x9_0000, 0x1_2000
TSS, STACK = 0x1_3000, 0x1_4000
SIZE: Final = 0x1_0000  # of the window, and of everything that is compared
PIECE: Final = 24  # instructions
POINTERS: Final = (3, 4, 5, 6, 7, 8, 9, 10)  # general registers that begin in the window
BASES: Final = frozenset({
    Register.RBX, Register.RSP, Register.RBP, Register.RSI, Register.RDI, Register.R8, Register.R9,
    Register.R10, Register.EBX, Register.ESP, Register.EBP, Register.ESI, Register.EDI,
    Register.RIP, Register.BX, Register.BP, Register.SI, Register.DI,
})  # fmt: skip
LEFT_OUT: Final = frozenset({  # they leave the machine, or say what time it is on the computer
    Mnemonic.HLT, Mnemonic.OUT, Mnemonic.IN, Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD,
    Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD, Mnemonic.MWAIT, Mnemonic.MONITOR,
    Mnemonic.PAUSE, Mnemonic.UD0, Mnemonic.UD1, Mnemonic.UD2,
})  # fmt: skip
PREFIXES: Final = (0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65)
TWO_BYTE: Final = (
    *range(0x40, 0x50), *range(0x80, 0xA0), 0xA3, 0xA4, 0xA5, 0xAB, 0xAC, 0xAD, 0xAF, 0xB0, 0xB1,
    0xB3, 0xB6, 0xB7, 0xB8, 0xBA, 0xBB, 0xBC, 0xBD, 0xBE, 0xBF, 0xC0, 0xC1, 0xC3, 0xC7,
    *range(0xC8, 0xD0), 0x05, 0x31, 0x1F, 0x0D, 0x18, 0xA0, 0xA1, 0xA8, 0xA9, 0xB2, 0xB4, 0xB5,
)  # fmt: skip
REAL, PROTECTED16, FLAT32, SEGMENTED32, LONG = "real", "16", "32", "segmented", "64"
USER32, USER64 = "user 32", "user 64"
MODES: Final = {
    REAL: 16, PROTECTED16: 16, FLAT32: 32, SEGMENTED32: 32, LONG: 64, USER32: 32, USER64: 64,
}  # fmt: skip
IS_LONG: Final = (LONG, USER64)
IS_USER: Final = (USER32, USER64)


def instruction(rng: random.Random, bits: int) -> bytes:
    """One that has a meaning, and whose memory is near the window if it is anywhere."""
    while True:
        out = bytearray()
        while rng.random() < 0.25:
            out.append(rng.choice(PREFIXES))
        if bits == 64 and rng.random() < 0.5:
            out.append(rng.randrange(0x40, 0x50))
        if rng.random() < 0.4:
            out += bytes((0x0F, rng.choice(TWO_BYTE)))
            if rng.random() < 0.05:
                out[-1:] = bytes((0x38, rng.choice((0xF0, 0xF1))))
        else:
            out.append(rng.randrange(256))
        out += rng.randbytes(12)
        found = iced.Decoder(bits, bytes(out[:15]), ip=0).decode()
        if _is_fit(found, rng):
            return bytes(out[: found.len])


def _is_fit(found: iced.Instruction, rng: random.Random) -> bool:
    if found.mnemonic in LEFT_OUT or found.mnemonic == Mnemonic.INVALID:
        return False
    if found.flow_control != iced.FlowControl.NEXT and rng.random() < 0.7:
        return False
    if OpKind.MEMORY not in (found.op_kind(n) for n in range(found.op_count)):
        return True
    if found.memory_index and rng.random() < 0.8:
        return False
    far = found.memory_displacement + 0x400 & (1 << 64) - 1 > 0x800
    return found.memory_base in BASES and (not far or rng.random() < 0.1)


@dataclass
class Piece:
    """A piece of code and the state that it begins with."""

    mode: str
    code: bytes
    registers: dict[str, int]
    window: bytes

    @classmethod
    def random(cls, rng: random.Random, mode: str) -> "Piece":
        code = b"".join(instruction(rng, MODES[mode]) for _ in range(PIECE))
        registers = state(rng, mode)
        return cls(mode, code, registers, rng.randbytes(SIZE))

    def load(self, vm: VM) -> None:
        """Let the VM begin with it."""
        vm.memory.write(CODE, self.code + b"\x0f\x0b" * 256)
        vm.memory.write(WINDOW, self.window)
        vcpu = vm.vcpus[0]
        vcpu.guest.end_shadow()
        vcpu.guest.unblock_nmis()
        vcpu.events.state = type(vcpu.events.state)()
        vcpu.state.activity = Activity.ACTIVE  # or a HLT before would go on
        vcpu.guest.set_registers(self.registers)


NAMES: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")


def _number(rng: random.Random, bits: int) -> int:
    kind = rng.random()
    if kind < 0.3:
        return rng.randrange(64)
    if kind < 0.5:
        return (1 << bits) - 1 - rng.randrange(64)
    return rng.getrandbits(bits)


def state(rng: random.Random, mode: str) -> dict[str, int]:
    """Random registers, and what the mode needs."""
    wide = MODES[mode] if mode in IS_LONG else 32
    base = 0 if mode in (REAL, PROTECTED16, SEGMENTED32) else WINDOW
    values = {}
    for n in range(16 if mode in IS_LONG else 8):
        name = NAMES[n] if n < 8 else f"r{n}"
        near = base + 0x8000 + rng.randrange(-0x2000, 0x2000)
        values[name] = near if n in POINTERS else _number(rng, wide)
    if rng.random() < 0.9:
        values["rcx"] = rng.randrange(40)  # of repetitions, too
    status = rng.getrandbits(12) & 0x8D5 | 2 | (rng.random() < 0.1) << 10
    segments: dict[str, int] = {}
    if mode == REAL:
        for name in ("es", "ss", "ds", "fs", "gs"):
            segments[name] = WINDOW >> 4
        segments |= {"cs": CODE >> 4, "cr0": 0x10, "rip": 0, "idtr_base": 0, "idtr_limit": 0x3FF}
        return values | segments | {"rflags": status}
    segments = {
        "idtr_base": IDT, "idtr_limit": 0xFFF if mode in IS_LONG else 0x7FF, "gdtr_base": GDT,
        "gdtr_limit": 0x37, "rip": CODE, "cr0": 0x11, "rflags": status,
    }  # fmt: skip
    if mode in IS_USER:
        segments |= {"cs": 0x1B, "cs_attr": 0xA0FB if mode == USER64 else 0xC0FB, "ss": 0x23}
        segments |= {f"{name}_attr": 0xC0F3 for name in ("es", "ss", "ds", "fs", "gs")}
        segments |= {"tr": 0x28, "tr_base": TSS, "tr_limit": 0x67, "tr_attr": 0x8B}
    if mode in IS_LONG:
        segments |= {"cr0": 0x8001_0011, "cr3": TABLES, "cr4": 0x20, "efer": 0x501}
        segments |= {"fs_base": WINDOW, "gs_base": WINDOW, "kernel_gs_base": WINDOW + 0x100}
        segments |= {"star": 0x0010_0008 << 32, "lstar": HANDLER + 16, "fmask": 0x700}
    elif mode in (FLAT32, SEGMENTED32, USER32):
        segments |= {"cr0": 0x8001_0011, "cr3": TABLES}
    if mode in (SEGMENTED32, PROTECTED16):
        for name in ("es", "ss", "ds", "fs", "gs"):
            segments |= {f"{name}_base": WINDOW, f"{name}_limit": 0xFFFF}
        big = 0x4000 if mode == SEGMENTED32 else 0
        segments |= {"ds_attr": 0x93 | big, "ss_attr": 0x93 | big, "gs_attr": 0x91 | big}
        segments |= {"es_attr": 0x97 | big, "es_limit": 0x3FFF}  # expands down
    if mode == PROTECTED16:
        segments |= {"cs_attr": 0x9B, "cs_base": CODE, "cs_limit": 0xFFFF, "rip": 0}
    if mode in IS_USER and rng.random() < 0.2:  # accesses must be aligned
        segments |= {"cr0": segments["cr0"] | CR0.AM.mask, "rflags": status | RFLAGS.AC.mask}
    return values | segments


def _entry(page: int) -> int:
    """Code is not written: where in a repeated store it would be noticed is nobody's promise."""
    return page << 12 | 4 | (1 if CODE >> 12 <= page < WINDOW >> 12 else 3)


def _gate(vector: int, mode: str) -> bytes:
    """Exceptions end the piece; from the interrupts, which a program may raise, it comes back."""
    is_back = vector >= 0x20
    at, rights = HANDLER + 8 * is_back, 0xEE if is_back else 0x8E
    gate = struct.pack("<HHBBH", at & 0xFFFF, 8, 0, rights, at >> 16)
    return gate + bytes(8) if mode in IS_LONG else gate


def tables(vm: VM, mode: str) -> None:
    """Gates that lead to the end or back, a GDT, a TSS, and page tables of half a MByte of RAM."""
    vm.memory.write(0, bytes(CODE))
    vm.memory.write(CODE, bytes(WINDOW - CODE))
    vm.memory.write(HANDLER, b"\xe6\xf4")  # out 0xf4, al
    vm.memory.write(HANDLER + 8, b"\x48\xcf" if mode in IS_LONG else b"\xcf")  # iret
    vm.memory.write(HANDLER + 16, b"\x48\x0f\x07")  # sysretq
    code = 0x00AF_9B00_0000_FFFF if mode in IS_LONG else 0x00CF_9B00_0000_FFFF
    data = 0x00CF_9300_0000_FFFF
    user = [one | 3 << 45 for one in (code, data)]
    vm.memory.write(GDT, struct.pack("<7Q", 0, code, data, *user, 0, 0))
    stack = struct.pack("<II", STACK, 0x10) if mode == USER32 else struct.pack("<Q", STACK)
    vm.memory.write(TSS, (bytes(4) + stack).ljust(0x68, b"\0"))
    if mode == REAL:
        gates = [struct.pack("<HH", HANDLER + 8 * (n >= 0x20) & 0xF, HANDLER >> 4)
                 for n in range(256)]  # fmt: skip
        vm.memory.write(0, b"".join(gates))
        return
    if mode in (FLAT32, SEGMENTED32, USER32):
        vm.memory.write(TABLES, struct.pack("<I", TABLES + 0x1007))
        entries = struct.pack("<128I", *map(_entry, range(128)))
        vm.memory.write(TABLES + 0x1000, entries)
    if mode in IS_LONG:
        vm.memory.write(TABLES, struct.pack("<Q", TABLES + 0x1007))
        vm.memory.write(TABLES + 0x1000, struct.pack("<Q", TABLES + 0x2007))
        vm.memory.write(TABLES + 0x2000, struct.pack("<Q", TABLES + 0x3007))
        entries = struct.pack("<128Q", *map(_entry, range(128)))
        vm.memory.write(TABLES + 0x3000, entries)
    vm.memory.write(IDT, b"".join(_gate(n, mode) for n in range(256)))


class Twins:
    """The same machine, interpreted and executed."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.vms = [VM("4M", execution=name, engine="reference") for name in ("emulate", "vmx")]
        for vm in self.vms:
            tables(vm, mode)
        guest = self.vms[0].vcpus[0].guest
        assert isinstance(guest, Emulate)
        self.guest = guest
        self.steps: Counter[str] = Counter()

    def seen(self, vm: VM, before: tuple[int, int]) -> dict[str, Any]:
        processor = vm.processors[0]
        out: dict[str, Any] = dict(vm.vcpus[0].registers())
        out |= {"retired": vm.instructions - before[0], "tsc": processor.tsc - before[1]}
        return out | {"memory": vm.memory.read(CODE, 0x2_0000), "low": vm.memory.read(0, CODE)}

    def run(self, piece: Piece, budget: int) -> dict[str, tuple[Any, Any]]:
        """What differs after so many instructions, or where the piece ends."""
        seen = []
        for vm in self.vms:
            tables(vm, self.mode)
            piece.load(vm)
            before = vm.instructions, vm.processors[0].tsc
            own = vm.vcpus[0].state
            kind = vm.go(budget=budget, until=lambda own=own: own.activity is Activity.HLT).kind
            seen.append(self.seen(vm, before) | {"kind": kind})
        one, other = seen
        return {name: (one[name], other[name]) for name in one if one[name] != other[name]}

    def check(self, piece: Piece) -> str:
        """In words the first instruction that differs; nothing if none does."""
        if not self.run(piece, PIECE):
            return ""
        for n in range(1, PIECE + 1):
            if differs := self.run(piece, n):
                return (
                    f"{self.mode}, after {n}: {_words(piece)}\n{_text(differs)}\n{piece.registers}"
                )
        return f"{self.mode}: differs only as a whole: {_words(piece)}"

    def close(self) -> None:
        for vm in self.vms:
            vm.close()


def _words(piece: Piece) -> str:
    decoder = iced.Decoder(MODES[piece.mode], piece.code, ip=CODE)
    formatter = iced.Formatter(iced.FormatterSyntax.NASM)
    return "; ".join(f"{formatter.format(one)}" for one in decoder)


def _text(differs: dict[str, tuple[Any, Any]]) -> str:
    lines = []
    for name, (one, other) in differs.items():
        if isinstance(one, bytes):
            at = next(n for n in range(len(one)) if one[n] != other[n])
            one, other = f"{at:#x}: {one[at : at + 8].hex()}", other[at : at + 8].hex()
        lines.append(f"  {name}: interpreted {_hex(one)}, executed {_hex(other)}")
    return "\n".join(lines)


def _hex(value: Any) -> str:
    return hex(value) if isinstance(value, int) else str(value)


def fuzz(mode: str, pieces: int, seed: int) -> tuple[int, Counter[str]]:
    """Compare so many pieces; how many instructions were interpreted, and what was handed over."""
    rng, twins = random.Random(f"{mode} {seed}"), Twins(mode)
    try:
        for _ in range(pieces):
            difference = twins.check(Piece.random(rng, mode))
            assert not difference, difference
        return twins.guest.interpreted, twins.guest.handed_over
    finally:
        twins.close()
