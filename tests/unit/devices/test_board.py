"""The board: rows, wires, errors; and a device that comes from a file nobody has heard of."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.property.device_bench import reset_is_power_on, snapshot_changes_nothing
from understudy.clock import ManualClock
from understudy.devices import Device
from understudy.devices.board import Board
from understudy.devices.message import Message
from understudy.devices.pc import PC
from understudy.devices.uart16550 import Uart16550
from understudy.machine.physical import PhysicalMemory

UART = {"at": 0x3E8, "irq": 4, "name": "com3"}


def a_pc(clock: ManualClock, **options: object) -> PC:
    nothing: Callable[..., None] = lambda *said: None  # noqa: E731
    return PC(
        clock, Ram(),
        power_off=nothing, reset=nothing, debug_exit=nothing, deliver=nothing, extint=nothing,
        com1=nothing, com2=nothing, **options,  # type: ignore[arg-type]
    )  # fmt: skip


class Ram(PhysicalMemory):
    def __init__(self) -> None:
        self.bytes = bytearray(0x100000)

    def read(self, gpa: int, length: int, /) -> bytes:
        return bytes(self.bytes[gpa : gpa + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview, /) -> None:
        self.bytes[gpa : gpa + len(data)] = data


# --- Rows ---


def test_a_row_makes_a_part_where_it_says() -> None:
    board = Board(ManualClock(), None, [("uart16550", UART)])
    board.bus.port_write(0x3EF, 1, 0x5A)
    assert board.bus.port_read(0x3EF, 1) == 0x5A
    assert board.part("com3", Uart16550).state.scr == 0x5A
    assert list(board.save()) == list(board.inspect()) == ["com3"]


def test_rows_are_plain_so_that_a_configuration_can_hold_them() -> None:
    rows = json.loads(json.dumps([["pit8254", {"at": [0x40, None], "irq": [0]}]]))
    board = Board(ManualClock(), None, rows)
    assert board.bus.port_read(0x40, 1) == 0 and board.bus.port_read(0x61, 1) == 0xFF


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("uart16540", {}, "no part 'uart16540': expected one of .*uart16550"),
        ("uart16550", {"at": 0x3E8, "speed": 1}, "no option 'speed': expected one of .*transmit"),
        ("uart16550", {}, r"1 spans of registers, and at=\(\) names 0"),
        ("uart16550", {"at": (0x3E8, 0x2E8)}, "names 2 places"),
        ("uart16550", {"at": 0x3FC}, "uart16550.*port 0x3fc is claimed twice"),
        ("uart16550", {"at": 0xFFFC}, "outside"),
        ("uart16550", {"at": 0x3E8, "name": "com1"}, "two parts are named 'com1'"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_refused_in_one_line(
    part: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        a_pc(ManualClock(), devices=[(part, options)])


def test_parts_are_found_by_name_and_kind() -> None:
    pc = a_pc(ManualClock())
    with pytest.raises(TypeError, match="'rtc' is a rtc, not a uart16550"):
        pc.part("rtc", Uart16550)
    with pytest.raises(KeyError):
        pc.part("com3", Uart16550)


def test_two_parts_share_an_interrupt_request() -> None:
    pc = a_pc(ManualClock(), devices=[("uart16550", UART)])
    for base, name in ((0x3F8, "com1"), (0x3E8, "com3")):
        pc.bus.port_write(base + 4, 1, 0x0B)
        pc.bus.port_write(base + 1, 1, 1)
        pc.part(name, Uart16550).receive(b"x")
    pc.bus.port_read(0x3E8, 1)
    assert pc.pic.state.master.pins == 0x10
    pc.bus.port_read(0x3F8, 1)
    assert pc.pic.state.master.pins == 0


def test_reset_of_a_pc_is_a_new_pc_and_its_wires_fall() -> None:
    clock = ManualClock()
    pc, new = a_pc(clock), a_pc(clock)
    pc.bus.port_write(0x3FC, 1, 0x0B)
    pc.bus.port_write(0x3F9, 1, 1)
    pc.com1.receive(b"typed")
    pc.bus.port_write(0x43, 1, 0x34)
    pc.bus.port_write(0x40, 1, 0x10)
    pc.bus.port_write(0x40, 1, 0x27)
    assert pc.pic.output.level and clock.next_deadline() is not None
    pc.reset()
    assert not pc.pic.output.level and pc.ioapic.state.pins == 0
    assert clock.next_deadline() is None
    assert pc.save() == new.save()
    assert pc.ioapic.state.id == 1 and pc.pic.state.slave.elcr == 0b1100_1110


def test_the_real_time_clock_and_its_ram_outlive_a_reset_but_for_what_firmware_writes() -> None:
    pc = a_pc(ManualClock())
    for index, value in ((0x40, 0x99), (0x15, 0), (0x0B, 0x72), (0x32, 0x21)):
        pc.bus.port_write(0x70, 1, index)
        pc.bus.port_write(0x71, 1, value)
    pc.reset()
    found = []
    for index in (0x40, 0x15, 0x0B, 0x32):
        pc.bus.port_write(0x70, 1, index)
        found.append(pc.bus.port_read(0x71, 1))
    assert found == [0x99, 640 & 0xFF, 0x02, 0x21]


# --- A device of one's own ---

ADDER = '''
"""An adder: two operands, a sum that it also writes to memory, an interrupt when it overflows."""

from dataclasses import dataclass, field

from understudy.devices import Device
from understudy.machine.bus import mmio, ports


@dataclass
class AdderState:
    """What it holds."""

    operands: list[int] = field(default_factory=lambda: [0, 0])


class Adder(Device, name="adder"):
    """Offset 0 and 1: operands; offset 2: sum.  The MMIO page is the address of the sum."""

    spans = (ports(4), mmio(0x1000))

    def __init__(self, wires, *, bias=0):
        super().__init__(wires)
        self.bias = bias
        self.overflow = self.lines["overflow"] = wires.line()
        self.state = self.power_on()

    def power_on(self):
        return AdderState()

    def read(self, region, offset, size):
        total = sum(self.state.operands) + self.bias
        return total & 0xFF if region == 0 and offset == 2 else 0

    def write(self, region, offset, value, size):
        if region == 0 and offset < 2:
            self.state.operands[offset] = value
            self.overflow.set(sum(self.state.operands) + self.bias > 0xFF)
        elif region == 1:
            try:
                self.wires.dma.write(value, bytes((self.read(0, 2, 1),)))
            except IndexError:
                pass
'''

NIC = '''
"""A network card without a network: one BAR, MSI-X, and a byte of DMA."""

from dataclasses import dataclass

from understudy.devices import Device
from understudy.devices.pci_function import Function


@dataclass
class NicState:
    """What it holds."""

    last: int = 0


class Nic(Device, name="nic"):
    """A store of a gpa to its BAR sends the byte there, and interrupts."""

    def __init__(self, wires):
        super().__init__(wires)
        self.state = self.power_on()
        function = Function(vendor=0x1AF4, device=0x1041, class_code=0x020000, is_express=True)
        function.add_bar(0, 0x1000, self, is_wide=True)
        function.add_msix(2, 2)
        wires.plug(function)

    def power_on(self):
        return NicState()

    def read(self, region, offset, size):
        return self.state.last & (1 << 8 * size) - 1

    def write(self, region, offset, value, size):
        try:
            self.state.last = self.wires.dma.read(value, 1)[0]
        except IndexError:
            return
        self.wires.msi(1)
'''


@pytest.fixture
def drop_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str], None]]:
    """Write a file into a folder and import it: all that a user does."""
    before = dict(Device.ALL)
    monkeypatch.syspath_prepend(tmp_path)

    def drop(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        importlib.import_module(name)

    yield drop
    Device.ALL.clear()
    Device.ALL.update(before)


def test_one_file_and_one_row_add_a_device(drop_in: Callable[[str, str], None]) -> None:
    drop_in("adder_for_the_test", ADDER)
    row = ("adder", {"at": (0x300, 0xFE00_0000), "irq": 5, "bias": 1})
    pc = a_pc(ManualClock(), devices=[row])
    pc.bus.port_write(0x300, 1, 200)
    pc.bus.port_write(0x301, 1, 100)
    assert pc.bus.port_read(0x302, 1) == 301 & 0xFF
    assert pc.pic.state.master.pins >> 5 & 1 and pc.ioapic.state.pins >> 5 & 1
    pc.bus.mmio_write(0xFE00_0000, 4, 0x1234)
    assert pc.memory.read(0x1234, 1) == bytes((301 & 0xFF,))
    assert pc.save()["adder"]["state"] == {"operands": [200, 100]}
    assert pc.inspect()["adder"]["lines"] == {"overflow": True}
    other = a_pc(ManualClock(), devices=[row])
    other.load(pc.save())
    assert other.bus.port_read(0x302, 1) == 301 & 0xFF
    pc.reset()
    assert pc.bus.port_read(0x302, 1) == 1 and pc.pic.state.master.pins == 0


def test_a_pci_device_takes_a_slot_and_sends_messages(
    drop_in: Callable[[str, str], None],
) -> None:
    drop_in("nic_for_the_test", NIC)
    messages = list[Message]()
    rows = [("pci", {"at": (0xCF8, 0xE000_0000)}), ("nic", {}), ("nic", {"name": "b", "slot": 9})]
    ram = Ram()
    ram.bytes[0x77] = 0x42
    board = Board(ManualClock(), ram, rows, deliver=messages.append)
    for slot in (1, 9):
        at = 0xE000_0000 | slot << 15
        bar, table = (board.bus.mmio_read(at + n, 4) & ~15 for n in (0x10, 0x18))
        board.bus.mmio_write(at + 4, 2, 2)
        board.bus.mmio_write(bar, 4, 0x77)
        assert board.bus.mmio_read(bar, 1) == 0, "not bus master yet"
        board.bus.mmio_write(at + 4, 2, 6)
        board.bus.mmio_write(table + 16, 8, 0xFEE0_3000)
        board.bus.mmio_write(table + 24, 8, 0x60 + slot)
        msix = board.bus.mmio_read(at + 0x7E, 2)
        board.bus.mmio_write(at + 0x7E, 2, msix | 0x8000)
        board.bus.mmio_write(bar, 4, 0x77)
        assert board.bus.mmio_read(bar, 1) == 0x42
        assert messages.pop() == Message(0x60 + slot, 3)


def test_a_pci_device_without_a_bus_is_refused(drop_in: Callable[[str, str], None]) -> None:
    drop_in("nic_for_the_refusal", NIC)
    with pytest.raises(ValueError, match="needs a bus"):
        Board(ManualClock(), Ram(), [("nic", {})])


LATE = NIC.replace("plug(function)", "plug(function); raise ValueError('too late')")


def test_what_fails_half_way_is_off_the_board_again(drop_in: Callable[[str, str], None]) -> None:
    drop_in("nic_that_fails", LATE)
    board = Board(ManualClock(), Ram(), [("pci", {"at": (0xCF8, 0xE000_0000)})])
    board.add("uart16550", at=0x3E8, irq=4)
    before, slots = board.save(), dict(board.slots)
    with pytest.raises(ValueError, match="too late"):
        board.add("nic")
    with pytest.raises(ValueError, match="claimed twice"):
        board.add("pit8254", at=(0x300, 0x3E8), irq=0)
    assert (board.save(), board.slots) == (before, slots)
    board.add("uart16550", name="com2", at=0x300, irq=3)  # where the timer almost was
    assert board.bus.mmio_read(0xE000_0000 | 1 << 15, 4) == 0xFFFF_FFFF


@pytest.mark.parametrize(("name", "source"), [("adder", ADDER), ("nic", NIC)])
def test_it_is_fuzzed_like_all_others(
    drop_in: Callable[[str, str], None], name: str, source: str
) -> None:
    drop_in(f"{name}_for_the_fuzzer", source)
    snapshot_changes_nothing(name, max_examples=20)()
    reset_is_power_on(name, max_examples=20)()
