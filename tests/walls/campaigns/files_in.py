"""Kernels, ELF and Multiboot images, initrds, packages: each gives what it is for, or one line."""

import bz2
import contextlib
import gzip
import io
import lzma
import random
import resource
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from tests.unit.guests.flat_memory import MIB, FlatMemory
from tests.unit.guests.kernels import MAIN, bzimage, compress, elf32, elf64, pvh_note
from tests.walls.campaigns import Round, part
from tests.walls.campaigns.mutations import mutated
from understudy.guests import GuestError, deb, initramfs, load, loader, payload
from understudy.machine.host import Host
from understudy.verdict import StopKind
from understudy.vm import VM

RAM = 20 * MIB
MORE = 512 << 10  # KiB that a campaign may need on top of what it had: the limit, a few times
LIMIT = 32 << 20  # in place of a gigabyte, so that bombs go off quickly
OUTSIDE = {StopKind.UNTIL, StopKind.WALL, StopKind.STOPPED}  # nobody asks for these
METHODS = (None, None, None, *loader.METHODS)
PACKERS = ("gzip", "XZ", "ZSTD", "LZ4")


def multiboot() -> bytes:
    """An ELF file with a Multiboot header that has addresses."""
    words = (0x1BAD_B002, 1 << 16, -(0x1BAD_B002 + (1 << 16)) & 0xFFFF_FFFF, MIB, MIB, 0, 0, MIB)
    return elf32(MIB, MIB, b"".join(word.to_bytes(4, "little") for word in words))


def tar() -> bytes:
    """Folders, files and links, with a header of each kind that tarfile reads by itself."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/f", tarfile.REGTYPE),
                           ("l", tarfile.LNKTYPE), ("é" * 200, tarfile.SYMTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "d/f"
            info.size = 700 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return out.getvalue()


def package(body: bytes, name: str) -> bytes:
    """An ar archive with a first member, and the data."""

    def member(name: str, data: bytes) -> bytes:
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        return head + data + b"\n" * (len(data) % 2)

    return deb.AR_MAGIC + member("debian-binary", b"2.0\n") + member(name, body)


ELFS = [elf64(), elf64(note=pvh_note(MAIN)), elf32(MIB, MIB, b"\xf4" * 64), multiboot()]
CPIO = initramfs.cpio({"a": initramfs.Node(0o40755), "a/b": initramfs.Node(0o100644, b"x" * 999)})
TAR = tar()
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "XZ": lzma.compress,
    "ZSTD": zstandard.compress,
}
BOMBS = [gzip.compress(bytes(LIMIT * 2)), zstandard.compress(bytes(LIMIT * 4)),
         lzma.compress(bytes(LIMIT * 2), preset=0), compress("LZ4", bytes(LIMIT * 2))]  # fmt: skip
SEEDS = [*ELFS, CPIO, CPIO + gzip.compress(CPIO), package(TAR, "data.tar"), *BOMBS]


def kernel(chance: random.Random) -> bytes:
    """Wrong inside, outside, or both."""
    inner = mutated(chance.choice(ELFS), chance, SEEDS)
    shape = chance.randrange(4)
    if shape == 0:
        return gzip.compress(inner)
    if shape == 1:
        return mutated(inner, chance, SEEDS)
    whole = chance.choice(BOMBS) if shape == 2 and chance.random() < 0.05 else None
    packed = whole or compress(chance.choice(PACKERS), inner)
    return mutated(bzimage(mutated(packed, chance, SEEDS)), chance, SEEDS)


def initrd(chance: random.Random) -> bytes:
    """One to three archives, plain or packed."""
    archives = (
        PACKED[chance.choice(list(PACKED))](mutated(CPIO, chance, SEEDS))
        for _ in range(chance.randrange(1, 4))
    )
    return mutated(b"\0\0\0\0".join(archives), chance, SEEDS)


@part(rounds=250)
def kernels() -> Iterator[Round]:
    """Loaded by every method, with an initrd and modules."""
    memory = FlatMemory(RAM)

    def one(chance: random.Random) -> None:
        with _ours(), contextlib.suppress(UnicodeError):
            load(
                memory,
                kernel(chance),
                initrd=initrd(chance) if chance.random() < 0.5 else None,
                method=chance.choice(METHODS),
                append=chance.choice(("", "console=ttyS0", "x" * 5000)),
                modules=[(initrd(chance), "m")] * chance.randrange(3),
            )

    with _limited():
        yield one


@part(rounds=60)
def booted_kernels() -> Iterator[Round]:
    """The same in a VM, which runs what was loaded, beside one whose memory it must not see."""
    with Host("128M") as host, VM("2M", host=host) as neighbor, VM("24M", host=host) as vm:
        before = neighbor.memory.read(0, neighbor.memory.size)
        free = host.frames.free_count

        def one(chance: random.Random) -> None:
            method = chance.choice(METHODS)
            with _ours(), contextlib.suppress(UnicodeError):
                vm.boot(lambda machine: load(machine.memory, kernel(chance), method=method))
                end = vm.clock.now() + 2_000_000
                stop = vm.go(budget=3000, deadline_ns=end, reboot=False)
                assert stop.kind in set(StopKind) - OUTSIDE, stop
            vm.describe()
            assert neighbor.memory.read(0, neighbor.memory.size) == before, "foreign writes"
            assert host.frames.free_count == free

        with _limited():
            yield one


@part(rounds=250)
def packages() -> Iterator[Round]:
    """Unpacked whole, and searched."""
    with tempfile.TemporaryDirectory() as folder, _limited():
        path = Path(folder) / "it.deb"

        def one(chance: random.Random) -> None:
            method = chance.choice(list(PACKED))
            body = mutated(PACKED[method](mutated(TAR, chance, SEEDS)), chance, SEEDS)
            path.write_bytes(mutated(package(body, f"data.tar.{method}"), chance, SEEDS))
            with _ours():
                deb.tree(path)
            with _ours():
                deb.files(path, ["*/f", "nothing"])

        yield one


@contextlib.contextmanager
def _ours() -> Iterator[None]:
    try:
        yield
    except GuestError as refusal:
        assert "\n" not in str(refusal), refusal


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """With small limits, and a bound on the memory that all rounds together may need."""
    limits = payload.LIMIT, deb.LIMIT
    payload.LIMIT = deb.LIMIT = LIMIT  # type: ignore[misc]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        payload.LIMIT, deb.LIMIT = limits  # type: ignore[misc]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MORE
