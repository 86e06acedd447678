"""State to plain values and back; the registry."""

from dataclasses import dataclass, field

import pytest

from understudy.arch.bits import Bit, Bits
from understudy.clock import ManualClock
from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.state import plain, restore


class Flags(Bits, width=8):
    P = Bit(0)


@dataclass
class Part:
    a: int = 1
    b: bool = True


@dataclass
class State:
    parts: list[Part] = field(default_factory=lambda: [Part(), Part(2, False)])
    ram: bytearray = field(default_factory=lambda: bytearray(b"\x00\xff"))
    maybe: int | None = None
    pair: tuple[int, str] = (1, "x")
    table: dict[int, bytes] = field(default_factory=lambda: {3: b"\x07"})
    flags: Flags = Flags(P=1)  # noqa: RUF009


def test_there_and_back() -> None:
    state = State(maybe=7)
    saved = plain(state)
    assert saved["ram"] == "00ff" and saved["flags"] == 1 and saved["table"] == {"3": "07"}
    assert restore(State, saved) == state
    assert restore(State, plain(State())) == State()
    assert isinstance(restore(State, saved).flags, Flags)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ram": 5}, r"state.ram is 5, expected str"),
        ({"parts": [3]}, r"state.parts\[0\] is 3, expected a dict"),
        ({"pair": [1]}, r"state.pair has 1 items, expected 2"),
        ({"extra": 1}, r"state and State differ in \['extra'\]"),
        ({"maybe": True}, r"state.maybe is True, expected int"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        restore(State, plain(State()) | change)


def test_only_plain_values_may_be_state() -> None:
    with pytest.raises(TypeError, match="state holds a object"):
        plain([object()])


def test_a_device_name_is_taken_once() -> None:
    assert "uart16550" in Device.ALL
    with pytest.raises(TypeError, match="two devices are named 'rtc'"):
        type("Another", (Device,), {}, name="rtc")
    with pytest.raises(ValueError, match="lacks state"):
        Device.load(Device(Wires(ManualClock())), {})
