"""The ACPI tables of the PC: RSDP, RSDT, XSDT, FADT, FACS, MADT, MCFG and DSDT.

Source: ACPI Specification 6.5, "System Description Tables" and "ACPI Hardware Specification"; for
the MCFG, PCI Firmware Specification 3.3, "MCFG Table Description".
They say what the board is and nothing more: local APICs, one I/O APIC, the fixed registers of
`acpi`, conventional PCI with fixed interrupt routes, two serial ports, the keyboard's
controller, the real-time clock, and where the generation of the VM is (`vmgenid`).

Not described: sleep states but S5, processors' power states, embedded controllers.

Invariants: every checksum is right; 32-bit and 64-bit addresses in one table agree; all tables
lie between 0xE0000 and 0xFFFFF, the RSDP first, so that a guest that searches finds it.
"""

import struct
from dataclasses import dataclass

from understudy.devices import acpi_hotplug, aml, pci
from understudy.devices.checksum import summed
from understudy.devices.rtc import Reg

BASE, LIMIT = 0xE_0000, 0x10_0000
OEM, TABLE_ID, CREATOR = b"UNDRST", b"UNDRSTDY", b"UNDS"
SCI = 9
S5 = 5  # SLP_TYP that means soft off

# Register blocks of `acpi`, as offsets from its base port.
PM1_EVENT, PM1_CONTROL, PM_TIMER, GPE0, PM_PORTS = 0, 4, 8, 12, 16
GPE0_BYTES = 4  # half of them status, half of them enable bits

NEW_GENERATION = 0  # the general-purpose event that tells of one

# FADT, "Fixed ACPI Description Table Fixed Feature Flags"
WBINVD, PROC_C1, SLP_BUTTON, FIX_RTC, TMR_VAL_EXT, RESET_REG_SUP = (
    1 << n for n in (0, 2, 5, 6, 8, 10)
)
# FADT, "IA-PC Boot Architecture Flags"
LEGACY_DEVICES, HAS_8042, VGA_NOT_PRESENT = 1 << 0, 1 << 1, 1 << 2

ACTIVE_HIGH_LEVEL = 0x0D  # MADT, "MPS INTI Flags"


@dataclass(frozen=True)
class Layout:
    """What the tables describe."""

    apic_ids: tuple[int, ...] = (0,)
    pm_port: int = 0x600
    ioapic_id: int = 1
    ioapic_gpa: int = 0xFEC0_0000
    lapic_gpa: int = 0xFEE0_0000
    ecam_gpa: int = pci.ECAM_GPA
    generation_gpa: int = 0xF_0000  # a page of firmware's own; the memory map calls it reserved
    high_mmio: range | None = None  # a PCI window above all memory
    hotplug_port: int | None = None  # where `pci_hotplug` is, if there is one


def build(layout: Layout) -> bytes:
    """All tables as one image for guest-physical address BASE, where the RSDP is."""
    image = bytearray(64)  # room for the RSDP, written last

    def place(data: bytes) -> int:
        image.extend(bytes(-len(image) % 64))
        image.extend(data)
        return BASE + len(image) - len(data)

    facs = place(struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2))
    dsdt = place(table(b"DSDT", 2, dsdt_body(layout)))
    fadt = place(table(b"FACP", 6, fadt_body(layout, facs, dsdt)))
    madt = place(table(b"APIC", 5, madt_body(layout)))
    mcfg = place(table(b"MCFG", 1, mcfg_body(layout)))
    rsdt = place(table(b"RSDT", 1, struct.pack("<III", fadt, madt, mcfg)))
    xsdt = place(table(b"XSDT", 1, struct.pack("<QQQ", fadt, madt, mcfg)))
    first = struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM, 2, rsdt)
    first = summed(first, 8)
    image[:36] = summed(first + struct.pack("<IQB3x", 36, xsdt, 0), 32)
    if BASE + len(image) > LIMIT:
        raise ValueError(f"ACPI tables of {len(image)} bytes do not fit below {LIMIT:#x}")
    return bytes(image)


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table: "System Description Table Header" and body, with its checksum."""
    length = 36 + len(body)
    header = struct.pack(
        "<4sIBB6s8sI4sI", signature, length, revision, 0, OEM, TABLE_ID, 1, CREATOR, 1
    )
    return summed(header + body, 9)


def _port(port: int, bits: int, access: int) -> bytes:
    """A Generic Address Structure in I/O space; access is 1 for bytes, 2 words, 3 dwords."""
    return struct.pack("<BBBBQ", 1, bits, 0, access, port)


def fadt_body(layout: Layout, facs: int, dsdt: int) -> bytes:
    """ "Fixed ACPI Description Table (FADT)", revision 6."""
    offsets = (PM1_EVENT, PM1_CONTROL, PM_TIMER, GPE0)
    event, control, timer, gpe = (layout.pm_port + n for n in offsets)
    none = bytes(12)
    parts = [
        struct.pack("<IIBB", facs, dsdt, 0, 0),  # no INT_MODEL, unspecified profile
        struct.pack("<HIBBBB", SCI, 0, 0, 0, 0, 0),  # no SMI command port: always in ACPI mode
        struct.pack("<IIIIIIII", event, 0, control, 0, 0, timer, gpe, 0),
        struct.pack("<BBBBBBBB", 4, 2, 0, 4, GPE0_BYTES, 0, 0, 0),  # lengths; no GPE1, no _CST
        struct.pack("<HHHHBB", 0xFFFF, 0xFFFF, 0, 0, 0, 0),  # no C2, no C3; no duty cycle
        struct.pack("<BBB", 0, 0, Reg.CENTURY),  # no alarm date in the RTC
        struct.pack("<HB", LEGACY_DEVICES | HAS_8042 | VGA_NOT_PRESENT, 0),
        struct.pack("<I", WBINVD | PROC_C1 | SLP_BUTTON | FIX_RTC | TMR_VAL_EXT | RESET_REG_SUP),
        _port(0xCF9, 8, 1),
        struct.pack("<BHB", 0x06, 0, 5),  # reset value; no ARM; FADT 6.5
        struct.pack("<QQ", 0, dsdt),  # the FACS is named once, in the 32-bit field
        _port(event, 32, 2) + none,
        _port(control, 16, 2) + none,
        none,
        _port(timer, 32, 3),
        _port(gpe, 8 * GPE0_BYTES, 1),
        none * 3,  # GPE1, sleep control, sleep status
        struct.pack("<Q", 0),  # hypervisor vendor identity
    ]
    return b"".join(parts)


def madt_body(layout: Layout) -> bytes:
    """ "Multiple APIC Description Table (MADT)"."""
    parts = [struct.pack("<II", layout.lapic_gpa, 1)]  # PCAT_COMPAT: there are 8259s too
    parts += [struct.pack("<BBBBI", 0, 8, n, id, 1) for n, id in enumerate(layout.apic_ids)]
    parts.append(struct.pack("<BBBBII", 1, 12, layout.ioapic_id, 0, layout.ioapic_gpa, 0))
    parts.append(struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0))  # IRQ 0 is on input 2
    parts.append(struct.pack("<BBBBIH", 2, 10, 0, SCI, SCI, ACTIVE_HIGH_LEVEL))
    parts.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))  # NMI on LINT1 of every processor
    return b"".join(parts)


def mcfg_body(layout: Layout) -> bytes:
    """ "MCFG Table Description": one segment group, and the buses that there are."""
    return bytes(8) + struct.pack("<QHBB4x", layout.ecam_gpa, 0, 0, pci.BUSES - 1)


def dsdt_body(layout: Layout) -> bytes:
    """ "Differentiated System Description Table (DSDT)"."""
    sleep = aml.package(*(aml.integer(n) for n in (S5, S5, 0, 0)))
    tells = aml.method(f"_E{NEW_GENERATION:02X}", aml.notify("\\_SB.VGEN", 0x80))
    claimed = [aml.io_ports(layout.pm_port, PM_PORTS)]
    if layout.hotplug_port is not None:
        tells += acpi_hotplug.event("\\_SB.PCI0")
        claimed.append(aml.io_ports(layout.hotplug_port, acpi_hotplug.HOTPLUG_PORTS))
    return (
        aml.name("_S5", sleep)
        + aml.scope("_GPE", tells)
        + aml.scope(
            "_SB",
            _pci_root(layout),
            aml.device(
                "MBRD",  # what no other device claims; a guest looks here before it trusts the MCFG
                aml.name("_HID", aml.eisa_id("PNP0C02")),
                aml.name(
                    "_CRS",
                    aml.resources(
                        *claimed,
                        aml.io_ports(0x4D0, 2),
                        aml.io_ports(0xF4, 4),
                        aml.memory(layout.ecam_gpa, pci.ECAM_BYTES),
                    ),
                ),
            ),
            _legacy("COM1", "PNP0501", aml.io_ports(0x3F8, 8) + aml.irq(4), uid=1),
            _legacy("COM2", "PNP0501", aml.io_ports(0x2F8, 8) + aml.irq(3), uid=2),
            _legacy("KBD", "PNP0303", aml.io_ports(0x60, 1) + aml.io_ports(0x64, 1) + aml.irq(1)),
            _legacy("RTC", "PNP0B00", aml.io_ports(0x70, 2) + aml.irq(8)),
            _legacy("PIC", "PNP0000", aml.io_ports(0x20, 2) + aml.io_ports(0xA0, 2) + aml.irq(2)),
            _legacy("TIMR", "PNP0100", aml.io_ports(0x40, 4) + aml.irq(0)),
            _generation(layout),
        )
    )


def _generation(layout: Layout) -> bytes:
    """ "Virtual Machine Generation ID": the halves of its address."""
    low, high = layout.generation_gpa & 0xFFFF_FFFF, layout.generation_gpa >> 32
    return aml.device(
        "VGEN",
        aml.name("_HID", aml.string("UNDS0001")),
        aml.name("_CID", aml.string("VM_Gen_Counter")),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        aml.name("ADDR", aml.package(aml.integer(low), aml.integer(high))),
    )


def _legacy(path: str, hid: str, descriptors: bytes, uid: int | None = None) -> bytes:
    terms = [aml.name("_HID", aml.eisa_id(hid))]
    if uid is not None:
        terms.append(aml.name("_UID", aml.integer(uid)))
    terms.append(aml.name("_CRS", aml.resources(descriptors)))
    return aml.device(path, *terms)


def _pci_root(layout: Layout) -> bytes:
    spans = [
        aml.address_range(aml.BUS_NUMBERS, range(pci.BUSES)),
        aml.io_ports(0xCF8, 8),
        aml.address_range(aml.IO, range(0x0CF8)),
        aml.address_range(aml.IO, range(0x0D00, 0x1_0000)),
        aml.address_range(aml.MEMORY, range(pci.MMIO_WINDOW.start, layout.ecam_gpa)),
        aml.address_range(
            aml.MEMORY, range(layout.ecam_gpa + pci.ECAM_BYTES, pci.MMIO_WINDOW.stop)
        ),
    ]
    if layout.high_mmio is not None:
        spans.append(aml.address_range(aml.MEMORY, layout.high_mmio))
    routes = [
        aml.package(
            aml.integer(device << 16 | 0xFFFF),
            aml.integer(pin),
            aml.integer(0),  # no link device: the source is a fixed interrupt
            aml.integer(pci.irq_of(device, pin + 1)),
        )
        for device in range(1, 32)
        for pin in range(4)
    ]
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_CRS", aml.resources(*spans)),
        aml.name("_PRT", aml.package(*routes)),
        b"" if layout.hotplug_port is None else acpi_hotplug.registers(layout.hotplug_port),
    )
