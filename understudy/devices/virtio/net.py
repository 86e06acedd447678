"""Virtio network device: a card that sends and receives Ethernet frames.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Network Device".

Not modeled: several pairs of queues, VLAN filters, announcements, the MTU, UDP fragmentation, ECN
in segments that are yet to be cut.  None of them is offered.

Invariants: a frame goes out whole or not at all; frames arrive in order; a frame that the guest
filters never reaches it, nor does one that is longer than what its driver has said it takes; what
another card's driver left to do is done here if this one's cannot.
"""

import struct
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from understudy.backends.cable import Cable
from understudy.backends.frame import (
    BROADCAST,
    GROUP,
    HEADER_BYTES,
    LONGEST,
    MAC_BYTES,
    Frame,
)
from understudy.clock import NS_PER_SECOND, Alarm
from understudy.devices.virtio.net_address import claim, is_one_cards, release
from understudy.devices.virtio.net_header import (
    GUEST_CSUM,
    GUEST_TSO,
    HEADER,
    MRG_RXBUF,
    OFFLOADS,
    Header,
    frame_of,
    header_of,
)
from understudy.devices.virtio.pci import NotNow, Postponed, VirtioPci, VirtioState
from understudy.devices.virtio.queue import (
    Chain,
    RingError,
    SplitQueue,
    cut,
    gather,
    length,
    scatter,
)
from understudy.devices.wires import Wires
from understudy.state import U62, U64

# --- The specification ---

KIND: Final = 1
CLASS: Final = 0x020000  # Ethernet controller
MAC, STATUS = 1 << 5, 1 << 16  # VIRTIO_NET_F_*
CTRL_VQ, CTRL_RX, CTRL_MAC_ADDR = 1 << 17, 1 << 18, 1 << 23
OFFERED: Final = OFFLOADS | MRG_RXBUF | MAC | STATUS | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR

RECEIVE, CONTROL = 0, 2  # queues; between them the one that transmits
CONFIG: Final = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu
LINK_UP: Final = 1  # VIRTIO_NET_S_LINK_UP
PROMISC, ALLMULTI = (0, 0), (0, 1)  # class and command; VIRTIO_NET_CTRL_RX_*
TABLE_SET, ADDR_SET = (1, 0), (1, 1)  # of VIRTIO_NET_CTRL_MAC_*
OK, ERR = b"\0", b"\1"  # VIRTIO_NET_*

# --- Ours ---

LONGEST_PLAIN: Final = 1518  # for a driver that knows no longer ones: with a VLAN tag
QUEUE_SIZE: Final = 256
MOST_ADDRESSES: Final = 64  # in each of the tables; with more, all such frames pass
MOST_CONTROL: Final = 1 << 20  # bytes of a command
USUAL_MAC: Final = b"\x52\x54\x00\x00\x00\x01"  # locally administered
IN, OUT = 0, 1
BUSY_NS: Final = 100_000  # after this a cable without room is tried again
PULLED_NS: Final = 100_000_000  # so long is the cable of a clone unplugged
BURST_NS: Final = 10_000_000  # by so much a limit of speed may be anticipated


@dataclass
class NetState(VirtioState):
    """What the guest filters, what has passed, and how far a limit of speed is used up."""

    own: Annotated[bytes, MAC_BYTES] = USUAL_MAC  # what the card has from its maker
    mac: Annotated[bytes, MAC_BYTES] = USUAL_MAC  # what the driver has set
    former: Annotated[bytes, MAC_BYTES] = BROADCAST  # what it had when it was cloned
    is_up: bool = True
    is_promiscuous: bool = True
    takes_all_groups: bool = False
    single: list[bytes] = field(default_factory=list)  # addresses beside its own
    groups: list[bytes] = field(default_factory=list)
    sent: U64 = 0  # frames, as they came from the driver
    sent_bytes: U64 = 0
    received: U64 = 0
    received_bytes: U64 = 0
    refused: U64 = 0  # frames of the driver that no wire carries
    lost: U64 = 0  # frames that came when the guest could not take them
    free_at: list[U62] = field(default_factory=lambda: [0, 0])  # in, out: by the limit of speed


class Net(VirtioPci, name="virtio_net"):
    """A card, and its cable."""

    battery = ("own", "is_up", "sent", "sent_bytes", "received", "received_bytes", "refused",
               "lost", "free_at")  # fmt: skip
    state: NetState

    def __init__(
        self, wires: Wires, *, mac: bytes | None = USUAL_MAC, named: str = "",
        cable: Cable | None = None, rate: int = 0,
    ) -> None:  # fmt: skip
        """`mac` None: one that follows from `named`.  rate: bit/s each way, 0 for no limit."""
        if mac is not None and not is_one_cards(mac):
            raise ValueError(f"virtio_net: a MAC {mac!r:.40}, expected 6 bytes of one card's own")
        super().__init__(wires, KIND, CLASS, (QUEUE_SIZE,) * 3)
        self.cable, self.rate = cable if cable is not None else Cable(), rate
        self.offered |= OFFERED
        self.plug = self.alarms["plug"] = Alarm(self.clock, lambda: self.set_link(is_up=True))
        self.ring: SplitQueue | None = None  # that is served
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
        return CONFIG.pack(self.state.mac, LINK_UP if self.state.is_up else 0, 1, 0)

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

    def _passes(self, to: bytes) -> bool:
        s = self.state
        if s.is_promiscuous or to == BROADCAST:
            return True
        if to[0] & GROUP:
            return s.takes_all_groups or to in s.groups
        return to in (s.mac, s.former) or to in s.single

    # --- what passes ---

    def _wait(self, way: int) -> None:
        """Not now, if the limit of speed is used up."""
        early = self.state.free_at[way] - self.clock.now() - BURST_NS
        if self.rate and early > 0:
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

    def _drain(self, number: int, queue: SplitQueue) -> int | None:
        self.ring = queue
        return super()._drain(number, queue)

    def serve(self, number: int, chain: Chain) -> int | None:
        if number == RECEIVE:
            return self._fill(chain)
        if number == CONTROL:
            return self._control(chain)
        self._send(chain)
        return 0

    # --- to the guest ---

    def _fill(self, chain: Chain) -> int | None:
        self._wait(IN)
        frame = self._next()
        header = header_of(frame)
        chains = self._room(chain, HEADER.size + len(frame.data))
        if chains is None:
            self.cable.put_back([frame])
            raise NotNow
        data = HEADER.pack(*header._replace(num_buffers=len(chains))) + frame.data
        self.moved += len(data)
        self._passed(IN, frame)
        if len(chains) == 1:
            return scatter(self.wires.dma, chain.writable, data)
        assert self.ring is not None
        for one in chains:
            count = scatter(self.wires.dma, one.writable, data)
            self.ring.push(one, count)
            data = data[count:]
        return None

    def _next(self) -> Frame:
        """The next frame for the guest, as its driver can take it."""
        longest = LONGEST if self._takes_long else LONGEST_PLAIN
        while (frame := self.cable.take()) is not None:
            if not self.state.is_up or not self._passes(frame.to):
                continue
            if frame.kind and not (self.has(GUEST_CSUM) and self.has(GUEST_TSO[frame.kind])):
                frame, *rest = frame.pieces()
                self.cable.put_back(rest)
            elif not self.has(GUEST_CSUM):
                frame = frame.whole()
            if len(frame.data) <= longest:
                return frame
            self.state.lost += 1
        raise NotNow

    @property
    def _takes_long(self) -> bool:
        """Whether the driver's buffers hold more than an ordinary frame."""
        return self.has(MRG_RXBUF | sum(GUEST_TSO.values()))

    def _room(self, chain: Chain, wanted: int) -> list[Chain] | None:
        """Buffers for so many bytes, the given one first; None if there are not enough yet."""
        room = length(chain.writable)
        if not self.has(MRG_RXBUF):
            if room < wanted:
                raise RingError("a buffer too small for a frame")
            return [chain]
        if room < HEADER.size:
            raise RingError("a buffer too small for the header of a frame")
        chains, ring = [chain], self.ring
        assert ring is not None
        while room < wanted:
            more = ring.pop() if len(chains) < ring.state.size else None
            if more is None:
                ring.ask_for_kicks()
                more = ring.pop() if len(chains) < ring.state.size else None
            if more is None:
                self._give_back(len(chains) - 1)
                return None
            chains.append(more)
            room += length(more.writable)
        return chains

    def _give_back(self, count: int) -> None:
        assert self.ring is not None
        for _ in range(count):
            self.ring.unpop()

    # --- from the guest ---

    def _send(self, chain: Chain) -> None:
        s, size = self.state, length(chain.readable) - HEADER.size
        if size < 0:
            raise RingError("a frame without its header")
        self.moved += HEADER.size
        if not HEADER_BYTES <= size <= LONGEST:
            s.refused += 1  # no wire carries it
            return
        self._wait(OUT)
        data = gather(self.wires.dma, chain.readable)
        self.moved += size
        frame = frame_of(Header(*HEADER.unpack_from(data)), data[HEADER.size :], s.driver_features)
        if frame is None:
            s.refused += 1
        elif s.is_up and not self.cable.send(frame):
            raise Postponed(BUSY_NS)
        else:
            self._passed(OUT, frame)

    # --- control ---

    def _control(self, chain: Chain) -> int:
        size = length(chain.readable)
        if not 2 <= size <= MOST_CONTROL or not chain.writable:
            raise RingError("a network command without its class or its acknowledgment")
        command = gather(self.wires.dma, chain.readable)
        self.moved += size
        status = OK if self._carry_out((command[0], command[1]), command[2:]) else ERR
        return scatter(self.wires.dma, cut(chain.writable, 0, 1), status)

    def _carry_out(self, command: tuple[int, int], data: bytes) -> bool:
        s = self.state
        is_switch = self.has(CTRL_RX) and len(data) == 1
        if command == PROMISC and is_switch:
            s.is_promiscuous = bool(data[0])
        elif command == ALLMULTI and is_switch:
            s.takes_all_groups = bool(data[0])
        elif command == ADDR_SET and self.has(CTRL_MAC_ADDR) and len(data) == MAC_BYTES:
            s.mac = data
        elif command == TABLE_SET and self.has(CTRL_RX) and (tables := _tables(data)):
            single, groups = tables
            s.is_promiscuous |= len(single) > MOST_ADDRESSES
            s.takes_all_groups |= len(groups) > MOST_ADDRESSES
            s.single, s.groups = single[:MOST_ADDRESSES], groups[:MOST_ADDRESSES]
        else:
            return False
        return True

    # --- snapshots ---

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        s = self.state
        if (
            max(len(s.single), len(s.groups)) > MOST_ADDRESSES
            or any(len(address) != MAC_BYTES for address in s.single + s.groups)
            or not is_one_cards(s.own)
            or len(s.free_at) != 2
        ):
            raise ValueError("snapshot: virtio_net has addresses or times that cannot be")

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


def _tables(data: bytes) -> tuple[list[bytes], list[bytes]] | None:
    """The two tables of virtio_net_ctrl_mac, or None if they do not fill `data`."""
    found: list[list[bytes]] = []
    at = 0
    for _ in range(2):
        if at + 4 > len(data):
            return None
        start, count = at + 4, int.from_bytes(data[at : at + 4], "little")
        at = start + MAC_BYTES * count
        if at > len(data):
            return None
        found.append([data[n : n + MAC_BYTES] for n in range(start, at, MAC_BYTES)])
    return (found[0], found[1]) if at == len(data) else None
