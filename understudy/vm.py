"""A virtual machine: memory, vCPUs, a PC's devices, and the techniques it was given.

    vm = VM(memory="256M")
    vm.boot(lambda machine: loader.load(machine.memory, kernel))
    stop = vm.go(until=done)

Invariants: a VM belongs to one thread at a time; another may only `post`, `stop`, choose its paging
technique and send to its consoles.  VMs share nothing but a host, and on it the frames of clones.
"""

import itertools
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, Unpack, overload

from understudy import assembly, inspection, outlets, tenant
from understudy.answers.triple_fault import meant
from understudy.changing import Changing
from understudy.closed import says_closed
from understudy.config import Config
from understudy.console import Console
from understudy.counting import counted
from understudy.describe import in_words
from understudy.endings import Endings
from understudy.guests.entry import Entry, GuestError
from understudy.image import TELLING, UNFIT, Contents, Image, Nothing, Outside, Shared, touched
from understudy.image_file import SnapshotError, pack, write
from understudy.inspection import Inspection
from understudy.interrupts import Router
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.machine.machine import Machine
from understudy.machine.memory import GuestMemory
from understudy.quantities import bytes_of
from understudy.sessions import Sessions
from understudy.state import U62, Kept, plain, restore
from understudy.tenant import still
from understudy.vcpu.loop import Vcpu
from understudy.verdict import UNEXPECTED, Stop, StopKind

__all__ = ["VM", "Console", "Stop"]

PARTS = frozenset(
    ("memory", "processors", "clock", "posts", "vcpus", "turns", "interrupts", "endings",
     "sessions", "pc", "bus", "pages", "machine", "on_reset")
)  # fmt: skip
"""What a closed VM has no more: they hold each other, and only a garbage collection ends that."""


@says_closed("name", "clock_kind", "engine", gone=PARTS)
class VM(Changing):
    """One virtual machine, made of a `Config`, or of its options: `VM("256M", paging="vtlb")`."""

    def __init__(
        self,
        config: Config | int | str | None = None,
        *,
        host: Host | None = None,
        contents: Contents | None = None,
        **options: Any,
    ) -> None:
        """`contents`: what is in its memory from the beginning (None: what firmware leaves)."""
        config = Config.of(config, **options)
        self.config = config = config if contents else assembly.on_host(config, host)
        assembly.check_names(config)
        self.is_closed = False
        with ExitStack() as given:  # given back here if something fails, else by `close`
            self._make(config, host, contents, given)
            self._given = given.pop_all()

    def _make(
        self, config: Config, host: Host | None, contents: Contents | None, given: ExitStack
    ) -> None:
        self.host = host if host is not None else assembly.host_of(config)
        self.host.join()
        given.callback(self.host.leave)
        self.memory = GuestMemory(self.host, bytes_of(config.memory), config.rom)
        given.callback(self.memory.close)
        self.posts: deque[Callable[[], None]] = deque()
        self.vcpus: list[Vcpu] = []
        given.callback(self.vcpus.clear)
        ballooned = tenant.hold(
            self.host, config, self.memory, self.vcpus, self.post, lambda: self.pages.thin(), given
        )
        (contents or Nothing()).fill(self.memory)
        self.processors, self.clock = assembly.processors_of(config, self.host, given)
        self.interrupts, self.endings = Router(self.vcpus), Endings(self.vcpus, self.clock)
        self.sessions = Sessions()
        self.console, self.com2 = (Console(self.post, self.fail) for _ in range(2))
        self.pc = assembly.board_of(
            config, self.clock, self.memory, ballooned, self.interrupts, self.endings.request,
            self.console, self.com2, self.post, self._ejected,
        )  # fmt: skip
        given.callback(self.pc.close)
        tenant.equip(self.host, self.memory, outlets.balloons_of(self.pc), self.clock)
        self.bus = self.pc.bus
        self.pages = assembly.paging_of(config, self.host, self.memory)
        given.callback(lambda: self.pages.close())  # the technique of then
        for _ in config.topology.apic_ids:
            vcpu = assembly.vcpu_of(
                config, self.host, self.processors, self.pages, self.memory, self.pc,
                self.interrupts, self.posts, self.clock,
            )  # fmt: skip
            self.vcpus.append(vcpu)
            given.callback(vcpu.close)
        self.turns = tenant.place_of(
            self.host, config, self.vcpus, self.clock, self._ended, self.pc.kvmclock.stolen, self
        )
        given.callback(self.turns.close)
        self.machine = Machine(self.memory, self.vcpus, self.pc)
        if contents is None:
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

    # --- running ---

    def boot(self, load: Callable[[Machine], Entry]) -> None:
        """Have a loader put a guest into memory, and start there; again after each reset."""
        self.enter(load(self.machine))
        self._load = load

    def enter(self, entry: Entry) -> None:
        """Set the initial state of the boot processor."""
        self.vcpus[0].set_registers(dict(entry.registers))

    def reset(self) -> None:
        """What the reset button does: nothing is left of what ran, the guest starts again.

        RuntimeError if the VM has nothing to boot from (`boot` has not been called), OutOfFrames if
        it shares memory, and the host has no room for its own: then it is as it was.  GuestError if
        there is nothing to start any more: then nothing is left, and the next run tries again.
        """
        if self._load is None:
            raise RuntimeError(f"{self.name} cannot be reset: it was not started by `boot`")
        for vcpu in self.vcpus:
            vcpu.leave_guest()
        self.pages.finish_steps()
        self.memory.clear()
        self.pc.reset()
        self.pc.install_tables()
        self.endings.request(Stop(StopKind.RESET))  # forgotten if there is something to start
        entry = self._load(self.machine)
        for vcpu in self.vcpus:
            vcpu.reset()
        self.enter(entry)
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
        (None: as configured).  After a KeyboardInterrupt it can go on.
        """
        self._refuse_if_running("run")
        if until is not None and until():
            return Stop(StopKind.UNTIL)
        end = None if budget is None else self.instructions + budget
        with self.endings.within(deadline_ns, wall_seconds):
            while (stop := self._ended(self.turns.run(end, until), reboot)) is None:
                if until is not None and until():
                    return Stop(StopKind.UNTIL)
        return stop

    def _ended(self, stop: Stop, reboot: bool | None = None) -> Stop | None:
        """What comes of the end of a run; None: the guest has started again."""
        stop = meant(stop, self.vcpus[0].guest, self.config.triple_fault)
        again = self.config.reboot if reboot is None else reboot
        if stop.kind is not StopKind.RESET or self._load is None or not again:
            return self._described(stop)
        try:
            self.reset()
        except (OutOfFrames, GuestError) as problem:
            self.endings.request(stop)  # the next run tries again
            return self._described(Stop(StopKind.ERROR, f"the guest cannot start again: {problem}"))
        self.endings.again()
        return None

    def _refuse_if_running(self, wish: str) -> None:
        if any(vcpu.is_running for vcpu in self.vcpus):
            others = f"a callback cannot {wish} it, nor can another thread"
            raise RuntimeError(f"{self.name} is running: {others}")

    def fail(self, problem: Exception) -> None:
        """From a callback that has failed: end the run, which raises this."""
        self.endings.fail(problem)

    def _described(self, stop: Stop) -> Stop:
        """With the decoded state, if something is not as it should be."""
        if stop.kind not in UNEXPECTED:
            return stop
        return replace(stop, detail=f"{stop.detail}\n{self._in_words()}")

    def _in_words(self) -> str:
        return in_words(self.vcpus, self.memory, self.bus.unclaimed)

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
        """Instructions retired; of those that are in the guest, up to when they went in."""
        with self.turns.held():
            return sum(vcpu.retired for vcpu in self.vcpus)

    @still
    def counts(self) -> dict[str, Any]:
        """Everything counted, as plain values."""
        told = counted(self.vcpus, self.processors, self.pages) | self.turns.counts()
        return told | outlets.carried(self.pc)

    @still
    def describe(self) -> str:
        """The decoded state, for people."""
        return f"{self.name} at guest time {self.clock.now()} ns\n{self._in_words()}"

    @overload
    def inspect(self) -> dict[str, Any]: ...
    @overload
    def inspect(self, gva: int) -> Inspection: ...
    def inspect(self, gva: int | None = None) -> dict[str, Any] | Inspection:
        """Everything, as plain values; of a linear address both page walks, to be printed."""
        if gva is not None:
            with self.turns.still():
                return inspection.of_vcpu(self.vcpus[0], gva)
        return {
            "name": self.name,
            "host": self.host.inspect(),
            "devices": self.pc.inspect(),
            "counts": self.counts(),
        }

    @still
    def snapshot(self) -> "Image[Self]":
        """This moment, as a value.  The VM goes on; what it writes from now on, it copies first.

        PlanError if its host has less memory than its VMs, and no room in the swap file for it.
        """
        state, contents = self._state(), Shared(self.host, self.memory.p2m)
        make = type(self)._of_image
        return Image(state, contents, make, self.host, self._load, self._clones)

    @property
    def parts(self) -> dict[str, Kept]:
        """What keeps its own state, in the order in which it is to be restored."""
        parts: dict[str, Kept] = {"board": self.pc, "bus": self.bus}
        parts |= {f"vcpu{number}": vcpu for number, vcpu in enumerate(self.vcpus)}
        return parts | {"paging": self.pages, "sessions": self.sessions}

    def _state(self) -> dict[str, Any]:
        for vcpu in self.vcpus:
            vcpu.leave_guest()
        own = {"config": plain(self.config), "now": self.clock.now(), "offset": self.clock.offset}
        own |= {"place": self.turns.save(), "features": sorted(self.vcpus[0].model.shown)}
        return own | {name: part.save() for name, part in self.parts.items()}

    def _become(self, state: dict[str, Any]) -> None:
        offset, now = restore(int, state["offset"], "offset"), restore(U62, state["now"], "now")
        self.clock.offset = offset
        for name, part in self.parts.items():
            part.load(state[name])
        self.turns.resume(offset, now)
        self.turns.load(state["place"])
        for vcpu in self.vcpus:
            vcpu.msrs.note_tsc_offset()

    @still
    def save(self) -> bytes:
        """This moment as bytes, for a file; nothing changes for the VM."""
        return b"".join(pack(self._state(), touched(self.host, self.memory.p2m)))

    @still
    def write(self, path: "str | Path") -> int:
        """This moment to a file, which is there whole or not at all; returns its bytes."""
        return write(Path(path), pack(self._state(), touched(self.host, self.memory.p2m)))

    @classmethod
    def restore(
        cls, data: "bytes | str | Path", *, host: Host | None = None, engine: str | None = None,
        clone: int | None = None, **outside: Unpack[Outside],
    ) -> Self:  # fmt: skip
        """The machine that `save` saw, ready to go on; on another engine if one is named.

        data: bytes, or the path of a file that has them.  clone: as for `Image.restore`.
        SnapshotError if they are no snapshot, or one that does not fit.
        """
        image = Image.of(data, cls._of_image, outside)
        return image.restore(host=host, engine=engine, clone=clone)

    @classmethod
    def _of_image(
        cls, image: "Image[Any]", host: Host | None, engine: str | None, clone: int | None
    ) -> Self:
        try:
            config = restore(Config, image.state["config"], "config")
            shown = frozenset(restore(list[str], image.state["features"], "features"))
            config = assembly.showing(assembly.again(config, engine, clone), shown)
            vm = cls(config, host=host, contents=image.contents)
            try:
                assembly.check_shown(shown, vm.vcpus[0].model.shown)
                vm._become(image.state)
                tenant.equip(vm.host, vm.memory, outlets.balloons_of(vm.pc), vm.clock)
                vm._load = image.load
                assembly.tell_apart(vm.config, vm.pc, vm.vcpus, clone)
            except BaseException:
                vm.close()
                raise
        except TELLING:
            raise
        except UNFIT as problem:
            raise SnapshotError(f"the snapshot does not fit: {problem!r}") from None
        return vm

    def close(self) -> None:
        """Give everything back to the host, and the host to the computer if it was the VM's own.

        RuntimeError from a callback of `go`, or while another thread runs it: nothing has changed.
        """
        if self.is_closed:
            return
        with self.turns.held():
            self._refuse_if_running("close")
            self.is_closed = True
            self._given.close()
        for name in PARTS & vars(self).keys():
            delattr(self, name)
        self.console.close()
        self.com2.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
