"""Virtio socket device: connections between programs of this computer and of the guest.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Socket Device".  Who is met at which port here is
a matter of `backends/unix_ports.py`.

Not modeled: datagrams, sequenced packets.

Invariants: nothing here waits, but a thread that only tells which sockets are ready; there are at
most `MOST_STREAMS` connections and `MOST_RESETS` refusals that the guest has no buffers for, beyond
which its packets wait; bytes arrive in order, once, and none is lost but with its connection.
"""

import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from understudy.backends.readiness import HUNG, READ, WRITE, Readiness
from understudy.backends.unix_ports import UnixPorts, wish
from understudy.devices.virtio.pci import NotNow, VirtioPci, VirtioState
from understudy.devices.virtio.queue import Chain, RingError, cut, length
from understudy.devices.virtio.vsock_packet import HOST_CID, LAYOUT, STREAM, Header, Op, header_of
from understudy.devices.virtio.vsock_stream import BUFFER, MOST, Phase, Stream
from understudy.devices.wires import Wires
from understudy.state import U32

# --- The specification ---

KIND: Final = 19
CLASS: Final = 0x078000  # communication, other: what QEMU's has
F_STREAM: Final = 1 << 0  # VIRTIO_VSOCK_F_STREAM
RX, TX, EVENT = range(3)  # queues, as the driver sees them
CONFIG: Final = struct.Struct("<Q")  # guest_cid
TRANSPORT_RESET: Final = bytes(4)  # VIRTIO_VSOCK_EVENT_TRANSPORT_RESET

# --- Ours ---

QUEUE_SIZE: Final = 128
MOST_STREAMS: Final = 128
MOST_RESETS: Final = 256
FIRST_PORT: Final = 1 << 30  # of ours that programs of this computer get

Ports = tuple[int, int]
"""Of this computer, and of the guest."""
Asking = tuple[socket.socket, bytearray]
"""Who has come, and what he has said so far."""


@dataclass
class VsockState(VirtioState):
    """What the guest is yet to be told."""

    resets: list[tuple[U32, U32]] = field(default_factory=list)  # `Ports` of what is no connection
    is_lost: bool = False  # all connections are gone


class Vsock(VirtioPci, name="virtio_vsock"):
    """The guest's address, and its connections."""

    state: VsockState

    def __init__(self, wires: Wires, *, cid: int = 3, ports: UnixPorts | None = None) -> None:
        super().__init__(wires, KIND, CLASS, (QUEUE_SIZE,) * 3)
        self.offered |= F_STREAM
        self.cid, self.ports = cid, ports
        self.notify: Callable[[], None] = lambda: None  # from a thread: `look`
        self.streams: dict[Ports, Stream] = {}
        self._ready: OrderedDict[Ports, None] = OrderedDict()  # that may have something to tell
        self._asking: dict[int, Asking] = {}  # who has not said yet what he wants
        self._by_end: dict[int, Ports] = {}
        self._following = FIRST_PORT
        self._is_held_up = False  # the guest's packets wait for buffers of its own
        self._readiness: Readiness | None = None
        self.state = self.power_on()

    def power_on(self) -> VsockState:
        return self.fresh(VsockState)

    def config(self) -> bytes:
        return CONFIG.pack(self.cid)

    # --- this computer's side ---

    def listen(self, notify: Callable[[], None]) -> None:
        """Let programs of this computer come; `notify`, from a thread: have me `look`."""
        self.notify = notify
        if self.ports is not None:
            self.readiness.watch(self.ports.listener, READ)

    @property
    def readiness(self) -> Readiness:
        """Who waits for sockets."""
        if self._readiness is None:
            self._readiness = Readiness()
            self._readiness.notify = lambda: self.notify()
        return self._readiness

    def open(self, port: int, end: socket.socket) -> Stream | None:
        """Connect a socket with a port of the guest; None: there is no guest that could answer.

        The socket is the device's from now on.
        """
        end.setblocking(False)
        stream = self._new(port, end)
        self.kick(RX)
        return stream

    def _new(self, port: int, end: socket.socket) -> Stream | None:
        if not self.is_live or len(self.streams) >= MOST_STREAMS:
            end.close()
            return None
        while (self._following, port) in self.streams:
            self._following += 1
        stream = Stream(self._following, port, end, Phase.ASKED)
        self._following = FIRST_PORT + (self._following + 1 - FIRST_PORT) % FIRST_PORT
        self._add(stream)
        self._watch(stream)
        return stream

    def _add(self, stream: Stream) -> None:
        key = stream.own, stream.guest
        self.streams[key] = stream
        self._by_end[stream.end.fileno()] = key
        self._ready[key] = None

    def _drop(self, key: Ports) -> None:
        stream = self.streams.pop(key)
        stream.phase = Phase.OVER
        self._ready.pop(key, None)
        del self._by_end[stream.end.fileno()]
        self.readiness.forget(stream.end)
        stream.end.close()

    def look(self) -> None:
        """Sockets are ready; on the VM's thread."""
        for fd, events in self.readiness.take().items():
            if self.ports is not None and fd == self.ports.listener.fileno():
                self._accept(self.ports)
            elif fd in self._asking:
                self._hear_wish(fd)
            elif (key := self._by_end.get(fd)) is not None:
                stream = self.streams[key]
                stream.is_readable |= bool(events & (READ | HUNG))
                stream.is_hung |= bool(events & HUNG)
                stream.is_broken |= stream.is_hung and stream.phase is Phase.ASKED  # he gave up
                stream.flush()
                self._ready[key] = None
                self._watch(stream)
        self.moved = 0
        self.kick(RX)

    def _accept(self, ports: UnixPorts) -> None:
        while (end := ports.accept()) is not None:
            if len(self._asking) + len(self.streams) >= MOST_STREAMS:
                end.close()
                continue
            self._asking[end.fileno()] = end, bytearray()
            self.readiness.watch(end, READ)
        self.readiness.watch(ports.listener, READ)

    def _hear_wish(self, fd: int) -> None:
        end, said = self._asking[fd]
        try:
            port = wish(end, said)
        except BlockingIOError:
            port = None
        except OSError:
            self._turn_away(fd)
            return
        if port is None:
            self.readiness.watch(end, READ)
            return
        self.readiness.forget(end)
        del self._asking[fd]
        if (stream := self._new(port, end)) is not None:
            stream.greeting += b"OK %d\n" % stream.own

    def _turn_away(self, fd: int) -> None:
        end, _ = self._asking.pop(fd)
        self.readiness.forget(end)
        end.close()

    def _watch(self, stream: Stream) -> None:
        """Hear of it when something can be done that cannot now."""
        if stream.is_broken or (stream.phase is Phase.ASKED and stream.is_hung):
            return
        if stream.phase is Phase.ASKED:
            self.readiness.watch(stream.end, 0)  # whether he gives up
            return
        is_known = stream.is_readable and not stream.is_over  # and read when the guest has room
        wanted = 0 if stream.is_readable else READ
        wanted |= WRITE if stream.out or stream.greeting else 0
        if wanted or not (is_known or stream.is_hung):
            self.readiness.watch(stream.end, wanted)

    # --- queues ---

    def kick(self, number: int) -> None:
        """See `VirtioPci.kick`.  What the guest sends has answers, and waits if it takes none."""
        super().kick(number)
        if number == TX:
            super().kick(RX)
        if number != EVENT and self._is_held_up and len(self.state.resets) < MOST_RESETS:
            self._is_held_up = False
            super().kick(TX)
            super().kick(RX)

    def serve(self, number: int, chain: Chain) -> int:
        if number == TX:
            self._hear(chain)
            return 0
        if number == EVENT:
            if not self.state.is_lost:
                raise NotNow
            self.state.is_lost = False
            return self.dma.scatter(chain.writable, TRANSPORT_RESET)
        return self._tell(chain)

    # --- from the guest ---

    def _hear(self, chain: Chain) -> None:
        if len(self.state.resets) >= MOST_RESETS:
            self._is_held_up = True
            raise NotNow
        size = length(chain.readable) - LAYOUT.size
        if not 0 <= size <= MOST:
            raise RingError(f"a packet of {size} bytes behind its header")
        packet = self.dma.gather(chain.readable)
        self.moved += len(packet)
        header = header_of(packet)
        if header.len > size:
            raise RingError("a packet without all its bytes")
        if (header.src_cid, header.dst_cid) != (self.cid, HOST_CID):
            return  # nobody is there
        key = header.dst_port, header.src_port
        stream = self.streams.get(key)
        if header.type != STREAM or (stream is None) != (header.op == Op.REQUEST):
            if stream is not None:
                self._drop(key)
            if header.op != Op.RST:
                self.state.resets.append(key)
        elif stream is None:
            self._connect(header)
        else:
            self._hear_of(stream, header, packet[LAYOUT.size :][: header.len])

    def _connect(self, header: Header) -> None:
        end = None
        if self.ports is not None and len(self.streams) < MOST_STREAMS:
            end = self.ports.connect(header.dst_port)
        if end is None:
            self.state.resets.append((header.dst_port, header.src_port))
            return
        stream = Stream(header.dst_port, header.src_port, end, Phase.OPEN)
        stream.hear(header)
        self._add(stream)
        self._watch(stream)

    def _hear_of(self, stream: Stream, header: Header, data: bytes) -> None:
        key = stream.own, stream.guest
        stream.hear(header)
        self._ready[key] = None
        match header.op:
            case Op.RST:
                self._drop(key)
                return
            case Op.RESPONSE if stream.phase is Phase.ASKED:
                stream.phase = Phase.OPEN
                stream.flush()
            case Op.RW:
                stream.take(data)
            case Op.SHUTDOWN:
                stream.shut(header.flags)
            case Op.CREDIT_UPDATE:
                pass
            case Op.CREDIT_REQUEST:
                stream.wants_update = True
            case _:
                stream.is_broken = True
        self._watch(stream)

    # --- to the guest ---

    def _tell(self, chain: Chain) -> int:
        room = length(chain.writable) - LAYOUT.size
        if room <= 0:
            raise RingError("a buffer too small for a packet")
        if self.state.resets:
            own, guest = self.state.resets.pop(0)
            return self._write(chain, own, guest, Op.RST)
        while self._ready:
            key = next(iter(self._ready))
            stream = self.streams[key]
            packet = stream.next(room)
            if packet is None:
                del self._ready[key]
                self._watch(stream)
                continue
            op, flags, data = packet
            stream.told = stream.forwarded
            written = self._write(chain, *key, op, flags, data, stream.forwarded)
            if stream.phase is Phase.OVER:
                self._drop(key)
            else:
                self._ready.move_to_end(key)  # others have their turn
            return written
        raise NotNow

    def _write(
        self, chain: Chain, own: int, guest: int, op: Op, flags: int = 0, data: bytes = b"",
        forwarded: int = 0,
    ) -> int:  # fmt: skip
        header = LAYOUT.pack(
            HOST_CID, self.cid, own, guest, len(data), STREAM, op, flags, BUFFER, forwarded
        )
        self.moved += LAYOUT.size + len(data)
        self.dma.scatter(cut(chain.writable, 0, LAYOUT.size), header)
        self.dma.scatter(cut(chain.writable, LAYOUT.size, len(data)), data)
        return LAYOUT.size + len(data)

    # --- reset, snapshots ---

    def reset(self) -> None:
        super().reset()
        self._end_all()

    def _end_all(self) -> None:
        for key in list(self.streams):
            self._drop(key)
        self._is_held_up = False

    def save(self) -> dict[str, Any]:
        saved = super().save()
        saved["state"]["is_lost"] |= bool(self.streams)  # whoever loads it has none of them
        return saved

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        self._end_all()
        self._is_held_up = len(self.state.resets) >= MOST_RESETS
        if len(self.state.resets) > MOST_RESETS:
            raise ValueError("snapshot: virtio_vsock refuses more connections than it can")
        if self.state.is_lost and self.is_live:
            self.postpone(EVENT)

    def inspect(self) -> dict[str, Any]:
        streams = [f"{own}-{guest}" for own, guest in self.streams]
        return super().save() | {"cid": self.cid, "streams": streams}

    def close(self) -> None:
        self._end_all()
        for fd in list(self._asking):
            self._turn_away(fd)
        if self.ports is not None:
            self.readiness.forget(self.ports.listener)
            self.ports.close()
        if self._readiness is not None:
            self._readiness.close()
        super().close()
