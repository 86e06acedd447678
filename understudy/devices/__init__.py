"""Device models: one chip a file, found by its data sheet's name.

A device is a module: docstring (part, data sheet, what is not modeled), data sheet section, a
`State` dataclass with everything a snapshot must keep, and the class.  Addresses and wires are
passed in; the class line registers it.  Copy `debug_exit.py` to begin a new one.

Invariants: nothing that a guest does raises; `load(save())` on a fresh device of the same wiring
gives a device that behaves the same, including the time at which its alarms fire.
"""

import importlib
import pkgutil
from typing import Any, ClassVar

from understudy.clock import Alarm
from understudy.machine.bus import Line
from understudy.state import plain, restore


class Device:
    """What every device model has.  Subclass with `class Part(Device, name="part")`."""

    ALL: ClassVar[dict[str, type["Device"]]] = {}

    name: str = ""
    ports: tuple[range, ...] = ()
    mmio: tuple[range, ...] = ()
    port_width: int = 1  # widest port access that it takes in one piece

    state: Any  # a dataclass of plain values: all that a snapshot must keep
    alarms: dict[str, Alarm]  # its timers; kept in snapshots
    lines: dict[str, Line]  # the wires it drives; their levels are kept in snapshots

    def __init_subclass__(cls, *, name: str) -> None:
        if name in Device.ALL:
            raise TypeError(f"two devices are named {name!r}")
        cls.name = name
        Device.ALL[name] = cls

    def __init__(self) -> None:
        self.alarms, self.lines = {}, {}

    def read(self, port: int, size: int) -> int:
        """IN from one of `ports`; the result fits in `size` bytes."""
        return (1 << 8 * size) - 1

    def write(self, port: int, value: int, size: int) -> None:
        """OUT to one of `ports`; `value` fits in `size` bytes."""

    def mmio_read(self, gpa: int, size: int) -> int:
        """A load inside one of `mmio`, of 1 to 8 bytes, aligned or not."""
        return (1 << 8 * size) - 1

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A store inside one of `mmio`."""

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
            alarm.load(alarms[name])
        for name, line in self.lines.items():
            line.level = bool(lines[name])

    def inspect(self) -> dict[str, Any]:
        """Decoded state, nested plain dicts, for people."""
        return self.save()


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
