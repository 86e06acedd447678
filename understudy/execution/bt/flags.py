"""Sequences for instructions on flags and time: POPF, IRET inside level 0, RDTSC and RDTSCP.

What they need of the flags themselves they do on a stack of the window's data, so that nothing is
pushed onto the guest's that the guest does not push.

IRET is carried out here if it returns to level 0 with the selectors that are loaded, and if their
descriptors, which it loads again, are what was loaded; to code that is translated.  POPF and IRET
if they change neither IOPL nor TF, NT and RF.  All else traps.

RDTSC executes, and what was executed beyond the guest's instructions is taken from what it reads:
so time is the guest's to the instruction.

Source: SDM 2, "POPF/POPFD/POPFQ", "IRET/IRETD/IRETQ", "RDTSC", "RDTSCP".
"""

from typing import Final

from understudy.arch.cr import RFLAGS
from understudy.execution.bt.layout import (
    CS_AT,
    EXTRA,
    FIRST,
    IOPL,
    MINUS_CODE,
    MINUS_CS,
    MINUS_SS,
    MINUS_STACK,
    NEW_FLAGS,
    NEW_IF,
    OFF,
    OPENING,
    OWN_FLAGS,
    SECOND,
    SS_AT,
    STACK,
    TARGET,
)
from understudy.execution.bt.sequences import AX, CX, LEA, LOAD, SP, STORE, Code

PUSHF, POPF = b"\x9c", b"\x9d"
OTHERS: Final = int(RFLAGS(TF=1, NT=1, RF=1, VM=1, VIF=1, VIP=1)) | 3 << 12
"""Flags that must not change here; IOPL must be what it is."""
RDTSC: Final = b"\x0f\x31"
RDTSCP: Final = b"\x0f\x01\xf9"


def popf(code: Code) -> None:
    """POPF of a register's size."""
    code.save()
    _stacked(code, 0)
    _look_at_flags(code)
    code.none_or_trap(adds=False)
    code.move(STORE, AX, NEW_IF, saved=2)
    code.count(code.steps + 11, saved=2)
    _let_if_be(code)
    _load_flags(code)
    code.last(code.datum(bytes((LOAD, 0x05 | SP << 3)), STACK))
    code.last(code.wide(bytes((LEA, 0x64, 0x24, code.layout.word))))
    code.last(code.datum(bytes((LOAD, 0x05 | CX << 3)), SECOND))
    code.last(code.datum(bytes((LOAD, 0x05 | AX << 3)), FIRST))


def iret(code: Code) -> None:
    """IRET of a register's size."""
    is_64 = code.layout.bits == 64
    code.save()
    _stacked(code, 1)
    _same_or_trap(code, MINUS_CS)
    _same_descriptor_or_trap(code, CS_AT, MINUS_CODE)
    if is_64:
        _stacked(code, 4)
        _same_or_trap(code, MINUS_SS)
        _same_descriptor_or_trap(code, SS_AT, MINUS_STACK)
    _stacked(code, 2)
    _look_at_flags(code)
    code.none_or_trap(adds=False)
    code.move(STORE, AX, NEW_IF, saved=2)
    if is_64:
        _stacked(code, 3)
    else:
        code.plain(bytes((LEA, 0x44, 0x24, 3 * code.layout.word)), saved=2)
    code.move(STORE, AX, STACK, saved=2)
    _stacked(code, 0)
    code.found_or_trap()
    code.move(STORE, CX, TARGET, saved=2)
    code.count(code.steps + 11, saved=2)
    _let_if_be(code)
    _load_flags(code)
    code.last(code.datum(bytes((LOAD, 0x05 | SP << 3)), STACK))
    code.last(code.datum(bytes((LOAD, 0x05 | CX << 3)), SECOND))
    code.last(code.datum(bytes((LOAD, 0x05 | AX << 3)), FIRST))
    code.last(code.datum(b"\xff\x25", TARGET, wide=False))


def read_time(code: Code, instruction: bytes) -> None:
    """RDTSC or RDTSCP, while virtual time is taken back."""
    code.move(STORE, AX, FIRST)
    code.count(4)
    code.plain(instruction, saved=1)
    code.last(code.datum(bytes((STORE, 0x05 | SP << 3)), STACK))
    code.last(code.datum(bytes((LEA, 0x05 | SP << 3)), OWN_FLAGS + code.layout.word))
    code.last(PUSHF)
    code.last(code.datum(b"\x03\x05", EXTRA, wide=False))  # add eax
    code.last(code.datum(b"\x13\x15", EXTRA + 4, wide=False))  # adc edx
    code.last(code.datum(b"\x83\x05", EXTRA, immediate=b"\xf8"))  # eight more
    code.last(POPF)
    code.last(code.datum(bytes((LOAD, 0x05 | SP << 3)), STACK))


# --- parts ---


def _stacked(code: Code, n: int) -> None:
    """AX: a word of the guest's stack."""
    offset = n * code.layout.word
    code.plain(code.wide(bytes((LOAD, 0x44, 0x24, offset))), saved=2)


def _same_or_trap(code: Code, minus: int) -> None:
    """AX is what the window has the negative of."""
    code.move(LOAD, CX, minus, saved=2)
    code.none_or_trap()


def _same_descriptor_or_trap(code: Code, at: int, minus: int) -> None:
    prefix = b"\x36" if code.layout.bits == 32 else b""
    for offset in range(0, 8, code.layout.word):
        code.move(LOAD, AX, at, saved=2)
        code.plain(prefix + code.wide(bytes((LOAD, 0x40, offset))), saved=2)
        _same_or_trap(code, minus + offset)


def _look_at_flags(code: Code) -> None:
    """The flags in AX are to be loaded: AX is what `IF` will be, CX zero if that can be done."""
    code.move(STORE, AX, NEW_FLAGS, saved=2)
    code.move(STORE, SP, STACK, saved=2)
    code.between(code.datum(bytes((LEA, 0x05 | SP << 3)), OWN_FLAGS + code.layout.word))
    code.between(PUSHF)
    code.between(b"\x89\xc1")  # mov ecx, eax
    code.between(code.datum(b"\x33\x0d", IOPL, wide=False))  # xor ecx
    code.between(b"\x81\xe1" + OTHERS.to_bytes(4, "little"))  # and ecx
    code.between(b"\x25" + (-OFF).to_bytes(4, "little"))  # and eax
    code.between(code.wide(b"\x2d" + (-OFF).to_bytes(4, "little")))  # sub
    code.between(POPF)
    code.between(code.datum(bytes((LOAD, 0x05 | SP << 3)), STACK))


def _let_if_be(code: Code) -> None:
    """If that is set, this faults while an interrupt waits.  Now the instruction has begun."""
    code.move(LOAD, AX, NEW_IF, saved=2)
    code.plain(code.datum(bytes((LEA, 0x05 | CX << 3)), OPENING), saved=2)
    code.inline.add(code.here)
    prefix = b"\x36" if code.layout.bits == 32 else b""
    code.plain(prefix + code.wide(b"\x89\x04\xc1"), saved=2)  # mov [cx + ax * 8], ax


def _load_flags(code: Code) -> None:
    code.last(code.datum(bytes((LEA, 0x05 | SP << 3)), NEW_FLAGS))
    code.last(POPF)
