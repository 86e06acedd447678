"""Interpretation: instructions are carried out in Python, one by one.

Idea: whatever the ISA lets slip through when it runs deprivileged, an interpreter looks at every
instruction, so nothing does.  Source: lecture, "Dealing with problematic ISAs".  Cost: some
thousands of the host's instructions for each of the guest's.

The guest's state rests where VMX keeps it.  What is interpreted is 64-bit code on general registers
and RAM; whatever else comes (a fault, an event, a device, a system instruction, other code, x87 and
SSE) the processor executes, one instruction at a time, and is counted in `handed_over`.

Invariants: an instruction that is not carried out here to its end has changed nothing; each takes a
tick of virtual time, as the processor's do, and none is begun when the guest's timer is over.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import iced_x86 as iced
from iced_x86 import Mnemonic

from understudy.arch.cr import RFLAGS
from understudy.arch.exit_reason import Reason
from understudy.arch.msr import Msr
from understudy.arch.vmcs import Vmcs
from understudy.arch.vmx_controls import PrimaryControls
from understudy.execution.emulate.linear import Linear, Ram
from understudy.execution.vmx.technique import INFO, INTERRUPTIBILITY, PENDING_DEBUG, VALID, Vmx
from understudy.guest import RSP
from understudy.instructions.control_transfer import Flow, NotHere, flow
from understudy.instructions.interpreter import decode, plan
from understudy.instructions.operands import LONGEST, MASK64
from understudy.machine.host import Host
from understudy.paging import Paging
from understudy.paging.guest_walk import GuestFault, Translation
from understudy.silicon import Exit, Processor
from understudy.state import restore
from understudy.vcpu.cpu_model import CpuModel

STEPS_KEPT: Final = 1 << 16
STRETCH: Final = 4096  # instructions between two looks at whether somebody wants something
MTF: Final = PrimaryControls.MONITOR_TRAP_FLAG.mask
WINDOWS: Final = int(PrimaryControls(INTERRUPT_WINDOW_EXITING=1, NMI_WINDOW_EXITING=1))
TIMER: Final = int(Vmcs.PREEMPTION_TIMER_VALUE)
BY_HARDWARE: Final = int(RFLAGS(TF=1, RF=1))
AC: Final = RFLAGS.AC.mask
BREAKPOINTS: Final = 0xFF  # of DR7
COUNTING: Final = (Msr.IA32_FIXED_CTR_CTRL, *range(Msr.IA32_PERFEVTSEL0, Msr.IA32_PERFEVTSEL0 + 4))


class Held:
    """The guest's general registers, RIP and RFLAGS, while it is interpreted."""

    def __init__(self, base: Callable[[int], int]) -> None:
        self.values = [0] * 16
        self.rip, self.rflags = 0, 2
        self.read_gpr: Callable[[int], int] = self.values.__getitem__
        self.write_gpr: Callable[[int, int], None] = self.values.__setitem__
        self.gpr, self.set_gpr, self.segment_base = self.read_gpr, self.write_gpr, base


class Emulate(Vmx, name="emulate"):
    """A vCPU whose instructions Python carries out.

    It walks the guest's own tables and needs no shadow of them: of the paging techniques, that
    which has none goes with it.
    """

    pagings = ("ept",)

    def __init__(
        self, host: Host, processor: Processor | None, paging: Paging, model: CpuModel,
        *, keep_timer: bool = True, exits: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.is_kicked, self.is_virtual = False, keep_timer
        self.interpreted = 0
        self.handed_over: Counter[str] = Counter()  # by mnemonic
        super().__init__(host, processor, paging, model, keep_timer=keep_timer, exits=exits)
        self.linear = Linear(Ram(host, paging.p2m))
        self.held = Held(self.segment_base)
        self._steps: dict[bytes, Flow | None] = {}
        self._refused = False  # the stretch ended before an instruction of the processor's

    # --- the way in ---

    @property
    def resume(self) -> Callable[[int], Exit]:
        """Interpret; `_way` is how the processor itself is entered."""
        return self._interpret

    @resume.setter
    def resume(self, way: Callable[[int], Exit]) -> None:
        self._way = way

    def _ways(self, processor: Processor) -> None:
        super()._ways(processor)
        self.count_retired = self._count

    def _count(self) -> int:
        if self.is_at_home:
            return self.processor.retired + self.interpreted
        return super()._count() + self.interpreted

    def kick(self) -> None:
        self.is_kicked = True
        super().kick()

    def forget(self, addresses: Any) -> None:
        super().forget(addresses)
        self.linear.forget()

    def save(self) -> dict[str, Any]:
        return super().save() | {"interpreted": self.interpreted}

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        self.interpreted = restore(int, saved["interpreted"], "interpreted")
        self.linear.forget()

    def _interpret(self, budget: int) -> Exit:
        """Go on until something is for the hypervisor, or the budget is used up."""
        end = self.retired + budget if budget else 0
        while True:
            if self.is_kicked or self.primary & MTF or self.is_inside:
                self.is_kicked = False
                self.linear.forget()
                return self._way(max(end - self.retired, 1) if end else 0)
            left = end - self.retired if end else STRETCH
            if end and left <= 0:
                return self._step_on(0)
            done = 0
            if self._is_ours():
                done = self._stretch(min(left, STRETCH, self._ticks()))
            if done == 0 or self._refused:
                exit = self._hand_over()
                if exit is not None:
                    return exit

    def _step_on(self, budget: int) -> Exit:
        """The budget is used up: an entry that executes nothing says so."""
        super().kick()
        return self._way(budget)

    def _ticks(self) -> int:
        """Instructions until the guest's timer is over."""
        if not self.is_virtual:
            return STRETCH
        shift, now = self.timer_shift, self.processor.tsc
        return ((now >> shift) + self.read(TIMER) << shift) - now

    def _is_ours(self) -> bool:
        """Whether the next instruction is plain code of 64 bits, with nothing that waits."""
        read = self.read
        if not self.is_code64() or self.rflags & BY_HARDWARE or self.dr7 & BREAKPOINTS:
            return False
        if read(INFO) & VALID or read(INTERRUPTIBILITY) or read(PENDING_DEBUG):
            return False
        return not self.current_primary & WINDOWS and not self._counts_events()

    def _counts_events(self) -> bool:
        """Whether a performance counter counts what only the processor knows."""
        if not self.operation.has_pmu or not self.read(Vmcs.GUEST_PERF_GLOBAL_CTRL):
            return False
        return any(self.processor.rdmsr(index) for index in COUNTING)

    # --- interpreting ---

    def _stretch(self, most: int) -> int:
        """Interpret at most so many instructions; how many it were."""
        held, linear, steps = self.held, self.linear, self._steps
        held.values[:] = self.processor.gprs()
        held.values[RSP] = self.gpr(RSP)
        held.rip, held.rflags = self.rip, self.rflags
        control, keys = self.paging_control(), self.protection_keys()
        linear.follow(Translation(
            *control[:4], self.cpl(), control.pdptes, bool(held.rflags & AC), keys
        ))  # fmt: skip
        done, load, store, code_at = 0, linear.load, linear.store, linear.code
        self._refused = False
        try:
            while done < most:
                code = code_at(held.rip, LONGEST)
                step = steps.get(code, ...)
                if step is ...:
                    step = self._decode(code)
                if step is None:
                    self._refused = True
                    break
                step(held, load, store)
                done += 1
        except (GuestFault, NotHere):
            self._refused = True
        if done:
            self._put_back(done)
        return done

    def _put_back(self, done: int) -> None:
        held = self.held
        self.processor.set_gprs(tuple(held.values))
        self.set_gpr(RSP, held.values[RSP])
        self.rip, self.rflags = held.rip, held.rflags
        self.interpreted += done
        if self.is_virtual:
            shift, now = self.timer_shift, self.processor.tsc
            after, timer = self.advance(done), self.read(TIMER)
            self.write(TIMER, max(timer - ((after >> shift) - (now >> shift)), 0))

    def _decode(self, code: bytes) -> Flow | None:
        if len(self._steps) >= STEPS_KEPT:
            self._steps.clear()
        step = self._steps[code] = _step(decode(code, 64))
        return step

    # --- what the processor executes ---

    def _hand_over(self) -> Exit | None:
        """Have the processor execute one instruction.  None: it is done, and nothing else is."""
        at = self.rip
        code = self.processor.fetch(at, LONGEST) if self.is_code64() else b""
        instruction = decode(code, 64) if code else None
        name = "other code" if instruction is None else _name(instruction)
        self.handed_over[name] += 1
        self.single_step(True)
        try:
            exit = self._way(0)
        finally:
            if not self.is_inside:
                self.single_step(False)
        self.linear.forget()
        return None if exit.reason == Reason.MONITOR_TRAP_FLAG else exit


_NAMES: Final = {
    value: name for name, value in vars(Mnemonic).items() if isinstance(value, int)
}  # fmt: skip


def _name(instruction: iced.Instruction) -> str:
    return _NAMES.get(instruction.mnemonic, "INVALID")


def _step(instruction: iced.Instruction) -> Flow | None:
    """A function that does all of the instruction.  None: not here."""
    if instruction.mnemonic == Mnemonic.INVALID:
        return None
    moved = flow(instruction)
    if moved is not None:
        return moved
    made = plan(instruction, 64)
    if made is None or made.string is not None:
        return None
    length, _, action, address, _ = made

    def step(held: Any, load: Any, store: Any) -> None:
        action(held, address(held), load, store)
        held.rip = held.rip + length & MASK64

    return step
