"""NS16550A: universal asynchronous receiver/transmitter with FIFOs.

[DS] National Semiconductor PC16550D data sheet.  A PC has COM1 at ports 0x3F8-0x3FF on IRQ 4 and
COM2 at 0x2F8-0x2FF on IRQ 3; the interrupt passes a gate that OUT2 opens.

Not modeled: the time that a character takes.  A character written is sent at once, so the
transmitter is always empty; a FIFO below its trigger level reports the character time-out at once.

The far end keeps what was typed until the guest has read it: it sends only while the guest
listens, and again what a reset of the FIFO dropped.  So nothing typed is lost, even before the
guest's driver is up; only a reset of the whole machine drops it.  The guest listens if it asserts
RTS, enables the receiver's interrupt, or polls: two reads of LSR with no access between (a sender
finds LSR.THRE set the first time).

Invariants: at most 16 characters in the FIFO, or 1 without FIFO mode; the interrupt line always
shows the state of the registers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from understudy.arch.bits import Bit, Bits, Field
from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.machine.bus import ports
from understudy.state import U8, U16

# --- The data sheet ---


class IER(Bits, width=8):
    """[DS] "Interrupt Enable Register"."""

    EDSSI = Bit(3)  # modem status interrupt
    ELSI = Bit(2)  # receiver line status interrupt
    ETBEI = Bit(1)  # transmitter holding register empty interrupt
    ERBFI = Bit(0)  # received data available and character time-out interrupts


class IIR(Bits, width=8):
    """[DS] "Interrupt Identification Register", a read of offset 2."""

    FIFOS = Field(7, 6)  # both set in FIFO mode
    ID = Field(3, 1)  # 3 line status, 2 data, 6 time-out, 1 THR empty, 0 modem status
    NONE = Bit(0)  # no interrupt is pending


class FCR(Bits, width=8):
    """[DS] "FIFO Control Register", a write of offset 2."""

    TRIGGER = Field(7, 6)  # receiver's trigger level: 1, 4, 8, 14 characters
    DMA = Bit(3)  # DMA mode select
    XRESET = Bit(2)  # clear the transmitter's FIFO
    RRESET = Bit(1)  # clear the receiver's FIFO
    ENABLE = Bit(0)  # FIFO mode


class LCR(Bits, width=8):
    """[DS] "Line Control Register"."""

    DLAB = Bit(7)  # offsets 0 and 1 are the divisor latch
    BREAK = Bit(6)  # hold the output low
    SP = Bit(5)  # stick parity
    EPS = Bit(4)  # even parity
    PEN = Bit(3)  # parity enable
    STB = Bit(2)  # two stop bits
    WLS = Field(1, 0)  # word length - 5


class MCR(Bits, width=8):
    """[DS] "Modem Control Register"."""

    LOOP = Bit(4)  # local loopback
    OUT2 = Bit(3)  # on a PC: lets the interrupt through
    OUT1 = Bit(2)
    RTS = Bit(1)  # request to send
    DTR = Bit(0)  # data terminal ready


class LSR(Bits, width=8):
    """[DS] "Line Status Register"."""

    FIFOE = Bit(7)  # an error is somewhere in the FIFO
    TEMT = Bit(6)  # transmitter empty
    THRE = Bit(5)  # transmitter holding register empty
    BI = Bit(4)  # break, of the character on top
    FE = Bit(3)  # framing error
    PE = Bit(2)  # parity error
    OE = Bit(1)  # overrun: a character was lost
    DR = Bit(0)  # data ready


class MSR(Bits, width=8):
    """[DS] "Modem Status Register"; the low half tells what changed since it was read."""

    DCD = Bit(7)
    RI = Bit(6)
    DSR = Bit(5)
    CTS = Bit(4)
    DDCD = Bit(3)
    TERI = Bit(2)
    DDSR = Bit(1)
    DCTS = Bit(0)


TRIGGER = (1, 4, 8, 14)
DLAB, LOOP, OUT2, RTS = LCR.DLAB.mask, MCR.LOOP.mask, MCR.OUT2.mask, MCR.RTS.mask
ERBFI, ETBEI, ELSI, EDSSI = IER.ERBFI.mask, IER.ETBEI.mask, IER.ELSI.mask, IER.EDSSI.mask
EMPTY = LSR.TEMT.mask | LSR.THRE.mask
OE, BI, DR, FIFOE = LSR.OE.mask, LSR.BI.mask, LSR.DR.mask, LSR.FIFOE.mask
IIR_NONE, IIR_MODEM, IIR_THRE, IIR_DATA, IIR_LINE, IIR_TIMEOUT = 1, 0, 2, 4, 6, 12

# Marks on an entry of the receiver's FIFO, above its 8 data bits.
FAR, BREAK = 0x100, 0x200  # came from the far end (may be sent again); was a break


# --- The device ---


@dataclass
class UartState:
    """The registers, the receiver's FIFO, and what the far end still holds."""

    ier: U8 = 0
    fcr: U8 = 0
    lcr: U8 = 0
    mcr: U8 = 0
    scr: U8 = 0
    divisor: U16 = 12  # 9600 baud, what a PC's firmware leaves
    errors: U8 = 0  # LSR.OE and LSR.BI until LSR is read
    delta: U8 = 0  # the low half of MSR
    inputs: U8 = 0xB0  # the far end's DCD, DSR and CTS are on
    is_thre_pending: bool = False  # "THR empty" has not been reported yet
    was_polled: bool = False  # the last access read LSR and found no data
    fifo: list[U16] = field(default_factory=list)
    far: list[U16] = field(default_factory=list)  # typed, not yet sent to the guest


class Uart16550(Device, name="uart16550"):
    """One serial port.  `receive` types into it; what the guest sends goes to `transmit`."""

    spans = (ports(8),)
    state: UartState

    def __init__(
        self, wires: Wires, *, transmit: Callable[[bytes], None] = lambda data: None
    ) -> None:
        super().__init__(wires)
        self.transmit = transmit
        self.irq = self.lines["irq"] = wires.line()
        self.state = self.power_on()

    def power_on(self) -> UartState:
        return UartState()

    # --- the far end ---

    def receive(self, data: bytes) -> None:
        """The far end types."""
        self.state.far.extend(byte | FAR for byte in data)
        self._listen()

    def receive_break(self) -> None:
        """The far end holds the line low for longer than a character."""
        self.state.far.append(FAR | BREAK)
        self._listen()

    @property
    def unread(self) -> int:
        """Characters typed that the guest has not read yet."""
        return len(self.state.far) + len(self.state.fifo)

    def _listen(self) -> None:
        s = self.state
        if s.mcr & RTS or s.ier & ERBFI:
            self._fill()
        self._update()

    def _fill(self) -> None:
        """Take what the far end has, as far as there is room."""
        s = self.state
        room = (16 if s.fcr & 1 else 1) - len(s.fifo)
        if room > 0 and s.far and not s.mcr & LOOP:
            taken = s.far[:room]
            del s.far[:room]
            was_empty = not s.fifo
            s.fifo.extend(taken)
            if was_empty:
                self._surface()

    def _surface(self) -> None:
        """A character came to the top of the FIFO: its errors show in LSR."""
        if self.state.fifo[0] & BREAK:
            self.state.errors |= BI

    def _drop(self) -> None:
        """Clear the receiver's FIFO.  What the far end sent, it will send again."""
        s = self.state
        s.far[:0] = [entry for entry in s.fifo if entry & FAR]
        s.fifo.clear()

    # --- the guest's end ---

    def read(self, region: int, offset: int, size: int) -> int:
        s = self.state
        if offset == 5:
            return self._read_lsr()
        s.was_polled = False
        if offset == 0:
            return s.divisor & 0xFF if s.lcr & DLAB else self._read_rbr()
        if offset == 1:
            return s.divisor >> 8 if s.lcr & DLAB else s.ier
        if offset == 2:
            pending = self._pending()
            if pending == IIR_THRE:
                s.is_thre_pending = False
                self._update()
            return pending | (0xC0 if s.fcr & 1 else 0)
        if offset == 3:
            return s.lcr
        if offset == 4:
            return s.mcr
        if offset == 6:
            value = s.delta | self._modem()
            s.delta = 0
            self._update()
            return value
        return s.scr

    def _read_lsr(self) -> int:
        s = self.state
        if s.far and not s.fifo and s.was_polled:
            self._fill()
        s.was_polled = not s.fifo
        value = EMPTY | s.errors
        if s.fifo:
            value |= DR
            if s.fcr & 1 and any(entry & BREAK for entry in s.fifo):
                value |= FIFOE
        if s.errors:
            s.errors = 0
            self._update()
        return value

    def _read_rbr(self) -> int:
        s = self.state
        if not s.fifo:
            return 0
        value = s.fifo.pop(0) & 0xFF
        if s.fifo:
            self._surface()
        self._listen()
        return value

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        s = self.state
        s.was_polled = False
        if offset == 0:
            if s.lcr & DLAB:
                s.divisor = s.divisor & 0xFF00 | value
                return
            s.is_thre_pending = True
            if s.mcr & LOOP:
                self._loop(value)
            else:
                self.transmit(bytes((value,)))
            if s.ier:
                self._update()
        elif offset == 1:
            if s.lcr & DLAB:
                s.divisor = s.divisor & 0xFF | value << 8
                return
            if value & ETBEI and not s.ier & ETBEI:
                s.is_thre_pending = True  # [DS]: enabling it while THR is empty interrupts
            s.ier = value & 0x0F
            self._listen()
        elif offset == 2:
            self._write_fcr(value)
        elif offset == 3:
            s.lcr = value
        elif offset == 4:
            self._write_mcr(value & 0x1F)
        elif offset == 7:
            s.scr = value

    def _loop(self, value: int) -> None:
        """[DS] "loopback": what is sent comes back, and the receiver may overrun."""
        s = self.state
        if len(s.fifo) < (16 if s.fcr & 1 else 1):
            s.fifo.append(value)
        else:
            s.errors |= OE
            if not s.fcr & 1:
                s.fifo[0] = value
        self._update()

    def _write_fcr(self, value: int) -> None:
        s = self.state
        if not value & 1:
            value = 0  # [DS]: the other bits are programmed only together with bit 0
        if (value ^ s.fcr) & 1 or value & FCR.RRESET.mask:
            self._drop()
        s.fcr = value & 0xC9
        self._listen()

    def _write_mcr(self, value: int) -> None:
        s = self.state
        before = self._modem()
        s.mcr = value
        changed = before ^ self._modem()
        s.delta |= changed >> 4 & 0x0B
        if before & ~self._modem() & MSR.RI.mask:
            s.delta |= MSR.TERI.mask  # only the trailing edge counts
        self._listen()

    def _modem(self) -> int:
        """The upper half of MSR."""
        s = self.state
        if not s.mcr & LOOP:
            return s.inputs
        mcr = s.mcr  # CTS = RTS, DSR = DTR, RI = OUT1, DCD = OUT2
        return (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 0xC) << 4

    def _pending(self) -> int:
        """IIR's low bits: the interrupt of the highest priority."""
        s = self.state
        ier = s.ier
        if ier & ELSI and s.errors:
            return IIR_LINE
        if ier & ERBFI and s.fifo:
            if s.fcr & 1 and len(s.fifo) < TRIGGER[s.fcr >> 6]:
                return IIR_TIMEOUT
            return IIR_DATA
        if ier & ETBEI and s.is_thre_pending:
            return IIR_THRE
        if ier & EDSSI and s.delta:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        s = self.state
        gate = s.mcr & (OUT2 | LOOP) == OUT2
        self.irq.set(gate and self._pending() != IIR_NONE)

    def inspect(self) -> dict[str, Any]:
        s = self.state
        return {
            "IER": repr(IER(s.ier)),
            "FCR": repr(FCR(s.fcr)),
            "LCR": repr(LCR(s.lcr)),
            "MCR": repr(MCR(s.mcr)),
            "baud": 115200 // s.divisor if s.divisor else 0,
            "unread": self.unread,
            "irq": self.irq.level,
        }
