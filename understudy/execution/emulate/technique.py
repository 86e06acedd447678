"""Interpretation: instructions are carried out in Python, one by one.

Idea: whatever the ISA lets slip through when it runs deprivileged, an interpreter looks at every
instruction, so nothing does.  Source: lecture, "Dealing with problematic ISAs".  Cost: some
hundred bytecodes of Python for each of the guest's instructions.

The guest's state rests where VMX keeps it, and is taken out for a stretch of instructions.  What is
not carried out here (what exits, what changes how addresses translate, x87 and SSE, tasks, most
faults) the processor executes, one instruction at a time, and is counted in `handed_over`.

Invariants: an instruction that is not carried out here to its end has changed nothing; each takes a
tick of virtual time, as the processor's do, and none is begun when the guest's timer is over.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from iced_x86 import Mnemonic, RegisterExt

from understudy.arch.cr import CR0, RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason
from understudy.arch.msr import Msr
from understudy.arch.segment import SegmentName
from understudy.arch.vmcs import Vmcs
from understudy.arch.vmx_controls import PrimaryControls
from understudy.execution import Execution
from understudy.execution.emulate.held import Held
from understudy.execution.emulate.linear import Linear, Ram, Refused, Rewritten
from understudy.execution.emulate.runs import Code, Run, Runs
from understudy.execution.vmx.technique import (
    ERROR_CODE,
    INFO,
    INTERRUPTIBILITY,
    PENDING_DEBUG,
    SHADOW,
    TYPE_SHIFT,
    VALID,
    Vmx,
)  # fmt: skip
from understudy.guest import IF, RSP, Event, Kind
from understudy.instructions.delivery import deliver
from understudy.instructions.interpreter import decode
from understudy.instructions.linear_strings import Again
from understudy.instructions.operands import LONGEST, LOW32, MASK64
from understudy.instructions.registers import NotHere
from understudy.machine.host import Host
from understudy.paging import Paging
from understudy.paging.guest_walk import GuestFault
from understudy.silicon import Exit, Processor
from understudy.state import restore
from understudy.vcpu.cpu_model import CpuModel

STRETCH: Final = 4096  # instructions between two looks at whether somebody wants something
MTF: Final = PrimaryControls.MONITOR_TRAP_FLAG.mask
NMI_WINDOW: Final = PrimaryControls.NMI_WINDOW_EXITING.mask
WINDOWS: Final = PrimaryControls.INTERRUPT_WINDOW_EXITING.mask | NMI_WINDOW
TIMER: Final = int(Vmcs.PREEMPTION_TIMER_VALUE)
TF, RF = RFLAGS.TF.mask, RFLAGS.RF.mask
TAKEN: Final = frozenset({
    Kind.INTERRUPT, Kind.EXCEPTION, Kind.SOFTWARE_INTERRUPT, Kind.SOFTWARE_EXCEPTION,
})  # fmt: skip
"""Kinds of events that are delivered here (an NMI blocks others)."""
AC: Final = RFLAGS.AC.mask
AM: Final = CR0.AM.mask
CODE64: Final = Code(64, 0, MASK64)
FORGETS: Final = frozenset({
    Mnemonic.INVLPG, Mnemonic.INVPCID, Mnemonic.WRMSR, Mnemonic.WRMSRNS,
})  # fmt: skip
"""Instructions by which a program has translations forgotten, beside a MOV to CR."""
BREAKPOINTS: Final = 0xFF  # of DR7
COUNTING: Final = (Msr.IA32_FIXED_CTR_CTRL, *range(Msr.IA32_PERFEVTSEL0, Msr.IA32_PERFEVTSEL0 + 4))


class Emulate(Vmx, name="emulate"):
    """A vCPU whose instructions Python carries out.

    It walks the guest's own tables and needs no shadow of them: of the paging techniques, that
    which has none goes with it.
    """

    pagings = ("ept",)
    takes_turns = True  # what is read and written by a locked instruction are two steps here

    def __init__(
        self, host: Host, processor: Processor | None, paging: Paging, model: CpuModel,
        *, keep_timer: bool = True, exits: tuple[str, ...] = (),
        before: Execution | None = None,
    ) -> None:  # fmt: skip
        self.is_kicked, self.is_virtual = False, keep_timer
        self._is_interpreting = False
        self.interpreted = 0
        self.handed_over: Counter[str] = Counter()  # by mnemonic
        self.delivered: Counter[int] = Counter()  # events, by vector
        super().__init__(
            host, processor, paging, model, keep_timer=keep_timer, exits=exits, before=before
        )
        self.linear = Linear(Ram(host, paging.p2m))
        self.held, self.runs = Held(self, self.linear, is_virtual=keep_timer), Runs(self.linear)
        self._fault: GuestFault | None = None  # of the instruction at which it stopped
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

    def come_out(self) -> None:
        if self._is_interpreting:
            self.held.is_attended = True
            self.kick()

    def forget(self, addresses: Any) -> None:
        super().forget(addresses)
        self.linear.forget()

    def forget_guest(self) -> None:
        super().forget_guest()
        self.linear.forget()

    def save(self) -> dict[str, Any]:
        return super().save() | {"interpreted": self.interpreted}

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        self.interpreted = restore(int, saved["interpreted"], "interpreted")
        self.linear.forget()

    def _interpret(self, budget: int) -> Exit:
        """Go on until something is for the hypervisor, or the budget is used up."""
        self._is_interpreting = True
        try:
            return self._interpret_to(self.retired + budget if budget else 0)
        finally:
            self._is_interpreting = False

    def _interpret_to(self, end: int) -> Exit:
        while True:
            if self.is_kicked or self.primary & MTF or self.is_inside:
                self.is_kicked = False
                self.linear.forget()
                return self._way(max(end - self.retired, 1) if end else 0)
            left = end - self.retired if end else STRETCH
            if end and left <= 0:
                return self._step_on(0)
            self._refused = True
            if self._is_ours():
                if self.read(INFO) & VALID:
                    self._take_event()
                else:
                    self._stretch(min(left, STRETCH, self._ticks()))
            if self._refused:
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
        """Whether nothing waits that comes before the next instruction, or watches it."""
        read, flags = self.read, self.rflags
        if flags & TF or self.dr7 & BREAKPOINTS or read(PENDING_DEBUG):
            return False
        blocking = read(INTERRUPTIBILITY)
        if blocking & ~SHADOW:
            return False
        windows = self.current_primary & WINDOWS
        if windows and (windows & NMI_WINDOW or (flags & IF and not blocking)):
            return False
        return not self._counts_events()

    def _counts_events(self) -> bool:
        """Whether a performance counter counts what only the processor knows."""
        if not self.operation.has_pmu or not self.read(Vmcs.GUEST_PERF_GLOBAL_CTRL):
            return False
        return any(self.processor.rdmsr(index) for index in COUNTING)

    # --- interpreting ---

    def _stretch(self, most: int) -> None:
        """Interpret at most so many instructions."""
        held = self.held
        if most <= 0 or not self._begin():
            return
        code = CODE64
        if held.bits != 64:
            _, base, limit, _ = self.segment(SegmentName.CS)
            code, held.code_limit = Code(held.bits, base, limit), limit
        held.blocking = blocking = self.read(INTERRUPTIBILITY)
        self._refused, done = False, 0
        while done < most and not self._refused and not held.is_attended:
            shadow, held.blocking = held.blocking, 0
            resumes = held.rflags & RF  # it lasts for one instruction
            held.rflags &= ~RF
            now = self._go(code, 1 if shadow or resumes else most - done, done)
            done += now
            if not now:
                held.rflags |= resumes
                held.blocking = shadow
            if self._fault is not None:
                self._raise(self._fault)
            if not now:
                break
            if held.blocking:
                held.is_attended = False  # not before the next one
            elif shadow and self.current_primary & WINDOWS:
                break
        self._put_back(done)
        if held.blocking != blocking:
            self.write(INTERRUPTIBILITY, held.blocking)

    def _begin(self) -> bool:
        """Take over the guest's registers.  False: each access would have to be aligned."""
        held, control = self.held, self.paging_control()
        held.begin(self.processor.gprs(), self.code_bits(), control)
        flags = held.rflags
        if held.cpl == 3 and flags & AC and control.cr0 & AM:
            return False
        self.linear.follow(control, (held.cpl, bool(flags & AC), self.protection_keys()))
        return True

    def _raise(self, fault: GuestFault) -> None:
        """Deliver an exception of the guest's own, if it is none of the hypervisor's."""
        vector, self._fault = fault.vector, None
        if vector not in (Vector.PF, Vector.DE) or self.held.exits_on(vector, Kind.EXCEPTION):
            return
        error = fault.error if vector == Vector.PF else None
        if self._deliver(Event(vector, Kind.EXCEPTION, error), resume=True) and error is not None:
            self.set_cr2(fault.gva)

    def _take_event(self) -> None:
        """Deliver what was injected, if it is none that the processor has to deliver."""
        info = self.read(INFO)
        kind = info >> TYPE_SHIFT & 7
        if kind not in TAKEN or self.read(INTERRUPTIBILITY) or not self._begin():
            return
        error = self.read(Vmcs.ENTRY_EXCEPTION_ERROR_CODE) if info & ERROR_CODE else None
        length = self.read(Vmcs.ENTRY_INSTRUCTION_LENGTH) if Kind(kind).is_software else 0
        if self._deliver(Event(info & 0xFF, Kind(kind), error, length), resume=False):
            self.write(INFO, 0)
            self._put_back(0)

    def _deliver(self, event: Event, *, resume: bool) -> bool:
        """Begin the handler.  False: the processor has to try."""
        held, linear = self.held, self.linear
        try:
            deliver(held, event, linear.load, linear.store, resume=resume)
        except (GuestFault, NotHere, Rewritten):
            self._refused = True
            return False
        held.blocking, self._refused = 0, False
        self.delivered[event.vector] += 1
        return True

    def _go(self, code: Code, most: int, before: int) -> int:
        """Interpret until so many are done, or something is to be looked at; how many were.

        `before`: how many the stretch has done already.
        """
        held, linear, store = self.held, self.linear, self.linear.store
        runs, done, is_alone = self.runs.of(code), 0, False
        run: Run | None = None
        while done < most:
            try:
                while done < most:
                    run = None if is_alone else runs.get(held.rip)
                    if run is None or run.epoch != linear.epoch:
                        run = None
                        run = self.runs.find(code, held.rip, is_alone)
                        runs, is_alone = self.runs.of(code), False
                    held.done = before + done
                    count, steps, transfer = run.count, run.steps, run.transfer
                    if count > most - done:
                        count, steps, transfer = most - done, steps[: most - done], None
                    for flow, address, load, after in steps:
                        flow(held, 0 if address is None else address(held), load, store)
                        held.rip = after
                    if transfer is not None:
                        flow, address, load = transfer
                        flow(held, 0 if address is None else address(held), load, store)
                    done += count
                    if held.is_attended:
                        return done
                return done
            except Rewritten:
                is_alone = True
            except GuestFault as fault:
                self._refused, self._fault = True, None if isinstance(fault, Refused) else fault
            except NotHere:
                self._refused = True
            except Again:
                held.is_attended = True
            if run is not None:
                done += run.starts.index(held.rip)
            if not is_alone:
                break
        return done

    def _put_back(self, done: int) -> None:
        held = self.held
        self.processor.set_gprs(tuple(held.values))
        self.set_gpr(RSP, held.values[RSP])
        self.rip, self.rflags = held.rip, held.rflags
        self.interpreted += done
        if done and self.is_virtual:
            shift, now = self.timer_shift, self.processor.tsc
            after, timer = self.advance(done), self.read(TIMER)
            self.write(TIMER, max(timer - ((after >> shift) - (now >> shift)), 0))

    # --- what the processor executes ---

    def _hand_over(self) -> Exit | None:
        """Have the processor execute one instruction.  None: it is done, and nothing else is."""
        name, forgets = "event", False
        if not self.read(INFO) & VALID:
            bits, at = self.code_bits(), self.rip
            if bits != 64:
                at = at + self.segment_base(SegmentName.CS) & LOW32
            instruction = decode(self.processor.fetch(at, LONGEST), bits)
            name = _NAMES.get(instruction.mnemonic, "INVALID")
            forgets = instruction.mnemonic in FORGETS or RegisterExt.is_cr(instruction.op0_register)
        self.handed_over[name] += 1
        self.single_step(True)
        try:
            exit = self._way(0)
        finally:
            if not self.is_inside:
                self.single_step(False)
        if forgets:
            self.linear.forget()
        return None if exit.reason == Reason.MONITOR_TRAP_FLAG else exit


_NAMES: Final = {
    value: name for name, value in vars(Mnemonic).items() if isinstance(value, int)
}  # fmt: skip
