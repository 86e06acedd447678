"""MC146818A: real-time clock, and the CMOS RAM of a PC.

[DS] Motorola MC146818A data sheet.  A PC wires it to ports 0x70 (index) and 0x71 (data), and to
IRQ 8.  The century is at 0x32, where the ACPI table FADT says it is.

Not modeled: the square-wave output, daylight saving, other time bases than 32.768 kHz.  An
update takes no time, so UIP announces it for 244 microseconds and falls with it.

Invariants: the time of day is `clock.now()` plus an offset that only setting the time changes;
alarms run only for enabled interrupts; flags alone are computed when register C is read; a reset
stops neither the clock nor forgets the RAM, which have a battery.
"""

from calendar import timegm
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Annotated, Any

from understudy.arch.bits import Bit, Bits, Field
from understudy.clock import NS_PER_SECOND, Alarm
from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.machine.bus import ports
from understudy.state import U8, U32, U64

# --- The data sheet ---


class Reg(IntEnum):
    """[DS] "Address Map"; CENTURY is a PC's."""

    SECONDS = 0x00
    SECONDS_ALARM = 0x01
    MINUTES = 0x02
    MINUTES_ALARM = 0x03
    HOURS = 0x04
    HOURS_ALARM = 0x05
    DAY_OF_WEEK = 0x06
    DATE = 0x07
    MONTH = 0x08
    YEAR = 0x09
    A = 0x0A
    B = 0x0B
    C = 0x0C
    D = 0x0D
    CENTURY = 0x32


class RegisterA(Bits, width=8):
    """[DS] "Register A"."""

    UIP = Bit(7)  # update in progress, or about to be
    DV = Field(6, 4)  # divider: 2 is the 32.768-kHz time base, 6 and 7 hold it in reset
    RS = Field(3, 0)  # rate of the periodic interrupt


class RegisterB(Bits, width=8):
    """[DS] "Register B"."""

    SET = Bit(7)  # halt updates while software writes the time
    PIE = Bit(6)  # periodic interrupt enable
    AIE = Bit(5)  # alarm interrupt enable
    UIE = Bit(4)  # update-ended interrupt enable
    SQWE = Bit(3)  # square-wave enable
    DM = Bit(2)  # data mode: 1 binary, 0 BCD
    H24 = Bit(1)  # "24/12": 1 is the 24-hour mode
    DSE = Bit(0)  # daylight saving enable


class RegisterC(Bits, width=8):
    """[DS] "Register C"; reading clears it."""

    IRQF = Bit(7)  # an enabled flag is set
    PF = Bit(6)  # periodic
    AF = Bit(5)  # alarm
    UF = Bit(4)  # update ended


SET, PIE, AIE, UIE = RegisterB.SET.mask, RegisterB.PIE.mask, RegisterB.AIE.mask, RegisterB.UIE.mask
DM, H24 = RegisterB.DM.mask, RegisterB.H24.mask
INDEX = 0  # offset; the other one is the data
UIP_NS = 244_000
VRT = 0x80  # register D: RAM and time are valid
TIME = frozenset((0, 2, 4, 6, 7, 8, 9, Reg.CENTURY))
DONT_CARE = 0xC0


# --- The device ---


@dataclass
class RtcState:
    """The registers and RAM, and the time of day as an offset."""

    index: U8 = 0
    offset_s: int = (
        0  # time of day (Unix, UTC) minus clock.now(), whole seconds; the years go to 9999
    )
    offset_part_ns: U32 = 0  # the rest, below a second
    flags: U8 = 0  # register C without IRQF
    seen_ns: U64 = 0  # up to when the flags are complete without an alarm
    ram: Annotated[bytearray, 128] = field(default_factory=lambda: bytearray(128))


class Rtc(Device, name="rtc"):
    """The clock starts at `epoch_ns` (Unix time, UTC) when `clock.now()` is 0.

    `ram` is what firmware puts into the RAM, at power-on and after each reset.
    """

    spans = (ports(2),)  # index, data
    battery = ("offset_s", "offset_part_ns", "ram")
    state: RtcState

    def __init__(
        self, wires: Wires, *, epoch_ns: int = 0, ram: Mapping[int, int] | None = None
    ) -> None:
        super().__init__(wires)
        self.epoch_ns = epoch_ns
        self.firmware = {Reg.A: 0x26, Reg.B: H24, **(ram or {})}
        self.irq = self.lines["irq"] = wires.line()
        self.periodic = self._alarm("periodic", self._tick)
        self.update = self._alarm("update", self._update_ended)
        self.match = self._alarm("alarm", self._alarm_match)
        self.state = self.power_on()

    def power_on(self) -> RtcState:
        seconds, part = divmod(self.epoch_ns, NS_PER_SECOND)
        state = RtcState(offset_s=seconds, offset_part_ns=part, seen_ns=self.clock.now())
        for index, value in self.firmware.items():
            state.ram[index] = value
        return state

    def reset(self) -> None:
        super().reset()
        for index, value in self.firmware.items():
            self.state.ram[index] = value

    def _alarm(self, name: str, callback: Callable[[], None]) -> Alarm:
        self.alarms[name] = alarm = Alarm(self.clock, callback)
        return alarm

    # --- time of day ---

    @property
    def time_ns(self) -> int:
        """Unix time by this clock."""
        return self.clock.now() + self.offset_ns

    @property
    def offset_ns(self) -> int:
        """`time_ns` minus clock.now()."""
        return self.state.offset_s * NS_PER_SECOND + self.state.offset_part_ns

    @offset_ns.setter
    def offset_ns(self, value: int) -> None:
        self.state.offset_s, self.state.offset_part_ns = divmod(value, NS_PER_SECOND)

    @property
    def is_running(self) -> bool:
        ram = self.state.ram
        return not ram[Reg.B] & SET and ram[Reg.A] >> 4 & 7 < 6

    def _show(self) -> None:
        """Copy the time of day into its registers."""
        ram = self.state.ram
        # The registers hold the years 0 to 9999; datetime holds 1 to 9999.
        seconds = max(-62_135_596_800, min(self.time_ns // NS_PER_SECOND, 253_402_300_799))
        t = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
        ram[0], ram[2] = self._encode(t.second), self._encode(t.minute)
        ram[4] = self._encode_hour(t.hour)
        ram[6] = self._encode(t.isoweekday() % 7 + 1)
        ram[7], ram[8] = self._encode(t.day), self._encode(t.month)
        ram[9], ram[Reg.CENTURY] = self._encode(t.year % 100), self._encode(t.year // 100)

    def _take(self) -> None:
        """The time of day becomes what its registers say; nonsense is taken as far as it goes."""
        ram = self.state.ram
        second, minute, day, month, year, century = (
            self._decode(ram[i]) for i in (0, 2, 7, 8, 9, Reg.CENTURY)
        )
        hour = self._decode_hour(ram[4])
        year = max(1, min(century * 100 + year, 9999))
        months = year, max(1, min(month, 12)), 1, hour, minute, second
        seconds = timegm(months) + (day - 1) * 86400
        part = self.time_ns % NS_PER_SECOND
        self.offset_ns = seconds * NS_PER_SECOND + part - self.clock.now()

    def _encode(self, value: int) -> int:
        return value if self.state.ram[Reg.B] & DM else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.state.ram[Reg.B] & DM else (value >> 4) * 10 + (value & 15)

    def _encode_hour(self, hour: int) -> int:
        if self.state.ram[Reg.B] & H24:
            return self._encode(hour)
        return self._encode((hour + 11) % 12 + 1) | (0x80 if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self.state.ram[Reg.B] & H24:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)

    # --- interrupts ---

    def _plan(self) -> None:
        """Set each alarm to its next time, if its interrupt is enabled."""
        b, now = self.state.ram[Reg.B], self.clock.now()
        running = self.is_running
        next_second = now + NS_PER_SECOND - self.time_ns % NS_PER_SECOND
        self.update.set(next_second if b & UIE and running else None)
        self.match.set(self._next_match(next_second) if b & AIE and running else None)
        self.periodic.set(self._next_tick(now) if b & PIE else None)

    def _next_tick(self, now: int) -> int | None:
        """[DS] "Periodic Interrupt Rate": 2**(RS-1) cycles of 32768 Hz; 1 and 2 as 8 and 9."""
        rate = self.state.ram[Reg.A] & 15
        if rate == 0:
            return None
        cycles = 1 << (rate + 6 if rate < 3 else rate - 1)
        done = (now * 32768 // NS_PER_SECOND) // cycles
        return -(-(done + 1) * cycles * NS_PER_SECOND // 32768)

    def _next_match(self, next_second: int) -> int | None:
        """When the alarm registers next agree with the time of day, within a day."""
        ram = self.state.ram
        hour, minute, second = (
            None if ram[i] >= DONT_CARE else decode(ram[i])
            for i, decode in ((5, self._decode_hour), (3, self._decode), (1, self._decode))
        )
        first = (next_second + self.offset_ns) // NS_PER_SECOND % 86400
        for h in range(25):
            day_hour = (first // 3600 + h) % 24
            if hour is not None and hour != day_hour:
                continue
            start = first % 3600 if h == 0 else 0
            for m in range(start // 60, 60):
                if minute is not None and minute != m:
                    continue
                low = start % 60 if m == start // 60 else 0
                s = low if second is None else second
                if low <= s < 60:
                    ahead = h * 3600 - first % 3600 + m * 60 + s
                    return next_second + ahead * NS_PER_SECOND
        return None

    def _tick(self) -> None:
        self._flag(RegisterC.PF.mask)

    def _update_ended(self) -> None:
        self._flag(RegisterC.UF.mask)

    def _alarm_match(self) -> None:
        self._flag(RegisterC.AF.mask)

    def _flag(self, flag: int) -> None:
        self.state.flags |= flag
        self._plan()
        self._drive()

    def _collect(self) -> None:
        """[DS] "Register C": flags are set whether or not their interrupt is enabled."""
        s, now = self.state, self.clock.now()
        seen, s.seen_ns = s.seen_ns, now
        tick = self._next_tick(seen)
        if tick is not None and tick <= now:
            s.flags |= RegisterC.PF.mask
        if self.is_running:
            next_second = seen + NS_PER_SECOND - (seen + self.offset_ns) % NS_PER_SECOND
            if next_second <= now:
                s.flags |= RegisterC.UF.mask
                match = self._next_match(next_second)
                if match is not None and match <= now:
                    s.flags |= RegisterC.AF.mask

    def _drive(self) -> None:
        self.irq.set(bool(self.state.flags & self.state.ram[Reg.B] & 0x70))

    # --- registers ---

    def read(self, region: int, offset: int, size: int) -> int:
        s = self.state
        if offset == INDEX:
            return 0xFF  # the index is write-only
        match s.index:
            case Reg.A:
                left = NS_PER_SECOND - self.time_ns % NS_PER_SECOND
                return s.ram[Reg.A] | (0x80 if self.is_running and left <= UIP_NS else 0)
            case Reg.C:
                self._collect()
                value = s.flags
                if value & s.ram[Reg.B] & 0x70:
                    value |= RegisterC.IRQF.mask
                s.flags = 0
                self._drive()
                return value
            case Reg.D:
                return VRT
            case index if index in TIME and self.is_running:
                self._show()
        return s.ram[s.index]

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        s = self.state
        if offset == INDEX:
            s.index = value & 0x7F  # bit 7 masks NMI: the board's, not ours
            return
        match s.index:
            case Reg.A:
                self._reconfigure(Reg.A, value & 0x7F)
            case Reg.B:
                if value & SET:
                    value &= ~UIE  # [DS]: SET clears UIE
                self._reconfigure(Reg.B, value)
                self._drive()
            case Reg.C | Reg.D:
                pass  # read-only
            case index if index in TIME:
                if self.is_running:
                    self._show()
                s.ram[index] = value
                if self.is_running:
                    self._take()
                    self._plan()
            case index:
                s.ram[index] = value
                if index in (1, 3, 5):
                    self._plan()

    def _reconfigure(self, register: Reg, value: int) -> None:
        """A write to register A or B, which may stop the clock or let it go."""
        s = self.state
        self._collect()
        was_running = self.is_running
        if was_running:
            self._show()
        s.ram[register] = value
        if self.is_running and not was_running:
            if register is Reg.A:  # [DS]: leaving reset, the first update is half a second later
                self.offset_ns += NS_PER_SECOND // 2 - self.time_ns % NS_PER_SECOND
            self._take()
        self._plan()

    def inspect(self) -> dict[str, Any]:
        s = self.state
        return {
            "time_ns": self.time_ns,
            "index": s.index,
            "A": repr(RegisterA(s.ram[Reg.A])),
            "B": repr(RegisterB(s.ram[Reg.B])),
            "C": repr(RegisterC(s.flags)),
        }
