"""A virtual machine: memory, vCPUs, a PC's devices, and the techniques it was given.

    vm = VM(memory="256M")
    vm.boot(lambda machine: loader.load(machine.memory, kernel))
    stop = vm.go(until=done)

Invariants: a VM belongs to one thread at a time; another thread may only `post`, `stop`, choose its
paging technique and send to its consoles.  Nothing is shared between VMs but the host they were
given, and on it the frames of clones.
"""

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from understudy import inspection
from understudy.answers.triple_fault import holds_no_gate, raises
from understudy.assembly import board_of, check_names, paging_of, tell_apart, vcpu_of
from understudy.closed import says_closed
from understudy.config import Config, check_choice
from understudy.console import Console
from understudy.counting import counted
from understudy.describe import describe
from understudy.endings import Endings
from understudy.guest import SegmentName
from understudy.image import Contents, Image, Shared, touched
from understudy.image_file import SnapshotError, pack, write
from understudy.inspection import Inspection, Registers, reader
from understudy.interrupts import Router
from understudy.machine.host import Host
from understudy.machine.machine import Machine
from understudy.machine.memory import GuestMemory
from understudy.paging import Paging
from understudy.quantities import bytes_of
from understudy.sessions import Sessions
from understudy.state import plain, restore
from understudy.vcpu.loop import Goal, Vcpu
from understudy.vcpu.time import GuestClock
from understudy.verdict import Stop, StopKind

if TYPE_CHECKING:
    from understudy.guests.entry import Entry

__all__ = ["VM", "Console", "Stop"]

UNEXPECTED = frozenset(
    {StopKind.ERROR, StopKind.STUCK, StopKind.TRIPLE_FAULT}
)  # stops that show the whole state
ROOM = 1 << 31  # beside the guest's RAM: alignment to a gigabyte, and the hypervisor's tables


@says_closed("name", "clock_kind", "engine")
class VM:
    """One virtual machine, made of a `Config`, or of its options: `VM("256M", paging="vtlb")`."""

    def __init__(
        self,
        config: Config | int | str | None = None,
        *,
        host: Host | None = None,
        contents: Contents | None = None,
        **options: Any,
    ) -> None:
        """`contents`: what is in its memory from the beginning (None: zeros)."""
        self.config = config = Config.of(config, **options)
        check_names(config)
        size = bytes_of(config.memory)
        self.host = host if host is not None else Host(size + ROOM)
        self.memory = GuestMemory(self.host, size)
        if contents is None:
            self.memory.populate()
        else:
            contents.fill(self.memory)
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
        self.pc = board_of(
            config, self.clock, self.memory, self.interrupts, self.endings.request,
            self.console, self.agent_port,
        )  # fmt: skip
        self.bus = self.pc.bus
        self.pages = paging_of(config, self.host, self.memory)
        for processor in self.processors:
            vcpu = vcpu_of(
                config, self.host, processor, self.pages, self.memory, self.pc, self.interrupts,
                self.posts, self.clock,
            )  # fmt: skip
            self.vcpus.append(vcpu)
        self.machine = Machine(self.memory, self.vcpus, self.pc)
        self.pc.install_tables()
        self._load: Callable[[Machine], Entry] | None = None
        self.on_reset: list[Callable[[], None]] = []  # called after each
        self._clones = itertools.count(1)

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
                vcpu.guest.check_mode(cr0, name, has_ept=pages.has_ept)
        except ValueError:
            pages.close()
            raise
        self.pages, self.config = pages, replace(self.config, paging=name)
        self.pages.continue_counts(old)
        for vcpu in self.vcpus:
            vcpu.use(pages)
        old.close()

    # --- running ---

    def boot(self, load: "Callable[[Machine], Entry]") -> None:
        """Have a loader put a guest into memory, and start there; again after each reset."""
        self.enter(load(self.machine))
        self._load = load

    def enter(self, entry: "Entry") -> None:
        """Set the initial state of the boot processor."""
        self.vcpus[0].set_registers(dict(entry.registers))

    def reset(self) -> None:
        """What the reset button does: nothing is left of what ran, the guest starts again.

        RuntimeError if the VM has nothing to boot from (`boot` has not been called).
        """
        if self._load is None:
            raise RuntimeError(f"{self.name} cannot be reset: it was not started by `boot`")
        for vcpu in self.vcpus:
            vcpu.leave_guest()
        self.pages.finish_step()
        self.memory.clear()
        self.pc.reset()
        self.pc.install_tables()
        for vcpu in self.vcpus:
            vcpu.reset()
        self.enter(self._load(self.machine))
        for listener in self.on_reset:
            listener()

    def go(
        self,
        *,
        budget: int | None = None,
        until: Callable[[], bool] | None = None,
        deadline_ns: int | None = None,
        wall_seconds: float | None = None,
        reboot: bool | None = None,
    ) -> Stop:
        """Run until one of these, or until the guest ends.

        budget: instructions.  until: asked after each exit, so keep it cheap.  deadline_ns: guest
        time.  wall_seconds: real time.  reboot: whether a guest that resets itself starts again
        (None: as the VM was configured, if it was started by `boot`).  A KeyboardInterrupt passes
        through; the VM can go on.
        """
        if any(vcpu.is_running for vcpu in self.vcpus):
            raise RuntimeError(
                f"{self.name} is running: a callback cannot run it, nor can another thread"
            )
        if until is not None and until():
            return Stop(StopKind.UNTIL)
        end = None if budget is None else self.instructions + budget
        again = self._load is not None and (self.config.reboot if reboot is None else reboot)
        with self.endings.within(deadline_ns, wall_seconds):
            while True:
                stop = self._meant(self.vcpus[0].run(Goal(end, until)))
                if stop.kind is not StopKind.RESET or not again:
                    return self._described(stop)
                self.reset()

    def fail(self, problem: Exception) -> None:
        """From a callback that has failed: end the run, which raises this."""
        self.endings.fail(problem)

    def _meant(self, stop: Stop) -> Stop:
        """A triple fault is a reset if the VM was configured so, or if the guest means it so."""
        if stop.kind is not StopKind.TRIPLE_FAULT or self.config.triple_fault == "stop":
            return stop
        guest = self.vcpus[0].guest
        at = guest.segment_base(SegmentName.CS) + guest.rip
        if self.config.triple_fault == "reset" or (
            holds_no_gate(guest.idtr().limit) and raises(guest.code_at(at, 2))
        ):
            return Stop(StopKind.RESET, "by a triple fault")
        return stop

    def _described(self, stop: Stop) -> Stop:
        """With the decoded state, if something is not as it should be."""
        if stop.kind not in UNEXPECTED:
            return stop
        return replace(stop, detail=f"{stop.detail}\n{self._state_in_words()}")

    def _state_in_words(self) -> str:
        return "\n".join(
            describe(
                vcpu.guest.registers(), self.memory, vcpu.counts.named_exits(), vcpu.guest.retired,
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
        return counted(self.vcpus, self.processors, self.pages)

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

    def snapshot(self) -> "Image[Self]":
        """This moment, as a value.  The VM goes on; what it writes from now on, it copies first."""
        state = self._state()
        contents = Shared(self.host, self.memory.p2m)
        made = type(self)._of_image
        return Image(state, contents, made, self.host, self._load, self._clones)

    def _state(self) -> dict[str, Any]:
        for vcpu in self.vcpus:
            vcpu.leave_guest()
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
        """This moment as bytes, for a file; nothing changes for the VM."""
        return b"".join(pack(self._state(), touched(self.host, self.memory.p2m)))

    def write(self, path: Path) -> int:
        """This moment to a file, which is there whole or not at all; returns its bytes."""
        return write(path, pack(self._state(), touched(self.host, self.memory.p2m)))

    @classmethod
    def restore(
        cls, data: "bytes | Path", *, host: Host | None = None, engine: str | None = None,
        clone: int | None = None,
    ) -> Self:  # fmt: skip
        """The machine that `save` saw, ready to go on; on another engine if one is named.

        data: bytes, or a file that has them.  SnapshotError if they are no snapshot, or one that
        does not fit.  clone: as for `Image.restore`.
        """
        return Image.of(data, cls._of_image).restore(host=host, engine=engine, clone=clone)

    @classmethod
    def _of_image(
        cls, image: "Image[Any]", host: Host | None, engine: str | None, clone: int | None
    ) -> Self:
        try:
            config = restore(Config, image.state["config"], "config")
            config = replace(config, engine=engine or config.engine)
            vm = cls(config, host=host, contents=image.contents)
            try:
                vm._become(image.state)
                vm._load = image.load
                tell_apart(vm.config, vm.pc, clone)
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
        self.memory.close()
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
