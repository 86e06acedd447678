"""A virtual processor: the run loop, and what happens between two stretches of guest code.

The loop is one screen and does as little as it can: enter, count, look up, call.  Everything
rare (time, events, halting, wishes of others) waits behind one flag, `attention`, which whoever
causes it sets.  What an exit means is in the technique's `Guest.table`; answers are in `answers/`.

Invariants: `attention` is set before anything that `attend` must see can matter; `attend` never
runs while the processor is in the guest; two runs in virtual time make the same decisions.
"""

from collections import deque
from collections.abc import Callable
from threading import get_ident
from time import monotonic_ns
from typing import Any, Final

from understudy.arch.exception import WITH_ERROR_CODE, Vector
from understudy.arch.exit_reason import Reason
from understudy.closed import let_go
from understudy.guest import CannotExecute, Event, Guest, Kind
from understudy.machine.bus import Bus
from understudy.machine.frames import OutOfFrames
from understudy.machine.memory import GuestMemory
from understudy.paging import Paging, View
from understudy.paging.guest_walk import PAE_FORMAT, GuestFault, Regime, Translation, entries_of
from understudy.silicon import Exit, LocalApic
from understudy.state import Kept, plain, restore
from understudy.vcpu.activity import Activity, Entry, Goal, VcpuState
from understudy.vcpu.counts import LAST_EXIT, ExitCounts, no_handler
from understudy.vcpu.cpu_model import CpuModel
from understudy.vcpu.events import Events
from understudy.vcpu.kvm import Kvm
from understudy.vcpu.msrs import Msrs
from understudy.vcpu.page_wait import PageWait
from understudy.vcpu.pmu import Pmu
from understudy.vcpu.time import Deadlines, GuestClock
from understudy.verdict import ASLEEP, OVER, RESUME, Stop, StopKind, Verdict

AC: Final = 1 << 18  # of RFLAGS
COMMANDS_KEPT: Final = 2  # INIT, and the message that starts it: a second one finds it started


class Vcpu:
    """One virtual processor of a VM."""

    def __init__(
        self, guest: Guest, model: CpuModel, clock: GuestClock, bus: Bus, memory: GuestMemory,
        posts: deque[Callable[[], None]], *, is_wall: bool = False,
    ) -> None:  # fmt: skip
        """`posts`: what other threads want done between two exits, by any of the VM's vCPUs."""
        self.guest, self.model, self.clock = guest, model, clock
        self.view: View = guest.view
        self.bus, self.memory, self.posts, self.is_wall = bus, memory, posts, is_wall
        self.answer, self.port_read, self.port_write = model.answer, bus.port_read, bus.port_write
        self.gpr, self.set_gpr, self.skip = guest.gpr, guest.set_gpr, guest.skip
        self.is_bootstrap = model.apic_id == 0
        self.apic = LocalApic(model.apic_id, self.is_bootstrap)
        self.power_on_apic, self.events = self.apic.save(), Events(guest, self.apic)
        self.msrs = Msrs(guest, self.apic, clock, model, self.look)
        self.pmu = Pmu(guest, self.apic, self.events)
        self.msrs.offer(self.pmu)
        self.time = Deadlines(guest, clock, self.apic, is_wall=is_wall)
        self.poke = self.time.wake.ring  # hears what it is told while it sleeps
        self.state = VcpuState(activity=Activity.first(self.is_bootstrap))
        self.table = guest.table
        self.counts, self.page = ExitCounts(self.table), PageWait(self, clock)
        self.kvm = Kvm(self.events, self.msrs, memory, lambda: self.view.flush(), self.page)
        self.exits, self.cr_accesses = self.counts.state.exits, self.counts.state.cr_accesses
        self.requested: Stop | None = None
        self.commands: deque[Callable[[], None]] = deque()
        self.is_running = self.is_stepping = False
        self.entry: Entry = guest  # the way into the guest
        self.halt: Callable[[], None] = lambda: None  # have the VM's others outside it
        clock.changed.append(self.look)
        guest.notify, guest.moved, guest.overflowed = self.look_now, self._moved, self.pmu.interrupt
        self._moved()

    def _moved(self) -> None:
        """The fast ways to the guest lead elsewhere."""
        self.read_gpr, self.write_gpr = self.guest.read_gpr, self.guest.write_gpr
        self.time.moved()
        self.look()

    # --- the run loop ---

    def run(self, goal: Goal) -> Stop | Verdict:
        """Enter the guest and answer its exits until the run ends; ASLEEP, OVER: for now.

        On a thread that has called `silicon.hold_signals` since others could have theirs.
        """
        self.is_running, self.guest.thread = True, get_ident()
        try:
            self.view.begin_turn()
            return self._run(goal)
        except (CannotExecute, OutOfFrames) as problem:
            return self.error(str(problem))
        finally:
            self.is_running, self.guest.thread = False, 0
            if self.time.debt:
                self.time.pay()

    def _run(self, goal: Goal) -> Stop | Verdict:
        guest, time, until, end = self.guest, self.time, goal.until, goal.end
        entry, state, retired = self.entry, self.state, guest.count_retired
        counts, table, is_wall = self.exits, self.table, self.is_wall
        budget = 0 if end is None else end - self.retired
        inside = guest.is_inside  # the last run ended between two instructions
        if inside and self.attention:
            guest.kick()
        while True:
            if end is not None and budget <= 0:
                return Stop(StopKind.BUDGET)
            if inside:
                exit = entry.run(budget)
            else:
                if time.debt and not is_wall:
                    time.pay()
                if self.attention:
                    if (stop := self.attend()) is not None:
                        return stop
                    if self.guest is not guest:  # another technique has taken over
                        return OVER
                if is_wall and monotonic_ns() > time.stale:
                    time.rearm()
                exit = entry.resume(budget)
            reason = exit.reason
            inside = reason > LAST_EXIT and guest.is_inside
            try:
                counts[reason] += 1
                verdict = table[reason](self, exit)
            except KeyError:
                if reason in table:
                    raise
                counts[reason] = counts.get(reason, 0) + 1
                return self.unknown(exit)
            if verdict is not RESUME:
                return verdict  # type: ignore[no-any-return]
            if until is not None and until():
                return Stop(StopKind.UNTIL)
            if end is not None:
                budget = end - retired() - state.carried_out

    # --- between exits ---

    def look(self) -> None:
        """Make the run loop call `attend` before it enters the guest."""
        self.attention = True

    def look_now(self) -> None:
        """From any thread: `look`, also if the guest runs or sleeps."""
        self.attention = True
        if self.guest.thread == get_ident():
            self.guest.come_out()  # or an exit is being answered: the loop comes by
            return
        self.poke()
        if self.is_running and self.entry.is_in:
            self.guest.kick()

    def command(self, action: Callable[[], None], *, is_first: bool) -> None:
        """From any thread: have this done before it executes more, and `is_first` nothing else."""
        if is_first:
            self.commands = deque([action])
        elif len(self.commands) < COMMANDS_KEPT:
            self.commands.append(action)
        self.look_now()

    def obey(self) -> None:
        """Do what was commanded."""
        while commands := self.commands:
            commands.popleft()()

    def request(self, stop: Stop) -> None:
        """End the run before the next entry.

        The first request counts, but any counts more than the end of a slice of wall time, after
        which the guest would go on.
        """
        first = self.requested
        if first is None or (first.kind is StopKind.WALL and stop.kind is not StopKind.WALL):
            self.requested = stop
        self.attention = True

    def attend(self) -> Stop | Verdict | None:
        """Everything that is not for every exit: wishes, time, sleep, events.  None: enter."""
        self.attention = False
        self.guest.pay()
        self.kvm.settle()
        try:
            while self.posts:
                self.posts.popleft()()
            self.obey()
            self.time.fire()
        except BaseException:
            self.attention = True  # for the rest of it
            raise
        if self.state.activity and self.requested is None and not self._wakes():
            self.attention = True
            self.kvm.leave()
            return ASLEEP
        if self.requested is not None:
            stop, self.requested = self.requested, None
            self.attention = True
            return stop
        if self.time.is_over:
            self.attention = True
            return OVER
        self.kvm.come_back()
        self.events.deliver()
        self.time.arm()
        return None

    def _wakes(self) -> bool:
        """It is not active: whether something ends that."""
        if self.state.activity is not Activity.HLT or not self.events.may_wake():
            return False
        self.state.activity, self.events.state.kicked = Activity.ACTIVE, False
        return True

    @property
    def is_idle(self) -> bool:
        """Nothing is there to do for it now."""
        activity = self.state.activity
        if not activity or self.posts or self.commands or self.requested is not None:
            return False
        is_woken = activity is Activity.HLT and self.events.may_wake()
        return not is_woken and not self.time.is_due

    @property
    def is_off(self) -> bool:
        """No interrupt can bring it back."""
        is_deaf = self.state.activity is Activity.HLT and not self.guest.interrupt_flag()
        return is_deaf or self.state.activity is Activity.WAIT_FOR_SIPI

    # --- what answers need ---

    def fault(self, vector: int, error: int | None = None) -> Verdict:
        """The instruction that exited faults.

        RF is set in the flags that the fault pushes, so that the return from its handler does not
        meet an instruction breakpoint again (SDM 3B, "Instruction-Breakpoint Exception Condition").
        """
        if vector != Vector.DB:
            self.guest.set_resume_flag(vector != Vector.DF)  # that one is no fault
        code = (error or 0) if vector in WITH_ERROR_CODE else None
        self.events.stage(Event(vector, Kind.EXCEPTION, code))
        self.attention = True
        return RESUME

    def guest_fault(self, fault: GuestFault) -> Verdict:
        """The instruction that exited may not access its memory."""
        if fault.vector == Vector.PF:
            self.guest.set_cr2(fault.gva)
        return self.fault(fault.vector, fault.error)

    def spend(self, ticks: int) -> None:
        """Virtual time for what no retired instruction counts; else polling a timer takes ages."""
        self.time.debt += ticks

    def retire(self) -> None:
        """The hypervisor has carried out an instruction that does not exit under every technique.

        It counts, and takes time, as if the processor had executed it.
        """
        self.state.carried_out += 1
        self.time.debt += 1

    def deliver_again(self, event: Event) -> None:
        """An exit interrupted the delivery of an event, which goes in with the next entry.

        An INT n (INT3, INTO) is executed again instead: RIP is still there, and whether it retires
        follows from whether its delivery faults.
        """
        if event.kind.is_software:
            return
        self.events.requeue(event)
        self.attention = True

    @property
    def retired(self) -> int:
        """Instructions retired, by the processor or in its place, when it came out last."""
        return self.entry.retired + self.state.carried_out

    def translation(self) -> Translation:
        """What the guest's linear addresses mean now."""
        guest = self.guest
        cr0, cr3, cr4, efer, pdptes = guest.control()
        ac, keys = bool(guest.rflags & AC), guest.protection_keys()
        return Translation(cr0, cr3, cr4, efer, guest.cpl(), pdptes, ac, keys)

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

    def use(self, paging: Paging) -> None:
        """Have memory virtualized by another technique from now on."""
        self.guest.use(paging)
        self.view = self.guest.view

    # --- looking at it ---

    def error(self, problem: str) -> Stop:
        """A stop because something cannot be; the VM adds the whole state."""
        return Stop(StopKind.ERROR, problem)

    def unknown(self, exit: Exit) -> Stop:
        """Nothing answers this exit: name it and stop."""
        return self.error(no_handler(exit, 0 if self.guest.is_inside else self.guest.rip))

    def leave_guest(self) -> None:
        """Finish a run that a budget ended, so that registers can be read and written."""
        self.halt()
        while self.guest.is_inside:
            self.guest.kick()
            exit = self.guest.run(0)
            if exit.reason not in (Reason.EXTERNAL_INTERRUPT, Reason.KICK):
                verdict = self.table[exit.reason](self, exit)
                if verdict is not RESUME:
                    self.request(verdict)
        if self.time.debt:
            self.time.pay()

    def close(self) -> None:
        """Give back what it has of the host; its processor must not run again."""
        self.guest.close()
        let_go(*self.parts.values(), self.time, self)

    # --- registers, reset ---

    def registers(self) -> dict[str, int]:
        """All registers, by the names of `silicon.Processor.registers`."""
        self.leave_guest()
        return self.guest.registers()

    def set_registers(self, values: dict[str, int]) -> None:
        """Set all registers; those not named are as after reset."""
        self.leave_guest()
        self.guest.set_registers(values)
        control = self.guest.control()
        if Regime(*control).format is PAE_FORMAT:  # what a MOV to CR3 would have loaded
            self.guest.load_control(control._replace(pdptes=self.pdptes(Regime(*control))))
            self.view.mode_change()

    def pdptes(self, regime: Regime) -> tuple[int, ...]:
        """What the processor would load; GuestFault if it would not."""
        if regime.format is not PAE_FORMAT:
            return (0, 0, 0, 0)
        return regime.load_pdptes(entries_of(self.memory))

    def reset(self) -> None:
        """As after power-on, but for what is counted; `set_registers` says where it starts."""
        self.apic.load(self.power_on_apic)
        self.msrs.as_firmware_leaves_them()
        self.events.clear()
        self.kvm.reset()
        self.guest.reset()
        self.commands.clear()
        self.state.activity = Activity.first(self.is_bootstrap)
        self.time.armed = self.time.debt = 0
        self.attention, self.requested = True, None

    # --- snapshots ---

    @property
    def parts(self) -> dict[str, Kept]:
        """What keeps its own state, in the order in which it is to be restored."""
        return {
            "guest": self.guest, "events": self.events, "msrs": self.msrs, "pmu": self.pmu,
            "counts": self.counts, "kvm": self.kvm, "page": self.page, "async": self.kvm.async_pf,
        }  # fmt: skip

    def save(self) -> dict[str, Any]:
        """What a snapshot keeps of this vCPU, as plain values.  It must be out of the guest."""
        self.obey()
        own = self.state
        own.attention, own.armed = self.attention, self.time.armed
        saved = {name: part.save() for name, part in self.parts.items()}
        return saved | {"vcpu": plain(own), "apic": self.apic.save().hex()}

    def load(self, saved: dict[str, Any]) -> None:
        """Become what was saved.  ValueError if it does not fit."""
        self.apic.load(bytes.fromhex(saved["apic"]))
        for name, part in self.parts.items():
            part.load(saved[name])
        own = self.state = restore(VcpuState, saved["vcpu"], "vcpu")
        self.attention, self.time.armed = own.attention, own.armed
