"""A VM at one moment, as a value: its configuration, the state of its parts, its memory.

    image = vm.snapshot()
    clones = image.fork(16)        # beside the VM, on its host, sharing what nobody writes
    image.write(Path("debian.usnap"))
    again = VM.restore(Path("debian.usnap"))

Everything is named as the guest names it: memory by gpa, tables of the paging technique by gfn.
What the hypervisor derives (EPT, shadow tables, VMCS) is made anew, so an image fits any host with
room, and says nothing about any host's memory.

Invariants: a VM restored and gone on with gives the same console bytes, instructions and exits
as one that was never saved; the origin and its clones never see each other's writes; bytes that
are no image raise SnapshotError and nothing else.
"""

import heapq
import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Generic, Protocol, Self, TypedDict, TypeVar

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.backends.cable import NetworkError
from understudy.backends.folder import ShareError
from understudy.backends.opening import ImageError
from understudy.backends.unix_ports import VsockError
from understudy.config import Config
from understudy.disk import Disk
from understudy.image_file import SnapshotError, mapped, pack, unpack, write
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import GuestMemoryError, P2m
from understudy.nic import Nic
from understudy.overcommit.plan import PlanError
from understudy.share import Share
from understudy.silicon import VmFail
from understudy.slot import Slotted
from understudy.state import plain, restore
from understudy.visible import visible
from understudy.vsock import Vsock

TELLING: Final = (SnapshotError, ImageError, NetworkError, ShareError, VsockError, PlanError)
"""What says by itself why there is no VM."""
UNFIT: Final = (LookupError, TypeError, AttributeError, ValueError, OverflowError, VmFail)
"""What a part raises, or the processor, if it cannot become what was saved."""
CHUNK: Final = 1 << 22  # bytes that are copied at once
FEW: Final = 16  # pages, where frames are few
NO_MEMORY: Final = "the snapshot has memory at {:#x}, where its VM has none"
COPIERS: Final = 2  # threads; with more the computer's memory is not any faster


class Outside(TypedDict, total=False):
    """What a snapshot's VM has outside of it, in its order: a snapshot opens none by itself."""

    disks: Sequence[Disk | str]
    """Its images."""
    net: Sequence[Nic | str] | Nic | str
    """Where its cables lead; without it, nowhere."""
    folders: Sequence[Share | str] | Share | str
    """What it shares."""
    vsock: Vsock | str
    """The path of its socket; without it, none."""


Piece = tuple[int, Any]
"""Bytes of guest memory from a gpa on, as a buffer."""


class Closable(Protocol):
    """What an image makes."""

    def close(self) -> None: ...


Made = TypeVar("Made", bound=Closable, covariant=True)
Slot = TypeVar("Slot", bound=Slotted)


class Contents(Protocol):
    """The memory of an image."""

    def fill(self, memory: GuestMemory) -> None:
        """Give this memory, which has no frames yet, frames with these contents."""

    def pieces(self) -> Iterator[Piece]:
        """What is not zero, by gpa, page by page or in longer runs."""

    def close(self) -> None:
        """Give everything back."""

    def forget(self) -> None:
        """The same as soon as that can be: from any thread, in the middle of anything."""


class Unowned:
    """Contents that have no frames."""

    def close(self) -> None:
        """There is nothing to give back."""

    forget = close


class Nothing(Unowned):
    """What is in the memory of a computer that was just switched on."""

    def fill(self, memory: GuestMemory) -> None:
        """Frames of zeros."""
        memory.populate()

    def pieces(self) -> Iterator[Piece]:
        """There are none."""
        return iter(())


class Shared:
    """Frames of the host on which the VM ran: whoever has them shares them, copy-on-write."""

    def __init__(self, host: Host, source: P2m) -> None:
        self.host, self.p2m = host, P2m()
        CopyOnWrite(host).clone(source, self.p2m)
        try:
            host.keep(self.p2m, source)
        except BaseException:
            CopyOnWrite(host).release(self.p2m)
            raise

    def fill(self, memory: GuestMemory) -> None:
        """Share the frames, on the same host; else copy what is in them."""
        if memory.host is self.host:
            CopyOnWrite(self.host).clone(self.p2m, memory.p2m)
        else:
            memory.populate()
            put(self.pieces(), memory)

    def pieces(self) -> Iterator[Piece]:
        """What is not a hole."""
        return touched(self.host, self.p2m)

    def close(self) -> None:
        """Give up the image's share of the frames."""
        with self.host.held():
            if self.host.room is not None:
                self.host.room.let_go(self.p2m)
            CopyOnWrite(self.host).release(self.p2m)
        self.host.leave()

    def forget(self) -> None:
        """The same, when nobody is at work on frames of the host."""
        self.host.later(self.close)


class Loose(Unowned):
    """Bytes that came from elsewhere."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces

    def fill(self, memory: GuestMemory) -> None:
        """Take frames and copy the bytes into them."""
        memory.populate()
        put(self._pieces, memory)

    def pieces(self) -> Iterator[Piece]:
        """All of them, as they came."""
        return iter(self._pieces)


class Maker(Protocol[Made]):
    """Makes a VM of a state and a memory; on this host if there is one."""

    def __call__(
        self, image: "Image[Any]", host: Host | None, engine: str | None, clone: int | None
    ) -> Made: ...


class Image(Generic[Made]):
    """What `VM.snapshot` gives.  Holds frames of a host until it is closed or forgotten."""

    def __init__(
        self,
        state: dict[str, Any],
        contents: Contents,
        make: "Maker[Made]",
        host: Host | None = None,
        load: Callable[[Any], Any] | None = None,
        clones: Iterator[int] | None = None,
    ) -> None:
        """`state`: plain values, by part.  `load`: what a VM of it boots from after a reset.

        clones: the numbers of its clones, which images of one VM share.
        """
        self.state, self.contents, self.host, self.load = state, contents, host, load
        self._make = make
        self._clones = itertools.count(1) if clones is None else clones
        self._release = weakref.finalize(self, contents.forget)

    def restore(
        self, *, host: Host | None = None, engine: str | None = None, clone: int | None = None
    ) -> Made:
        """The VM as it was, ready to go on; on another host or engine if one is named.

        clone: a number, for another VM than that which was saved; its guest is told that it is.
        """
        if not self._release.alive:
            raise RuntimeError("this image is closed")
        return self._make(self, host, engine, clone)

    def fork(self, count: int = 1) -> list[Made]:
        """So many clones on the host of the VM; what nobody writes, they share.

        All of them, or none: OutOfFrames or PlanError if the host has no room for one.
        """
        if count < 0:
            raise ValueError(f"fork({count}): expected how many clones to make")
        with ExitStack() as made:
            clones = []
            for _ in range(count):
                clones.append(self.restore(host=self.host, clone=next(self._clones)))
                made.callback(clones[-1].close)
            made.pop_all()
        return clones

    def to_bytes(self) -> bytes:
        """As bytes, for a file."""
        return b"".join(pack(self.state, self.contents.pieces()))

    def write(self, path: "str | Path") -> int:
        """To a file, which is there whole or not at all; returns its bytes."""
        return write(Path(path), pack(self.state, self.contents.pieces()))

    @classmethod
    def of(
        cls, data: "bytes | str | Path", make: "Maker[Made]", outside: Outside | None = None
    ) -> Self:
        """What `to_bytes` made, or a file with it; SnapshotError for anything else.

        outside: what it has there, since what may come from anybody opens nothing by itself.
        """
        view = memoryview(data) if isinstance(data, bytes) else mapped(Path(data))
        state, pieces = unpack(view)
        given = outside or Outside()
        _choose_files(state, Disk, "disks", given.get("disks"))
        _choose_nets(state, given.get("net"))
        _choose_files(state, Share, "folders", given.get("folders"))
        _choose_vsock(state, given.get("vsock"))
        return cls(state, Loose(pieces), make)

    def close(self) -> None:
        """Give the frames back; clones keep theirs."""
        if self._release.detach() is not None:
            self.contents.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _choose_files(
    state: dict[str, Any], kind: type[Disk] | type[Share], field: str, given: Any
) -> None:
    """Put these into a field of the configuration in place of those that are named there."""
    try:
        kept = restore(tuple[kind, ...], state["config"][field], f"config.{field}")  # type: ignore[valid-type]
        if given is not None:
            clock = state["config"]["clock"]  # on which it depends what may be there
            chosen = getattr(Config.of(**{field: given, "clock": clock}), field)
            state["config"][field] = plain(_at(chosen, kept))
    except UNFIT as problem:
        raise SnapshotError(f"the snapshot does not fit: {problem!r}") from None
    if kept and given is None:
        named = visible(
            ", ".join(one.file if isinstance(one, Disk) else one.folder for one in kept)
        )
        raise SnapshotError(
            f"the snapshot's VM has {field} ({named}), and a snapshot opens no files by itself: "
            f"say which they are, in this order, {field}=[…]"
        )


def _at(chosen: tuple[Slot, ...], kept: tuple[Slot, ...]) -> tuple[Slot, ...]:
    """These in the slots, and with the names, of those that were there."""
    places = itertools.zip_longest(chosen, kept[: len(chosen)])
    return tuple(
        one if old is None else replace(one, name=old.name, slot=old.slot) for one, old in places
    )


def _choose_nets(state: dict[str, Any], net: Any) -> None:
    """Put these into the configuration in place of those that are named there; else pull cables."""
    try:
        kept = restore(tuple[Nic, ...], state["config"]["net"], "config.net")
        chosen = tuple(Nic("none", mac=nic.mac) for nic in kept)
        if net is not None:
            chosen = Config.of(net=net).net
        state["config"] |= {"net": plain(_at(chosen, kept)), "publish": []}
    except UNFIT as problem:
        raise SnapshotError(f"the snapshot does not fit: {problem!r}") from None
    if len(chosen) != len(kept):
        raise SnapshotError(
            f"the snapshot's VM has {len(kept)} network cards, and net= names {len(chosen)} cables"
        )


def _choose_vsock(state: dict[str, Any], vsock: Any) -> None:
    """Have this path in place of that which is named there; else none."""
    try:
        kept = restore(tuple[Vsock, ...], state["config"]["vsock"], "config.vsock")
        chosen = (Vsock(),) * len(kept) if vsock is None else Config.of(vsock=vsock).vsock
        pairs = zip(kept, chosen, strict=False)
        state["config"]["vsock"] = plain([replace(old, path=new.path) for old, new in pairs])
    except UNFIT as problem:
        raise SnapshotError(f"the snapshot does not fit: {problem!r}") from None
    if len(chosen) != len(kept):
        raise SnapshotError(f"the snapshot's VM has {len(kept)} vsocks, and vsock= names another")


def put(pieces: "Iterator[Piece] | Sequence[Piece]", memory: GuestMemory) -> None:
    """Write pieces to a memory that nobody uses yet.  SnapshotError if it has no RAM there.

    By the file, because each page that is first written through a mapping costs a fault; but where
    frames come as they are needed, others may have to go before the next ones come.
    """
    if memory.is_lazy:
        for gpa, data in pieces:
            view = memoryview(data)
            for at in range(0, len(view), FEW * PAGE):
                memory.host.expect(FEW)
                try:
                    memory.write(gpa + at, view[at : at + FEW * PAGE])
                except GuestMemoryError:
                    raise SnapshotError(NO_MEMORY.format(gpa + at)) from None
        return
    with ThreadPoolExecutor(COPIERS) as pool:
        deque(pool.map(partial(_copy, memory.host.memory.fd), _placed(pieces, memory)), maxlen=0)


def _copy(fd: int, place: "tuple[int, memoryview]") -> None:
    hpa, part = place
    while part:
        written = os.pwrite(fd, part, hpa)
        part, hpa = part[written:], hpa + written


def _placed(
    pieces: "Iterator[Piece] | Sequence[Piece]", memory: GuestMemory
) -> Iterator[tuple[int, memoryview]]:
    """Where each goes: (hpa, bytes)."""
    for gpa, data in pieces:
        view = memoryview(data)
        extents = memory.p2m.within(gpa >> PAGE_SHIFT, len(view) >> PAGE_SHIFT)
        if sum(extent.frames for extent in extents) << PAGE_SHIFT != len(view):
            raise SnapshotError(NO_MEMORY.format(gpa))
        for extent in extents:
            at = (extent.gfn << PAGE_SHIFT) - gpa
            yield extent.pfn << PAGE_SHIFT, view[at : at + (extent.frames << PAGE_SHIFT)]


def touched(host: Host, p2m: P2m) -> Iterator[Piece]:
    """The pieces of a memory that are not holes, by gpa; what is swapped out stays there."""
    p2m.bring_back()
    there = _there(host, p2m)
    if p2m.keeper is None:
        return there
    out = ((gfn << PAGE_SHIFT, contents) for gfn, contents in p2m.keeper.pieces(p2m))
    return heapq.merge(there, out, key=itemgetter(0))


def _there(host: Host, p2m: P2m) -> Iterator[Piece]:
    fd, view = host.memory.fd, memoryview(host.memory)
    for extent in p2m:
        at, end = extent.pfn << PAGE_SHIFT, (extent.pfn + extent.frames) << PAGE_SHIFT
        ahead = (extent.gfn - extent.pfn) << PAGE_SHIFT
        while at < end:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # nothing but holes up to the end of the memory
                break
            stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
            for piece in range(start, stop, CHUNK):
                yield piece + ahead, view[piece : min(piece + CHUNK, stop)]
            at = max(stop, start)
