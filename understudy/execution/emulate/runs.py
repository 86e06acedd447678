"""Runs of decoded instructions: straight code up to where it goes elsewhere.

Idea: what an instruction does is worked out once; where the same bytes are met again, only their
functions are called.  Source: SDM 3A, "Self-Modifying Code", for what must be noticed.

Invariants: a run is used only while the bytes that it was made of are what is fetched; whatever
writes over them is refused (`Rewritten`) until they are not counted as decoded any more.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import iced_x86 as iced
from iced_x86 import Mnemonic

from understudy.execution.emulate.linear import Linear
from understudy.instructions import bits as bit_instructions
from understudy.instructions import (
    control_transfer,
    far_transfer,
    flag_control,
    linear_strings,
    segment_loads,
    stack,
    system_calls,
    timing,
    translations,
)
from understudy.instructions.access import Load
from understudy.instructions.interpreter import decode, plan
from understudy.instructions.operands import LONGEST, LOW32, MASK64, SEGMENTS
from understudy.instructions.registers import NotHere, Program
from understudy.instructions.segment_limits import is_written, linear_address
from understudy.instructions.stack import Flow

RUNS_KEPT: Final = 1 << 16
CODES_KEPT: Final = 1024  # code segments
LONGEST_RUN: Final = 32  # instructions
Address = Callable[[Program], int]


class Code(NamedTuple):
    """What code a program executes, but for where: a run is good for one of these."""

    bits: int
    base: int  # of its segment
    limit: int  # the last offset


class Step(NamedTuple):
    """One instruction, wherever it is: without what follows from its place."""

    flow: Flow
    address: Address | None  # the linear address of its operand
    is_written: bool
    length: int
    goes_on: bool  # what comes behind it is next
    ends: bool  # it may change what the next instruction means
    begins: bool = False  # it has to be the first of its run


class Run:
    """Instructions behind one another.  All but the last, if it transfers control, go on."""

    __slots__ = ("code", "count", "epoch", "starts", "steps", "transfer")

    def __init__(self) -> None:
        self.steps: list[tuple[Flow, Address | None, Load, int]] = []
        self.transfer: tuple[Flow, Address | None, Load] | None = None
        self.starts: list[int] = []  # RIP of each
        self.count, self.code, self.epoch = 0, b"", 0


class Runs:
    """The runs of one guest's processor."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear
        self._codes: dict[Code, dict[int, Run]] = {}
        self._steps: dict[tuple[bytes, int], Step | None] = {}
        self._kept = 0

    def of(self, code: Code) -> dict[int, Run]:
        """By RIP.  Whether one is as old as `Linear.epoch` has to be looked at."""
        runs = self._codes.get(code)
        if runs is None:
            if len(self._codes) >= CODES_KEPT:
                self.forget()
            runs = self._codes[code] = {}
        return runs

    def find(self, code: Code, rip: int, is_alone: bool = False) -> Run:
        """The run at RIP, of what is there now.  NotHere: its first instruction is not for us.

        `is_alone`: one instruction, which does not count as decoded and may be written over.
        """
        linear, runs = self.linear, self.of(code)
        run = runs.get(rip)
        start = rip if code.bits == 64 else rip + code.base & LOW32
        if is_alone:
            return self._make(code, rip, start, 1)
        if run is None or self._bytes(start, len(run.code)) != run.code:
            if self._kept >= RUNS_KEPT:
                self.forget()
                runs = self.of(code)
            self._kept += run is None
            run = runs[rip] = self._make(code, rip, start, LONGEST_RUN)
        linear.cover(start, len(run.code))
        run.epoch = linear.epoch
        return run

    def forget(self) -> None:
        """Decode everything again."""
        self._codes.clear()
        self._kept = 0
        self.linear.forget_code()

    def _bytes(self, start: int, length: int) -> bytes:
        """Code from here on, beyond the page if it takes that."""
        code = self.linear.code(start, length)
        if len(code) < length:
            code += self.linear.code(start + len(code) & MASK64, length - len(code))
        return code

    def _make(self, code: Code, rip: int, start: int, most: int) -> Run:
        run, at, end = Run(), rip, MASK64 if code.bits == 64 else LOW32
        there = self.linear.code(start, most * LONGEST)
        length = 0
        while run.count < most:
            step = self.step(there[length : length + LONGEST], code.bits)
            if step is None and not length and len(there) < LONGEST:
                step = self.step(self._bytes(start, LONGEST), code.bits)
            if step is not None and step.begins and run.count:
                break
            if step is None or (code.bits != 64 and at + step.length - 1 > code.limit):
                break
            load = self.linear.load_to_write if step.is_written else self.linear.load
            length += step.length
            run.starts.append(at)
            run.count += 1
            at = at + step.length & end
            if not step.goes_on:
                run.transfer = step.flow, step.address, load
                break
            run.steps.append((step.flow, step.address, load, at))
            if step.ends or length >= len(there):
                break
        if not run.count:
            raise NotHere
        run.code = self._bytes(start, length)
        return run

    def step(self, code: bytes, bits: int) -> Step | None:
        """The instruction that these bytes begin with.  None: not here, or a part of one."""
        key = code, bits
        step = self._steps.get(key, ...)
        if step is ...:
            if len(self._steps) >= RUNS_KEPT:
                self._steps.clear()
            step = self._steps[key] = _step(decode(code, bits), bits)
        return step


TRANSFERS: Final = (control_transfer.transfer, far_transfer.transfer, system_calls.transfer)
FLOWS: Final = (
    segment_loads.flow, stack.flow, flag_control.flow, linear_strings.flow, system_calls.flow,
    translations.flow, timing.flow,
)  # fmt: skip


def _finds_itself(instruction: iced.Instruction) -> bool:
    """Its action finds its operand: a far pointer, and what POP writes, by the new RSP."""
    return instruction.code in far_transfer.FAR_SIZES or (
        instruction.mnemonic in (Mnemonic.POP, Mnemonic.INVLPG, *segment_loads.FAR_LOADS)
    )


ENDS: Final = frozenset({
    Mnemonic.STI, Mnemonic.POPF, Mnemonic.POPFD, Mnemonic.POPFQ, Mnemonic.CLAC, Mnemonic.STAC,
    Mnemonic.SWAPGS, Mnemonic.INVLPG,
    *segment_loads.FAR_LOADS,
})  # fmt: skip


def _step(instruction: iced.Instruction, bits: int) -> Step | None:
    if instruction.mnemonic == Mnemonic.INVALID:
        return None
    size, length = iced.MemorySizeExt.size(instruction.memory_size), instruction.len
    moved: Flow | None = None
    for group in TRANSFERS:
        moved = moved or group(instruction, bits)
    flow = moved
    for group in FLOWS:
        flow = flow or group(instruction, bits)
    if flow is None and bit_instructions.is_bit_string(instruction):
        flow = bit_instructions.test_bit(instruction)
    if flow is None:
        made = plan(instruction, bits)
        if made is None:
            return None
        flow = made.action
    if linear_strings.is_string(instruction) or _finds_itself(instruction):
        ends = instruction.mnemonic in ENDS or instruction.op0_register in SEGMENTS
        return Step(flow, None, False, length, moved is None, ends)
    address = linear_address(instruction, bits, size)
    written = address is not None and is_written(instruction)
    return Step(
        flow, address, written, length, moved is None,
        instruction.mnemonic in ENDS or instruction.op0_register in SEGMENTS,
        instruction.mnemonic in timing.READS_TIME,
    )  # fmt: skip
