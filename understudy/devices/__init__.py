"""Device models: one chip a file, found by its data sheet's name.

A device is a module: docstring (part, data sheet, what is not modeled), data sheet section, a
`State` dataclass with everything a snapshot must keep, and the class.  Wires are passed in; where
its registers lie, only the board knows.  The class line registers it, a row puts it on a board.
Copy `rtc.py` to begin a new one (docs/adding-a-device.md).

Invariants: nothing that a guest does raises; `load(save())` on a fresh device of the same wiring
gives a device that behaves the same, including the time at which its alarms fire; after `reset` a
device is as a fresh one, but for what its battery keeps.
"""

import importlib
import pkgutil
from typing import Any, ClassVar

from understudy.clock import Alarm
from understudy.closed import let_go
from understudy.devices.wires import Wires
from understudy.machine.bus import Line, Span
from understudy.state import plain, restore


class Device:
    """What every device model has.  Subclass with `class Part(Device, name="part")`.

    A class without a name is no part: what several of a kind have in common.

    The first argument of `__init__` is the `Wires`, all others are keywords with defaults, and its
    last line is `self.state = self.power_on()`.
    """

    ALL: ClassVar[dict[str, type["Device"]]] = {}

    name: str = ""
    spans: tuple[Span, ...] = ()  # its registers; a region's number is the place in here
    battery: tuple[str, ...] = ()  # fields of the state that outlive a reset

    state: Any  # a dataclass of plain values: all that a snapshot must keep
    alarms: dict[str, Alarm]  # its timers; kept in snapshots
    lines: dict[str, Line]  # the wires it drives; their levels are kept in snapshots

    def __init_subclass__(cls, *, name: str = "") -> None:
        if name in Device.ALL:
            raise TypeError(f"two devices are named {name!r}")
        cls.name = name
        if name:
            Device.ALL[name] = cls

    def __init__(self, wires: Wires) -> None:
        self.wires, self.clock = wires, wires.clock
        self.alarms, self.lines = {}, {}

    def power_on(self) -> Any:
        """The state in which it starts.  Everything that a guest can change is in there."""
        raise NotImplementedError(f"{self.name} has no power_on")

    def read(self, region: int, offset: int, size: int) -> int:
        """A read in one of `spans`; the result fits in `size` bytes."""
        return (1 << 8 * size) - 1

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        """A write in one of `spans`; `value` fits in `size` bytes."""

    def reset(self) -> None:
        """Be as after power-on, on the same wires: timers stop, lines fall, and that is told."""
        before, self.state = self.state, self.power_on()
        for field in self.battery:
            setattr(self.state, field, getattr(before, field))
        for alarm in self.alarms.values():
            alarm.set(None)
        for line in self.lines.values():
            line.lower()

    def close(self) -> None:
        """Nobody uses it any more; parts that hold each other let go."""
        let_go(self)

    def save(self) -> dict[str, Any]:
        """Everything that a snapshot must keep, as plain values."""
        return {
            "state": plain(self.state),
            "alarms": {name: alarm.save() for name, alarm in self.alarms.items()},
            "lines": {name: line.level for name, line in self.lines.items()},
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Become what was saved.  Wires take their levels without telling the other end."""
        try:
            state, alarms, lines = saved["state"], saved["alarms"], saved["lines"]
        except (KeyError, TypeError):
            raise ValueError(f"snapshot: {self.name} lacks state, alarms or lines") from None
        if alarms.keys() != self.alarms.keys() or lines.keys() != self.lines.keys():
            raise ValueError(f"snapshot: {self.name} was saved with other alarms or lines")
        self.state = restore(type(self.state), state, self.name)
        for name, alarm in self.alarms.items():
            alarm.load(restore(tuple[int, int] | None, alarms[name], f"{self.name}.{name}"))
        for name, line in self.lines.items():
            line.level = bool(lines[name])

    def inspect(self) -> dict[str, Any]:
        """Decoded state, nested plain dicts, for people."""
        return self.save()


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
