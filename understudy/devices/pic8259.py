"""Intel 8259A: programmable interrupt controller, and the pair of them that a PC has.

[DS] Intel 8259A data sheet.  A PC has the master at ports 0x20-0x21 and the slave, which is on the
master's input 2, at 0xA0-0xA1; the registers ELCR1 and ELCR2 at 0x4D0-0x4D1 make single inputs
level-triggered (Intel 82371SB data sheet, "Edge/Level Control Register").

Not modeled: the MCS-80 mode (ICW4.uPM = 0 delivers as if it were 1), buffered mode, and that a
request which falls before its acknowledge is forgotten: an edge stays latched.

Invariants: `extint` is called when the pair's output changes, and only then; `acknowledge` always
gives a vector, that of input 7 if the request is gone ("spurious").
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from understudy.arch.bits import Bit, Bits, Field
from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.machine.bus import Line, ports
from understudy.state import U3, U8

# --- The data sheet ---

MASTER, SLAVE, ELCR = 0, 1, 2  # regions; the offset is A0, or which of the ELCRs


class ICW1(Bits, width=8):
    """[DS] "Initialization Command Word 1"."""

    LTIM = Bit(3)  # level-triggered, all inputs
    SNGL = Bit(1)  # single: no ICW3
    IC4 = Bit(0)  # ICW4 follows


class ICW4(Bits, width=8):
    """[DS] "Initialization Command Word 4"."""

    SFNM = Bit(4)  # special fully nested mode
    BUF = Field(3, 2)  # buffered mode
    AEOI = Bit(1)  # automatic end of interrupt
    UPM = Bit(0)  # 8086 mode


class OCW2(Bits, width=8):
    """[DS] "Operation Command Word 2"."""

    R = Bit(7)  # rotate
    SL = Bit(6)  # specific: for the level in L
    EOI = Bit(5)  # end of interrupt
    L = Field(2, 0)


class OCW3(Bits, width=8):
    """[DS] "Operation Command Word 3"."""

    ESMM = Bit(6)  # SMM is valid
    SMM = Bit(5)  # special mask mode
    P = Bit(2)  # poll
    RR = Bit(1)  # RIS is valid
    RIS = Bit(0)  # a read gives ISR, else IRR


# --- One chip ---


@dataclass
class Chip:
    """One 8259A."""

    irr: U8 = 0  # interrupt request register
    isr: U8 = 0  # in-service register
    imr: U8 = 0  # interrupt mask register
    pins: U8 = 0  # levels of the inputs
    elcr: U8 = 0  # inputs that are level-triggered
    base: U8 = 0  # vector of input 0
    icw: U3 = 0  # the initialization word expected next, 0 if none
    icw1: int = 0
    icw4: int = 0
    lowest: U3 = 7  # the input of lowest priority
    rotate_in_aeoi: bool = False
    special_mask: bool = False
    poll: bool = False
    read_isr: bool = False

    def set_pin(self, n: int, level: bool) -> None:
        """An input has this level now."""
        bit = 1 << n
        if level:
            if self.is_level(bit) or not self.pins & bit:
                self.irr |= bit
            self.pins |= bit
        else:
            if self.is_level(bit):
                self.irr &= ~bit
            self.pins &= ~bit

    def is_level(self, bit: int) -> bool:
        """Whether this input is level-triggered."""
        return bool(self.icw1 & 8 or self.elcr & bit)

    def first(self, bits: int) -> int:
        """The place in the order of priority (0 first) of the first of these inputs; 8 if none."""
        if not bits:
            return 8
        shift = self.lowest + 1 & 7
        rotated = (bits >> shift | bits << 8 - shift) & 0xFF
        return (rotated & -rotated).bit_length() - 1

    def request(self, is_master: bool) -> int | None:
        """The input to be served now."""
        wanted = self.first(self.irr & ~self.imr & 0xFF)
        if wanted == 8:
            return None
        in_service = self.isr
        if self.special_mask:
            in_service &= ~self.imr
        if is_master and self.icw4 & 0x10:
            in_service &= ~4  # [DS] SFNM: a slave in service does not block its own inputs
        if wanted >= self.first(in_service):
            return None
        return wanted + self.lowest + 1 & 7

    def accept(self, n: int) -> None:
        """Interrupt acknowledge for input n."""
        bit = 1 << n
        if not self.is_level(bit):
            self.irr &= ~bit
        if self.icw4 & 2:
            if self.rotate_in_aeoi:
                self.lowest = n
        else:
            self.isr |= bit

    def write_command(self, value: int) -> None:
        """A write with A0 = 0: ICW1, OCW2 or OCW3."""
        if value & 0x10:
            self._initialize(value)
        elif value & 8:
            if value & 4:
                self.poll = True
            if value & 2:
                self.read_isr = bool(value & 1)
            if value & 0x40:
                self.special_mask = bool(value & 0x20)
        else:
            self._write_ocw2(value)

    def _initialize(self, icw1: int) -> None:
        """[DS] "Initialization Command Words 1 and 2": what ICW1 does by itself."""
        self.icw1, self.icw4, self.icw = icw1, 0, 2
        self.imr = self.isr = 0
        self.irr = self.pins & (0xFF if icw1 & 8 else self.elcr)
        self.lowest = 7
        self.special_mask = self.poll = self.read_isr = self.rotate_in_aeoi = False

    def _write_ocw2(self, value: int) -> None:
        level = value & 7
        match value >> 5:
            case 0 | 4:
                self.rotate_in_aeoi = value >> 5 == 4
            case 1 | 5:
                bits = self.isr & ~self.imr if self.special_mask else self.isr
                place = self.first(bits & 0xFF)
                if place < 8:
                    n = place + self.lowest + 1 & 7
                    self.isr &= ~(1 << n)
                    if value & 0x80:
                        self.lowest = n
            case 3:
                self.isr &= ~(1 << level)
            case 6:
                self.lowest = level
            case 7:
                self.isr &= ~(1 << level)
                self.lowest = level

    def write_data(self, value: int) -> None:
        """A write with A0 = 1: the next initialization word, or the mask."""
        match self.icw:
            case 2:
                self.base = value & 0xF8
                self.icw = 3 if not self.icw1 & 2 else 4 if self.icw1 & 1 else 0
            case 3:
                self.icw = 4 if self.icw1 & 1 else 0
            case 4:
                self.icw4 = value & 0x1F
                self.icw = 0
            case _:
                self.imr = value


# --- The device ---


@dataclass
class PicState:
    """Both chips."""

    master: Chip = field(default_factory=Chip)
    slave: Chip = field(default_factory=Chip)


class Pic8259(Device, name="pic8259"):
    """The pair.  Inputs are numbered 0-15 (IRQ 2 is the slave); the output is `extint`.

    `levels` is what firmware writes to the ELCRs: the inputs that are level-triggered.
    """

    spans = (ports(2), ports(2), ports(2))  # master, slave, ELCR1 and ELCR2
    state: PicState

    def __init__(
        self, wires: Wires, *, extint: Callable[[bool], None] = lambda level: None, levels: int = 0
    ) -> None:
        super().__init__(wires)
        self.levels = levels
        self.output = self.lines["extint"] = Line(extint)
        self.state = self.power_on()

    def power_on(self) -> PicState:
        return PicState(Chip(elcr=self.levels & 0xFF), Chip(elcr=self.levels >> 8))

    def set_input(self, irq: int, level: bool) -> None:
        """The level of an interrupt request changes."""
        if irq < 8:
            self.state.master.set_pin(irq, level)
        else:
            self.state.slave.set_pin(irq - 8, level)
        self._update()

    def acknowledge(self) -> int:
        """INTA: the processor takes the interrupt; gives its vector."""
        s = self.state
        n = s.master.request(True)
        if n is None:
            return s.master.base | 7
        chip, input_ = s.master, n
        s.master.accept(n)
        if n == 2:
            chip = s.slave
            slave = chip.request(False)
            if slave is None:
                input_ = 7
            else:
                input_ = slave
                chip.accept(slave)
            s.master.set_pin(2, False)  # [DS]: INT goes low, and up again if more is pending
        self._update()
        return chip.base | input_

    def _update(self) -> None:
        s = self.state
        cascade = s.slave.request(False) is not None
        if cascade is not bool(s.master.pins & 4):
            s.master.set_pin(2, cascade)
            if not cascade:
                s.master.irr &= ~4
        output = s.master.request(True) is not None
        if output is not self.output.level:
            self.output.set(output)

    def read(self, region: int, offset: int, size: int) -> int:
        s = self.state
        if region == ELCR:
            return (s.slave if offset else s.master).elcr
        chip = s.slave if region == SLAVE else s.master
        if chip.poll:
            return self._poll(chip)
        if offset:
            return chip.imr
        return chip.isr if chip.read_isr else chip.irr

    def _poll(self, chip: Chip) -> int:
        """[DS] "Poll Command": the read is the acknowledge."""
        chip.poll = False
        n = chip.request(chip is self.state.master)
        if n is None:
            return 0
        chip.accept(n)
        self._update()
        return 0x80 | n

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        s = self.state
        if region == ELCR:  # IRQ 0, 1, 2, 8 and 13 are edge-triggered on every PC
            if offset:
                s.slave.elcr = value & 0xDE
            else:
                s.master.elcr = value & 0xF8
            for chip in (s.master, s.slave):
                chip.irr |= chip.pins & chip.elcr
        else:
            chip = s.slave if region == SLAVE else s.master
            if offset:
                chip.write_data(value)
            else:
                chip.write_command(value)
        self._update()

    def inspect(self) -> dict[str, Any]:
        return {
            name: {
                "IRR": f"{chip.irr:08b}",
                "IMR": f"{chip.imr:08b}",
                "ISR": f"{chip.isr:08b}",
                "ELCR": f"{chip.elcr:08b}",
                "base": f"{chip.base:#x}",
            }
            for name, chip in (("master", self.state.master), ("slave", self.state.slave))
        } | {"output": self.output.level}
