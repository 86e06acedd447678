"""Intel 8254: programmable interval timer, three counters of 16 bits.

[DS] Intel 8254 data sheet.  A PC clocks it with 1.193182 MHz at ports 0x40-0x43.  The output of
counter 0 is IRQ 0; counter 1 once timed the memory refresh; counter 2 drives the speaker, and its
gate and output are bits of port 0x61 (IBM PC AT Technical Reference, "System Board").

Not modeled: the speaker's sound.  The low phase before a rising edge of counter 0's output is
compressed to nothing, which an edge-triggered interrupt controller cannot see.

Invariants: counts and outputs are functions of the clock and of what was written, computed when
someone looks; the one alarm is for the next rising edge of counter 0's output.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from understudy.arch.bits import Bit, Bits, Field
from understudy.clock import NS_PER_SECOND, Alarm
from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.machine.bus import ports
from understudy.state import U2, U3, U8, U16

# --- The data sheet ---

HZ = 1_193_182
COUNTERS, PORT61 = 0, 1  # regions
CONTROL = 3  # offset of the control word; the counters come before it


class ControlWord(Bits, width=8):
    """[DS] "Control Word Format"."""

    SC = Field(7, 6)  # select counter; 3 is the read-back command
    RW = Field(5, 4)  # 1 low byte, 2 high byte, 3 low then high; 0 is the latch command
    M = Field(3, 1)  # mode 0-5; 6 and 7 mean 2 and 3
    BCD = Bit(0)  # count in four decimal digits


class Port61(Bits, width=8):
    """System control port B of a PC AT."""

    OUT2 = Bit(5)  # output of counter 2
    REFRESH = Bit(4)  # toggles with each refresh, every 15 microseconds
    SPEAKER = Bit(1)  # counter 2 may drive the speaker
    GATE2 = Bit(0)  # gate of counter 2


def ticks_at(ns: int) -> int:
    """How often the 1.193182-MHz clock has ticked by then."""
    return ns * HZ // NS_PER_SECOND


def ns_at(tick: int) -> int:
    """The first nanosecond at which it has ticked that often."""
    return -(-tick * NS_PER_SECOND // HZ)


# --- The counters ---


@dataclass
class Counter:
    """One counter.  Times are ticks of the input clock since power-on."""

    mode: U3 = 3
    rw: U2 = 3
    is_bcd: bool = False
    gate: bool = True
    count: U16 = 0  # the count register; 0 stands for the largest count
    next_count: U16 | None = None  # written, in use from the next reload on
    reload_at: int | None = None  # modes 2 and 3: the tick of that reload
    start: int | None = None  # when the count was loaded; None: never, or not yet triggered
    stopped: int | None = None  # how many ticks had passed when the gate stopped it
    is_null: bool = True  # status: written, but not loaded yet
    write_low: U8 | None = None  # the first byte of two
    read_high: bool = False  # the second byte of two is next
    latch: list[U8] = field(default_factory=list)  # bytes of a latched count
    latched_status: U8 | None = None

    @property
    def period(self) -> int:
        """The count register's meaning in ticks."""
        return self._meaning(self.count)

    def _meaning(self, count: int) -> int:
        if self.is_bcd:
            return _from_bcd(count) or 10_000
        return count or 0x10000

    def passed(self, tick: int) -> int:
        """Ticks counted since the load."""
        if self.stopped is not None:
            return self.stopped
        assert self.start is not None
        return max(tick - self.start, 0)

    def settle(self, tick: int) -> None:
        """Modes 2 and 3: take over a new count whose time has come."""
        at = self.reload_at
        if at is None or tick < at or self.next_count is None or self.start is None:
            return
        is_middle = at != self.start + self.period
        self._take_next()
        self.start = at - (self.period + 1) // 2 if is_middle else at

    def _take_next(self) -> None:
        if self.next_count is not None:
            self.count, self.is_null = self.next_count, False
        self.next_count = self.reload_at = None

    def _replace(self, count: int, tick: int) -> None:
        """Modes 2 and 3, running: [DS] the new count waits for the end of the (half) cycle."""
        self.settle(tick)
        assert self.start is not None
        n = self.period
        self.start += (tick - self.start) // n * n
        half = (n + 1) // 2
        is_high = self.mode == 3 and tick < self.start + half < self.start + n
        self.next_count, self.is_null = count, True
        self.reload_at = self.start + (half if is_high else n)

    def out(self, tick: int) -> bool:
        """The level of the output."""
        if self.start is None:
            return self.mode != 0
        n, passed = self.period, self.passed(tick)
        match self.mode:
            case 0 | 1:
                return passed >= n
            case 2:
                return self.stopped is not None or passed % n != n - 1
            case 3:
                return self.stopped is not None or passed % n < (n + 1) // 2
            case _:
                return passed != n

    def value(self, tick: int) -> int:
        """What the counting element holds, in the counter's number system."""
        if self.start is None:
            return self.count
        n, passed = self.period, self.passed(tick)
        match self.mode:
            case 2:
                left = n - passed % n
            case 3:
                phase, half = passed % n, (n + 1) // 2
                left = (n & ~1) - 2 * (phase if phase < half else phase - half)
                left = max(left, 2)
            case _:
                left = n - passed
        return _to_bcd(left % 10_000) if self.is_bcd else left & 0xFFFF

    def next_rise(self, tick: int) -> int | None:
        """The first tick after this one at which the output goes high by itself."""
        if self.start is None or self.stopped is not None:
            return None
        n, passed = self.period, self.passed(tick)
        match self.mode:
            case 0 | 1:
                rise = n if passed < n else None
            case 2 | 3:
                rise = passed - passed % n + n
                at = self.reload_at
                if at is not None and at < self.start + rise and self.next_count is not None:
                    return at + self._meaning(self.next_count) // 2
            case _:
                rise = n + 1 if passed <= n else None
        return None if rise is None else self.start + rise

    def control(self, mode: int, rw: int, is_bcd: bool) -> None:
        """A control word: the counter waits for a count."""
        self.mode, self.rw, self.is_bcd = (mode & 3 if mode > 5 else mode), rw, is_bcd
        self.start = self.stopped = self.next_count = self.reload_at = self.write_low = None
        self.read_high, self.is_null = False, True
        self.latch.clear()
        self.latched_status = None

    def load(self, count: int, tick: int) -> None:
        """A whole count was written."""
        if self.mode in (1, 5):  # loaded by the next trigger
            if self.start is None:
                self.count = count
            else:
                self.next_count = count
            self.is_null = True
        elif self.mode in (2, 3) and self.start is not None and self.stopped is None:
            self._replace(count, tick)
        else:
            self.count, self.next_count, self.reload_at = count, None, None
            self.is_null = False
            self.start = tick
            self.stopped = None if self.gate else 0

    def set_gate(self, gate: bool, tick: int) -> None:
        """The gate input has this level now: it pauses, or triggers."""
        if gate is self.gate:
            return
        self.settle(tick)
        self.gate = gate
        if self.mode in (1, 5):
            if gate:  # the trigger
                self._take_next()
                self.start, self.is_null = tick, False
        elif self.start is None:
            pass
        elif self.mode in (2, 3):
            if gate:  # reload
                self._take_next()
                self.start, self.stopped = tick, None
            else:
                self.stopped, self.reload_at = self.passed(tick), None
        elif gate:
            assert self.stopped is not None
            self.start, self.stopped = tick - self.stopped, None
        else:
            self.stopped = self.passed(tick)


def _from_bcd(value: int) -> int:
    return sum((value >> 4 * i & 15) * 10**i for i in range(4))


def _to_bcd(value: int) -> int:
    return sum(value // 10**i % 10 << 4 * i for i in range(4))


# --- The device ---


@dataclass
class PitState:
    """The counters, and the speaker's switch."""

    counters: Annotated[list[Counter], 3] = field(
        default_factory=lambda: [Counter(), Counter(), Counter()]
    )
    speaker: bool = False


class Pit8254(Device, name="pit8254"):
    """The timer and the port 0x61 that belongs to its third counter."""

    spans = (ports(4), ports(1))  # the counters and the control word; port 0x61
    state: PitState

    def __init__(self, wires: Wires) -> None:
        super().__init__(wires)
        self.irq = self.lines["irq"] = wires.line()
        self.edge = self.alarms["edge"] = Alarm(self.clock, self._rise)
        self.state = self.power_on()

    def power_on(self) -> PitState:
        state = PitState()
        state.counters[2].gate = False
        return state

    # --- counter 0's output ---

    def _rise(self) -> None:
        """A rising edge is due: once, however many have been missed."""
        self.irq.lower()
        self.irq.raise_()
        self._plan(ticks_at(self.clock.now()))

    def _plan(self, tick: int) -> None:
        counter = self.state.counters[0]
        counter.settle(tick)
        rise = counter.next_rise(tick)
        self.edge.set(None if rise is None else ns_at(rise))

    # --- registers ---

    def read(self, region: int, offset: int, size: int) -> int:
        tick = ticks_at(self.clock.now())
        if region == PORT61:
            return self._read61(tick)
        if offset == CONTROL:
            return 0xFF  # [DS]: no operation
        c = self.state.counters[offset]
        if c.latched_status is not None:
            status, c.latched_status = c.latched_status, None
            return status
        if c.latch:
            return c.latch.pop(0)
        c.settle(tick)
        value = c.value(tick)
        if c.rw == 3:
            c.read_high = not c.read_high
            return value & 0xFF if c.read_high else value >> 8
        return value >> 8 if c.rw == 2 else value & 0xFF

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        tick = ticks_at(self.clock.now())
        if region == PORT61:
            self.state.speaker = bool(value & Port61.SPEAKER.mask)
            self.state.counters[2].set_gate(bool(value & Port61.GATE2.mask), tick)
        elif offset == CONTROL:
            self._control(value, tick)
        else:
            self._count(offset, value, tick)

    def _count(self, n: int, value: int, tick: int) -> None:
        c = self.state.counters[n]
        if c.rw == 3 and c.write_low is None:
            c.write_low = value
            if c.mode == 0:  # [DS]: the first byte stops the counting and lowers OUT
                c.start = c.stopped = None
        else:
            low = c.write_low or 0
            c.write_low = None
            c.load(value if c.rw == 1 else value << 8 | low, tick)
        if n == 0:
            self.irq.set(c.out(tick))
            self._plan(tick)

    def _control(self, value: int, tick: int) -> None:
        select, rw = value >> 6, value >> 4 & 3
        if select == 3:
            for n, c in enumerate(self.state.counters):
                if value >> n & 2:
                    if not value & 0x10:
                        self._latch_status(c, tick)
                    if not value & 0x20:
                        self._latch_count(c, tick)
            return
        c = self.state.counters[select]
        if rw == 0:
            self._latch_count(c, tick)
            return
        c.control(value >> 1 & 7, rw, bool(value & 1))
        if select == 0:
            self.irq.set(c.out(tick))
            self._plan(tick)

    def _latch_count(self, c: Counter, tick: int) -> None:
        if c.latch:
            return  # [DS]: the first latch holds until it is read
        c.settle(tick)
        value = c.value(tick)
        both = [value & 0xFF, value >> 8]
        c.latch = both if c.rw == 3 else [both[c.rw - 1]]

    def _latch_status(self, c: Counter, tick: int) -> None:
        if c.latched_status is None:
            c.settle(tick)
            c.latched_status = (
                c.out(tick) << 7 | c.is_null << 6 | c.rw << 4 | c.mode << 1 | c.is_bcd
            )

    def _read61(self, tick: int) -> int:
        s = self.state
        c = s.counters[2]
        c.settle(tick)
        refresh = tick // 18 & 1  # counter 1 divides by 18 on a PC
        return c.out(tick) << 5 | refresh << 4 | s.speaker << 1 | c.gate

    def inspect(self) -> dict[str, Any]:
        tick = ticks_at(self.clock.now())
        return {
            f"counter {n}": {
                "mode": c.mode,
                "period": c.period,
                "value": c.value(tick),
                "out": c.out(tick),
                "gate": c.gate,
            }
            for n, c in enumerate(self.state.counters)
        } | {"next edge": self.edge.when}
