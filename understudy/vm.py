"""A virtual machine: memory, one vCPU, a PC's devices, and the techniques it was given.

    vm = VM(memory="256M")
    vm.enter(loader.load(vm.memory, kernel))
    stop = vm.go(until=done)

Invariants: a VM belongs to one thread at a time; another thread may only `post`, `kick` and send
to its consoles.  Nothing is shared between VMs but the host they were given.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from understudy import inspection
from understudy.answers.translation import load_pdptes
from understudy.arch.msr import InterruptCommand, Msr
from understudy.devices.kvmclock import MSRS as KVM_MSRS
from understudy.devices.message import Delivery, Message
from understudy.devices.pc import DEFAULT_EPOCH_NS, PC
from understudy.execution.vmx.control_registers import check_mode
from understudy.inspection import Inspection
from understudy.machine.frames import PAGE, bytes_of
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.paging import Paging
from understudy.silicon import host_features
from understudy.vcpu.cpu_model import CpuModel
from understudy.vcpu.loop import Goal, GuestClock, Vcpu
from understudy.verdict import Stop

if TYPE_CHECKING:
    from understudy.guests.entry import Entry

__all__ = ["VM", "Console", "Stop"]

SMALLEST, LARGEST = 1 << 20, 1 << 38
PHYSICAL_BITS = 46  # as the silicon has them
ROOM = 1 << 31  # beside the guest's RAM: alignment to a gigabyte, and the hypervisor's tables


class Console:
    """A serial line to the guest."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self.on_output: list[Callable[[bytes], None]] = []
        self.receive: Callable[[bytes], None] = lambda data: None
        self._post = post

    def transmit(self, data: bytes) -> None:
        """The guest has sent this."""
        for listener in self.on_output:
            listener(data)

    def send(self, data: bytes) -> None:
        """Type this; from any thread.  The guest gets it when it runs."""
        self._post(lambda: self.receive(data))


class VM:
    """One virtual machine.

    clock: "virtual" (time is instructions retired, idle time is skipped) or "wall".  engine:
    "dbt" or "reference".  paging: a name in `Paging.ALL`; largest_page: the largest EPT page.
    """

    def __init__(
        self,
        memory: int | str = "256M",
        *,
        clock: str = "virtual",
        engine: str = "dbt",
        host: Host | None = None,
        name: str = "vm",
        paging: str = "ept",
        largest_page: int | str = "1G",
        smap: bool = False,
    ) -> None:
        self._check(memory, clock, engine, paging)
        self.name, self.clock_kind, self.engine = name, clock, engine
        self.largest_page, self.smap = largest_page, smap
        size = bytes_of(memory)
        self.host = host if host is not None else Host(size + ROOM)
        self.memory = GuestMemory(self.host, size)
        self.memory.populate()
        self.processor = self.host.plug(engine, clock)
        self.clock = GuestClock(self.processor)
        self.clock.offset = -self.processor.tsc
        self.console, self.agent_port = Console(self.post), Console(self.post)
        self.pc = self._board(size)
        self.bus = self.pc.bus
        self.pages = Paging.ALL[paging](self.host, self.memory.p2m, largest=largest_page)
        model = CpuModel(
            host_features(), smap, 0, PHYSICAL_BITS, self.processor.rdmsr(Msr.IA32_VMX_CR4_FIXED1)
        )
        self.vcpu = Vcpu(self, self.processor, self.pages, model, self.clock)
        self._wire()
        self.pc.install_tables()
        self.is_closed = False

    @classmethod
    def _check(cls, memory: int | str, clock: str, engine: str, paging: str) -> None:
        size = bytes_of(memory)
        if not SMALLEST <= size <= LARGEST or size % PAGE:
            raise ValueError(
                f"memory {memory!r}: expected {SMALLEST >> 20}M to {LARGEST >> 30}G, whole pages"
            )
        cls._check_choice("clock", clock, ("virtual", "wall"))
        cls._check_choice("engine", engine, ("dbt", "reference"))
        cls._check_choice("paging", paging, tuple(Paging.ALL))

    @staticmethod
    def _check_choice(what: str, value: str, known: tuple[str, ...]) -> None:
        if value not in known:
            raise ValueError(f"{what} {value!r}: expected one of {', '.join(known)}")

    def _board(self, size: int) -> PC:
        console, agent = self.console, self.agent_port
        is_wall = self.clock_kind == "wall"
        board = PC(
            self.clock,
            self.memory.write,
            power_off=lambda: self.vcpu.request(Stop("poweroff")),
            reset=lambda: self.vcpu.request(Stop("reset")),
            debug_exit=lambda code: self.vcpu.request(Stop("debug-exit", f"code {code}", code)),
            deliver=self._deliver,
            extint=self._extint,
            com1=console.transmit,
            com2=agent.transmit,
            ram_bytes=size,
            epoch_ns=time.time_ns() if is_wall else DEFAULT_EPOCH_NS,
        )
        console.receive, agent.receive = board.com1.receive, board.com2.receive
        return board

    def _wire(self) -> None:
        vcpu, kvmclock = self.vcpu, self.pc.kvmclock
        vcpu.events.acknowledge = self.pc.acknowledge
        vcpu.msrs.eoi = self.pc.end_of_interrupt
        vcpu.msrs.interrupt_command = self._interrupt_command
        vcpu.msrs.note_tsc_offset()
        vcpu.msrs.set_virtual_wire()
        for index in KVM_MSRS:
            vcpu.msrs.extra[index] = (
                lambda index=index: kvmclock.rdmsr(0, index),  # type: ignore[misc]
                lambda value, index=index: kvmclock.wrmsr(0, index, value),  # type: ignore[misc]
            )

    # --- memory virtualisation ---

    @property
    def paging(self) -> str:
        """The technique by which the guest's memory is virtualised now."""
        return self.pages.name

    @paging.setter
    def paging(self, name: str) -> None:
        """Change it at the next exit; the guest notices nothing.  From any thread."""
        self._check_choice("paging", name, tuple(Paging.ALL))
        self.post(lambda: self.change_paging(name))

    def change_paging(self, name: str) -> None:
        """Change it now: on the VM's thread, between two exits.

        ValueError if the guest is in real-address mode, which needs EPT; nothing has changed then.
        """
        self._check_choice("paging", name, tuple(Paging.ALL))
        old = self.pages
        if name == old.name:
            return
        old.finish_step()
        pages = Paging.ALL[name](self.host, self.memory.p2m, largest=self.largest_page)
        try:
            check_mode(self.vcpu.execution.control.get().cr0, pages)
        except ValueError:
            pages.close()
            raise
        self.pages = pages
        self.pages.continue_counts(old)
        self.vcpu.execution.use(self.pages)
        old.close()

    # --- wires from the board to the vCPU ---

    def _deliver(self, message: Message) -> None:
        """An interrupt message from the I/O APIC."""
        vcpu = self.vcpu
        match message.delivery:
            case Delivery.FIXED | Delivery.LOWEST if message.vector >= 16:
                vcpu.apic.raise_vector(message.vector, message.level)
            case Delivery.NMI:
                vcpu.events.nmi()
            case _:
                return
        vcpu.attention = True

    def _interrupt_command(self, icr: int) -> None:
        """An interrupt command that left the APIC (SDM 3A, "Issuing Interprocessor Interrupts").

        There is one processor; what concerns it, and did not stay inside its APIC, is an NMI.
        """
        command = InterruptCommand(icr)
        if command.DELIVERY_MODE != Delivery.NMI:
            return
        is_x2apic = self.vcpu.msrs.apic_page == 0
        target = icr >> 32 if is_x2apic else icr >> 56
        everyone = 0xFFFF_FFFF if is_x2apic else 0xFF
        match command.SHORTHAND:
            case 0:
                is_own = target in (self.vcpu.model.apic_id, everyone)
            case shorthand:
                is_own = shorthand in (1, 2)  # self; all including self
        if is_own:
            self.vcpu.events.nmi()
            self.vcpu.attention = True

    def _extint(self, level: bool) -> None:
        """The 8259 pair's output."""
        self.vcpu.events.extint = level
        self.vcpu.apic.lint(0, level)
        self.vcpu.attention = True

    # --- running ---

    def enter(self, entry: "Entry") -> None:
        """Set the initial state of the boot processor."""
        check_mode(entry.registers.get("cr0", 0), self.pages)
        self.vcpu.leave_guest()
        self.vcpu.execution.set_registers(dict(entry.registers))
        load_pdptes(self.vcpu)

    def go(
        self,
        *,
        budget: int | None = None,
        until: Callable[[], bool] | None = None,
        deadline_ns: int | None = None,
        wall_seconds: float | None = None,
    ) -> Stop:
        """Run until one of these, or until the guest ends.

        budget: instructions.  until: asked after each exit, so keep it cheap.  deadline_ns: guest
        time.  wall_seconds: real time.  A KeyboardInterrupt passes through; the VM can go on.
        """
        if self.is_closed:
            raise RuntimeError(f"{self.name} is closed")
        vcpu = self.vcpu
        if until is not None and until():
            return Stop("until")
        end = None if budget is None else self.instructions + budget
        timer = late = alarm = None
        if deadline_ns is not None:
            text = f"guest time {deadline_ns} ns"
            alarm = self.clock.at(deadline_ns, lambda: vcpu.request(Stop("deadline", text)))
        if wall_seconds is not None:
            late = Stop("wall", f"{wall_seconds} s")
            timer = threading.Timer(max(wall_seconds, 0), self._interrupt, (late,))
            timer.daemon = True
            timer.start()
        try:
            return vcpu.run(Goal(end, until))
        finally:
            if alarm is not None:
                alarm.cancel()
            if timer is not None:
                timer.cancel()
                timer.join()
            if vcpu.requested is late:
                vcpu.requested = None

    def _interrupt(self, stop: Stop) -> None:
        self.vcpu.request(stop)
        self.vcpu.look_now()

    def post(self, action: Callable[[], None]) -> None:
        """From any thread: do this on the VM's thread, between two exits."""
        self.vcpu.post(action)

    def stop(self, reason: str = "asked to") -> None:
        """From any thread: end `go` soon (Stop kind "wall")."""
        self._interrupt(Stop("wall", reason))

    # --- looking, saving, ending ---

    @property
    def instructions(self) -> int:
        """Instructions retired."""
        return self.vcpu.retired

    def counts(self) -> dict[str, Any]:
        """Everything counted, as plain values."""
        raw = self.processor.counters()
        return {
            "instructions": self.instructions,
            "exits": self.vcpu.named_exits(),
            "kicks": self.vcpu.kicks,
            "walk": {
                dimension: {str(level): n for level, n in levels.items()}
                for dimension, levels in raw["walk"].items()
            },
            "walk_caches": raw["walk_caches"],
            "tlb": {"misses": raw["tlb_misses"], "instruction_misses": raw["itlb_misses"]},
            "paging": self.pages.name,
            "fills": self.pages.fills,
            "flushes": self.pages.flushes,
            "faults": dict(self.pages.faults),
            "tables": self.pages.table_count,
            "cr_accesses": self.vcpu.named_cr_accesses(),
            "injected": dict(sorted(self.vcpu.events.injected.items())),
            "engine": dict(raw["engine"]),
        }

    def describe(self) -> str:
        """The decoded state, for people."""
        return f"{self.name} at guest time {self.clock.now()} ns\n{self.vcpu.describe()}"

    @overload
    def inspect(self) -> dict[str, Any]: ...
    @overload
    def inspect(self, gva: int) -> Inspection: ...
    def inspect(self, gva: int | None = None) -> dict[str, Any] | Inspection:
        """Everything about the machine, as nested plain values.

        With a linear address: the guest's page walk and the hypervisor's, every entry decoded;
        `print` it, or call its own `inspect`.
        """
        if gva is not None:
            return self._inspect(gva)
        return {
            "name": self.name,
            "host": self.host.inspect(),
            "devices": self.pc.inspect(),
            "counts": self.counts(),
        }

    def _inspect(self, gva: int) -> Inspection:
        self.vcpu.leave_guest()  # so that the execution technique holds the guest's state
        registers = inspection.Registers(*self.vcpu.execution.control.get())
        guest, host = inspection.reader(self.memory.read), inspection.reader(self.host.memory.read)
        technique, pages = f"paging {self.pages.name}", self.pages
        tables, root = pages.translation
        return inspection.inspect(gva, technique, registers, guest, tables, root, host)

    def save(self) -> bytes:
        """A snapshot: memory, processor, devices."""
        from understudy import snapshot

        return snapshot.save(self)

    @classmethod
    def restore(cls, data: bytes, *, host: Host | None = None, engine: str | None = None) -> Self:
        """The machine that `save` saw, ready to go on; on another engine if one is named."""
        from understudy import snapshot

        return snapshot.restore(cls, data, host, engine)

    def close(self) -> None:
        """Give everything back to the host."""
        if self.is_closed:
            return
        self.is_closed = True
        self.vcpu.leave_guest()
        self.vcpu.execution.close()
        self.pages.close()
        for extent in self.memory.p2m:
            self.host.release(extent.pfn, extent.frames)
        self.host.unplug(self.processor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
