"""A small builder of AML, the byte code of ACPI's DSDT.

Source: ACPI Specification 6.5, "ACPI Machine Language (AML) Specification" and "Resource Data
Types for ACPI".  Only declarations are built, and of methods what they need to notify devices.

Invariants: every function returns the complete encoding of its term; terms are joined by `+`.
"""

import struct

# --- Names and data objects ---


def name_string(path: str) -> bytes:
    r"""A name such as `_CRS`, `\_S5` or `\_SB.PCI0`; segments are padded with underscores."""
    root = b"\\" if path.startswith("\\") else b""
    segments = [s.ljust(4, "_").encode("ascii") for s in path.removeprefix("\\").split(".")]
    if any(len(s) != 4 for s in segments):
        raise ValueError(f"AML name {path!r}: expected segments of at most 4 characters")
    match len(segments):
        case 1:
            prefix = b""
        case 2:
            prefix = b"\x2e"
        case n:
            prefix = bytes((0x2F, n))
    return root + prefix + b"".join(segments)


def integer(value: int) -> bytes:
    """The shortest encoding of an integer."""
    if value in (0, 1):
        return bytes((value,))
    for opcode, code in ((0x0A, "<B"), (0x0B, "<H"), (0x0C, "<I"), (0x0E, "<Q")):
        if value < 1 << 8 * struct.calcsize(code):
            return bytes((opcode,)) + struct.pack(code, value)
    raise ValueError(f"AML integer {value:#x}: expected at most 64 bits")


def string(text: str) -> bytes:
    """A string of ASCII characters."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A compressed EISA identifier, e.g. PNP0501: an integer with the text packed into it."""
    a, b, c = (ord(letter) - 0x40 for letter in text[:3])
    packed = (a << 10 | b << 5 | c) << 16 | int(text[3:], 16)
    return integer(int.from_bytes(packed.to_bytes(4, "big"), "little"))


def package(*elements: bytes) -> bytes:
    """Package (n) { elements }"""
    return b"\x12" + _length(bytes((len(elements),)) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """Buffer (n) { data }"""
    return b"\x11" + _length(integer(len(data)) + data)


# --- Declarations ---


def name(path: str, value: bytes) -> bytes:
    """Name (path, value)"""
    return b"\x08" + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) { terms }"""
    return b"\x10" + _length(name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) { terms }"""
    return b"\x5b\x82" + _length(name_string(path) + b"".join(terms))


def method(path: str, *terms: bytes, arguments: int = 0) -> bytes:
    """Method (path, arguments) { terms }"""
    return b"\x14" + _length(name_string(path) + bytes((arguments,)) + b"".join(terms))


def port_region(path: str, port: int, count: int) -> bytes:
    """OperationRegion (path, SystemIO, port, count)"""
    return b"\x5b\x80" + name_string(path) + b"\x01" + integer(port) + integer(count)


def dword_fields(region: str, *names: str) -> bytes:
    """Field (region, DWordAcc, NoLock, WriteAsZeros) { name, 32 ... }"""
    units = b"".join(name_string(one) + _length_of(32) for one in names)
    return b"\x5b\x81" + _length(name_string(region) + b"\x43" + units)


# --- In methods ---


def local(number: int) -> bytes:
    """LocalN"""
    return bytes((0x60 + number,))


def store(source: bytes, target: bytes) -> bytes:
    """Store (source, target)"""
    return b"\x70" + source + target


def and_(a: bytes, b: bytes) -> bytes:
    """And (a, b)"""
    return b"\x7b" + a + b + b"\0"


def if_(predicate: bytes, *terms: bytes) -> bytes:
    """If (predicate) { terms }"""
    return b"\xa0" + _length(predicate + b"".join(terms))


def notify(path: str, value: int) -> bytes:
    """Notify (path, value)"""
    return b"\x86" + name_string(path) + integer(value)


def _length_of(count: int) -> bytes:
    """A PkgLength of so many, 63 at most."""
    return bytes((count,))


def _length(body: bytes) -> bytes:
    """The body after its PkgLength, which counts itself."""
    if len(body) + 1 < 0x40:
        return _length_of(len(body) + 1) + body
    for extra in (1, 2, 3):
        total = len(body) + 1 + extra
        if total < 1 << 4 + 8 * extra:
            head = bytes((extra << 6 | total & 15,))
            return head + (total >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"AML package of {len(body)} bytes: expected less than 256 MiB")


# --- Resource descriptors ---

MEMORY, IO, BUS_NUMBERS = 0, 1, 2  # kinds of address space


def resources(*descriptors: bytes) -> bytes:
    """A resource template: the descriptors and the end tag (checksum 0: not used)."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io_ports(start: int, count: int) -> bytes:
    """IO (Decode16, start, start, 1, count)"""
    return struct.pack("<BBHHBB", 0x47, 1, start, start, 1, count)


def memory(start: int, length: int) -> bytes:
    """Memory32Fixed (ReadWrite, start, length)"""
    return struct.pack("<BHBII", 0x86, 9, 1, start, length)


def irq(*numbers: int) -> bytes:
    """IRQNoFlags () {numbers}: edge-triggered, high active, exclusive"""
    return struct.pack("<BH", 0x22, sum(1 << n for n in numbers))


def address_range(kind: int, span: range, *, cacheable: bool = False) -> bytes:
    """WordBusNumber, WordIO, DWordMemory or QWordMemory: a fixed range that a bridge passes on."""
    fixed = 0x0C  # minimum and maximum are fixed, positive decode, producer
    flags = {MEMORY: 3 if cacheable else 1, IO: 3, BUS_NUMBERS: 0}[kind]
    low, high = span.start, span.stop - 1
    if kind != MEMORY:
        code, tag = "HHHHH", 0x88
    elif high < 1 << 32:
        code, tag = "IIIII", 0x87
    else:
        code, tag = "QQQQQ", 0x8A
    body = bytes((kind, fixed, flags)) + struct.pack("<" + code, 0, low, high, 0, len(span))
    return struct.pack("<BH", tag, len(body)) + body
