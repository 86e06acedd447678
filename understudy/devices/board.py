"""A board: devices on a bus, made from rows.

A row is the name of a part and keyword options: where its registers go, which interrupts it
drives, and what is the part's own.

    board.add("uart16550", at=0x3E8, irq=5, name="com3")

Source: ours; the shape is gem5's board and QEMU's `-device`.

Options of every row: `name` (the part's own by default), `at` (a base, or one for each of the
part's spans; None leaves one out), `irq` (one interrupt request or several, in the part's order),
`slot` (PCI device number of a part that is a PCI function).

Invariants: only the board knows addresses and interrupt numbers; parts are told apart by name;
`save`, `load`, `reset` and `inspect` reach every part, in the order of the rows.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from understudy.clock import Clock
from understudy.closed import let_go
from understudy.devices import Device
from understudy.devices.message import Message
from understudy.devices.pci import Pci
from understudy.devices.pci_function import Function
from understudy.devices.wires import Wires
from understudy.machine.bus import Bus, Line, Region, SharedLine
from understudy.machine.physical import NoMemory, PhysicalMemory

Row = tuple[str, Mapping[str, Any]]
Part = TypeVar("Part", bound=Device)


class Board:
    """The parts by name, their bus, and the wires to the outside.

    memory: what devices reach by DMA.  deliver: takes interrupt messages to the local APICs.
    interrupt: called with (interrupt request, level) when one of these wires changes.
    """

    def __init__(
        self,
        clock: Clock,
        memory: PhysicalMemory | None = None,
        rows: Sequence[Row] = (),
        *,
        deliver: Callable[[Message], None] = lambda message: None,
        interrupt: Callable[[int, bool], None] = lambda irq, level: None,
    ) -> None:
        self.clock, self.memory = clock, memory if memory is not None else NoMemory()
        self.deliver, self.interrupt = deliver, interrupt
        self.bus = Bus()
        self.parts: dict[str, Device] = {}
        self.regions: dict[str, list[Region]] = {}  # by the name of the part
        self.slots: dict[str, int] = {}  # of the PCI bus, by the name of the part
        self._irqs: dict[int, SharedLine] = {}
        for part, options in rows:
            self.add(part, **options)

    # --- parts ---

    def add(
        self,
        part: str,
        *,
        name: str | None = None,
        at: int | Sequence[int | None] | None = (),
        irq: int | Sequence[int] = (),
        slot: int | None = None,
        **options: Any,
    ) -> Device:
        """Make a part and put it on the board.  ValueError says what is wrong with the row."""
        kind = Device.ALL.get(part)
        if kind is None:
            raise ValueError(f"there is no part {part!r}: expected one of {', '.join(Device.ALL)}")
        name = part if name is None else name
        if name in self.parts:
            raise ValueError(f"two parts are named {name!r}: give one of them another name=…")
        _check_options(part, kind, options)
        wires = Wires(
            clock=self.clock,
            dma=self.memory,
            lines=tuple(self.line(n) for n in _sequence(irq)),
            deliver=self.deliver,
            slot=lambda function: self._plug(name, function, slot),
            bus=self.bus,
            requester=self.dma,
        )
        try:
            device = kind(wires, **options)
            self.regions[name] = self._place(name, device, _sequence(at))
        except BaseException:
            if name in self.slots:  # it was on the bus already
                self.part(Pci.name, Pci).unplug(self.slots.pop(name) << 3)
            raise
        self.parts[name] = device
        return device

    def remove(self, name: str) -> None:
        """Take a part that is a PCI function and nothing else off the board, and close it."""
        device, slot = self.parts.pop(name), self.slots.pop(name)
        del self.regions[name]
        device.reset()
        self.part(Pci.name, Pci).unplug(slot << 3)
        device.close()

    def part(self, name: str, kind: type[Part]) -> Part:
        """The part with this name.  KeyError, TypeError if there is none of that kind."""
        found = self.parts[name]
        if not isinstance(found, kind):
            raise TypeError(f"part {name!r} is a {found.name}, not a {kind.name}")
        return found

    def _place(self, name: str, device: Device, bases: Sequence[int | None]) -> list[Region]:
        """Give the part's spans their places."""
        if len(bases) != len(device.spans):
            raise ValueError(
                f"{name} ({device.name}) has {len(device.spans)} spans of registers, "
                f"and at={bases!r} names {len(bases)} places for them"
            )
        regions = [
            Region(span.space, base, span.length, device, number, span.width)
            for number, (span, base) in enumerate(zip(device.spans, bases, strict=True))
            if base is not None
        ]
        with ExitStack() as claimed:
            for region in regions:
                try:
                    self.bus.claim(region)
                except ValueError as problem:
                    raise ValueError(f"{name} ({device.name}): {problem}") from None
                claimed.callback(self.bus.release, region)
            claimed.pop_all()
        return regions

    def _plug(self, name: str, function: Function, slot: int | None) -> None:
        """Put a function on the board's PCI bus."""
        pci = self.parts.get(Pci.name)
        if not isinstance(pci, Pci):
            raise ValueError("a PCI function needs a bus: put a row for the part pci before it")
        slot = pci.free_device() if slot is None else slot
        pci.plug(function, slot, pin=1)
        self.slots[name] = slot

    # --- wires ---

    def line(self, irq: int) -> Line:
        """One more device's end of an interrupt request's wire."""
        shared = self._irqs.get(irq)
        if shared is None:
            shared = self._irqs[irq] = SharedLine(lambda level: self.interrupt(irq, level))
        return shared.input()

    def dma(self, requester: int) -> PhysicalMemory:
        """Memory as this requester (PCI bus, device and function) reaches it."""
        return self.memory

    # --- all parts ---

    def reset(self) -> None:
        """Every part is as after power-on; wires that were up fall, and the outside hears it."""
        for device in self.parts.values():
            device.reset()

    def close(self) -> None:
        """Nobody uses it any more; parts and wires that hold each other let go."""
        for shared in self._irqs.values():
            shared.inputs.clear()
        for device in self.parts.values():
            device.close()
        let_go(self.bus, self)

    def save(self) -> dict[str, Any]:
        """All parts, as plain values."""
        return {name: device.save() for name, device in self.parts.items()}

    def load(self, saved: dict[str, Any]) -> None:
        """Become the board that was saved.  ValueError says what does not fit."""
        if saved.keys() != self.parts.keys():
            names = sorted(saved.keys() ^ self.parts.keys())
            raise ValueError(f"snapshot: this board and the saved one differ in {names}")
        for name, device in self.parts.items():
            device.load(saved[name])

    def inspect(self) -> dict[str, Any]:
        """Decoded state of every part, for people."""
        return {name: device.inspect() for name, device in self.parts.items()}


def _sequence(value: Any) -> Sequence[Any]:
    return (value,) if value is None or isinstance(value, int) else value


def _check_options(part: str, kind: type[Device], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(kind).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if unknown := [name for name in options if name not in known]:
        expected = ", ".join(["name", "at", "irq", "slot", *known])
        raise ValueError(f"{part} has no option {unknown[0]!r}: expected one of {expected}")
