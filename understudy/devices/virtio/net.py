"""Virtio network device: a card that sends and receives Ethernet frames.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Network Device".

Not modeled: VLAN filters, announcements, the MTU, UDP fragmentation, ECN
in segments that are yet to be cut.  None of them is offered.

Invariants: a frame goes out whole or not at all; frames arrive in order; a frame that the guest
filters never reaches it, nor does one that is longer than what its driver has said it takes; what
another card's driver left to do is done here if this one's cannot.
"""

import struct
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from understudy.backends.cable import Cable
from understudy.backends.frame import (
    HEADER_BYTES,
    LONGEST,
    MAC_BYTES,
    Frame,
)
from understudy.backends.virtio_header import (
    GUEST_CSUM,
    GUEST_TSO,
    HEADER,
    MRG_RXBUF,
    OFFLOADS,
    Header,
    frame_of,
    header_of,
)
from understudy.clock import NS_PER_SECOND, Alarm
from understudy.devices.virtio.net_address import claim, is_one_cards, release
from understudy.devices.virtio.net_control import (
    CTRL_MAC_ADDR,
    CTRL_RX,
    MOST_ADDRESSES,
    MQ,
    PAIRS_SET,
    USUAL_MAC,
    NetState,
)
from understudy.devices.virtio.net_flows import bucket_of
from understudy.devices.virtio.pci import NotNow, Postponed, VirtioPci
from understudy.devices.virtio.queue import (
    Chain,
    Queue,
    RingError,
    cut,
    length,
)
from understudy.devices.wires import Wires
from understudy.machine.frames import OutOfFrames

# --- The specification ---

KIND: Final = 1
CLASS: Final = 0x020000  # Ethernet controller
MAC, STATUS = 1 << 5, 1 << 16  # VIRTIO_NET_F_*
CTRL_VQ: Final = 1 << 17
OFFERED: Final = OFFLOADS | MRG_RXBUF | MAC | STATUS | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR

RECEIVE: Final = 0  # of a pair of queues; the other sends.  After all pairs comes that for control
CONFIG: Final = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu
LINK_UP: Final = 1  # VIRTIO_NET_S_LINK_UP
OK, ERR = b"\0", b"\1"  # VIRTIO_NET_*
PLAIN: Final = HEADER.pack(*Header())  # there is nothing to do, and it is in one buffer
LONG: Final = MRG_RXBUF | sum(GUEST_TSO.values())  # each lets longer frames come

# --- Ours ---

LONGEST_PLAIN: Final = 1518  # for a driver that knows no longer ones: with a VLAN tag
QUEUE_SIZE: Final = 256
MOST_PAIRS: Final = 8
MOST_CONTROL: Final = 1 << 20  # bytes of a command
IN, OUT = 0, 1
BUSY_NS: Final = 100_000  # after this a cable without room is tried again
PULLED_NS: Final = 100_000_000  # so long is the cable of a clone unplugged
BURST_NS: Final = 10_000_000  # by so much a limit of speed may be anticipated


class Net(VirtioPci, name="virtio_net"):
    """A card, and its cable."""

    battery = ("own", "is_up", "sent", "sent_bytes", "received", "received_bytes", "refused",
               "lost", "free_at")  # fmt: skip
    switches: ClassVar[Mapping[str, int]] = {
        **VirtioPci.switches, "mq": MQ, "mrg-rxbuf": MRG_RXBUF,
    }  # fmt: skip
    state: NetState

    def __init__(
        self, wires: Wires, *, mac: bytes | None = USUAL_MAC, named: str = "",
        cable: Cable | None = None, rate: int = 0, pairs: int = 1,
    ) -> None:  # fmt: skip
        """`mac` None: one that follows from `named`.  rate: bit/s each way, 0 for no limit.

        pairs: of queues, that the driver may use.
        """
        if not 1 <= pairs <= MOST_PAIRS:
            raise ValueError(f"virtio_net: {pairs} pairs of queues, expected 1 to {MOST_PAIRS}")
        if mac is not None and not is_one_cards(mac):
            raise ValueError(f"virtio_net: a MAC {mac!r:.40}, expected 6 bytes of one card's own")
        super().__init__(wires, KIND, CLASS, (QUEUE_SIZE,) * (2 * pairs + 1))
        self.pairs = pairs
        self.cable, self.rate = cable if cable is not None else Cable(), rate
        self.offered |= OFFERED | (MQ if pairs > 1 else 0)
        self.plug = self.alarms["plug"] = Alarm(self.clock, lambda: self.set_link(is_up=True))
        self.ring: Queue | None = None  # that is served
        self.first = USUAL_MAC
        self.state = self.power_on()
        claim(self, mac, named)
        self.first = self.own
        self.state = self.power_on()

    @property
    def own(self) -> bytes:
        """The address that the card has from its maker."""
        return self.state.own

    @own.setter
    def own(self, mac: bytes) -> None:
        self.state.own = mac

    def power_on(self) -> NetState:
        return self.fresh(NetState, own=self.first, mac=self.first)

    def reset(self) -> None:
        super().reset()
        self.state.mac = self.state.own

    def config(self) -> bytes:
        return CONFIG.pack(self.state.mac, LINK_UP if self.state.is_up else 0, self.pairs, 0)

    # --- the cable ---

    def look(self) -> None:
        """Something has come; on the VM's thread."""
        self.moved = 0
        if self.cable.is_gone:
            self.set_link(is_up=False)
        if self.is_live and self.state.is_up:
            self.kick(RECEIVE)
        if not (self.is_live and self.state.is_up and self.state.queues[RECEIVE].is_enabled):
            while self.cable.take() is not None:
                self.state.lost += 1

    def set_link(self, *, is_up: bool) -> None:
        """Plug the cable in, or pull it."""
        if is_up != self.state.is_up:
            self.state.is_up = is_up
            self.config_changed()

    def become_another(self, named: str) -> None:
        """The card is another one than its guest knows; frames for the old address reach it, too.

        The cable is out for a moment.  Linux reads the address when it binds a driver to the card.
        """
        s = self.state
        s.former = s.mac
        claim(self, None, named)
        s.mac = s.own
        if s.is_up:
            self.set_link(is_up=False)
            self.plug.set(self.clock.now() + PULLED_NS)

    # --- what passes ---

    def _wait(self, way: int) -> None:
        """Not now, if the limit of speed is used up."""
        if self.rate and (early := self.state.free_at[way] - self.clock.now() - BURST_NS) > 0:
            raise Postponed(early)

    def _passed(self, way: int, frame: Frame) -> None:
        s, count = self.state, len(frame.data)
        if self.rate:
            free = max(s.free_at[way], self.clock.now())
            s.free_at[way] = free + 8 * NS_PER_SECOND * count // self.rate
        if way == OUT:
            s.sent += 1
            s.sent_bytes += count
        else:
            s.received += 1
            s.received_bytes += count
        self.cable.passed(way == OUT, frame)

    # --- queues ---

    @property
    def _control_queue(self) -> int:
        return 2 * self.pairs if self.has(MQ) else 2

    def kick(self, number: int) -> None:
        """See `VirtioPci.kick`.  The frame that comes next may be for another queue."""
        super().kick(number)
        while number % 2 == RECEIVE and self.state.pairs > 1 and self.is_live:
            turn = self._turn()
            if turn is None or turn == number:
                break
            number = turn
            super().kick(number)

    def _drain(self, number: int, queue: Queue) -> int | None:
        self.ring = queue
        return super()._drain(number, queue)

    def serve(self, number: int, chain: Chain) -> int | None:
        if number >= self._control_queue:
            if number > self._control_queue:
                raise NotNow  # there are no more pairs
            return self._control(chain)
        pair, way = divmod(number, 2)
        if way == RECEIVE:
            return self._fill(number, chain)
        self._send(pair, chain)
        return 0

    # --- to the guest ---

    def _fill(self, number: int, chain: Chain) -> int | None:
        self._wait(IN)
        frame = self._next()
        if self._queue_for(frame) != number:
            self.cable.put_back([frame])
            raise NotNow
        size = HEADER.size + len(frame.data)
        try:
            chains = self._room(chain, size)
        except (NotNow, OutOfFrames):
            self.cable.put_back([frame])
            raise
        if frame.start or len(chains) > 1:
            header = HEADER.pack(*header_of(frame)[:-1], len(chains))
        else:
            header = PLAIN
        runs = [run for one in chains for run in one.writable]
        self.dma.scatter(cut(runs, 0, size), header + frame.data)
        self.moved += size
        self._passed(IN, frame)
        if len(chains) == 1:
            return size
        assert self.ring is not None
        for one in chains:
            count = min(length(one.writable), size)
            self.ring.push(one, count)
            size -= count
        return None

    def _next(self) -> Frame:
        """The next frame for the guest, as its driver can take it."""
        s = self.state
        while (frame := self.cable.take()) is not None:
            if not s.is_up or not (s.is_promiscuous or s.passes(frame.to)):
                continue
            if frame.start:
                can_sum = self.has(GUEST_CSUM)
                if frame.kind and not (can_sum and self.has(GUEST_TSO[frame.kind])):
                    frame, *rest = frame.pieces()
                    self.cable.put_back(rest)
                elif not can_sum:
                    frame = frame.whole()
            if len(frame.data) <= (LONGEST if self.has(LONG) else LONGEST_PLAIN):
                return frame
            self.state.lost += 1
        raise NotNow

    def _turn(self) -> int | None:
        """The queue to which the next frame goes, if one waits."""
        try:
            frame = self._next()
        except NotNow:
            return None
        self.cable.put_back([frame])
        return self._queue_for(frame)

    def _queue_for(self, frame: Frame) -> int:
        s = self.state
        if s.pairs == 1:
            return RECEIVE
        pair = s.flows[bucket_of(frame.data, is_out=False)]
        is_used = pair < s.pairs and s.queues[2 * pair].is_enabled
        return 2 * pair if is_used else RECEIVE

    def _room(self, chain: Chain, wanted: int) -> list[Chain]:
        """Buffers for so many bytes, the given one first; NotNow if there are not enough yet."""
        room = length(chain.writable)
        if not self.has(MRG_RXBUF):
            if room < wanted:
                raise RingError("a buffer too small for a frame")
            return [chain]
        if room < HEADER.size:
            raise RingError("a buffer too small for the header of a frame")
        chains, ring = [chain], self.ring
        assert ring is not None
        try:
            while room < wanted:
                more = ring.pop_or_ask() if len(chains) < ring.state.size else None
                if more is None:
                    raise NotNow
                chains.append(more)
                room += length(more.writable)
                ring.expect(more, wanted)
        except (NotNow, OutOfFrames):
            for one in reversed(chains[1:]):
                ring.unpop(one)
            raise
        return chains

    # --- from the guest ---

    def _send(self, pair: int, chain: Chain) -> None:
        s, size = self.state, length(chain.readable) - HEADER.size
        if size < 0:
            raise RingError("a frame without its header")
        self.moved += HEADER.size
        if not HEADER_BYTES <= size <= LONGEST:
            s.refused += 1  # no wire carries it
            return
        self._wait(OUT)
        data = self.dma.gather(chain.readable)
        self.moved += size
        frame = frame_of(Header(*HEADER.unpack_from(data)), data[HEADER.size :], s.driver_features)
        if frame is None:
            s.refused += 1
        elif s.is_up and not self.cable.send(frame):
            raise Postponed(BUSY_NS)
        else:
            self._passed(OUT, frame)
            if s.pairs > 1 and s.flows[bucket := bucket_of(frame.data, is_out=True)] != pair:
                s.flows = s.flows[:bucket] + bytes([pair]) + s.flows[bucket + 1 :]

    # --- control ---

    def _control(self, chain: Chain) -> int:
        size = length(chain.readable)
        if not 2 <= size <= MOST_CONTROL or not chain.writable:
            raise RingError("a network command without its class or its acknowledgment")
        command = self.dma.gather(chain.readable)
        self.moved += size
        is_done = self.state.obey((command[0], command[1]), command[2:], self.pairs)
        status = OK if is_done else ERR
        if is_done and (command[0], command[1]) == PAIRS_SET:
            self.kick(RECEIVE)  # the frame that comes next may be for another queue now
        return self.dma.scatter(cut(chain.writable, 0, 1), status)

    # --- snapshots ---

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        s = self.state
        if (
            max(len(s.single), len(s.groups)) > MOST_ADDRESSES
            or any(len(address) != MAC_BYTES for address in s.single + s.groups)
            or not is_one_cards(s.own)
            or len(s.free_at) != 2
            or not 1 <= s.pairs <= self.pairs
        ):
            raise ValueError("snapshot: virtio_net has addresses, times or queues that cannot be")

    def inspect(self) -> dict[str, Any]:
        return super().inspect() | {"cable": self.cable.inspect()}

    def counts(self) -> dict[str, int]:
        """What has passed and what was lost."""
        s = self.state
        names = ("sent", "sent_bytes", "received", "received_bytes", "refused")
        return {name: getattr(s, name) for name in names} | {"lost": s.lost + self.cable.lost}

    def close(self) -> None:
        release(self)
        self.cable.close()
        super().close()
