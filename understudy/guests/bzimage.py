"""bzImage: a Linux kernel as distributions ship it, and anything else with its boot header.

Three ways in, named by `loader.load(method=...)`:

* "linux-direct": the payload is decompressed here, and vmlinux entered at its own entry point.
  Saves the guest the 1-2 G instructions of its decompressor.  What the decompressor would have
  done is done here: segments at their physical addresses, .bss zero, boot_params kept, no
  5-level paging.  Nothing is relocated: the kernel goes where it was linked to run, and its
  address is not randomized.
* "linux-64": the file's own 64-bit entry point, 0x200 bytes into the protected-mode part.
* "linux-32": the file's 32-bit entry point, code32_start.

Source: Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header", "32-bit Boot
Protocol", "64-bit Boot Protocol".
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from understudy.guests import boot_params, elf, payload
from understudy.guests.entry import (
    CODE_32,
    CODE_64,
    Entry,
    GuestError,
    GuestMemory,
    long_mode,
    protected_mode,
    write_gdt,
)
from understudy.guests.placement import Placement

XLF_KERNEL_64 = 1 << 0
OLDEST = 0x0202  # protocol 2.02: the command line is given by address
ENTRY_64_OFFSET = 0x200


@dataclass(frozen=True)
class Header:
    """What of the setup header a loader needs."""

    raw: bytes  # from 0x1F1 to its end, as the zero page wants it
    version: int
    kernel_offset: int  # where in the file the protected-mode part starts
    kernel_length: int
    loadflags: int
    code32_start: int
    initrd_ceiling: int
    command_line_limit: int
    relocatable: bool
    xloadflags: int
    payload_offset: int  # from kernel_offset
    payload_length: int
    pref_address: int
    init_size: int

    @property
    def has_64_bit_entry(self) -> bool:
        return bool(self.xloadflags & XLF_KERNEL_64)


def is_bzimage(data: bytes) -> bool:
    """Whether the boot header's two magics are there."""
    return data[0x202:0x206] == b"HdrS" and data[0x1FE:0x200] == b"\x55\xaa"


def header(data: bytes, what: str = "the kernel") -> Header:
    """Read and check the setup header."""
    if len(data) < 0x268:
        raise GuestError(f"{what} is truncated: {len(data)} bytes, not even its boot header")
    (version,) = struct.unpack_from("<H", data, 0x206)
    if version < OLDEST:
        raise GuestError(
            f"{what} has boot protocol {version:#06x}, expected {OLDEST:#06x} or later"
        )
    if not data[0x211] & boot_params.LOADED_HIGH:
        raise GuestError(f"{what} is a zImage (not loaded high), which is not supported")
    setup_sectors = data[0x1F1] or 4
    offset = (setup_sectors + 1) * 512
    (paragraphs,) = struct.unpack_from("<I", data, 0x1F4)
    length = paragraphs * 16
    if len(data) <= max(offset, offset + length - 16):  # the length is rounded up to 16 bytes
        raise GuestError(
            f"{what} is truncated: its header promises {offset + length} bytes, "
            f"the file has {len(data)}"
        )
    length = min(length, len(data) - offset)

    def since(first: int, layout: str, at: int, otherwise: int) -> int:
        """A field that exists from protocol version `first` on."""
        return int(struct.unpack_from(layout, data, at)[0]) if version >= first else otherwise

    return Header(
        raw=data[0x1F1 : min(0x202 + data[0x201], 0x290)],
        version=version,
        kernel_offset=offset,
        kernel_length=length,
        loadflags=data[0x211],
        code32_start=int(struct.unpack_from("<I", data, 0x214)[0]),
        initrd_ceiling=since(0x203, "<I", 0x22C, boot_params.LOWEST_INITRD_CEILING - 1) + 1,
        command_line_limit=since(0x206, "<I", 0x238, 255),
        relocatable=bool(since(0x205, "<B", 0x234, 0)),
        xloadflags=since(0x20C, "<H", 0x236, 0),
        payload_offset=since(0x208, "<I", 0x248, 0),
        payload_length=since(0x208, "<I", 0x24C, 0),
        pref_address=since(0x20A, "<Q", 0x258, 0x10_0000),
        init_size=since(0x20A, "<I", 0x260, 0),
    )


def vmlinux(data: bytes, what: str = "the kernel") -> bytes | None:
    """The decompressed payload; None if the file has none that can be decompressed here."""
    head = header(data, what)
    start = head.kernel_offset + head.payload_offset
    packed = data[start : start + head.payload_length]
    if not head.payload_length or not payload.can_decompress(packed):
        return None
    if len(packed) < head.payload_length:
        raise GuestError(f"{what} is truncated: its payload ends beyond the file")
    return payload.decompress(packed, what)


def load(
    memory: GuestMemory,
    data: bytes,
    *,
    inner: bytes | None,
    initrd: bytes | None,
    append: str,
    rsdp: int,
    e820: Iterable[tuple[int, int, int]] | None,
    method: str | None = None,
    what: str = "the kernel",
    seed: bytes = b"",
) -> Entry:
    """Put a bzImage into memory by one of the three methods (None: the first that can be).

    inner: its `vmlinux`, if that is wanted and there is one.
    """
    head = header(data, what)
    if inner is None and method == "linux-direct":
        raise GuestError(f"{what} has no payload that can be decompressed: use another method")
    if method == "linux-64" and not head.has_64_bit_entry:
        raise GuestError(f"{what} has no 64-bit entry point (xloadflags {head.xloadflags:#x})")
    place = Placement(memory)
    if inner is not None:
        start, is_64 = _place_vmlinux(place, inner, head, what)
        protocol = "linux-direct"
    else:
        is_64 = head.has_64_bit_entry and method != "linux-32"
        start = _place_as_is(place, data, head, what) + (ENTRY_64_OFFSET if is_64 else 0)
        protocol = "linux-64" if is_64 else "linux-32"
    page = finish(place, head, initrd=initrd, append=append, rsdp=rsdp, e820=e820, seed=seed)
    return enter(place, protocol, start, page, is_64)


def finish(
    place: Placement,
    head: Header | None,
    *,
    initrd: bytes | None,
    append: str,
    rsdp: int,
    e820: Iterable[tuple[int, int, int]] | None,
    seed: bytes = b"",
) -> int:
    """Everything beside the kernel: initrd, command line, zero page.  Returns the page."""
    ceiling = head.initrd_ceiling if head else boot_params.LOWEST_INITRD_CEILING
    limit = head.command_line_limit if head else 2047
    place.tables()
    if len(append.encode("utf-8", "surrogateescape")) > limit:
        boot_params.write_command_line(place, append, limit)  # says what is wrong
    location = boot_params.put_initrd(place, initrd, ceiling)
    return boot_params.write(
        place,
        header=head.raw if head else b"",
        append=append,
        initrd=location,
        rsdp=rsdp,
        e820=e820,
        seed=seed,
    )


def enter(place: Placement, protocol: str, rip: int, page: int, is_64: bool) -> Entry:
    """The registers of the boot protocol: RSI is the zero page; the others it wants are zero."""
    moved = place.moved
    write_gdt(place.memory, CODE_64 if is_64 else CODE_32, moved)
    if is_64:
        return long_mode(place.memory, protocol, rip, moved=moved, rsi=page)
    return protected_mode(protocol, rip, moved=moved, rsi=page, rbp=0, rdi=0, rbx=0)


def _place_vmlinux(place: Placement, data: bytes, head: Header, what: str) -> tuple[int, bool]:
    image = elf.parse(data, f"{what} (its payload)")
    elf.load(image, place)
    start = min(s.paddr for s in image.loads)
    end = max(s.paddr + s.memory_size for s in image.loads)
    slack = start + head.init_size - end
    if slack > 0:  # init_size may ask for more, which the kernel uses before it knows its memory
        place.claim("the kernel's first memory (init_size)", end, slack)
    return image.physical_entry, image.is_64


def _place_as_is(place: Placement, data: bytes, head: Header, what: str) -> int:
    if not head.relocatable and not head.code32_start:
        raise GuestError(
            f"{what} needs a PC's BIOS, which a VM does not have: its only entry is for "
            "real-address mode (code32_start is 0)"
        )
    kernel = data[head.kernel_offset : head.kernel_offset + head.kernel_length]
    start = head.code32_start if not head.relocatable else head.pref_address
    place.put("the kernel", start, kernel, max(head.init_size, len(kernel)))
    return start
