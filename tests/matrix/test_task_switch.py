"""A guest's task switches do what they do on the bare machine.

What: the same programs of 32 bits on a processor without a hypervisor, whose own microcode
switches tasks, and as guests, where each switch exits and the hypervisor carries it out; registers
and the tables in memory are the same at the end.
Source: SDM 3A, "Task Management".
"""

import struct
from typing import Any

import pytest

from tests.matrix.programs import assemble
from understudy.guests.entry import Entry, protected_mode
from understudy.silicon import Memory, Processor
from understudy.verdict import StopKind
from understudy.vm import VM

GDT, IDT, LDT, TSS_A, TSS_B, TSS_16 = 0x1000, 0x2000, 0x2800, 0x3000, 0x3100, 0x3200
CODE_A, CODE_B, CODE_16, HANDLER = 0x1_0000, 0x1_1000, 0x6000, 0x1_2000
STACK_A, STACK_B = 0x2_0000, 0x2_1000
DIRECTORY_A, DIRECTORY_B, PDPT_B, DIRECTORY_PAE = 0x3_0000, 0x3_1000, 0x3_2000, 0x3_3000
TABLES = (GDT, 0x3000)  # address and length: all that a switch may change
MARKER = 0x80_0000  # what lies behind it tells the page directories apart
CODE, DATA, TASK_A, TASK_B, LDT_SELECTOR, TASK_16, ABSENT = range(0x10, 0x48, 8)
IN_LDT = 0x04
PIO, RF = 0x10005, 1 << 16
END = "e6 f4 | out 0xf4, al"
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")


def tss32(ip: int, stack: int, cr3: int = 0, **fields: int) -> bytes:
    segments = {"es": DATA, "cs": CODE, "ss": DATA, "ds": DATA, "fs": 0, "gs": 0}
    segments |= {name: value for name, value in fields.items() if name in segments}
    image = bytearray(0x68)
    struct.pack_into("<II", image, 4, STACK_B - 0x800, DATA)  # for level 0
    struct.pack_into("<III", image, 0x1C, cr3, ip, fields.get("flags", 2))
    registers = (0xA, 0xC, 0xD, 0xB, stack, 0xBB, 0x51, 0xD1)
    struct.pack_into("<8I", image, 0x28, *registers)
    struct.pack_into("<6I", image, 0x48, *segments.values())
    struct.pack_into("<II", image, 0x60, fields.get("ldt", 0), fields.get("trap", 0) | 0x68 << 16)
    return bytes(image)


def tss16(ip: int, stack: int) -> bytes:
    image = bytearray(0x2C)
    struct.pack_into("<HH", image, 0x0E, ip, 2)
    struct.pack_into("<8H", image, 0x12, 0xA, 0xC, 0xD, 0xB, stack, 0xBB, 0x51, 0xD1)
    struct.pack_into("<4H", image, 0x22, DATA, CODE, DATA, DATA)
    return bytes(image)


def descriptor(base: int, limit: int, rights: int) -> int:
    """Rights: bits 7:0 and 15:12 as in the descriptor's upper half."""
    low = limit & 0xFFFF | (base & 0xFF_FFFF) << 16
    return low | ((rights & 0xFF) | (limit >> 16) << 8 | rights & 0xF000 | base >> 24 << 16) << 40


def gate(selector: int, offset: int, kind: int) -> bytes:
    return struct.pack("<HHBBH", offset & 0xFFFF, selector, 0, kind, offset >> 16)


def memory_image(a: str, b: str, task_b: bytes, handler: str) -> dict[int, bytes]:
    """Everything in memory, by address."""
    flat = descriptor(0, 0xFFFFF, 0xC092)
    gdt = [0, 0, descriptor(0, 0xFFFFF, 0xC09A), flat, descriptor(TSS_A, 0x67, 0x8B),
           descriptor(TSS_B, 0x67, 0x89), descriptor(LDT, 0xF, 0x82),
           descriptor(TSS_16, 0x2B, 0x81), descriptor(0, 0xFFFFF, 0xC012)]  # fmt: skip
    idt = bytearray(0x81 * 8)
    for vector in (6, 8, 13, 0x80):
        idt[8 * vector : 8 * vector + 8] = gate(TASK_B, 0, 0xE5)
    for vector in (1, 3, 10, 11, 12):
        idt[8 * vector : 8 * vector + 8] = gate(CODE, HANDLER, 0xEE)
    directory = [i << 22 | 0x87 for i in range(4)]
    other = [*directory[:2], 0x40_0087, directory[3]]
    pae = [i << 21 | 0x87 for i in range(4)] + [0x40_0087]
    return {
        GDT: struct.pack(f"<{len(gdt)}Q", *gdt),
        IDT: bytes(idt),
        LDT: struct.pack("<QQ", 0, descriptor(0x5000, 0xFFF, 0x4092)),
        TSS_A: tss32(0, 0),
        TSS_B: task_b,
        TSS_16: tss16(CODE_16, 0x8000),
        CODE_A: assemble(a),
        CODE_B: assemble(b),
        CODE_16: assemble(b),
        HANDLER: assemble(handler),
        DIRECTORY_A: struct.pack("<4I", *directory),
        DIRECTORY_B: struct.pack("<4I", *other),
        PDPT_B: struct.pack("<4Q", DIRECTORY_PAE | 1, 0, 0, 0),
        DIRECTORY_PAE: struct.pack("<5Q", *pae),
        0x40_0000: b"B's page",
        MARKER: b"A's page",
    }


def registers(paging: str) -> dict[str, int]:
    """The first task's, in flat segments."""
    state = protected_mode("test", CODE_A).registers | {
        "gdtr_base": GDT, "gdtr_limit": 0x47, "idtr_base": IDT, "idtr_limit": 0x407,
        "tr": TASK_A, "tr_base": TSS_A, "tr_limit": 0x67, "tr_attr": 0x8B, "rsp": STACK_A,
        "cs": CODE, "rflags": 0x46, "dr7": 0x4FF, "cr0": 0x31,
    }  # fmt: skip
    state |= dict.fromkeys(("es", "ss", "ds", "fs", "gs"), DATA)
    state |= {"rax": 1, "rcx": 2, "rdx": 3, "rbx": 4, "rbp": 5, "rsi": 6, "rdi": 7}
    if paging == "32-bit":
        state |= {"cr0": 0x8000_0031, "cr3": DIRECTORY_A, "cr4": 0x10}
    if paging == "PAE":
        state |= {"cr0": 0x8000_0031, "cr3": PDPT_B, "cr4": 0x20}
    return state


def seen(found: dict[str, int], memory: bytes) -> dict[str, Any]:
    """What must be the same."""
    names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "rflags", "cr3", "dr7"]
    out: dict[str, Any] = {name: found[name] for name in names}
    for name in SEGMENTS:
        usable = not found[f"{name}_attr"] & 0x1_0000
        parts = ("_base", "_limit", "_attr") if usable else ()
        out |= {name + part: found[name + part] for part in ("", *parts)}
    out["rflags"] &= ~RF  # the bare machine stops in the midst of OUT
    return out | {"ts": found["cr0"] >> 3 & 1, "tables": memory.hex(" ", 8)}


def on_bare_machine(image: dict[int, bytes], state: dict[str, int]) -> dict[str, Any]:
    memory = Memory(16 << 20)
    for at, data in image.items():
        memory.write(at, data)
    processor = Processor(memory, "reference")
    processor.set_registers(state)
    exit = processor.run(1000)
    assert exit.reason == PIO, hex(exit.reason)
    return seen(processor.registers(), memory.read(*TABLES))


def as_guest(
    image: dict[int, bytes], state: dict[str, int], engine: str, paging: str
) -> tuple[dict[str, Any], dict[str, int]]:
    with VM("16M", engine=engine, paging=paging) as vm:
        for at, data in image.items():
            vm.memory.write(at, data)
        vm.enter(Entry(state, "test"))
        stop = vm.go(budget=1000)
        assert stop.kind == StopKind.DEBUG_EXIT, str(stop)
        found = vm.vcpus[0].guest.registers()
        return seen(found, vm.memory.read(*TABLES)), vm.counts()["exits"]


FAR_CALL = "9a 00 00 00 00 28 00 | call 0x28:0"
FAR_JUMP = "ea 00 00 00 00 28 00 | jmp 0x28:0"
IRET = "cf | iret"
LOOK = f"a1 {MARKER.to_bytes(4, 'little').hex(' ')} | mov eax, [MARKER]"
PLAIN = tss32(CODE_B, STACK_B)
NEXT = "83 05 20 30 00 00 02 | add dword [0x3020], 2  ; A goes on behind its instruction"

CASES: dict[str, tuple[str, str, bytes, str, int]] = {
    # name: A's code, B's code, B's TSS, the handler, switches
    "call and return": (
        f"{FAR_CALL}\n bb 07 00 00 00 | mov ebx, 7\n {END}",
        f"b8 34 12 00 00 | mov eax, 0x1234\n {IRET}", PLAIN, "", 2),
    "twice": (
        f"{FAR_CALL}\n {FAR_CALL}\n {END}",
        f"40 | next: inc eax\n {IRET}\n eb fc | jmp next", PLAIN, "", 4),
    "jump": (f"{FAR_JUMP}", END, PLAIN, "", 1),
    "to a task of 16 bits": (
        "ea 00 00 00 00 38 00 | jmp 0x38:0", END, PLAIN, "", 1),
    "int n": (
        f"cd 80 | int 0x80\n {END}", f"b9 09 00 00 00 | mov ecx, 9\n {IRET}", PLAIN, "", 2),
    "an exception": (
        f"0f 0b | ud2\n {END}", f"{NEXT}\n {IRET}", PLAIN, "", 2),
    "an exception with an error code": (
        f"66 b8 50 00 | mov ax, 0x50\n 8e d8 | mov ds, ax\n {END}",
        f"59 | pop ecx\n {NEXT}\n {IRET}", PLAIN, "", 2),
    "to an LDT": (
        f"{FAR_JUMP}", END, tss32(CODE_B, STACK_B, ldt=LDT_SELECTOR, ds=8 | IN_LDT, gs=DATA), "",
        1),
    "with a segment that is not present": (
        f"{FAR_JUMP}", END, tss32(CODE_B, STACK_B, fs=ABSENT), f"59 | pop ecx\n {END}", 1),
    "with a segment beyond the GDT": (
        f"{FAR_JUMP}", END, tss32(CODE_B, STACK_B, gs=0x50), f"59 | pop ecx\n {END}", 1),
    "with a trap": (
        f"{FAR_JUMP}", END, tss32(CODE_B, STACK_B, trap=1), f"59 | pop ecx\n {END}", 1),
    "to virtual-8086 mode, and from there to level 0": (
        f"{FAR_JUMP}", "cc | int3",
        tss32(0x100, 0x1000, flags=0x2_3002, cs=0x1100, ds=0x1234, ss=0x2000), END, 1),
}  # fmt: skip


@pytest.mark.parametrize("technique", ["ept", "vtlb"])
@pytest.mark.parametrize("paging", ["off", "32-bit", "PAE"])
@pytest.mark.parametrize("name", CASES)
def test_as_on_the_bare_machine(name: str, paging: str, technique: str) -> None:
    a, b, task, handler, switches = CASES[name]
    cr3 = {"off": 0, "32-bit": DIRECTORY_B, "PAE": PDPT_B}[paging]
    task = task[:0x1C] + cr3.to_bytes(4, "little") + task[0x20:]
    image = memory_image(a, b, task, handler)
    image[CODE_B + 0x100] = assemble(b)  # where virtual-8086 mode begins
    state = registers(paging)
    # A returns to its own directory.
    image[TSS_A] = image[TSS_A][:0x1C] + state["cr3"].to_bytes(4, "little") + image[TSS_A][0x20:]
    bare = on_bare_machine(image, state)
    for engine in ("reference", "dbt"):
        guest, exits = as_guest(image, state, engine, technique)
        assert guest == bare, engine
        assert exits["TASK_SWITCH"] == switches


@pytest.mark.parametrize("technique", ["ept", "vtlb"])
def test_cr3_is_the_new_tasks(technique: str) -> None:
    """What was translated before is translated anew."""
    task = tss32(CODE_B, STACK_B, DIRECTORY_B)
    image = memory_image(f"{LOOK}\n {FAR_JUMP}", f"{LOOK}\n {END}", task, "")
    bare = on_bare_machine(image, registers("32-bit"))
    guest, _ = as_guest(image, registers("32-bit"), "dbt", technique)
    assert guest == bare
    assert guest["rax"].to_bytes(4, "little") == b"B's "


def test_a_task_that_cannot_be_saved_faults_in_the_old_one() -> None:
    """The old TSS lies in a page that is not mapped: #PF, and there is no gate for it."""
    image = memory_image(FAR_JUMP, END, PLAIN, "")
    state = registers("32-bit") | {"tr_base": 0x4000_0000}
    with VM("16M") as vm:
        for at, data in image.items():
            vm.memory.write(at, data)
        vm.enter(Entry(state, "test"))
        assert vm.go(budget=1000).kind == StopKind.TRIPLE_FAULT
        assert vm.processors[0].registers()["cr2"] & ~0xFF == 0x4000_0000


def test_a_tss_where_there_is_no_ram_ends_the_guest_with_its_state() -> None:
    image = memory_image(FAR_JUMP, END, PLAIN, "")
    gdt = bytearray(image[GDT])
    gdt[TASK_B : TASK_B + 8] = struct.pack("<Q", descriptor(0x800_0000, 0x67, 0x89))
    image[GDT] = bytes(gdt)
    with VM("16M") as vm:
        for at, data in image.items():
            vm.memory.write(at, data)
        vm.enter(Entry(registers("off"), "test"))
        stop = vm.go(budget=1000)
        assert stop.kind == StopKind.ERROR and "a task switch: gpa 0x8000000" in stop.detail
