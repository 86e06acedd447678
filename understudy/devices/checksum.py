"""The checksum of firmware's tables: all bytes add up to nothing.

Source: ACPI Specification, "System Description Table Header"; SMBIOS and MultiProcessor tables have
the same.  Invariants: none.
"""


def summed(data: bytes, at: int) -> bytes:
    """With the byte `at` (0 before) such that all bytes add up to 0, modulo 256."""
    return data[:at] + bytes((-sum(data) & 0xFF,)) + data[at + 1 :]
