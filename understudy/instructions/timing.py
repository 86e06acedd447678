"""RDTSC, RDTSCP and PAUSE: what programs wait with.

Source: SDM 2, the instructions' own pages; SDM 3B, "Time-Stamp Counter".

Invariant: the counter is what the processor would show at this very instruction, which is therefore
the first of its run (`Program.time_stamp`).
"""

from typing import Final

import iced_x86 as iced
from iced_x86 import Mnemonic

from understudy.arch.msr import Msr
from understudy.instructions.access import Load, Store
from understudy.instructions.operands import LOW32
from understudy.instructions.registers import Program
from understudy.instructions.stack import Flow

RAX, RCX, RDX = range(3)
READS_TIME: Final = frozenset({Mnemonic.RDTSC, Mnemonic.RDTSCP})


def flow(instruction: iced.Instruction, bits: int) -> Flow | None:
    """How to carry out an instruction of this group.  None: it is of another."""
    if instruction.mnemonic == Mnemonic.PAUSE:
        return lambda r, at, load, store: r.pause()
    if instruction.mnemonic not in READS_TIME:
        return None
    has_processor = instruction.mnemonic == Mnemonic.RDTSCP

    def rdtsc(r: Program, at: int, load: Load, store: Store) -> None:
        now = r.time_stamp(with_processor=has_processor)
        r.set_gpr(RAX, now & LOW32)
        r.set_gpr(RDX, now >> 32)
        if has_processor:
            r.set_gpr(RCX, r.msr(Msr.IA32_TSC_AUX) & LOW32)

    return rdtsc
