"""Two guests that differ in one thing: what lies behind two pages is a device, or RAM.

What: runs one instruction with its operands anywhere around those pages, and tells all that it has
done: registers, x87 and SSE state, memory, the device's bytes, and the exception if there was one.
Source: none.  Invariant: the device is plain memory that is reached over the bus; so whatever
carries the instruction out, what the RAM guest does is right.
"""

import random
from dataclasses import dataclass, field
from typing import Any

from understudy.arch.cr import CR0, CR4
from understudy.guests.entry import CODE_32, CODE_64, Entry, long_mode, protected_mode, write_gdt
from understudy.lab.bare import LAYOUTS, Tables
from understudy.machine.bus import Region, Space
from understudy.vm import VM

WINDOW = 0x4000_0000  # RAM, device, device, RAM, nothing
DEVICE = 0xD000_0000
CODE, IDT, HANDLERS, STACK = 0x8000, 0x1_4000, 0x1_6000, 0x1_8000
RAM = (0x5_0000, 0x5_1000)
PAGE = 0x1000
SIZE = 0x2000  # of the device
OUT = b"\xe6\xf4"
IGNORED = frozenset({"tsc"})
GPRS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
CODE_16 = 0x009B
CR0_FLAGS = int(CR0(PG=1, NE=1, ET=1, MP=1, PE=1))
CR4_FLAGS = int(CR4(OSFXSR=1, OSXMMEXCPT=1))


@dataclass
class Case:
    """One instruction and what it finds."""

    code: bytes
    registers: dict[str, int]
    memory: bytes  # of the four pages
    fx: bytes
    device_bytes: bytearray = field(default_factory=bytearray)


class Machine:
    """A guest of 16, 32 or 64-bit code."""

    def __init__(self, paging: str, bits: int, *, is_device: bool) -> None:
        self.bits, self.is_device = bits, is_device
        self.vm = VM("16M", paging=paging)
        memory, self.device = self.vm.memory, bytearray(SIZE)
        self.log: list[tuple[str, int, int]] = []
        if is_device:
            self.vm.bus.claim(Region(Space.MMIO, DEVICE, SIZE, self))
        else:
            for n in range(SIZE // PAGE):
                pfn = self.vm.host.frame() >> 12
                memory.p2m.map((DEVICE >> 12) + n, pfn, 1)
        self.tables = Tables(memory, "intel64" if bits == 64 else "ia32")
        places = (RAM[0], DEVICE, DEVICE + PAGE, RAM[1])
        for n, gpa in enumerate(places):
            self.tables.map(WINDOW + n * PAGE, gpa)
        self.places = places
        write_gdt(memory, CODE_64 if bits == 64 else CODE_32)
        memory.write(HANDLERS, OUT.ljust(16, b"\x90") * 256)
        memory.write(IDT, b"".join(self._gate(HANDLERS + 16 * n) for n in range(256)))

    def _gate(self, at: int) -> bytes:
        low = at & 0xFFFF | 0x10 << 16 | 0x8E00 << 32 | at >> 16 << 48
        return low.to_bytes(16 if self.bits == 64 else 8, "little")

    def read(self, region: int, offset: int, size: int) -> int:
        """The device is read."""
        self.log.append(("read", offset, size))
        return int.from_bytes(self.device[offset : offset + size], "little")

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        """The device is written."""
        self.log.append(("write", offset, size))
        self.device[offset : offset + size] = value.to_bytes(size, "little")

    def _entry(self, case: Case) -> Entry:
        cr4 = CR4_FLAGS | LAYOUTS[self.tables.format].cr4
        if self.bits == 64:
            start = long_mode(self.vm.memory, "bare", CODE).registers
        else:
            start = protected_mode("bare", CODE).registers
        start |= {"cr0": CR0_FLAGS, "cr3": self.tables.root, "cr4": cr4, "cr2": 0}
        start |= {"idtr_base": IDT, "idtr_limit": 0xFFF, "gdtr_base": 0x1000}
        if self.bits == 16:
            start |= {"cs_attr": CODE_16, "cs_limit": 0xFFFF}
            start |= {"ds_base": WINDOW, "es_base": WINDOW}
        return Entry(start | {"rsp": STACK} | case.registers, "bare")

    def run(self, case: Case) -> dict[str, Any]:
        """Everything that the instruction has done."""
        memory = self.vm.memory
        for n, gpa in enumerate(self.places):
            data = case.memory[n * PAGE : (n + 1) * PAGE]
            if self.is_device and n in (1, 2):
                self.device[(n - 1) * PAGE : n * PAGE] = data
            else:
                memory.write(gpa, data)
        memory.write(STACK - 0x800, bytes(range(256)) * 16)
        memory.write(0x1000, bytes(0x200))
        write_gdt(memory, CODE_64 if self.bits == 64 else CODE_32)
        memory.write(CODE, (case.code + OUT).ljust(64, b"\xf4"))
        self.log.clear()
        self.vm.enter(self._entry(case))
        self.vm.processors[0].fxrstor(case.fx)
        stop = self.vm.go(budget=40)
        registers = self.vm.vcpus[0].guest.registers()
        registers["cr2"] = self.vm.processors[0].registers()["cr2"]
        after = b"".join(
            bytes(self.device[(n - 1) * PAGE : n * PAGE])
            if self.is_device and n in (1, 2) else memory.read(gpa, PAGE)
            for n, gpa in enumerate(self.places)
        )  # fmt: skip
        return {
            "stop": (stop.kind, stop.status, stop.detail[:80] if stop.kind == "error" else ""),
            "registers": {k: v for k, v in registers.items() if k not in IGNORED},
            "fx": self.vm.processors[0].fxsave(), "memory": after,
            "stack": memory.read(STACK - 0x800, PAGE), "gdt": memory.read(0x1000, 0x200),
        }  # fmt: skip


def difference(left: dict[str, Any], right: dict[str, Any]) -> str:
    """In words; empty if there is none."""
    words = []
    for name, value in left.items():
        other = right[name]
        if value == other:
            continue
        if name == "registers":
            words += [f"{k} {v:#x} != {other[k]:#x}" for k, v in value.items() if v != other[k]]
        elif isinstance(value, bytes):
            at = [n for n in range(len(value)) if value[n] != other[n]]
            words.append(f"{name} at {[hex(n) for n in at[:6]]} ({len(at)} bytes): "
                         f"{bytes(value[n] for n in at[:6]).hex()} != "
                         f"{bytes(other[n] for n in at[:6]).hex()}")  # fmt: skip
        else:
            words.append(f"{name} {value} != {other}")
    return "; ".join(words)


def random_fx(rng: random.Random) -> bytes:
    """An x87 and SSE state that FXRSTOR takes, exceptions masked."""
    image = bytearray(512)
    image[0:2] = (0x37F).to_bytes(2, "little")
    image[4] = rng.randrange(256)
    image[24:28] = (0x1F80).to_bytes(4, "little")
    for n in range(8):
        image[32 + 16 * n : 42 + 16 * n] = rng.randbytes(8) + bytes([rng.randrange(256), 0x3F])
    image[160:416] = rng.randbytes(256)
    return bytes(image)


def case_of(code: bytes, bits: int, rng: random.Random, *, offset: int | None = None) -> Case:
    """Registers such that [RBX] (16-bit code: [BX]), strings and XLAT come near the device."""
    base = 0 if bits == 16 else WINDOW
    near = rng.choice((PAGE, 2 * PAGE, 3 * PAGE)) - rng.randrange(20)
    inside = PAGE + rng.randrange(0, SIZE - 600) & ~15
    at = base + (offset if offset is not None else rng.choice((near, inside, inside, inside)))
    mask = 0xFFFF_FFFF_FFFF_FFFF if bits == 64 else 0xFFFF_FFFF
    registers = {name: rng.getrandbits(64) & mask for name in GPRS}
    registers |= {f"r{n}": rng.getrandbits(64) for n in range(8, 16)} if bits == 64 else {}
    registers["rsp"] = STACK
    if rng.random() < 0.5:
        registers["rax"] = rng.choice((0, 1, rng.randrange(256)))
    registers["rcx"] = rng.choice((rng.randrange(8), registers["rcx"]))
    registers["rbx"] = at
    registers["rsi"] = base + PAGE + rng.randrange(-40, SIZE + 40)
    registers["rdi"] = base + rng.choice((PAGE, 2 * PAGE, 3 * PAGE)) + rng.randrange(-40, 40)
    registers["rflags"] = 2 | rng.getrandbits(12) & 0xCD5
    return Case(code, registers, rng.randbytes(4 * PAGE), random_fx(rng))
