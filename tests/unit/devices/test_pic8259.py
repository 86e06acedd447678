"""8259A pair: priorities, cascade, ends of interrupt, special modes."""

from understudy.clock import ManualClock
from understudy.devices.pic8259 import Pic8259
from understudy.devices.wires import Wires


def ready(icw1: int = 0x11, icw4: int = 1) -> tuple[Pic8259, list[bool]]:
    out: list[bool] = []
    pic = Pic8259(Wires(ManualClock()), extint=out.append)
    for chip, vector, wiring in ((0, 0x30, 4), (1, 0x38, 2)):
        pic.write(chip, 0, icw1, 1)
        pic.write(chip, 1, vector, 1)
        pic.write(chip, 1, wiring, 1)
        pic.write(chip, 1, icw4, 1)
    return pic, out


def pulse(pic: Pic8259, irq: int) -> None:
    pic.set_input(irq, True)
    pic.set_input(irq, False)


def test_one_interrupt() -> None:
    pic, out = ready()
    pic.set_input(4, True)
    assert out == [True]
    assert pic.read(0, 0, 1) == 0x10
    assert pic.acknowledge() == 0x34
    assert out == [True, False]
    pic.write(0, 0, 0x0B, 1)
    assert pic.read(0, 0, 1) == 0x10
    pic.write(0, 0, 0x20, 1)
    assert pic.read(0, 0, 1) == 0
    assert out == [True, False]  # still high, but an edge is needed


def test_higher_priority_interrupts_the_lower_one_only() -> None:
    pic, out = ready()
    pulse(pic, 4)
    assert pic.acknowledge() == 0x34
    pulse(pic, 5)
    assert out[-1] is False
    pulse(pic, 3)
    assert out[-1] is True and pic.acknowledge() == 0x33
    pic.write(0, 0, 0x20, 1)
    pic.write(0, 0, 0x20, 1)
    assert out[-1] is True and pic.acknowledge() == 0x35


def test_slave_and_its_two_ends_of_interrupt() -> None:
    pic, out = ready()
    pulse(pic, 8)
    pulse(pic, 9)
    assert pic.acknowledge() == 0x38
    assert out[-1] is False
    pic.write(1, 0, 0x20, 1)
    pic.write(0, 0, 0x20, 1)
    assert out[-1] is True and pic.acknowledge() == 0x39


def test_mask_and_spurious() -> None:
    pic, out = ready()
    pic.write(0, 1, 0xFB, 1)
    pulse(pic, 4)
    assert out == []
    assert pic.acknowledge() == 0x37
    assert pic.state.master.isr == 0
    pic.write(1, 1, 0xFF, 1)
    pulse(pic, 15)
    assert pic.read(1, 1, 1) == 0xFF and out == []
    pic.write(1, 1, 0, 1)
    assert out == [True]
    pic.write(1, 1, 0xFF, 1)
    assert out == [True, False]


def test_automatic_end_of_interrupt_with_two_pending_on_the_slave() -> None:
    pic, out = ready(icw4=3)
    pulse(pic, 10)
    pulse(pic, 11)
    assert pic.acknowledge() == 0x3A
    assert out[-1] is True and pic.acknowledge() == 0x3B
    assert (pic.state.master.isr, pic.state.slave.isr) == (0, 0)
    assert out[-1] is False


def test_level_triggered_input_comes_again_until_it_falls() -> None:
    pic, out = ready()
    pic.write(2, 0, 0xFF, 1)
    pic.write(2, 1, 0xFF, 1)
    assert (pic.read(2, 0, 1), pic.read(2, 1, 1)) == (0xF8, 0xDE)
    pic.set_input(11, True)
    assert pic.acknowledge() == 0x3B
    pic.write(1, 0, 0x63, 1)
    pic.write(0, 0, 0x62, 1)
    assert out[-1] is True and pic.acknowledge() == 0x3B
    pic.set_input(11, False)
    pic.write(1, 0, 0x20, 1)
    pic.write(0, 0, 0x20, 1)
    assert out[-1] is False


def test_special_mask_mode_lets_lower_priorities_in() -> None:
    pic, out = ready()
    pulse(pic, 3)
    pic.acknowledge()
    pulse(pic, 5)
    assert out[-1] is False
    pic.write(0, 1, 0x08, 1)
    pic.write(0, 0, 0x68, 1)
    assert out[-1] is True and pic.acknowledge() == 0x35


def test_rotation() -> None:
    pic, _ = ready()
    pulse(pic, 3)
    pic.acknowledge()
    pic.write(0, 0, 0xA0, 1)  # rotate on non-specific EOI: 3 is now the lowest
    pulse(pic, 3)
    pulse(pic, 4)
    assert pic.acknowledge() == 0x34
    pic.write(0, 0, 0x20, 1)
    pic.write(0, 0, 0xC7, 1)  # set priority: 7 lowest again
    assert pic.state.master.lowest == 7


def test_poll_is_an_acknowledge() -> None:
    pic, out = ready()
    pulse(pic, 6)
    pic.write(0, 0, 0x0C, 1)
    assert pic.read(0, 0, 1) == 0x86
    assert out[-1] is False
    pic.write(0, 0, 0x0C, 1)
    assert pic.read(0, 0, 1) == 0


def test_single_chip_without_icw4() -> None:
    pic, _ = ready()
    pic.write(0, 0, 0x12, 1)
    pic.write(0, 1, 0x40, 1)
    pic.write(0, 1, 0xFE, 1)
    assert pic.state.master.imr == 0xFE
    pulse(pic, 0)
    assert pic.acknowledge() == 0x40


def test_special_fully_nested_master_takes_a_second_slave_interrupt() -> None:
    pic, out = ready(icw4=0x11)
    pulse(pic, 12)
    assert pic.acknowledge() == 0x3C
    pulse(pic, 9)
    assert out[-1] is True and pic.acknowledge() == 0x39
