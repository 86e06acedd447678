"""Every registered device survives a hostile guest, and a snapshot changes nothing.

Random port and memory accesses of all sizes, typing, interrupt acknowledges and the passing of
time.  Two boards get the same; one of them is replaced by a fresh one that loads its snapshot at
a random point.  Both must answer the same to the end.
"""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.clock import ManualClock
from understudy.devices import Device
from understudy.devices.acpi import Acpi
from understudy.devices.debug_exit import DebugExit
from understudy.devices.i8042 import I8042
from understudy.devices.ioapic import IoApic
from understudy.devices.kvmclock import MSRS, KvmClock
from understudy.devices.pc import PC
from understudy.devices.pci import Function, Pci
from understudy.devices.pic8259 import Pic8259
from understudy.devices.pit8254 import Pit8254
from understudy.devices.rtc import Rtc
from understudy.devices.uart16550 import Uart16550
from understudy.machine.bus import Bus, Line

RAM = 1 << 16


class Region:
    """What stands behind the BARs of the test's PCI function."""

    def __init__(self) -> None:
        self.last = 0

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        return offset & (1 << 8 * size) - 1

    def bar_write(self, bar: int, offset: int, value: int, size: int) -> None:
        self.last = value


def plug_something(pci: Pci) -> None:
    function = Function(vendor=0x1AF4, device=0x1000, class_code=0x020000)
    function.add_bar(0, 32, Region(), is_port=True)
    function.add_bar(1, 4096, Region())
    function.add_bar(2, 16, Region())
    function.add_capability(9, bytes(10), b"\xff\xff")
    pci.plug(function, 1, pin=1)


class Outside:
    """Whatever a device reaches, it is written down in one log."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.log: list[Any] = []
        self.bus = Bus()

    def line(self, name: str) -> Line:
        return Line(lambda level: self.log.append((name, level)))

    def said(self, *what: Any) -> Any:
        return lambda *more: self.log.append((*what, *more))

    def write_memory(self, gpa: int, data: bytes) -> None:
        if not 0 <= gpa <= gpa + len(data) <= RAM:
            raise IndexError(gpa)
        self.log.append((gpa, bytes(data)))

    def pci(self) -> Pci:
        pci = Pci(self.bus, self.said("reset"), self.said("pirq"))
        plug_something(pci)
        return pci

    def pc(self) -> PC:
        pc = PC(
            self.clock,
            self.write_memory,
            power_off=self.said("off"),
            reset=self.said("reset"),
            debug_exit=self.said("exit"),
            deliver=self.said("message"),
            extint=self.said("extint"),
            com1=self.said("com1"),
            com2=self.said("com2"),
            vcpus=2,
        )
        plug_something(pc.pci)
        self.bus = pc.bus
        return pc


MAKE = {
    "acpi": lambda o: Acpi(o.clock, o.line("sci"), o.said("off")),
    "debug_exit": lambda o: DebugExit(o.said("exit")),
    "i8042": lambda o: I8042(o.line("irq"), o.said("reset")),
    "ioapic": lambda o: IoApic(o.said("message")),
    "kvmclock": lambda o: KvmClock(o.clock, o.write_memory, vcpus=2),
    "pci": Outside.pci,
    "pic8259": lambda o: Pic8259(o.said("extint")),
    "pit8254": lambda o: Pit8254(o.clock, o.line("irq")),
    "rtc": lambda o: Rtc(o.clock, o.line("irq"), epoch_ns=1_700_000_000_123_456_789),
    "uart16550": lambda o: Uart16550(0x3F8, o.line("irq"), o.said("sent")),
    "pc": Outside.pc,
}


def test_every_registered_device_is_fuzzed() -> None:
    assert MAKE.keys() == Device.ALL.keys() | {"pc"}


@dataclass(frozen=True)
class Action:
    kind: str
    a: int = 0
    size: int = 1
    value: int = 0


VALUES = st.one_of(
    st.integers(0, 255), st.integers(0, (1 << 64) - 1), st.sampled_from([1 << 31, 0x80000008])
)
INPUTS = ("pic8259", "ioapic", "pc")


def actions(name: str) -> st.SearchStrategy[list[Action]]:
    """What can be done to this device, aimed at its own addresses."""
    made = MAKE[name](Outside())
    parts = list(made.devices.values()) if isinstance(made, PC) else [made]
    ports = [p for d in parts for span in d.ports for p in range(span.start - 1, span.stop + 1)]
    pages = [span.start for d in parts for span in d.mmio]
    choices = [
        st.builds(
            Action,
            st.sampled_from(["in", "out", "out"]),
            st.sampled_from([*ports, 0xC004]),
            st.sampled_from([1, 1, 1, 2, 4]),
            VALUES,
        ),
        st.builds(
            Action,
            st.just("time"),
            st.one_of(st.integers(0, 10**7), st.integers(0, 10**12)),
        ),
    ]
    if pages or name == "pci":
        offsets = st.one_of(st.sampled_from([0, 0, 0x10, 0x10, 0x40]), st.integers(0, 0x1010))
        gpas = st.builds(lambda p, o: p + o, st.sampled_from([*pages, 0xC0000000]), offsets)
        choices.append(
            st.builds(
                Action, st.sampled_from(["load", "store"]), gpas, st.sampled_from([1, 2, 4, 8]),
                st.one_of(st.integers(0, 0x3F), VALUES),
            )
        )  # fmt: skip
    if name in INPUTS:
        choices.append(st.builds(Action, st.sampled_from(["raise", "lower"]), st.integers(0, 15)))
        choices.append(st.builds(Action, st.just("ack"), st.integers(0, 255)))
    if name in ("uart16550", "pc"):
        choices.append(st.builds(Action, st.just("type"), st.integers(0, 40)))
    if name in ("kvmclock", "pc"):
        choices.append(
            st.builds(Action, st.just("msr"), st.sampled_from(sorted(MSRS)), value=VALUES)
        )
    return st.lists(st.one_of(choices), max_size=60)


class Bench:
    """One device, or the whole board, with its surroundings."""

    def __init__(self, name: str, ns: int = 0) -> None:
        self.name, self.out = name, Outside()
        self.out.clock.ns = ns
        self.made: Any = MAKE[name](self.out)
        if not isinstance(self.made, PC):
            self.out.bus.attach(self.made)

    def do(self, action: Action) -> int | None:
        made, bus, a = self.made, self.out.bus, action.a
        board = isinstance(made, PC)
        match action.kind:
            case "in":
                value = bus.port_read(a, action.size)
                assert 0 <= value < 1 << 8 * action.size, f"{value:#x} from {action}"
                return value
            case "out":
                bus.port_write(a, action.size, action.value)
            case "load":
                value = bus.mmio_read(a, action.size)
                assert 0 <= value < 1 << 8 * action.size, f"{value:#x} from {action}"
                return value
            case "store":
                bus.mmio_write(a, action.size, action.value)
            case "time":
                self.time(a)
            case "raise" | "lower":
                (made.set_irq if board else made.set_input)(a, action.kind == "raise")
            case "ack" if self.name == "ioapic":
                made.end_of_interrupt(a)
            case "ack":
                return int(made.acknowledge())
            case "type":
                (made.com1 if board else made).receive(bytes(range(a)))
            case "msr":
                clock = made.kvmclock if board else made
                clock.wrmsr(a & 1, a, action.value)
                return int(clock.rdmsr(a & 1, a))
        return None

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
        other.made.load(json.loads(json.dumps(self.made.save())))
        assert len(other.out.log) == log, "loading a snapshot may not reach outside"
        other.out.log[:] = self.out.log
        return other


@pytest.mark.parametrize("name", sorted(MAKE))
@given(data=st.data())
def test_random_accesses_never_raise_and_a_snapshot_changes_nothing(
    name: str, data: st.DataObject
) -> None:
    script = data.draw(actions(name))
    cut = data.draw(st.integers(0, len(script)))
    straight = twin = Bench(name)
    for action in script[:cut]:
        straight.do(action)
    twin = straight.reborn()
    for action in script[cut:]:
        assert straight.do(action) == twin.do(action), action
    assert straight.made.save() == twin.made.save()
    assert straight.out.log == twin.out.log
    json.dumps(straight.made.inspect())
