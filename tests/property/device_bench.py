"""A device on a board of its own, what a hostile guest does to it, and what it does outside.

Nothing here names a device: what a part has is seen from its spans, its options and its methods,
so a new file in the folder of the devices is tried without another line.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from understudy.clock import ManualClock
from understudy.devices import Device
from understudy.devices.board import Board, Row
from understudy.devices.pc import PC
from understudy.devices.pci import Pci
from understudy.devices.pci_function import Function
from understudy.machine.bus import Space
from understudy.machine.physical import PhysicalMemory

RAM = 1 << 16


class Echo:
    """What stands behind the BARs of the test's PCI function."""

    def read(self, region: int, offset: int, size: int) -> int:
        return offset & (1 << 8 * size) - 1

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        pass


def something() -> Function:
    """A PCI function with one of each."""
    function = Function(vendor=0x1AF4, device=0x1000, class_code=0x020000, is_express=True)
    function.add_bar(0, 32, Echo(), is_port=True)
    function.add_bar(1, 4096, Echo())
    function.add_bar(2, 8192, Echo(), is_wide=True)
    function.add_msi(4)
    function.add_msix(4, 3)
    function.add_extended_capability(3, 1, bytes(8))
    return function


class Outside(PhysicalMemory):
    """Whatever a device reaches, it is written down in one log."""

    def __init__(self, ns: int) -> None:
        self.clock = ManualClock(ns)
        self.log: list[Any] = []

    def said(self, *what: Any) -> Callable[..., Any]:
        return lambda *more: self.log.append((*what, *more))

    # memory

    def read(self, gpa: int, length: int, /) -> bytes:
        if not 0 <= gpa <= gpa + length <= RAM:
            raise IndexError(gpa)
        return bytes(length)

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        if not 0 <= gpa <= gpa + len(data) <= RAM:
            raise IndexError(gpa)
        self.log.append(("memory", gpa, bytes(data)))

    # boards

    def board(self, name: str) -> Board:
        board = self.pc() if name == "pc" else self.alone(name)
        for part in board.parts.values():
            if isinstance(part, Pci):
                part.plug(something(), 7, pin=1)
        return board

    def alone(self, name: str) -> Board:
        """The part, and a PCI bus if it needs one."""
        kind = Device.ALL[name]
        parameters = inspect.signature(kind).parameters.values()
        options = {
            p.name: self.said(p.name)
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and callable(p.default)
        }
        rows: list[Row] = [(name, {**self.places(kind), **options})]
        try:
            return self._build(rows)
        except ValueError:
            return self._build([("pci", self.places(Pci)), *rows])

    def _build(self, rows: list[Row]) -> Board:
        return Board(
            self.clock, self, rows, deliver=self.said("message"), interrupt=self.said("irq")
        )

    @staticmethod
    def places(kind: type[Device]) -> dict[str, Any]:
        """Somewhere: ports from 0x1000 on, or 0x4000 for a bridge; memory far apart."""
        first = 0x4000 if kind is Pci else 0x1000
        places = [
            first + 0x100 * n if span.space is Space.PORT else (n + 1) << 36
            for n, span in enumerate(kind.spans)
        ]
        return {"at": places, "irq": range(4)}

    def pc(self) -> PC:
        return PC(
            self.clock,
            self,
            power_off=self.said("off"),
            reset=self.said("reset"),
            debug_exit=self.said("exit"),
            deliver=self.said("message"),
            extint=self.said("extint"),
            com1=self.said("com1"),
            com2=self.said("com2"),
            apic_ids=(0, 1),
            eject=self.said("eject"),
        )


@dataclass(frozen=True)
class Action:
    """Something that a guest, a user or the time does.  `kind` is often the method's name."""

    kind: str
    a: int = 0
    size: int = 1
    value: int = 0


VALUES = st.one_of(
    st.integers(0, 255), st.integers(0, (1 << 64) - 1), st.sampled_from([1 << 31, 0x80003810])
)
METHODS = ("set_input", "acknowledge", "end_of_interrupt", "receive", "wrmsr")


class Bench:
    """One board with its surroundings."""

    def __init__(self, name: str, ns: int = 0) -> None:
        self.name, self.out = name, Outside(ns)
        self.board = self.out.board(name)

    def with_method(self, method: str) -> Any:
        """The first part that has it."""
        return next((p for p in self.board.parts.values() if hasattr(p, method)), None)

    def script(self) -> st.SearchStrategy[list[Action]]:
        """What can be done to this board, aimed at its own addresses."""
        regions = [r for found in self.board.regions.values() for r in found]
        ports = [
            p for r in regions if r.space is Space.PORT for p in range(r.base - 1, r.end + 1)
        ]  # fmt: skip
        pages = [r.base for r in regions if r.space is Space.MMIO]
        choices = [
            st.builds(Action, st.just("time"), st.integers(0, 10**7) | st.integers(0, 10**12))
        ]
        pci = next((p for p in self.board.parts.values() if isinstance(p, Pci)), None)
        if pci is not None:
            ports.append(0xC004)
            pages += [0xC000_0000, 0xC000_4000, *(r.base + (7 << 15) for r in regions[1:2])]
            choices.append(st.builds(Action, st.just("msi"), st.integers(0, 2)))
            choices.append(st.builds(Action, st.just("config"), *CONFIG))
        if ports:
            choices.append(
                st.builds(
                    Action,
                    st.sampled_from(["in", "out", "out"]),
                    st.sampled_from(ports),
                    st.sampled_from([1, 1, 1, 2, 4]),
                    VALUES,
                )
            )
        if pages:
            offsets = st.one_of(st.sampled_from([0, 0, 0x10, 0x10, 0x40]), st.integers(0, 0x1010))
            gpas = st.builds(lambda p, o: p + o, st.sampled_from(pages), offsets)
            sizes, values = st.sampled_from([1, 2, 4, 8]), st.integers(0, 0x3F) | VALUES
            choices.append(
                st.builds(Action, st.sampled_from(["load", "store"]), gpas, sizes, values)
            )
        choices += [
            st.builds(Action, st.just(method), st.integers(0, 15), value=VALUES)
            for method in METHODS
            if self.with_method(method) is not None
        ]
        return st.lists(st.one_of(choices), max_size=60)

    def do(self, action: Action) -> Any:
        bus, a, value = self.board.bus, action.a, action.value
        match action.kind:
            case "in":
                return self.fits(bus.port_read(a, action.size), action)
            case "out":
                bus.port_write(a, action.size, value)
            case "load":
                return self.fits(bus.mmio_read(a, action.size), action)
            case "store":
                bus.mmio_write(a, action.size, value)
            case "time":
                self.time(a)
            case "set_input" if isinstance(self.board, PC):
                self.board.set_irq(a, bool(value & 1))
            case "set_input":
                self.with_method("set_input").set_input(a, bool(value & 1))
            case "acknowledge":
                return self.with_method("acknowledge").acknowledge()
            case "end_of_interrupt":
                self.with_method("end_of_interrupt").end_of_interrupt(value & 0xFF)
            case "receive":
                self.with_method("receive").receive(bytes(range(a)))
            case "wrmsr":
                part, index = self.with_method("wrmsr"), (0x11, 0x12, 0x4B564D00, 0x4B564D01)[a & 3]
                part.wrmsr(0, index, value)
                return part.rdmsr(0, index)
            case "msi":
                function = self.board.part("pci", Pci).functions[7 << 3]
                function.set_intx(not function.msi(a))
            case "config":
                function = self.board.part("pci", Pci).functions[7 << 3]
                function.config_write(a, action.size, value & (1 << 8 * action.size) - 1)
        return None

    @staticmethod
    def fits(value: int, action: Action) -> int:
        assert 0 <= value < 1 << 8 * action.size, f"{value:#x} from {action}"
        return value

    def time(self, ns: int) -> None:
        """Time passes, with at most 50 stops on the way: a wall clock may be late as well."""
        clock = self.out.clock
        end = clock.ns + ns
        for _ in range(50):
            deadline = clock.next_deadline()
            if deadline is None or deadline > end:
                break
            assert deadline > clock.ns or clock.ns == 0
            clock.ns = deadline
            clock.run_due()
        clock.ns = end
        clock.run_due()

    def reborn(self) -> "Bench":
        """A fresh one that loads this one's snapshot."""
        other = Bench(self.name, self.out.clock.ns)
        log = len(other.out.log)
        other.board.load(json.loads(json.dumps(self.board.save())))
        assert len(other.out.log) == log, "loading a snapshot may not reach outside"
        other.out.log[:] = self.out.log
        return other

    def asserted(self) -> set[Any]:
        """The wires whose other end last heard that they are up."""
        levels = {said[:-1]: said[-1] for said in self.out.log if said[0] in ("irq", "extint")}
        return {wire for wire, level in levels.items() if level}


# Registers of the function in slot 7: command, BARs, and where its MSI and MSI-X capabilities are.
CONFIG = (
    st.sampled_from([4, 4, 4, *range(0x10, 0x28, 4), *range(0x7C, 0xA4, 2)]),
    st.sampled_from([2, 2, 4]),
    st.one_of(st.sampled_from([6, 7, 0x8000, 0xC000, 1, 0x21, 0xFEE0_1000]), VALUES),
)


# --- The properties ---

Property = Callable[[], None]


def snapshot_changes_nothing(name: str, **options: Any) -> Property:
    """Random accesses never raise; a board that loads another's snapshot goes on the same."""

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], **options)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        straight = Bench(name)
        script = data.draw(straight.script())
        cut = data.draw(st.integers(0, len(script)))
        for action in script[:cut]:
            straight.do(action)
        twin = straight.reborn()
        same(straight, twin, script[cut:])
        json.dumps(straight.board.inspect())

    return run


def reset_is_power_on(name: str, **options: Any) -> Property:
    """After a reset a board is as a fresh one, wires down; but for what batteries keep."""

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], **options)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        used = Bench(name)
        script, more = data.draw(used.script()), data.draw(used.script())
        for action in script:
            used.do(action)
        used.board.reset()
        assert used.asserted() == set(), "the other end of a wire did not hear that it fell"
        fresh = Bench(name, used.out.clock.ns)
        assert without_batteries(used.board) == without_batteries(fresh.board)
        fresh.board.load(used.board.save())
        fresh.out.log[:] = used.out.log
        same(used, fresh, more)

    return run


def same(one: Bench, other: Bench, script: list[Action]) -> None:
    """Both answer the same, to the end."""
    for action in script:
        assert one.do(action) == other.do(action), action
    assert in_order(one.board.save()) == in_order(other.board.save())
    assert one.out.log == other.out.log


def in_order(saved: dict[str, Any]) -> dict[str, Any]:
    """Alarms by their place in the queue; how many timers there were before does not count."""
    places = sorted(a[1] for part in saved.values() for a in part["alarms"].values() if a)
    for part in saved.values():
        for alarm in part["alarms"].values():
            if alarm:
                alarm[1] = places.index(alarm[1])
    return saved


def without_batteries(board: Board) -> dict[str, Any]:
    saved = board.save()
    for name, part in board.parts.items():
        for field in part.battery:
            del saved[name]["state"][field]
    return saved
