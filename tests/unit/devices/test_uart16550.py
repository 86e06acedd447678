"""16550: registers against the data sheet, and nothing typed is lost."""

from understudy.clock import ManualClock
from understudy.devices.uart16550 import IIR, LSR, MSR, Uart16550
from understudy.devices.wires import Wires
from understudy.machine.bus import Line

RBR, IER, FCR, LCR, MCR, LSR_, MSR_, SCR = range(8)


class Port:
    """A UART with short names for its registers."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.line = Line(lambda level: None)
        wires = Wires(ManualClock(), lines=(self.line,))
        self.uart = Uart16550(wires, transmit=self.sent.extend)

    def __getitem__(self, offset: int) -> int:
        return self.uart.read(0, offset, 1)

    def __setitem__(self, offset: int, value: int) -> None:
        self.uart.write(0, offset, value, 1)


def opened() -> Port:
    p = Port()
    p[FCR] = 0x01 | 0x80  # FIFO mode, trigger level 8
    p[MCR] = 0x0B
    p[IER] = 0x05
    return p


def test_transmit() -> None:
    p = Port()
    for c in b"hi":
        p[RBR] = c
    assert p.sent == b"hi"
    assert LSR(p[LSR_]) == LSR(TEMT=1, THRE=1)


def test_divisor_latch_hides_the_data() -> None:
    p = Port()
    p[LCR] = 0x83
    p[RBR], p[IER] = 0x34, 0x12
    assert (p[RBR], p[IER]) == (0x34, 0x12)
    p[LCR] = 0x03
    assert p[IER] == 0 and p.sent == b""
    assert p.uart.state.divisor == 0x1234


def test_scratch_and_unused_bits() -> None:
    p = Port()
    p[SCR], p[IER], p[MCR] = 0xA5, 0xFF, 0xFF
    assert (p[SCR], p[IER], p[MCR]) == (0xA5, 0x0F, 0x1F)


def test_thr_empty_interrupts_on_enabling_and_on_each_write_and_iir_clears_it() -> None:
    p = Port()
    p[MCR] = 0x08
    p[IER] = 0x02
    assert p.line.level
    assert p[FCR] == 0x02
    assert not p.line.level and p[FCR] == 0x01
    p[RBR] = 0x41
    assert p.line.level and p[FCR] == 0x02
    p[IER] = 0
    p[IER] = 2
    assert p.line.level


def test_without_out2_there_is_no_interrupt() -> None:
    p = Port()
    p[IER] = 0x02
    assert not p.line.level
    p[MCR] = 0x08
    assert p.line.level


def test_data_interrupt_at_the_trigger_level_and_time_out_below() -> None:
    p = opened()
    p.uart.receive(b"1234567")
    assert p.line.level and IIR(p[FCR]) == IIR(FIFOS=3, ID=6)
    p.uart.receive(b"8")
    assert IIR(p[FCR]) == IIR(FIFOS=3, ID=2)
    assert bytes(p[RBR] for _ in range(8)) == b"12345678"
    assert not p.line.level and p[RBR] == 0


def test_line_status_outranks_data_outranks_thr_outranks_modem() -> None:
    p = opened()
    p[IER] = 0x0F
    p[MCR] = 0x1A  # loopback: CTS follows RTS, and DSR and DCD fall or rise
    p[MCR] = 0x0B
    p.uart.receive_break()
    assert p[FCR] & 0xF == 6
    assert LSR(p[LSR_]) == LSR(FIFOE=1, TEMT=1, THRE=1, BI=1, DR=1)
    assert p[FCR] & 0xF == 12
    assert p[RBR] == 0
    assert p[FCR] & 0xF == 2
    assert p[FCR] & 0xF == 0
    assert p[MSR_] & 0xF
    assert p[FCR] & 0xF == 1


def test_loopback_of_data_and_modem_lines() -> None:
    p = Port()
    p[FCR] = 1
    p[MCR] = 0x10 | 0x0A
    assert p[MSR_] & 0xF0 == 0x90  # what Linux looks for: RTS and OUT2 come back
    for c in range(17):
        p[RBR] = c
    assert p.sent == b""
    assert LSR(p[LSR_]).OE
    assert [p[RBR] for _ in range(17)] == [*range(16), 0]
    p[MCR] = 0x14
    p[MSR_]
    p[MCR] = 0x10
    assert MSR(p[MSR_]).TERI


def test_typing_before_the_driver_is_up_is_kept() -> None:
    p = Port()
    p.uart.receive(bytes(range(100)))
    assert not LSR(p[LSR_]).DR and p[RBR] == 0
    p[FCR] = 1
    p[IER] = 1
    got = bytes(p[RBR] for _ in range(100))
    assert got == bytes(range(100)) and p.uart.unread == 0


def test_a_reset_of_the_fifo_makes_the_far_end_send_again() -> None:
    p = opened()
    p.uart.receive(b"uname -a\n")
    p[IER] = 0
    p[MCR] = 0
    p[FCR] = 0x07
    p[FCR] = 0
    assert not LSR(p[LSR_]).DR and p[RBR] == 0
    p[FCR] = 0x81
    p[MCR] = 0x0B
    assert bytes(p[RBR] for _ in range(9)) == b"uname -a\n"


def test_a_guest_that_polls_is_listening() -> None:
    p = Port()
    p.uart.receive(b"x")
    assert not LSR(p[LSR_]).DR
    assert LSR(p[LSR_]).DR and p[RBR] == ord("x")
    p.uart.receive(b"y")
    p[LSR_]
    p[RBR] = 0x41  # a sender: reads LSR once for each character
    p[LSR_]
    p[RBR] = 0x42
    assert not p.uart.state.fifo


def test_the_fifo_never_overruns() -> None:
    p = opened()
    p.uart.receive(bytes(1000))
    assert len(p.uart.state.fifo) == 16
    n = 0
    while LSR(status := p[LSR_]).DR:
        assert not LSR(status).OE
        p[RBR]
        n += 1
    assert n == 1000
