"""The same instruction on a bare processor, where it does not exit, and in a guest, where it does.

What: a program of one instruction, perhaps behind one that casts an interrupt shadow, at an edge of
canonical space; run until it halts, in a handler or behind the instruction.
Source: none.  Invariant: memory, tables and registers are the same on both; where an instruction
reaches a device, the bare one has another of the same length that does the same without.
"""

import struct
from dataclasses import dataclass, field
from typing import Any, Final

from understudy.guests.entry import Entry, long_mode
from understudy.machine.bus import Region, Space
from understudy.silicon import Memory, Processor
from understudy.verdict import StopKind
from understudy.vm import VM

PAGE: Final = 0x1000
GDT, TABLES, IDT, HANDLERS, DATA, DEVICE_RAM = 0x1000, 0x2_0000, 0x1_4000, 0x1_6000, 0x9000, 0xA000
STACK: Final = 0x1_9000
CODE: Final = 0xB000  # of the first edge; one page each
CR3: Final = TABLES
DEVICE: Final = 0xD000_0000
WINDOW: Final = 0x4000_0000
EDGES: Final = (0, 0x8000_0000_0000, 0xFFFF_8000_0000_0000, 1 << 64)
"""The first address of each half, and the one behind its last."""
SHADOWS: Final = {"": b"", "STI": b"\xfb", "MOV SS": b"\x8e\xd5"}  # mov ss, bp
TF, RF, MASK = 1 << 8, 1 << 16, (1 << 64) - 1
HALT: Final = 0x10002
SELECTOR: Final = 0x18
GDT_ENTRIES: Final = (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
SEEN: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r15", "rip", "rflags",
               "cr0", "cr3", "cr4", "ss", "cs", "debugctl", "dr7")  # fmt: skip
LIVE: Final = ("cr2", "dr6")


@dataclass(frozen=True)
class Instruction:
    """`alike`: what does the same on the bare processor, if that is another."""

    name: str
    code: str
    registers: dict[str, int] = field(default_factory=dict)
    alike: str = ""


@dataclass(frozen=True)
class Case:
    """One instruction in one situation."""

    instruction: Instruction
    edge: int
    shadow: str
    flags: int
    nmi: bool

    @property
    def name(self) -> str:
        words = [self.instruction.name, f"edge {self.edge:#x}", self.shadow]
        words += [word for word, on in (("TF", self.flags & TF), ("RF", self.flags & RF),
                                        ("NMI", self.nmi)) if on]  # fmt: skip
        return ", ".join(word for word in words if word)

    def placed(self, *, is_bare: bool) -> tuple[int, int, bytes]:
        """Where the program begins, where the instruction does, and the program."""
        before, what = SHADOWS[self.shadow], self.instruction
        code = bytes.fromhex(what.alike if is_bare and what.alike else what.code)
        is_end = self.edge in (EDGES[1], EDGES[3])
        at = self.edge - len(code) if is_end else self.edge
        if self.edge == EDGES[2]:
            at += len(before)  # nothing can come before
        return at - len(before) & MASK, at & MASK, before + code + b"\xf4"


def _image() -> dict[int, bytes]:
    """Memory but for the program, by address."""
    gates = b""
    for n in range(256):
        at = HANDLERS + 16 * n
        gates += struct.pack("<HHBBHII", at & 0xFFFF, 0x10, 0, 0x8E, at >> 16, 0, 0)
    halt = b"\xf4\xeb\xfd".ljust(16, b"\x90")  # hlt; jmp back
    handlers = bytearray(halt * 256)
    handlers[32:37] = b"\x49\xff\xc7\x48\xcf"  # NMI: inc r15; iretq
    image = {GDT: struct.pack("<4Q", *GDT_ENTRIES), IDT: gates, HANDLERS: bytes(handlers)}
    image |= {DATA: b"\xff" * 64, STACK - 0x200: bytes(0x200), DEVICE_RAM: bytes(range(64))}
    return image


def _tables(device: int) -> bytes:
    """4-KByte pages: the first 2 MBytes as they are but page 0; the edges; the device."""
    pages = {at: at for at in range(PAGE, 0x20_0000, PAGE)} | {WINDOW: device}
    for n, edge in enumerate(EDGES):
        first = edge - PAGE if edge in (EDGES[1], EDGES[3]) else edge
        pages[first] = CODE + n * PAGE
    tables: list[list[int]] = [[0] * 512]
    for gva, gpa in pages.items():
        table = tables[0]
        for shift in (39, 30, 21):
            n = gva >> shift & 511
            if not table[n]:
                table[n] = TABLES + len(tables) * PAGE | 0x63
                tables.append([0] * 512)
            table = tables[(table[n] - TABLES) >> 12]
        table[gva >> 12 & 511] = gpa | 0x63
    return b"".join(struct.pack("<512Q", *table) for table in tables)


def _code_gpa(gva: int) -> int:
    """Of a place in the page at an edge."""
    page = gva & -PAGE & MASK
    first = [(e - PAGE if e in (EDGES[1], EDGES[3]) else e) & MASK for e in EDGES]
    return CODE + first.index(page) * PAGE + (gva & PAGE - 1)


class Machine:
    """`write` and `read` are of guest-physical memory."""

    memory: Any
    device = DEVICE_RAM

    def prepare(self, case: Case, *, is_bare: bool) -> dict[str, int]:
        """Fill memory; returns the registers to begin with."""
        write = self.memory.write
        for at, data in _image().items():
            write(at, data)
        write(TABLES, _tables(self.device))
        start, at, program = case.placed(is_bare=is_bare)
        for n in range(4):
            write(CODE + n * PAGE, b"\xf4" * PAGE)
        for n, byte in enumerate(program[:-1]):
            write(_code_gpa(start + n & MASK), bytes([byte]))
        registers = dict.fromkeys(("rax", "rcx", "rdx", "rbx", "r15"), 0)
        registers |= {"rbp": SELECTOR, "rsp": STACK, "rsi": DATA, "rdi": DATA + 32}
        registers |= {"cr0": 0x8001_0033, "cr3": CR3, "cr4": 0x6A0, "cs": 0x10, "ss": SELECTOR}
        registers |= {"gdtr_base": GDT, "gdtr_limit": 0x1F, "idtr_base": IDT, "idtr_limit": 0xFFF}
        registers |= {"rip": start, "rflags": 2 | case.flags, "debugctl": 0, "dr7": 0x400}
        registers |= {"dr0": at, "dr6": 0xFFFF_0FF0, "cr2": 0}
        if case.flags & RF:
            registers["dr7"] |= 2  # a breakpoint on the instruction, which RF passes over
        return registers | case.instruction.registers

    def seen(self, registers: dict[str, int], live: dict[str, int]) -> dict[str, int | bytes]:
        """All that must be the same."""
        out: dict[str, int | bytes] = {name: registers[name] for name in SEEN}
        out |= {name: live[name] for name in LIVE}
        out["stack"] = self.memory.read(STACK - 0x200, 0x200)
        out["data"] = self.memory.read(DATA, 64)
        return out


class Bare(Machine):
    """Nobody is between the program and the processor."""

    def __init__(self, leaves: dict[int, tuple[int, int, int, int]]) -> None:
        self.memory = Memory(4 << 20)
        self.processor = Processor(self.memory, "reference")
        for leaf, words in leaves.items():
            self.processor.set_cpuid(leaf, 0, *words)
        state = long_mode(self.memory, "test", 0).registers
        self.flat = {"efer": 0xD00, "tr": 0, "tr_base": 0, "tr_limit": 0xFFFF, "tr_attr": 0x8B}
        self.flat |= {k: v for k, v in state.items() if k.endswith(("_attr", "_limit"))}
        for name in ("es", "cs", "ss", "ds", "fs", "gs"):
            self.flat[f"{name}_attr"] = 0xA09B if name == "cs" else 0xC093
            self.flat |= {name: SELECTOR, f"{name}_base": 0, f"{name}_limit": 0xFFFF_FFFF}
        self.fresh = self.processor.save()

    def run(self, case: Case) -> dict[str, int | bytes]:
        processor = self.processor
        processor.load(self.fresh)
        registers = self.prepare(case, is_bare=True)
        processor.set_registers(self.flat | registers)
        if case.nmi:
            if case.shadow:
                processor.run(1)
            processor.apic.write(0xF0, 0x1FF, 0)
            processor.apic.write(0x360, 0x400, 0)
            processor.apic.lint(1, True)
        exit = processor.run(200)
        assert exit.reason == HALT, hex(exit.reason)
        now = processor.registers()
        return self.seen(now, now) | {"device": self.memory.read(DEVICE_RAM, 64)}


class Guest(Machine):
    """A VM."""

    device = DEVICE

    def __init__(self, paging: str, engine: str, exits: tuple[str, ...] = ()) -> None:
        self.vm = VM("4M", paging=paging, engine=engine, exits=exits)
        self.vm.bus.port_write(0x43, 1, 0x30)  # a HLT ends when it is stuck, not by the timer
        self.memory = self.vm.memory
        self.vm.bus.claim(Region(Space.MMIO, DEVICE, PAGE, self))
        self.bytes = bytearray(PAGE)

    def read(self, region: int, offset: int, size: int) -> int:
        """The device is read."""
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        """The device is written."""
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")

    def run(self, case: Case) -> dict[str, int | bytes]:
        vm, vcpu = self.vm, self.vm.vcpus[0]
        vcpu.reset()
        registers = self.prepare(case, is_bare=False)
        self.bytes[:64] = bytes(range(64))
        live = {name: registers.pop(name) for name in ("dr0", "dr6", "cr2")}
        base = {"efer": 0xD00, **dict.fromkeys(("ds", "es", "fs", "gs"), SELECTOR)}
        vm.enter(Entry(base | registers, "test"))
        vm.processors[0].set_registers(live)
        if case.nmi:
            if case.shadow:
                vm.go(budget=1)
            vcpu.events.nmi()
            vcpu.look_now()
        stop = vm.go(budget=200)
        assert stop.kind == StopKind.STUCK, str(stop)
        found = self.seen(vcpu.registers(), vm.processors[0].registers())
        return found | {"device": bytes(self.bytes[:64])}
