"""ACPI fixed hardware: PM1 and general-purpose event registers, and the power-management timer.

Source: ACPI Specification 6.5, "ACPI Hardware Specification".  `acpi_tables` tells the guest where
the board has them and which interrupt the SCI is.  There is no legacy mode: SCI_EN is 1.

Not modeled: sleeping states but S5, bus-master status, the global lock's release to firmware that
does not exist.

Invariants: the timer is the clock at 3.579545 MHz; the SCI is asserted exactly while a status bit
and its enable bit are both set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from understudy.arch.bits import Bit, Bits, Field
from understudy.clock import NS_PER_SECOND, Alarm
from understudy.devices import Device
from understudy.devices.acpi_tables import GPE0, GPE0_BYTES, PM1_CONTROL, PM_PORTS, PM_TIMER, S5
from understudy.devices.wires import Wires
from understudy.machine.bus import ports
from understudy.state import U16, U64

# --- The specification ---

PM_HZ = 3_579_545
HALF = 1 << 31  # TMR_STS is set whenever bit 31 of the timer changes


class PM1Status(Bits, width=16):
    """ "PM1 Status Registers"; writing a 1 clears a bit."""

    WAK = Bit(15)
    RTC = Bit(10)
    SLPBTN = Bit(9)
    PWRBTN = Bit(8)  # the power button was pressed
    GBL = Bit(5)
    BM = Bit(4)
    TMR = Bit(0)  # bit 31 of the timer has changed


class PM1Enable(Bits, width=16):
    """ "PM1 Enable Registers": which of them raise the SCI."""

    RTC = Bit(10)
    SLPBTN = Bit(9)
    PWRBTN = Bit(8)
    GBL = Bit(5)
    TMR = Bit(0)


class PM1Control(Bits, width=16):
    """ "PM1 Control Registers"."""

    SLP_EN = Bit(13)  # enter the state that SLP_TYP says; reads as 0
    SLP_TYP = Field(12, 10)
    GBL_RLS = Bit(2)
    BM_RLD = Bit(1)
    SCI_EN = Bit(0)  # power-management events raise the SCI, not an SMI


STATUS_BITS = sum(f.mask for f in PM1Status.FIELDS)
ENABLE_BITS = sum(f.mask for f in PM1Enable.FIELDS)
TMR, PWRBTN = PM1Status.TMR.mask, PM1Status.PWRBTN.mask


# "General-Purpose Event Register Blocks": a block of status bits, then one of enable bits
GPE_BITS = 4 * GPE0_BYTES
GPES = (1 << GPE_BITS) - 1


# --- The device ---


@dataclass
class AcpiState:
    """The registers, and how far TMR_STS is up to date."""

    status: U16 = 0
    enable: U16 = 0
    control: U16 = int(PM1Control(SCI_EN=1))
    gpe_status: U16 = 0
    gpe_enable: U16 = 0
    seen: U64 = 0  # how often bit 31 had changed when TMR_STS was last cleared


class Acpi(Device, name="acpi"):
    """The register blocks.  `power_off` is called when the guest enters S5."""

    spans = (ports(PM_PORTS, width=4),)
    state: AcpiState

    def __init__(self, wires: Wires, *, power_off: Callable[[], None] = lambda: None) -> None:
        super().__init__(wires)
        self.power_off = power_off
        self.sci = self.lines["sci"] = wires.line()
        self.carry = self.alarms["carry"] = Alarm(self.clock, self._update)
        self.state = self.power_on()

    def power_on(self) -> AcpiState:
        return AcpiState(seen=self.timer // HALF)

    def press_power_button(self) -> None:
        """Ask the guest to shut down, as the button on the front does."""
        self.state.status |= PWRBTN
        self._update()

    def raise_event(self, n: int) -> None:
        """Something has happened that the tables have this general-purpose event for."""
        self.state.gpe_status |= 1 << n
        self._update()

    # --- the timer ---

    @property
    def timer(self) -> int:
        """Ticks since power-on; the register shows the low 32 bits."""
        return self.clock.now() * PM_HZ // NS_PER_SECOND

    def _update(self) -> None:
        s = self.state
        changes = self.timer // HALF
        if changes != s.seen:
            s.seen = changes
            s.status |= TMR
        if s.enable & TMR and not s.status & TMR:
            self.carry.set(-(-(changes + 1) * HALF * NS_PER_SECOND // PM_HZ))
        else:
            self.carry.set(None)
        self.sci.set(bool(s.status & s.enable & ENABLE_BITS or s.gpe_status & s.gpe_enable))

    # --- registers ---

    def read(self, region: int, offset: int, size: int) -> int:
        if offset >= GPE0:
            block, start = self.state.gpe_status | self.state.gpe_enable << GPE_BITS, GPE0
        elif offset >= PM_TIMER:
            block, start = self.timer & 0xFFFF_FFFF, PM_TIMER
        elif offset >= PM1_CONTROL:
            block, start = self.state.control, PM1_CONTROL
        else:
            self._update()
            block, start = self.state.status | self.state.enable << 16, 0
        return block >> 8 * (offset - start) & (1 << 8 * size) - 1

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        s = self.state
        if offset >= GPE0:
            self._write_gpe(offset - GPE0, value, size)
            return
        if offset >= PM_TIMER:
            return
        start = PM1_CONTROL if offset >= PM1_CONTROL else 0
        shift = 8 * (offset - start)
        value <<= shift
        mask = ((1 << 8 * size) - 1) << shift
        if start:
            self._write_control(value & 0xFFFF | s.control & ~mask)
            return
        self._update()
        s.status &= ~(value & STATUS_BITS)
        enable = s.enable << 16 & ~mask | value & mask
        s.enable = enable >> 16 & ENABLE_BITS
        self._update()

    def _write_gpe(self, offset: int, value: int, size: int) -> None:
        """A 1 in the block of status bits clears it; the other block is kept."""
        s, mask = self.state, ((1 << 8 * size) - 1) << 8 * offset
        value = value << 8 * offset & mask
        s.gpe_status &= ~value
        s.gpe_enable = (s.gpe_enable & ~(mask >> GPE_BITS) | value >> GPE_BITS) & GPES
        self._update()

    def _write_control(self, value: int) -> None:
        sleeps = value & PM1Control.SLP_EN.mask
        keep = PM1Control.SLP_TYP.mask | PM1Control.BM_RLD.mask
        self.state.control = value & keep | PM1Control.SCI_EN.mask
        if sleeps and value & PM1Control.SLP_TYP.mask == S5 << PM1Control.SLP_TYP.low:
            self.power_off()

    def inspect(self) -> dict[str, Any]:
        s = self.state
        return {
            "PM1_STS": repr(PM1Status(s.status)),
            "PM1_EN": repr(PM1Enable(s.enable)),
            "PM1_CNT": repr(PM1Control(s.control)),
            "PM_TMR": self.timer & 0xFFFF_FFFF,
            "GPE0_STS": f"{s.gpe_status:#06x}",
            "GPE0_EN": f"{s.gpe_enable:#06x}",
            "SCI": self.sci.level,
        }
