"""What the ACPI tables say of PCI slots whose devices come and go.

Source: ACPI Specification 6.5, "Device Insertion, Removal, and Status Objects" and "Device Object
Notifications".  Each slot is a device with `_EJ0`, by which the guest gives up what is in it.
"""

from typing import Final

from understudy.devices import aml

HOTPLUGGED: Final = 1  # the general-purpose event: look at the registers
CAME, GOES, EJECT, HOTPLUG_PORTS = 0, 4, 8, 12  # registers of `pci_hotplug`, and bytes of them all
DEVICE_CHECK, EJECT_REQUEST = 1, 3  # notifications
SLOTS: Final = range(1, 32)


def _path(slot: int) -> str:
    return f"S{slot:02X}"


def registers(port: int) -> bytes:
    """The registers as fields, in the scope of the bus, and its slots."""
    return (
        aml.port_region("HOTP", port, HOTPLUG_PORTS)
        + aml.dword_fields("HOTP", "CAME", "GOES", "EJCT")
        + b"".join(_slot(slot) for slot in SLOTS)
    )


def _slot(slot: int) -> bytes:
    return aml.device(
        _path(slot),
        aml.name("_ADR", aml.integer(slot << 16)),
        aml.name("_SUN", aml.integer(slot)),
        aml.method("_EJ0", aml.store(aml.integer(1 << slot), aml.name_string("EJCT")), arguments=1),
    )


def event(bus: str) -> bytes:
    """The method of the event: hear which slots it is about, clear their bits, and tell of them."""
    terms = b""
    for local, register in enumerate(("CAME", "GOES")):
        path = aml.name_string(f"{bus}.{register}")
        terms += aml.store(path, aml.local(local)) + aml.store(aml.local(local), path)
    for slot in SLOTS:
        for local, value in enumerate((DEVICE_CHECK, EJECT_REQUEST)):
            is_set = aml.and_(aml.local(local), aml.integer(1 << slot))
            terms += aml.if_(is_set, aml.notify(f"{bus}.{_path(slot)}", value))
    return aml.method(f"_E{HOTPLUGGED:02X}", terms)
