"""Guest programs of a few instructions, assembled by hand, and how to start them.

Each line of a program is its bytes in hex, a bar, and what it says.  They run in 64-bit mode, at
1 MByte, with the first 4 GBytes mapped to themselves, and end through the debug-exit port.
"""

import struct

from understudy.guests.entry import (
    CODE_64,
    GDT_GPA,
    PAGE_TABLES_GPA,
    Entry,
    long_mode,
    write_gdt,
)
from understudy.vm import VM

CODE, IDT, DATA = 0x10_0000, 0x11_0000, 0x12_0000
HANDLERS = 0x10_8000
LINUX_BASE = 0x40_0000
CODE_SELECTOR = 0x10  # `long_mode`'s
PROGRAM = CODE + 0x100  # at level 3
TO_PROGRAM = """
    6a 33          | push 0x33
    68 00 00 20 00 | push 0x200000
    68 02 02 00 00 | push 0x202
    6a 2b          | push 0x2b
    68 00 01 10 00 | push PROGRAM
    48 cf          | iretq
"""
OF_PROGRAMS = (0x00AF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF)  # at 0x28, 0x30: code, data
PROGRAM_GDT = 0x37  # the limit
USER = 4  # of a paging entry


def assemble(program: str) -> bytes:
    """The bytes left of the bars."""
    return bytes.fromhex("".join(line.partition("|")[0] for line in program.splitlines()))


def start(vm: VM, program: str, **registers: int) -> None:
    """Load a program and make it the next thing that the VM runs."""
    vm.memory.write(CODE, assemble(program))
    write_gdt(vm.memory, CODE_64)
    entry = long_mode(vm.memory, "test", CODE, **registers)
    vm.enter(Entry(entry.registers | {"rsp": 0x20_0000}, "test"))


def start_program(vm: VM, program: str, before: str = "", **registers: int) -> None:
    """The same at level 3, where it reaches the first GByte; `before`: first, at level 0."""
    start(vm, before + TO_PROGRAM, gdtr_limit=PROGRAM_GDT, **registers)
    vm.memory.write(PROGRAM, assemble(program))
    vm.memory.write(GDT_GPA + 0x28, b"".join(n.to_bytes(8, "little") for n in OF_PROGRAMS))
    for table in range(PAGE_TABLES_GPA, PAGE_TABLES_GPA + 0x3000, 0x1000):
        entries = 512 if table == PAGE_TABLES_GPA + 0x2000 else 1
        for at in range(table, table + 8 * entries, 8):
            vm.memory.write(at, bytes((vm.memory.read(at, 1)[0] | USER,)))


def handle(vm: VM, vector: int, program: str) -> dict[str, int]:
    """Put a gate for `vector` into an IDT; returns the IDTR's registers for `start`."""
    at = HANDLERS + vector * 64
    vm.memory.write(at, assemble(program))
    gate = struct.pack(
        "<HHBBHII", at & 0xFFFF, CODE_SELECTOR, 0, 0x8E, at >> 16 & 0xFFFF, at >> 32, 0
    )
    vm.memory.write(IDT + vector * 16, gate)
    return {"idtr_base": IDT, "idtr_limit": 0xFFF}


def executable(code: bytes) -> bytes:
    """An ELF file of one segment, for a Linux to run."""
    entry, size = LINUX_BASE + 64 + 56, 64 + 56 + len(code)
    header = struct.pack(
        "<4s5B7xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 0, 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0,
        0, 0,
    )  # fmt: skip
    return (
        header + struct.pack("<IIQQQQQQ", 1, 5, 0, LINUX_BASE, LINUX_BASE, size, size, 4096) + code
    )


HELLO = """
    66 ba f8 03          | mov dx, 0x3f8
    48 8d 35 0c 00 00 00 | lea rsi, [rel text]
    ac                   | next: lodsb
    84 c0                | test al, al
    74 03                | jz done
    ee                   | out dx, al
    eb f8                | jmp next
    b0 2a                | done: mov al, 42
    e6 f4                | out 0xf4, al
    68 65 6c 6c 6f 0a 00 | text: db `hello\\n`, 0
"""

CPUID_LOOP = """
    41 b8 e8 03 00 00    | mov r8d, 1000
    31 c0                | next: xor eax, eax
    0f a2                | cpuid
    41 ff c8             | dec r8d
    75 f7                | jnz next
    b0 00                | mov al, 0
    e6 f4                | out 0xf4, al
"""

CHECKSUM = """
    31 c0                | xor eax, eax
    b9 a0 86 01 00       | mov ecx, 100000
    bf 00 00 12 00       | mov edi, DATA
    69 c0 0d 66 19 00    | next: imul eax, eax, 1664525
    05 5f f3 6e 3c       | add eax, 1013904223
    89 04 0f             | mov [rdi + rcx], eax
    ff c9                | dec ecx
    75 ee                | jnz next
    e7 f4                | out 0xf4, eax
"""

OUTSB = """
    66 ba f8 03          | mov dx, 0x3f8
    be 00 00 12 00       | mov esi, DATA
    b9 88 13 00 00       | mov ecx, 5000
    f3 6e                | rep outsb
    e6 f4                | out 0xf4, al
"""

IOAPIC_VERSION = """
    bf 00 00 c0 fe       | mov edi, 0xfec00000
    c7 07 01 00 00 00    | mov dword [rdi], 1
    8b 47 10             | mov eax, [rdi + 0x10]
    e7 f4                | out 0xf4, eax
"""

# Counts three interrupts of the APIC timer in TSC-deadline mode, halting in between.
DEADLINES = """
    b9 1b 00 00 00       | mov ecx, IA32_APIC_BASE
    b8 00 0d e0 fe       | mov eax, 0xfee00d00
    31 d2                | xor edx, edx
    0f 30                | wrmsr                  ; x2APIC mode
    b9 0f 08 00 00       | mov ecx, 0x80f         ; spurious vector, software enable
    b8 ff 01 00 00       | mov eax, 0x1ff
    0f 30                | wrmsr
    b9 32 08 00 00       | mov ecx, 0x832         ; LVT timer: TSC-deadline, vector 0x40
    b8 40 00 04 00       | mov eax, 0x40040
    0f 30                | wrmsr
    31 db                | xor ebx, ebx
    0f 31                | arm: rdtsc
    05 40 42 0f 00       | add eax, 1000000
    83 d2 00             | adc edx, 0
    b9 e0 06 00 00       | mov ecx, IA32_TSC_DEADLINE
    0f 30                | wrmsr
    fb                   | sti
    f4                   | hlt
    fa                   | cli
    83 fb 03             | cmp ebx, 3
    75 e7                | jne arm
    89 d8                | mov eax, ebx
    e7 f4                | out 0xf4, eax
"""
DEADLINE_HANDLER = """
    ff c3                | inc ebx
    b9 0b 08 00 00       | mov ecx, 0x80b         ; EOI
    31 c0                | xor eax, eax
    31 d2                | xor edx, edx
    0f 30                | wrmsr
    48 cf                | iretq
"""

# Interrupts of the 8254 through the 8259s, as a PC's firmware leaves them: IRQ 0 is vector 0x20.
PIT = """
    b0 11                | mov al, 0x11
    e6 20                | out 0x20, al
    b0 20                | mov al, 0x20
    e6 21                | out 0x21, al
    b0 04                | mov al, 4
    e6 21                | out 0x21, al
    b0 01                | mov al, 1
    e6 21                | out 0x21, al
    b0 fe                | mov al, 0xfe
    e6 21                | out 0x21, al           ; all masked but IRQ 0
    b0 34                | mov al, 0x34
    e6 43                | out 0x43, al           ; channel 0, mode 2
    b0 00                | mov al, 0
    e6 40                | out 0x40, al
    b0 10                | mov al, 0x10
    e6 40                | out 0x40, al           ; every 4096 ticks
    31 db                | xor ebx, ebx
    fb                   | next: sti
    f4                   | hlt
    83 fb 05             | cmp ebx, 5
    75 f9                | jne next
    89 d8                | mov eax, ebx
    e7 f4                | out 0xf4, eax
"""
PIT_HANDLER = """
    ff c3                | inc ebx
    b0 20                | mov al, 0x20
    e6 20                | out 0x20, al
    48 cf                | iretq
"""

UNKNOWN_MSR = """
    b9 34 12 00 00       | mov ecx, 0x1234
    0f 32                | rdmsr
    b0 01                | mov al, 1
    e6 f4                | out 0xf4, al
"""
GP_HANDLER = """
    58                   | pop rax                ; the error code
    83 c0 0d             | add eax, 13
    e7 f4                | out 0xf4, eax
"""

READ_DATA = """
    a1 00 00 12 00 00 00 00 00 | mov eax, [abs DATA]
    e7 f4                | out 0xf4, eax
"""

# An interpreted instruction right before one that may fault: the engine must tell them apart.
SWAPGS = """
    0f 01 f8             | swapgs
    0f ae e8             | lfence
    f3 0f ae c8          | rdgsbase eax
    e7 f4                | out 0xf4, eax
"""

SPIN = """
    fa                   | cli
    eb fe                | jmp $
"""
CLI_HLT = """
    fa                   | cli
    f4                   | hlt
"""
UD2 = """
    0f 0b                | ud2
"""
NOWHERE = """
    48 b8 00 00 00 80 00 00 00 00 | mov rax, 0x80000000
    ff e0                | jmp rax
"""
