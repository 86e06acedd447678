"""Every registered device survives a hostile guest; neither snapshot nor reset leaves a trace.

Random port and memory accesses of all sizes, typing, interrupt acknowledges and the passing of
time.  Two boards get the same; one of them is replaced by a fresh one that loads its snapshot at
a random point.  Both must answer the same to the end.

The checks are checked themselves: a device that is sound passes, and each fault is caught.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import Phase

from tests.property.device_bench import reset_is_power_on, snapshot_changes_nothing
from understudy.clock import Alarm
from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.machine.bus import ports

NAMES = sorted([*Device.ALL, "pc"])
ONCE = {
    "database": None,
    "report_multiple_bugs": False,
    "phases": [Phase.generate],
    "max_examples": 2000,
}


@pytest.mark.parametrize("name", NAMES)
def test_random_accesses_never_raise_and_a_snapshot_changes_nothing(name: str) -> None:
    snapshot_changes_nothing(name)()


@pytest.mark.parametrize("name", NAMES)
def test_after_a_reset_a_device_is_as_after_power_on(name: str) -> None:
    reset_is_power_on(name)()


# --- The checks can fail ---


@dataclass
class ToyState:
    value: int = 0


def toy(fault: str) -> None:
    """Register a device with a register, a wire and a timer, and with one thing wrong."""

    class Toy(Device, name="toy"):
        spans = (ports(1),)
        state: ToyState

        def __init__(self, wires: Wires) -> None:
            super().__init__(wires)
            self.irq = self.lines["irq"] = wires.line()
            self.alarm = Alarm(self.clock, self.irq.raise_)
            if fault != "an alarm of its own":
                self.alarms["alarm"] = self.alarm
            self.aside = 0
            self.state = self.power_on()

        def power_on(self) -> ToyState:
            return ToyState()

        def read(self, region: int, offset: int, size: int) -> int:
            return self.aside if fault == "a register aside" else self.state.value

        def write(self, region: int, offset: int, value: int, size: int) -> None:
            self.state.value = self.aside = value
            if fault == "a register aside":
                self.state.value = 0
            self.irq.set(value > 0x80)
            self.alarm.set(self.clock.now() + value * 100 if value & 1 else None)
            if fault == "a guest that makes it raise" and value > 0xF0:
                raise RuntimeError("too much")

        def reset(self) -> None:
            if fault == "a reset that is forgotten":
                return
            if fault == "a wire that stays up":
                self.state = self.power_on()
                self.alarm.set(None)
                return
            if fault == "a wire that falls in silence":
                self.irq.level = False
            super().reset()


@pytest.fixture
def registry() -> Iterator[None]:
    yield
    del Device.ALL["toy"]


@pytest.mark.usefixtures("registry")
def test_a_sound_device_passes() -> None:
    toy("")
    snapshot_changes_nothing("toy")()
    reset_is_power_on("toy")()


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "fault",
    [
        "a reset that is forgotten",
        "a register aside",
        "an alarm of its own",
        "a wire that stays up",
        "a wire that falls in silence",
    ],
)
def test_a_device_that_forgets_its_reset_is_caught(fault: str) -> None:
    toy(fault)
    with pytest.raises(AssertionError):
        reset_is_power_on("toy", **ONCE)()


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "fault", ["a register aside", "an alarm of its own", "a guest that makes it raise"]
)
def test_a_device_that_keeps_something_from_the_snapshot_is_caught(fault: str) -> None:
    toy(fault)
    with pytest.raises((AssertionError, RuntimeError)):
        snapshot_changes_nothing("toy", **ONCE)()
