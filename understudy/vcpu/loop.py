"""A virtual processor: the run loop, and what happens between two stretches of guest code.

The loop is one screen and does as little as it can: enter, count, look up, call.  Everything
rare (time, events, halting, wishes of other threads) waits behind one flag, `attention`, which
whoever causes it sets.

Time: the guest's TSC is the processor's.  The next deadline of devices and APIC timer is put
into the VMX preemption timer, and only when it changes; with the virtual clock the timer keeps
its count over exits, with the wall clock it is set anew on each entry.

Invariants: `attention` is set before anything that `attend` must see can matter; `attend` never
runs while the processor is in the guest; two runs in virtual time make the same decisions.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from understudy.answers.instructions import TABLE, unknown
from understudy.answers.translation import read_efer, write_efer
from understudy.arch.cr import RFLAGS
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason, reason_name
from understudy.arch.msr import Msr
from understudy.clock import Clock, Timer
from understudy.describe import astray, describe, indented
from understudy.execution.vmx.technique import Vmx
from understudy.paging import Paging
from understudy.paging.guest_walk import GuestFault, Translation
from understudy.silicon import Exit, LocalApic, Processor
from understudy.vcpu.cpu_model import CpuModel
from understudy.vcpu.events import WITH_LENGTH, Events
from understudy.vcpu.msrs import Msrs
from understudy.verdict import RESUME, Stop, Verdict

if TYPE_CHECKING:
    from understudy.vm import VM

NEVER: Final = (1 << 64) - 1
LAST_EXIT: Final = 0xFFFF  # reasons above it are the silicon's own stops


@dataclass
class Goal:
    """When `run` shall come back, if the guest does not end before."""

    end: int | None = None  # instructions retired
    until: Callable[[], bool] | None = None


@dataclass
class VcpuState:
    """What a snapshot keeps, beside the processor and `Events`."""

    halted: bool = False
    armed: int = 0  # the deadline that the preemption timer holds
    interrupted_at: int = -1  # what was retired when a software interrupt's delivery was
    carried_out: int = 0  # instructions that only exit because of the paging technique


class GuestClock(Clock):
    """Guest time, read from the processor; tells the vCPU when a deadline may have moved."""

    def __init__(self, processor: Processor) -> None:
        super().__init__()
        self.processor, self.offset = processor, 0
        self.changed: Callable[[], None] = lambda: None

    def now(self) -> int:
        return self.processor.tsc + self.offset

    def _push(self, ns: int, sequence: int, callback: Callable[[], None]) -> Timer:
        self.changed()
        return super()._push(ns, sequence, callback)


class Vcpu:
    """One virtual processor of a VM."""

    def __init__(
        self, vm: "VM", processor: Processor, paging: Paging, model: CpuModel, clock: GuestClock
    ) -> None:
        self.vm, self.processor, self.clock = vm, processor, clock
        self.is_wall = vm.clock_kind == "wall"
        self.model, self.answer = model, model.answer
        self.bus, self.memory = vm.bus, vm.memory
        self.execution = Vmx(vm.host, processor, paging, model, keep_timer=not self.is_wall)
        self.read_gpr, self.write_gpr = processor.gpr, processor.set_gpr  # RSP: see `gpr`
        self.skip, self.shift = self.execution.skip, self.execution.timer_shift
        self.apic = LocalApic(model.apic_id, True)
        self.events = Events(self.execution, self.apic)
        self.msrs = Msrs(self)
        self.msrs.extra[Msr.IA32_EFER] = (lambda: read_efer(self), lambda v: write_efer(self, v))
        self.state = VcpuState()
        self.exits: dict[int, int] = dict.fromkeys(TABLE, 0)
        self.cr_accesses: Counter[tuple[int, int]] = Counter()  # by number and kind
        self.table = dict(TABLE)
        self.attention = True
        self.requested: Stop | None = None
        self.posts: deque[Callable[[], None]] = deque()
        self.wake = threading.Event()
        self.is_running = False
        clock.changed = self.look

    # --- the run loop ---

    def run(self, goal: Goal) -> Stop:
        """Enter the guest and answer its exits until something ends the run."""
        self.is_running = True
        try:
            return self._run(goal)
        finally:
            self.is_running = False

    def _run(self, goal: Goal) -> Stop:
        processor, execution = self.processor, self.execution
        counts, table, until, end = self.exits, self.table, goal.until, goal.end
        budget = 0 if end is None else end - self.retired
        inside = processor.in_guest  # the last run ended between two instructions
        if inside and self.attention:
            processor.kick()
        while True:
            if end is not None and budget <= 0:
                return Stop("budget")
            if inside:
                exit = processor.run(budget)
            else:
                if self.attention and (stop := self.attend()) is not None:
                    return stop
                if self.is_wall:
                    self._rearm()
                exit = execution.resume(budget)
            reason = exit.reason
            inside = reason > LAST_EXIT and processor.in_guest
            try:
                counts[reason] += 1
                verdict = table[reason](self, exit)
            except KeyError:
                if reason in table:
                    raise
                counts[reason] = counts.get(reason, 0) + 1
                return unknown(self, exit)
            if verdict is not RESUME:
                return verdict
            if until is not None and until():
                return Stop("until")
            if end is not None:
                budget = end - self.retired

    # --- between exits ---

    def look(self) -> None:
        """Make the run loop call `attend` before it enters the guest."""
        self.attention = True

    def post(self, action: Callable[[], None]) -> None:
        """From any thread: have the vCPU's thread do this soon, between two exits."""
        self.posts.append(action)
        self.look_now()

    def look_now(self) -> None:
        """From any thread: `look`, also if the guest runs or sleeps."""
        self.attention = True
        self.wake.set()
        if self.is_running:
            self.processor.kick()

    def request(self, stop: Stop) -> None:
        """End the run before the next entry.  The first request counts."""
        if self.requested is None:
            self.requested = stop
        self.attention = True

    def attend(self) -> Stop | None:
        """Everything that is not for every exit: wishes, time, sleep, events, the timer."""
        self.attention = False
        while self.posts:
            self.posts.popleft()()
        self._pass_time()
        if self.state.halted and self.requested is None:
            self._sleep()
        if self.requested is not None:
            stop, self.requested = self.requested, None
            self.attention = True
            return stop
        self.events.deliver()
        deadline = self._next_deadline()
        if deadline != self.state.armed:  # else the timer kept its count over the exit
            self.state.armed = deadline
            self._rearm()
        return None

    def _next_deadline(self) -> int:
        device, apic = self.clock.next_deadline(), self.apic.deadline()
        return apic if device is None or apic < device else device

    def _pass_time(self) -> None:
        """Fire what is due."""
        now = self.clock.now()
        # Not before the preemption timer could say so: a kick, which comes at any time, must not
        # make anything happen earlier than it would without.
        if self._next_deadline() <= now >> self.shift << self.shift:
            self.clock.run_due()
            if self.apic.deadline() <= now:
                self.apic.tick(now)

    def _rearm(self) -> None:
        """Put the deadline into the preemption timer.

        It counts changes of bit `shift` of the TSC: round so as never to be early.
        """
        shift = self.shift
        now = self.processor.tsc + self.clock.offset
        ticks = (self.state.armed + (1 << shift) - 1 >> shift) - (now >> shift)
        self.execution.arm(ticks if ticks > 0 else 0)

    def _sleep(self) -> None:
        """The guest halted.  Let time pass until an event can wake it."""
        while not self.events.may_wake():
            if self.requested is not None:
                return
            if not self.events.execution.interrupt_flag():
                self.request(Stop("stuck", "halted with RFLAGS.IF=0\n" + self.describe()))
                return
            if not self._idle():
                return
            while self.posts:
                self.posts.popleft()()
            self._pass_time()
        self.state.halted = False

    def _idle(self) -> bool:
        """One step of idle time.  False if a stop was requested because none would end it."""
        deadline = self._next_deadline()
        if self.is_wall:
            self.wake.clear()
            if not self.posts and self.requested is None:
                left = deadline - self.clock.now()
                self.wake.wait(None if deadline == NEVER else max(left, 0) / 1e9)
            return True
        if deadline == NEVER:
            self.request(Stop("stuck", "halted, and no timer is armed\n" + self.describe()))
            return False
        left = -(-deadline >> self.shift << self.shift) - self.clock.now()
        if left > 0:
            self.processor.advance(left)
        self.state.armed = 0  # the preemption timer does not count idle time
        return True

    # --- what handlers need ---

    def gpr(self, n: int) -> int:
        """A general register of the guest; RSP is in the VMCS."""
        return self.execution.read(0x681C) if n == 4 else self.processor.gpr(n)

    def set_gpr(self, n: int, value: int) -> None:
        """Set a general register of the guest."""
        if n == 4:
            self.execution.write(0x681C, value)
        else:
            self.processor.set_gpr(n, value)

    def fault(self, vector: int, error: int | None = None) -> Verdict:
        """The instruction that exited faults.

        RF is set in the flags that the fault pushes, so that the return from its handler does not
        meet an instruction breakpoint again (SDM 3B, "Instruction-Breakpoint Exception Condition").
        """
        if vector != Vector.DB:
            self.execution.set_resume_flag(vector != Vector.DF)  # that one is no fault
        self.events.exception(vector, error)
        self.attention = True
        return RESUME

    def guest_fault(self, fault: GuestFault) -> Verdict:
        """The instruction that exited may not access its memory."""
        if fault.vector == Vector.PF:
            self.processor.set_registers({"cr2": fault.gva})
        return self.fault(fault.vector, fault.error)

    def spend(self, ticks: int) -> None:
        """Virtual time for what no retired instruction counts; the preemption timer did not see it.

        Without it a guest that polls a timer of the board would do so millions of times.
        """
        if ticks > 0 and not self.is_wall:
            self.processor.advance(ticks)
            self._rearm()

    def retire(self) -> None:
        """The hypervisor has carried out an instruction that does not exit under every technique.

        It counts, and takes time, as if the processor had executed it.
        """
        self.state.carried_out += 1
        self.spend(1)

    def deliver_again(self, exit: Exit) -> None:
        """An exit interrupted the delivery of an event, which goes in with the next entry.

        An INT n (INT3, INTO) that is delivered so does not retire by itself.
        """
        self.events.requeue(exit)
        self.attention = True
        if (exit.idt_info >> 8 & 7) in WITH_LENGTH:
            retired = self.processor.retired
            if self.state.interrupted_at != retired:  # else it was interrupted again
                self.state.interrupted_at = retired
                self.retire()

    @property
    def retired(self) -> int:
        """Instructions retired, by the processor or in its place."""
        return self.processor.retired + self.state.carried_out

    @property
    def paging(self) -> Paging:
        """The technique by which the guest's memory is virtualised now."""
        return self.execution.paging

    def translation(self) -> Translation:
        """What the guest's linear addresses mean now."""
        execution = self.execution
        cr0, cr3, cr4, efer, pdptes = execution.control.get()
        is_ac = bool(execution.read(0x6820) & RFLAGS.AC.mask)
        return Translation(cr0, cr3, cr4, efer, execution.cpl(), pdptes, is_ac)

    def mmio_read(self, gpa: int, size: int) -> int:
        """A load from where there is no RAM."""
        if self.msrs.is_apic_page(gpa):
            return self.msrs.apic_read(gpa, size)
        return self.bus.mmio_read(gpa, size)

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A store to where there is no RAM."""
        if self.msrs.is_apic_page(gpa):
            self.msrs.apic_write(gpa, size, value)
        else:
            self.bus.mmio_write(gpa, size, value)

    # --- looking at it ---

    def error(self, problem: str) -> Stop:
        """A stop that shows the whole state."""
        return Stop("error", problem + "\n" + self.describe())

    def describe(self) -> str:
        """The decoded state, for people."""
        holder = self.processor if self.processor.in_guest else self.execution
        lines = describe(holder.registers(), self.memory)
        lines.append(f"exits={self.named_exits()}  retired={self.processor.retired}")
        return indented(lines + astray(self.bus.unclaimed, self.msrs.unknown))

    def named_exits(self) -> dict[str, int]:
        """Exits by name, those that happened.

        The silicon's own stops are no exits; nor are kicks counted here (see `kicks`), because
        the guest has no part in them.
        """
        own = (n for n in self.exits if n <= LAST_EXIT and n != Reason.EXTERNAL_INTERRUPT)
        counted = sorted((n, self.exits[n]) for n in own if self.exits[n])
        return {reason_name(n): count for n, count in counted}

    def named_cr_accesses(self) -> dict[str, int]:
        """Exits for control registers, by register and direction."""
        words = {0: "write", 1: "read", 2: "CLTS", 3: "LMSW"}
        counted = sorted(self.cr_accesses.items())
        return {f"CR{number} {words[kind]}": n for (number, kind), n in counted}

    @property
    def kicks(self) -> int:
        """Exits because another thread wanted something."""
        return self.exits[Reason.EXTERNAL_INTERRUPT]

    def leave_guest(self) -> None:
        """Make sure that the VMCS can be read and written: finish a run that a budget ended."""
        while self.processor.in_guest:
            self.processor.kick()
            exit = self.processor.run(0)
            if exit.reason not in (Reason.EXTERNAL_INTERRUPT, Reason.KICK):
                self.table[exit.reason](self, exit)
