"""A virtual machine: memory, one vCPU, a PC's devices, and the techniques it was given.

    vm = VM(memory="256M")
    vm.enter(loader.load(vm.memory, kernel))
    stop = vm.go(until=done)

Invariants: a VM belongs to one thread at a time; another thread may only `post`, `kick` and send
to its consoles.  Nothing is shared between VMs but the host they were given.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from understudy import inspection
from understudy.answers.control_registers import load_pdptes, offer_efer
from understudy.arch.address import MAXPHYADDR
from understudy.arch.msr import Msr
from understudy.closed import says_closed
from understudy.config import Config, check_choice
from understudy.console import Console
from understudy.describe import describe
from understudy.devices.kvmclock import MSRS as KVM_MSRS
from understudy.devices.pc import DEFAULT_EPOCH_NS, PC
from understudy.endings import Endings
from understudy.execution import Execution
from understudy.image import Image, SnapshotError, touched
from understudy.inspection import Inspection, Registers, reader
from understudy.interrupts import Router
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.paging import Paging
from understudy.quantities import bytes_of
from understudy.sessions import Sessions
from understudy.silicon import host_features
from understudy.state import plain, restore
from understudy.vcpu.cpu_features import Choice
from understudy.vcpu.cpu_model import CpuModel
from understudy.vcpu.loop import Goal, Vcpu
from understudy.vcpu.time import GuestClock
from understudy.verdict import Stop, StopKind

if TYPE_CHECKING:
    from understudy.guests.entry import Entry

__all__ = ["VM", "Console", "Stop"]

ANY_CR4 = (1 << 64) - 1
UNEXPECTED = frozenset(
    {StopKind.ERROR, StopKind.STUCK, StopKind.TRIPLE_FAULT}
)  # stops that show the whole state
ROOM = 1 << 31  # beside the guest's RAM: alignment to a gigabyte, and the hypervisor's tables


def check_names(config: Config) -> None:
    """ValueError if a Config names what no room of this house has."""
    check_choice("execution", config.execution, Execution.ALL)
    check_choice("paging", config.paging, Paging.ALL)
    Choice.of(config.cpu).made(host_features(), ANY_CR4)


@says_closed("name", "clock_kind", "engine")
class VM:
    """One virtual machine, made of a `Config`, or of its options: `VM("256M", paging="vtlb")`."""

    def __init__(
        self,
        config: Config | int | str | None = None,
        *,
        host: Host | None = None,
        **options: Any,
    ) -> None:
        self.config = config = Config.of(config, **options)
        check_names(config)
        size = bytes_of(config.memory)
        self.host = host if host is not None else Host(size + ROOM)
        self.memory = GuestMemory(self.host, size)
        self.memory.populate()
        self.processors = [self.host.plug(config.engine, config.clock)]
        bootstrap = self.processors[0]
        self.clock = GuestClock(lambda: bootstrap.tsc)
        self.clock.offset = -bootstrap.tsc
        self.posts: deque[Callable[[], None]] = deque()
        self.vcpus: list[Vcpu] = []
        self.interrupts, self.endings = Router(self.vcpus), Endings(self.vcpus, self.clock)
        self.sessions = Sessions()
        self.is_closed = False
        self.console, self.agent_port = (Console(self.post, self.fail) for _ in range(2))
        self.pc = self._board(size)
        self.bus = self.pc.bus
        self.pages = Paging.ALL[config.paging](
            self.host, self.memory.p2m, largest=config.largest_page
        )
        self._add_vcpus()
        self.pc.install_tables()

    @property
    def name(self) -> str:
        """What the VM is called."""
        return self.config.name

    @property
    def clock_kind(self) -> str:
        """Where guest time comes from: "virtual" or "wall"."""
        return self.config.clock

    @property
    def engine(self) -> str:
        """What executes the guest's instructions."""
        return self.config.engine

    def _board(self, size: int) -> PC:
        console, agent = self.console, self.agent_port
        is_wall, request = self.clock_kind == "wall", self.endings.request
        board = PC(
            self.clock,
            self.memory,
            power_off=lambda: request(Stop(StopKind.POWEROFF)),
            reset=lambda: request(Stop(StopKind.RESET)),
            debug_exit=lambda code: request(Stop(StopKind.DEBUG_EXIT, f"code {code}", code)),
            deliver=self.interrupts.deliver,
            extint=self.interrupts.extint,
            com1=console.transmit,
            com2=agent.transmit,
            ram_bytes=size,
            epoch_ns=time.time_ns() if is_wall else DEFAULT_EPOCH_NS,
            devices=self.config.devices,
        )
        console.receive, agent.receive = board.com1.receive, board.com2.receive
        return board

    def _add_vcpus(self) -> None:
        is_wall, execution = self.clock_kind == "wall", Execution.ALL[self.config.execution]
        for number, processor in enumerate(self.processors):
            cr4 = processor.rdmsr(Msr.IA32_VMX_CR4_FIXED1)
            model = CpuModel(host_features(), self.config.cpu, number, MAXPHYADDR, cr4)
            guest = execution(self.host, processor, self.pages, model, keep_timer=not is_wall)
            vcpu = Vcpu(
                guest, self.pages, model, self.clock, self.bus, self.memory, self.posts,
                is_wall=is_wall,
            )  # fmt: skip
            self.vcpus.append(vcpu)
            self._wire(number, vcpu)

    def _wire(self, number: int, vcpu: Vcpu) -> None:
        kvmclock, msrs = self.pc.kvmclock, vcpu.msrs
        vcpu.events.acknowledge = self.pc.acknowledge
        msrs.eoi = self.pc.end_of_interrupt
        msrs.interrupt_command = lambda icr: self.interrupts.command(vcpu, icr)
        msrs.note_tsc_offset()
        msrs.set_virtual_wire()
        offer_efer(vcpu)
        for index in KVM_MSRS:
            msrs.extra[index] = (
                lambda index=index: kvmclock.rdmsr(number, index),  # type: ignore[misc]
                lambda value, index=index: kvmclock.wrmsr(number, index, value),  # type: ignore[misc]
            )

    # --- memory virtualisation ---

    @property
    def paging(self) -> str:
        """The technique by which the guest's memory is virtualised now."""
        return self.pages.name

    @paging.setter
    def paging(self, name: str) -> None:
        """Change it at the next exit; the guest notices nothing.  From any thread."""
        check_choice("paging", name, Paging.ALL)
        self.post(lambda: self.change_paging(name))

    def change_paging(self, name: str) -> None:
        """Change it now: on the VM's thread, between two exits.

        ValueError if the guest is in real-address mode, which needs EPT; nothing has changed then.
        """
        check_choice("paging", name, Paging.ALL)
        old = self.pages
        if name == old.name:
            return
        old.finish_step()
        largest = self.config.largest_page
        pages = Paging.ALL[name](self.host, self.memory.p2m, largest=largest)
        try:
            for vcpu in self.vcpus:
                cr0 = vcpu.guest.control().cr0
                vcpu.guest.check_mode(cr0, name, has_ept=bool(pages.eptp))
        except ValueError:
            pages.close()
            raise
        self.pages, self.config = pages, replace(self.config, paging=name)
        self.pages.continue_counts(old)
        for vcpu in self.vcpus:
            vcpu.use(pages)
        old.close()

    # --- running ---

    def enter(self, entry: "Entry") -> None:
        """Set the initial state of the boot processor."""
        vcpu, pages = self.vcpus[0], self.pages
        cr0 = entry.registers.get("cr0", 0)
        vcpu.guest.check_mode(cr0, pages.name, has_ept=bool(pages.eptp))
        vcpu.leave_guest()
        vcpu.guest.set_registers(dict(entry.registers))
        load_pdptes(vcpu)

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
        if any(vcpu.is_running for vcpu in self.vcpus):
            raise RuntimeError(
                f"{self.name} is running: a callback cannot run it, nor can another thread"
            )
        if until is not None and until():
            return Stop(StopKind.UNTIL)
        end = None if budget is None else self.instructions + budget
        with self.endings.within(deadline_ns, wall_seconds):
            return self._described(self.vcpus[0].run(Goal(end, until)))

    def fail(self, problem: Exception) -> None:
        """From a callback that has failed: end the run, which raises this."""
        self.endings.fail(problem)

    def _described(self, stop: Stop) -> Stop:
        """With the decoded state, if something is not as it should be."""
        if stop.kind not in UNEXPECTED:
            return stop
        return replace(stop, detail=f"{stop.detail}\n{self._state_in_words()}")

    def _state_in_words(self) -> str:
        return "\n".join(
            describe(
                vcpu.guest.registers(), self.memory, vcpu.named_exits(), vcpu.guest.retired,
                self.bus.unclaimed, vcpu.msrs.unknown,
            )
            for vcpu in self.vcpus
        )  # fmt: skip

    def post(self, action: Callable[[], None]) -> None:
        """From any thread: do this on the VM's thread, between two exits."""
        self.posts.append(action)
        for vcpu in self.vcpus:
            vcpu.look_now()

    def stop(self, reason: str = "asked to") -> None:
        """From any thread: end `go` soon, as `StopKind.STOPPED`."""
        self.endings.interrupt(Stop(StopKind.STOPPED, reason))

    # --- looking, saving, ending ---

    @property
    def instructions(self) -> int:
        """Instructions retired."""
        return sum(vcpu.retired for vcpu in self.vcpus)

    def counts(self) -> dict[str, Any]:
        """Everything counted, as plain values."""
        raw, vcpu = self.processors[0].counters(), self.vcpus[0]
        return {
            "instructions": self.instructions,
            "exits": vcpu.named_exits(),
            "kicks": vcpu.kicks,
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
            "cr_accesses": vcpu.named_cr_accesses(),
            "injected": dict(sorted(vcpu.events.state.injected.items())),
            "engine": dict(raw["engine"]),
        }

    def describe(self) -> str:
        """The decoded state, for people."""
        return f"{self.name} at guest time {self.clock.now()} ns\n{self._state_in_words()}"

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
            return self._walks(gva)
        return {
            "name": self.name,
            "host": self.host.inspect(),
            "devices": self.pc.inspect(),
            "counts": self.counts(),
        }

    def _walks(self, gva: int) -> Inspection:
        self.vcpus[0].leave_guest()
        guest, memory = self.vcpus[0].guest, self.host.memory
        return inspection.inspect(
            gva, f"paging {self.pages.name}", Registers(*guest.control()), reader(self.memory.read),
            self.pages.eptp, Registers(*guest.real_control()[:4], None), reader(memory.read),
        )  # fmt: skip

    def snapshot(self) -> Image:
        """This moment, as a value: memory, processors, devices."""
        for vcpu in self.vcpus:
            vcpu.leave_guest()
        return Image(self._state(), tuple(touched(self.memory)))

    def _state(self) -> dict[str, Any]:
        return {
            "config": plain(self.config),
            "now": self.clock.now(),
            "offset": self.clock.offset,
            "vcpus": [vcpu.save() for vcpu in self.vcpus],
            "paging": self.pages.save(),
            "board": self.pc.save(),
            "sessions": self.sessions.save(),
        }  # fmt: skip

    def _become(self, state: dict[str, Any]) -> None:
        self.clock.offset = state["offset"]
        self.pc.load(state["board"])
        for vcpu, saved in zip(self.vcpus, state["vcpus"], strict=True):
            vcpu.load(saved)
        if self.clock_kind == "wall":  # guest time goes on from where it was
            self.clock.offset = state["now"] - self.processors[0].tsc
        for vcpu in self.vcpus:
            vcpu.msrs.note_tsc_offset()
        self.pages.load(state["paging"])
        self.sessions.load(state["sessions"])

    def save(self) -> bytes:
        """A snapshot as bytes."""
        return self.snapshot().to_bytes()

    @classmethod
    def restore(cls, data: bytes, *, host: Host | None = None, engine: str | None = None) -> Self:
        """The machine that `save` saw, ready to go on; on another engine if one is named.

        SnapshotError if the bytes are no snapshot, or one that does not fit.
        """
        image = Image.of_bytes(data)
        try:
            config = restore(Config, image.state["config"], "config")
            vm = cls(replace(config, engine=engine or config.engine), host=host)
            try:
                for gpa, piece in image.pieces:
                    vm.memory.write(gpa, piece)
                vm._become(image.state)
            except BaseException:
                vm.close()
                raise
        except SnapshotError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as problem:
            raise SnapshotError(f"the snapshot does not fit: {problem!r}") from None
        return vm

    def close(self) -> None:
        """Give everything back to the host."""
        if self.is_closed:
            return
        self.is_closed = True
        for vcpu in self.vcpus:
            vcpu.leave_guest()
            vcpu.guest.close()
        self.pages.close()
        for extent in self.memory.p2m:
            self.host.release(extent.pfn, extent.frames)
        for processor in self.processors:
            self.host.unplug(processor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
