"""Snapshots: a whole VM as bytes, and back.

Layout: a magic number, then one zstd stream of a JSON header (length first) and the frames that
the VM owns and has touched.  The processor's own state is the silicon's blob; tables in memory
(VMCS, EPT) are saved as the frames they are, so a VM returns to the same host frames.

Invariants: a VM restored and gone on with gives the same console bytes, instructions and exits
as one that was never saved; bytes that are no snapshot raise SnapshotError and nothing else.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import zstandard

from understudy import state
from understudy.config import Config
from understudy.execution.vmx.control_registers import Values
from understudy.machine.frames import PAGE, PAGE_SHIFT, OutOfFrames
from understudy.machine.host import Host
from understudy.state import plain
from understudy.vcpu.events import EventState
from understudy.vcpu.loop import VcpuState
from understudy.vcpu.msrs import MsrState

if TYPE_CHECKING:
    from understudy.vm import VM

MAGIC = b"understudy 1\n"
LENGTH = struct.Struct("<QQ")
CHUNK = 1 << 20
AnyVM = TypeVar("AnyVM", bound="VM")


class SnapshotError(ValueError):
    """Not a snapshot, or one that does not fit here."""


# --- saving ---


def save(vm: "VM") -> bytes:
    """The VM as bytes."""
    if vm.clock_kind == "wall":
        vm.vcpu.leave_guest()
    header = json.dumps(_header(vm)).encode()
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    parts = [MAGIC, compressor.compress(LENGTH.pack(len(header), 0) + header)]
    for hpa, length in _touched(vm):
        data = vm.host.memory.read(hpa, length)
        parts.append(compressor.compress(LENGTH.pack(hpa, length)))
        parts.append(compressor.compress(data))
    parts.append(compressor.flush())
    return b"".join(parts)


def _header(vm: "VM") -> dict[str, Any]:
    vcpu, pages, execution = vm.vcpu, vm.pages, vm.vcpu.execution
    events = vcpu.events.save()
    return {
        "config": plain(vm.config),
        "host": vm.host.memory.size,
        "p2m": [list(extent) for extent in vm.memory.p2m],
        "pages": pages.save(),
        "execution": [getattr(execution, name) for name in EXECUTION_FRAMES],
        "launched": execution.is_launched,
        "primary": execution.current_primary,
        "control": list(execution.control.values),
        "now": vm.clock.now(),
        "offset": vm.clock.offset,
        "devices": vm.pc.save(),
        "sessions": vm.sessions.save(),
        "vcpu": {
            "halted": vcpu.state.halted, "armed": vcpu.state.armed,
            "carried_out": vcpu.state.carried_out,
            "interrupted_at": vcpu.state.interrupted_at,
            "cr_accesses": [[*key, n] for key, n in vcpu.cr_accesses.items()],
            "attention": vcpu.attention,
            "exits": {str(n): count for n, count in vcpu.exits.items() if count},
        },
        "events": {
            "staged": events.staged, "nmis": events.nmis, "extint": events.extint,
            "injected": events.injected,
        },
        "msrs": {str(n): value for n, value in vcpu.msrs.state.values.items()},
        "apic": vcpu.apic.save().hex(),
        "processor": vm.processor.save().hex(),
    }  # fmt: skip


EXECUTION_FRAMES = ("region", "vmcs", "bitmap", "host_table")


def owned(vm: "VM") -> list[tuple[int, int]]:
    """The host frames that belong to a VM, as sorted runs (pfn, count)."""
    single = [*vm.pages.frames(), *vm.vcpu.execution.frames()]
    return sorted([(e.pfn, e.frames) for e in vm.memory.p2m] + [(pfn, 1) for pfn in single])


def _touched(vm: "VM") -> Iterator[tuple[int, int]]:
    """Pieces (hpa, length) of the VM's frames that are not holes."""
    fd = os.dup(vm.host.memory.fd)
    try:
        for pfn, count in owned(vm):
            at, end = pfn << PAGE_SHIFT, (pfn + count) << PAGE_SHIFT
            while at < end:
                try:
                    start = os.lseek(fd, at, os.SEEK_DATA)
                except OSError:  # nothing but holes up to the end of the memory
                    break
                stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
                for piece in range(start, stop, CHUNK):
                    yield piece, min(CHUNK, stop - piece)
                at = max(stop, start)
    finally:
        os.close(fd)


# --- restoring ---


def restore(cls: type[AnyVM], data: bytes, host: Host | None, engine: str | None = None) -> AnyVM:
    """A VM that goes on where the saved one was."""
    stream = _Stream(data)
    header = stream.header()
    try:
        size = header["host"]
        if host is not None and host.memory.size < size:
            raise SnapshotError(f"the host has {host.memory.size} bytes, the snapshot needs {size}")
        config = state.restore(Config, header["config"], "config")
        vm = cls(replace(config, engine=engine or config.engine), host=host or Host(size))
        _return_to_frames(vm, header)
        try:
            _load(vm, header, stream)
        except BaseException:
            for pfn, count in owned(vm):
                vm.host.release(pfn, count)
            vm.host.unplug(vm.processor)
            raise
    except OutOfFrames as problem:
        raise SnapshotError(f"the snapshot's frames are in use on this host: {problem}") from None
    except SnapshotError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as problem:
        raise SnapshotError(f"the snapshot's header does not fit: {problem!r}") from None
    return vm


def _return_to_frames(vm: "VM", header: dict[str, Any]) -> None:
    """Own the frames that the saved VM owned instead of those that the new one was given."""
    vm.vcpu.execution.processor.vmclear(vm.vcpu.execution.vmcs)
    for pfn, count in owned(vm):
        vm.host.release(pfn, count)
    watchers, vm.memory.p2m.watchers = vm.memory.p2m.watchers, []
    for gfn, count in vm.memory.layout():
        vm.memory.p2m.unmap(gfn, count)
    for gfn, pfn, count in header["p2m"]:
        vm.memory.p2m.map(gfn, pfn, count)
    vm.memory.p2m.watchers = watchers
    vm.pages.load(header["pages"])
    for name, hpa in zip(EXECUTION_FRAMES, header["execution"], strict=True):
        setattr(vm.vcpu.execution, name, hpa)
    claimed: list[tuple[int, int]] = []
    try:
        for run in owned(vm):
            vm.host.frames.claim(*run)
            claimed.append(run)
    except OutOfFrames:
        for run in claimed:
            vm.host.frames.free(*run)
        vm.host.unplug(vm.processor)
        raise


def _load(vm: "VM", header: dict[str, Any], stream: "_Stream") -> None:
    frames = owned(vm)
    for hpa, piece in stream.pieces():
        inside = any(
            pfn << PAGE_SHIFT <= hpa and hpa + len(piece) <= (pfn + count) << PAGE_SHIFT
            for pfn, count in frames
        )
        if not inside:
            raise SnapshotError(f"the snapshot writes to hpa {hpa:#x}, which is not the VM's")
        vm.host.memory.write(hpa, piece)
    vcpu, saved = vm.vcpu, header["vcpu"]
    vm.processor.load(bytes.fromhex(header["processor"]))
    vcpu.apic.load(bytes.fromhex(header["apic"]))
    vcpu.execution.relaunch(header["launched"])
    vcpu.execution.current_primary = header["primary"]
    cr0, cr3, cr4, efer, pdptes = header["control"]
    vcpu.execution.restore_control(Values(cr0, cr3, cr4, efer, tuple(pdptes)))
    vm.clock.offset = header["offset"]
    vm.pc.load(header["devices"])
    vm.sessions.load(header["sessions"])
    vcpu.state = VcpuState(
        saved["halted"], saved["armed"], saved["interrupted_at"], saved["carried_out"]
    )
    vcpu.cr_accesses.update({(n, kind): count for n, kind, count in saved["cr_accesses"]})
    vcpu.attention = saved["attention"]
    vcpu.exits |= {int(n): count for n, count in saved["exits"].items()}
    events = dict(header["events"])
    staged = events.pop("staged")
    vcpu.events.load(EventState(tuple(staged) if staged else None, **events))
    vcpu.msrs.state = MsrState({int(n): value for n, value in header["msrs"].items()})
    vcpu.msrs.note_apic_base()
    if vm.clock_kind == "wall":  # guest time goes on from where it was
        vm.clock.offset = header["now"] - vm.processor.tsc
        vcpu.msrs.note_tsc_offset()


class _Stream:
    """Reads what `save` wrote; SnapshotError for anything else."""

    def __init__(self, data: bytes) -> None:
        if not data.startswith(MAGIC):
            raise SnapshotError(f"not a snapshot: expected it to begin with {MAGIC!r}")
        reader = zstandard.ZstdDecompressor().stream_reader(data[len(MAGIC) :])
        self._reader = reader

    def _take(self, length: int) -> bytes:
        out = b""
        try:
            while len(out) < length and (part := self._reader.read(length - len(out))):
                out += part
        except zstandard.ZstdError as problem:
            raise SnapshotError(f"the snapshot is damaged: {problem}") from None
        return out

    def header(self) -> dict[str, Any]:
        raw = self._take(LENGTH.size)
        if len(raw) < LENGTH.size or LENGTH.unpack(raw)[0] > CHUNK << 6:
            raise SnapshotError("the snapshot is cut off before its header")
        try:
            header = json.loads(self._take(LENGTH.unpack(raw)[0]))
        except ValueError as problem:
            raise SnapshotError(f"the snapshot's header is no JSON: {problem}") from None
        if not isinstance(header, dict):
            raise SnapshotError("the snapshot's header is no object")
        return header

    def pieces(self) -> Iterator[tuple[int, bytes]]:
        while raw := self._take(LENGTH.size):
            if len(raw) < LENGTH.size:
                raise SnapshotError("the snapshot is cut off between two pieces")
            hpa, length = LENGTH.unpack(raw)
            if hpa % PAGE or not 0 < length <= CHUNK:
                raise SnapshotError(f"the snapshot has a piece of {length} bytes at {hpa:#x}")
            piece = self._take(length)
            if len(piece) < length:
                raise SnapshotError("the snapshot is cut off in the middle of memory")
            yield hpa, piece
