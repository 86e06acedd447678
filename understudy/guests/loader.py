"""Load any kernel file: find out what it is, put it into memory, say where the processor starts.

The formats, in the order tried: bzImage (Linux boot protocol), then of ELF files paravirtual
kernels, those with a PVH note, those with a Multiboot header (of version 1, or else 2), any other
as vmlinux.  A gzipped file is unpacked first.  `method` overrides the choice.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from understudy import plain_file
from understudy.guests import (
    bzimage,
    elf,
    multiboot,
    multiboot2,
    payload,
    pv,
    pvh,
    ramdisk,
    room,
)
from understudy.guests.entry import Entry, GuestError, GuestMemory
from understudy.guests.placement import NoRoom, Placement

INITRD = (1 << 32) - 1, "4 GiB, which no kernel can be told of"
METHODS = {
    "linux-direct": "bzImage: payload decompressed by understudy, vmlinux entered directly",
    "linux-64": "bzImage: the file's own 64-bit entry point",
    "linux-32": "bzImage: the file's own 32-bit entry point",
    "elf": "ELF vmlinux: its entry point, with Linux boot parameters",
    "pvh": "ELF with a PVH note: 32-bit entry with the PVH start information",
    "multiboot": "Multiboot 1",
    "multiboot2": "Multiboot 2",
    "pv": "ELF with a note of ours: a paravirtual kernel, for --execution pv",
}


def load(
    memory: GuestMemory,
    kernel: bytes | Path,
    *,
    initrd: bytes | Path | None = None,
    append: str = "",
    rsdp: int = 0,
    e820: Iterable[tuple[int, int, int]] | None = None,
    method: str | None = None,
    modules: Iterable[tuple[bytes | Path, str]] = (),
    seed: bytes = b"",
) -> Entry:
    """Put a kernel and its initrd into `memory`; returns the state to start the processor in.

    `rsdp` is the guest-physical address of the ACPI tables' root (0: none), `e820` a memory map
    as (base, length, type) rows (None: made from `memory.ranges()`).  `modules` are more files
    with their command lines, for PVH and Multiboot.  `seed` starts a Linux kernel's random numbers
    (those that have the Linux boot protocol).  Every refusal is a GuestError.
    """
    if method is not None and method not in METHODS:
        raise GuestError(f"unknown boot method {method!r}: expected one of {', '.join(METHODS)}")
    what = f"kernel {kernel}" if isinstance(kernel, Path) else "the kernel"
    data = read(kernel, what)
    first = None if initrd is None else read(initrd, _name(initrd, "the initrd"), *INITRD)
    if payload.compression(data) == "gzip":
        data = payload.decompress(data, what, sized=False)
    files = [] if first is None else [(initrd, first, "")]
    files += [(file, read(file, _name(file, "a module"), *INITRD), line) for file, line in modules]
    chosen, unpacked = method or detect(data, what), 0
    texts = [(content, line) for _, content, line in files]
    is_multiboot = chosen in ("multiboot", "multiboot2")
    if is_multiboot:
        append = _spoken(kernel, "kernel", append)
        texts = [(content, _spoken(file, "module", line)) for file, content, line in files]
    if first is not None and not is_multiboot:
        unpacked = ramdisk.check(first, _name(initrd, "the initrd"))
    put = _way(chosen, data, what, first, texts, append, rsdp, e820, method, seed)
    try:
        return put(memory)
    except NoRoom as problem:
        raise GuestError(f"{problem}: {room.advice(put, memory.size, unpacked)}") from None


def _way(
    chosen: str,
    data: bytes,
    what: str,
    first: bytes | None,
    files: list[tuple[bytes, str]],
    append: str,
    rsdp: int,
    e820: Iterable[tuple[int, int, int]] | None,
    method: str | None,
    seed: bytes,
) -> Callable[[GuestMemory], Entry]:
    """All that does not depend on the memory is done once; the rest may be tried."""
    rows = None if e820 is None else list(e820)
    match chosen:
        case "linux-direct" | "linux-64" | "linux-32" | "bzimage":
            if not bzimage.is_bzimage(data):
                raise GuestError(f"{what} is no bzImage (its boot header is missing)")
            unpacks = method in (None, "linux-direct")
            inner = bzimage.vmlinux(data, what) if unpacks else None
            return lambda memory: bzimage.load(
                memory,
                data,
                inner=inner,
                initrd=first,
                append=append,
                rsdp=rsdp,
                e820=rows,
                method=method,
                what=what,
                seed=seed,
            )
        case "pvh":
            image = elf.parse(_elf_of(data, what), what)
            return lambda memory: pvh.load(
                memory, image, modules=files, append=append, rsdp=rsdp, e820=rows
            )
        case "pv":
            image = elf.parse(_elf_of(data, what), what)
            return lambda memory: pv.load(memory, image, append=append)
        case "multiboot":
            return lambda memory: multiboot.load(
                memory, data, modules=files, append=append, e820=rows
            )
        case "multiboot2":
            return lambda memory: multiboot2.load(
                memory, data, modules=files, append=append, rsdp=rsdp, e820=rows
            )
    image = elf.parse(_elf_of(data, what), what)

    def vmlinux(memory: GuestMemory) -> Entry:
        place = Placement(memory)
        elf.load(image, place)
        page = bzimage.finish(
            place, None, initrd=first, append=append, rsdp=rsdp, e820=rows, seed=seed
        )
        return bzimage.enter(place, "elf", image.physical_entry, page, image.is_64)

    return vmlinux


def detect(data: bytes, what: str = "the kernel") -> str:
    """The method that fits a file: "bzimage" or one of METHODS.  GuestError if none does."""
    if bzimage.is_bzimage(data):
        return "bzimage"
    if data.startswith(elf.MAGIC):
        image = elf.parse(data, what)
        if pv.is_paravirtual(image):
            return "pv"
        if pvh.entry_point(image) is not None:
            return "pvh"
        return _multiboot(data) or "elf"
    found = _multiboot(data)
    if found is not None:
        return found
    raise GuestError(
        f"{what} is not a kernel: expected a bzImage, an ELF file or a Multiboot image, "
        f"got {len(data)} bytes that begin with {data[:4].hex(' ')}"
    )


def _multiboot(data: bytes) -> str | None:
    if multiboot.find_header(data) is not None:
        return "multiboot"
    return None if multiboot2.find_header(data) is None else "multiboot2"


def read(
    file: bytes | Path, what: str, most: int = payload.LIMIT, bound: str = "any kernel"
) -> bytes:
    """The bytes of a file, at most so many, with each failure as one line."""
    if isinstance(file, Path):
        try:
            with plain_file.opened(file) as opened:
                data = opened.read(most + 1)
        except FileNotFoundError:
            raise GuestError(f"{what} does not exist") from None
        except OSError as error:
            raise GuestError(f"{what} cannot be read: {error.strerror or error}") from None
    else:
        data = bytes(file)
    if len(data) > most:
        raise GuestError(f"{what} is larger than {bound}")
    if not data:
        raise GuestError(f"{what} is empty")
    return data


def _spoken(file: bytes | Path | None, kind: str, line: str) -> str:
    """A command line as Multiboot kernels expect it, which skip its first word: by the custom of
    boot loaders that is the name of the file."""
    return f"{file.name if isinstance(file, Path) else kind} {line}".rstrip()


def _name(file: bytes | Path | None, kind: str) -> str:
    return (
        f"{kind.removeprefix('the ').removeprefix('a ')} {file}" if isinstance(file, Path) else kind
    )


def _elf_of(data: bytes, what: str) -> bytes:
    """The ELF file itself, or the one inside a bzImage."""
    if bzimage.is_bzimage(data):
        inner = bzimage.vmlinux(data, what)
        if inner is not None:
            return inner
    return data
