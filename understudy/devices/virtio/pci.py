"""Virtio over PCI: the registers through which a driver finds, sets up and kicks a device.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Virtio Over PCI Bus" and "Basic Facilities of a
Virtio Device".

Not modeled: the legacy interface, notification data, the reset of one queue alone.

Requests are carried out within the access that asks for them (docs/decisions/0051-*), or at a later
time of the guest's (`gathering.py`): between two exits none is under way, so a snapshot keeps the
queues' indices and nothing else.

A driver is hostile.  Invariants: whatever it does in registers and rings ends as *device needs
reset* at the worst; one access carries out as many requests as a queue has entries, or `QUANTUM`
bytes, and the rest a moment later, so the guest cannot keep the hypervisor; no buffer is used
before DRIVER_OK, nor after a ring was found broken.
"""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, TypeVar

from understudy.clock import Alarm
from understudy.devices import Device
from understudy.devices.virtio.function import (
    COMMON,
    ISR,
    NOTIFY,
    NOTIFY_UNIT,
    PAGE_BYTES,
    SPECIFIC,
    VirtioFunction,
)
from understudy.devices.virtio.packed import PackedQueue
from understudy.devices.virtio.queue import (
    EVENT_IDX,
    INDIRECT_DESC,
    MOST_LOOKED_AT,
    NO_VECTOR,
    RING_PACKED,
    Chain,
    Queue,
    QueueState,
    RingError,
    work,
)
from understudy.devices.virtio.split import SplitQueue
from understudy.devices.wires import Wires
from understudy.machine.frames import OutOfFrames
from understudy.machine.physical import PhysicalMemory
from understudy.state import U8, U16, U32, U64

# --- The specification ---

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8  # "Device Status Field"
NEEDS_RESET, FAILED = 64, 128
VERSION_1: Final = 1 << 32  # VIRTIO_F_*
ACCESS_PLATFORM: Final = 1 << 33
RING: Final = INDIRECT_DESC | EVENT_IDX | RING_PACKED | VERSION_1

CONFIG_CHANGED: Final = 2  # in the ISR status; 1 is a queue

# "Common configuration structure layout": offset, bytes, name (the state's, if it is kept as is).
_LAYOUT: Final = (
    (0x00, 4, "device_feature_select"), (0x04, 4, "device_feature"),
    (0x08, 4, "driver_feature_select"), (0x0C, 4, "driver_feature"),
    (0x10, 2, "config_vector"), (0x12, 2, "num_queues"),
    (0x14, 1, "device_status"), (0x15, 1, "generation"), (0x16, 2, "queue_select"),
    (0x18, 2, "queue_size"), (0x1A, 2, "queue_vector"), (0x1C, 2, "queue_enable"),
    (0x1E, 2, "queue_notify_off"),
    (0x20, 8, "descriptors"), (0x28, 8, "driver"), (0x30, 8, "device"),
)  # fmt: skip
_COMMON: Final = struct.Struct("<IIIIHHBBHHHHHQQQ")
_PLACES: Final = {(offset, size): (name, 0) for offset, size, name in _LAYOUT} | {
    (offset + half, 4): (name, half) for offset, size, name in _LAYOUT if size == 8
    for half in (0, 4)
}  # fmt: skip

QUANTUM: Final = 64 << 20  # ours: bytes that are moved before the guest runs again
SOON: Final = 1000  # ours: after so many nanoseconds the rest is done
PATIENCE: Final = 100  # ours: times that a buffer waits for frames before the VM ends


@dataclass
class VirtioState:
    """What every virtio device keeps."""

    queues: list[QueueState] = field(default_factory=list)
    status: U8 = 0
    isr: U8 = 0
    device_feature_select: U32 = 0
    driver_feature_select: U32 = 0
    driver_features: U64 = 0
    config_vector: U16 = NO_VECTOR
    generation: U8 = 0
    queue_select: U16 = 0
    waiting: U64 = 0  # queues, as bits, that are to be served when the alarm goes off


State = TypeVar("State", bound=VirtioState)


class NotNow(Exception):
    """A device has no use for a buffer yet: it stays in the queue until the device asks again."""


class Postponed(Exception):
    """A device cannot carry a request out now: it stays in the queue, and comes again soon."""

    def __init__(self, ns: int = SOON) -> None:
        super().__init__(ns)
        self.ns = ns


class VirtioPci(Device):
    """A virtio device in a PCI slot.  A subclass says what it is, and serves its queues."""

    state: VirtioState
    expected: ClassVar[int] = 1 << 20
    """Bytes of a buffer, each way, whose frames are there before a request is carried out."""
    switches: ClassVar[Mapping[str, int]] = {
        "packed": RING_PACKED, "indirect": INDIRECT_DESC, "event-idx": EVENT_IDX,
    }  # fmt: skip
    """Features that can be hidden, by name."""

    def __init__(self, wires: Wires, kind: int, class_code: int, sizes: Sequence[int]) -> None:
        """`kind`: "Device Types".  `sizes`: the most entries of each queue, powers of two."""
        super().__init__(wires)
        self.sizes = tuple(sizes)
        self.offered = RING  # features
        self.again = self.alarms["again"] = Alarm(self.clock, self._serve_waiting)
        self.moved = 0  # bytes, since the access began
        self.served = 0  # requests, by the last kick
        self.starved, self.wanted, self.trouble = 0, 0, ""  # for frames: how often, bytes, why
        self.dma: PhysicalMemory = wires.dma  # as it is reached while a queue is served
        self.function = VirtioFunction(kind, class_code, len(self.sizes), self, _COMMON.size)
        wires.plug(self.function)

    def hide(self, names: Iterable[str]) -> None:
        """Offer none of these, before a driver looks; what is another device's means nothing."""
        for name in names:
            self.offered &= ~self.switches.get(name, 0)

    # --- what a device is ---

    def serve(self, number: int, chain: Chain) -> int | None:
        """Carry out a request of the driver; how many bytes were written to its buffer.

        None: the device has given the buffer back by itself.

        IndexError for memory that is not there, RingError for what no driver may do; `NotNow` or
        `Postponed` if it is to stay in the queue.
        """
        raise NotImplementedError(f"{self.name} serves no queue")

    def config(self) -> bytes:
        """The device's own registers."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to them."""

    def power_on(self) -> Any:
        return self.fresh(VirtioState)

    def fresh(self, kind: Callable[..., State], **more: Any) -> State:
        """A state with the queues as they are after a reset."""
        return kind(queues=[QueueState(size=size) for size in self.sizes], **more)

    def has(self, feature: int) -> bool:
        """Whether the driver has accepted it."""
        return bool(self.state.driver_features & feature)

    @property
    def is_live(self) -> bool:
        """Whether buffers may be used."""
        wanted = DRIVER_OK | FEATURES_OK
        return self.state.status & (wanted | NEEDS_RESET) == wanted

    # --- registers ---

    def read(self, region: int, offset: int, size: int) -> int:
        s = self.state
        page, at = offset & -PAGE_BYTES, offset & PAGE_BYTES - 1
        if page == ISR and at == 0:
            isr, s.isr = s.isr, 0
            self.function.set_intx(False)
            return isr
        if page == COMMON:
            data = self._common()
        elif page == SPECIFIC:
            data = self.config()
        else:
            return 0
        return int.from_bytes(data[at : at + size], "little")

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        page, at = offset & -PAGE_BYTES, offset & PAGE_BYTES - 1
        if page == NOTIFY:
            number, rest = divmod(at, NOTIFY_UNIT)
            if number < len(self.sizes) and not rest:
                self.moved = 0
                self.notified(number)
        elif page == SPECIFIC:
            if at + size <= len(self.config()):
                self.write_config(at, value.to_bytes(size, "little"))
        elif page == COMMON and (place := _PLACES.get((at, size))):
            self._set(*place, value, size)

    def _common(self) -> bytes:
        s = self.state
        number = s.queue_select
        q = s.queues[number] if number < len(s.queues) else QueueState()
        return _COMMON.pack(
            s.device_feature_select, _half(self.offered, s.device_feature_select),
            s.driver_feature_select, _half(s.driver_features, s.driver_feature_select),
            s.config_vector, len(s.queues), s.status, s.generation, number,
            q.size, q.vector, q.is_enabled, number if number < len(s.queues) else 0,
            q.descriptors, q.driver, q.device,
        )  # fmt: skip

    def _set(self, name: str, half: int, value: int, size: int) -> None:
        s = self.state
        match name:
            case "device_feature_select" | "driver_feature_select" | "queue_select":
                setattr(s, name, value)
            case "driver_feature":
                if s.driver_feature_select < 2 and not s.status & FEATURES_OK:
                    shift = 32 * s.driver_feature_select
                    s.driver_features = s.driver_features & ~(0xFFFF_FFFF << shift) | value << shift
            case "config_vector":
                s.config_vector = self._vector(value)
            case "device_status":
                self._set_status(value)
            case _ if s.queue_select < len(s.queues):
                self._set_queue(s.queues[s.queue_select], name, half, value, size)

    def _set_queue(self, q: QueueState, name: str, half: int, value: int, size: int) -> None:
        if name == "queue_vector":
            q.vector = self._vector(value)
        elif q.is_enabled:
            return  # "the driver MUST NOT": what is in use does not change
        elif name == "queue_size":
            most = self.sizes[self.state.queue_select]
            if value <= most and self.kind_of_queue.is_size(value):
                q.size = value
        elif name == "queue_enable":
            q.is_enabled = value == 1
        elif name in ("descriptors", "driver", "device"):
            if size == 4:
                old = getattr(q, name)
                value = old & ~(0xFFFF_FFFF << 8 * half) | value << 8 * half
            setattr(q, name, value)

    def _vector(self, value: int) -> int:
        """The vector as it reads back: NO_VECTOR if there is none of that number."""
        return value if value <= len(self.sizes) else NO_VECTOR

    def _set_status(self, value: int) -> None:
        s = self.state
        if value == 0:
            self.reset()
            return
        if value & FEATURES_OK and not s.status & FEATURES_OK:
            unknown = s.driver_features & ~self.offered
            if unknown or not s.driver_features & VERSION_1:
                value &= ~FEATURES_OK
        was_live = self.is_live
        s.status = value & ~NEEDS_RESET | s.status & NEEDS_RESET
        if self.is_live and not was_live:
            self.moved = 0
            for number in range(len(s.queues)):  # whatever was made available before
                self.kick(number)

    # --- queues ---

    @property
    def kind_of_queue(self) -> type[Queue]:
        """The kind of ring that the driver has chosen."""
        return PackedQueue if self.has(RING_PACKED) else SplitQueue

    def queue(self, number: int) -> Queue:
        """One of the queues, as it is now."""
        s = self.state
        return self.kind_of_queue(self.function.reach(), s.queues[number], s.driver_features)

    def notified(self, number: int) -> None:
        """The driver says that it has made buffers available."""
        self.kick(number)

    def kick(self, number: int) -> None:
        """The driver has made buffers available, or may have."""
        self.served = 0
        if not self.is_live or not self.state.queues[number].is_enabled:
            return
        try:
            queue = self.queue(number)
            queue.check()
            again = self._drain(number, queue)
            self.starved = 0
        except (RingError, IndexError):
            self.needs_reset()
            return
        except OutOfFrames as problem:  # what was not done is still in the queue
            again, self.trouble = SOON, str(problem)
            self.wanted = max(self.wanted, MOST_LOOKED_AT)
            self.starved = 1 if self.served else self.starved + 1
        if again is not None:
            self.postpone(number, again)

    def postpone(self, number: int, ns: int = SOON) -> None:
        """Serve the queue when so much time has passed."""
        self.state.waiting |= 1 << number
        when = self.clock.now() + ns
        if self.again.when is None or when < self.again.when:
            self.again.set(when)

    def _serve_waiting(self) -> None:
        waiting, self.state.waiting = self.state.waiting, 0
        self.moved = 0
        if self.wanted:  # no exit is being answered: the guest's own frames may go for it
            self.function.reach().make_room(self.wanted)
            self.wanted = 0
        for number in range(len(self.sizes)):
            if waiting >> number & 1:
                self.kick(number)
        if self.starved > PATIENCE:
            raise OutOfFrames(self.trouble)

    def _drain(self, number: int, queue: Queue) -> int | None:
        """Carry out what waits, as far as one may at once; in how many ns comes the rest."""
        left, self.dma = queue.state.size, queue.memory
        try:
            while left and self.moved < QUANTUM:
                chain = queue.pop_or_ask()
                if chain is None:
                    return None
                enough = self.moved + (needed := work(chain, self.expected))
                try:
                    queue.expect(chain, self.expected)
                    written = self.serve(number, chain)
                except (NotNow, Postponed, OutOfFrames) as excuse:
                    queue.unpop(chain)
                    if isinstance(excuse, OutOfFrames):
                        self.wanted = max(self.wanted, needed)
                        raise
                    return excuse.ns if isinstance(excuse, Postponed) else None
                if written is not None:
                    queue.push(chain, written)
                self.moved = max(self.moved, enough)
                left -= 1
                self.served += 1
            return SOON
        finally:
            if queue.publish():
                self.interrupt(queue.state.vector, 1)

    # --- interrupts ---

    def interrupt(self, vector: int, cause: int) -> None:
        """Tell the driver: by a message, or by the pin if it wants no messages."""
        if self.wires.msi(vector) if vector != NO_VECTOR else self.function.messages is not None:
            return
        self.state.isr |= cause
        self.function.set_intx(True)

    def config_changed(self) -> None:
        """Tell the driver that the device's own registers have changed."""
        s = self.state
        s.generation = s.generation + 1 & 0xFF
        if s.status & DRIVER_OK:
            self.interrupt(s.config_vector, CONFIG_CHANGED)

    def needs_reset(self) -> None:
        """The driver has broken a ring: nothing more is done until it resets the device."""
        self.state.status |= NEEDS_RESET
        self.config_changed()

    # --- reset, snapshots ---

    def reset(self) -> None:
        super().reset()
        self.starved = self.wanted = 0
        self.function.set_intx(False)

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        s = self.state
        vectors = [q.vector for q in s.queues] + [s.config_vector]
        sizes = [q.size for q in s.queues]
        if (
            len(sizes) != len(self.sizes)
            or not all(0 < size <= most for size, most in zip(sizes, self.sizes, strict=True))
            or any(self._vector(vector) != vector for vector in vectors)
        ):
            raise ValueError(f"snapshot: {self.name} has queues or vectors that cannot be")


def _half(features: int, select: int) -> int:
    return features >> 32 * select & 0xFFFF_FFFF if select < 2 else 0
