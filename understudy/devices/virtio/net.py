"""Virtio network device: a card that sends and receives Ethernet frames.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Network Device".

Not modeled: mergeable buffers, checksum and segmentation offloads, several pairs of queues, VLAN
filters, announcements, the MTU.  None of them is offered.

Invariants: a frame goes out whole or not at all; frames arrive in order; what waits for a buffer is
bounded, and what is beyond is lost, as on a wire; a frame that the guest filters never reaches it.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from understudy.devices.virtio.pci import NotNow, VirtioPci, VirtioState
from understudy.devices.virtio.queue import Chain, RingError, cut, gather, length, scatter
from understudy.devices.wires import Wires
from understudy.state import U64

# --- The specification ---

KIND: Final = 1
CLASS: Final = 0x020000  # Ethernet controller
MAC, STATUS = 1 << 5, 1 << 16  # VIRTIO_NET_F_*
CTRL_VQ, CTRL_RX, CTRL_MAC_ADDR = 1 << 17, 1 << 18, 1 << 23

RECEIVE, CONTROL = 0, 2  # queues; between them the one that transmits
CONFIG: Final = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu
LINK_UP: Final = 1  # VIRTIO_NET_S_LINK_UP
HEADER: Final = struct.Struct("<BBHHHHH")  # virtio_net_hdr; num_buffers is the last
PLAIN: Final = HEADER.pack(0, 0, 0, 0, 0, 0, 1)  # a frame as it is, in one buffer

PROMISC, ALLMULTI = (0, 0), (0, 1)  # class and command; VIRTIO_NET_CTRL_RX_*
TABLE_SET, ADDR_SET = (1, 0), (1, 1)  # of VIRTIO_NET_CTRL_MAC_*
OK, ERR = b"\0", b"\1"  # VIRTIO_NET_*

# --- IEEE 802.3 ---

MAC_BYTES: Final = 6
SHORTEST: Final = 14  # the header; what sends pads a frame, or not
LONGEST: Final = 1518  # without the check sequence, with a VLAN tag
GROUP: Final = 1  # in the first byte of an address
BROADCAST: Final = b"\xff" * MAC_BYTES

# --- Ours ---

QUEUE_SIZE: Final = 256
WAITING: Final = 256  # frames that wait for buffers
MOST_ADDRESSES: Final = 64  # in each of the tables; with more, all such frames pass
MOST_CONTROL: Final = 1 << 20  # bytes of a command
USUAL_MAC: Final = b"\x52\x54\x00\x00\x00\x01"  # locally administered


@dataclass
class NetState(VirtioState):
    """What the guest filters, and what has arrived."""

    mac: Annotated[bytes, MAC_BYTES] = USUAL_MAC
    is_up: bool = True
    is_promiscuous: bool = True
    takes_all_groups: bool = False
    single: list[bytes] = field(default_factory=list)  # addresses beside its own
    groups: list[bytes] = field(default_factory=list)
    arrived: list[bytes] = field(default_factory=list)
    lost: U64 = 0  # frames for which there was no room


class Net(VirtioPci, name="virtio_net"):
    """A card.  `on_frame` hears each frame that the guest sends; `receive` brings it one."""

    battery = ("is_up", "lost")
    state: NetState

    def __init__(self, wires: Wires, *, mac: bytes = USUAL_MAC) -> None:
        if not isinstance(mac, bytes) or len(mac) != MAC_BYTES or mac[0] & GROUP or not any(mac):
            raise ValueError(f"virtio_net: a MAC {mac!r:.40}, expected 6 bytes of one card's own")
        super().__init__(wires, KIND, CLASS, (QUEUE_SIZE,) * 3)
        self.mac = mac
        self.offered |= MAC | STATUS | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR
        self.on_frame: list[Callable[[bytes], None]] = []
        self.state = self.power_on()

    def power_on(self) -> NetState:
        return self.fresh(NetState, mac=self.mac)

    def config(self) -> bytes:
        return CONFIG.pack(self.state.mac, LINK_UP if self.state.is_up else 0, 1, 0)

    # --- the wire ---

    def receive(self, frame: bytes) -> bool:
        """A frame comes from outside; False if it is not for the guest, or is lost."""
        s = self.state
        if not self.is_live or not s.is_up or not SHORTEST <= len(frame) <= LONGEST:
            return False
        if not self._passes(frame[:MAC_BYTES]):
            return False
        if len(s.arrived) >= WAITING:
            s.lost += 1
            return False
        s.arrived.append(frame)
        self.moved = 0
        self.kick(RECEIVE)
        return True

    def set_link(self, *, is_up: bool) -> None:
        """Plug the cable in, or pull it."""
        if is_up != self.state.is_up:
            self.state.is_up = is_up
            self.config_changed()

    def _passes(self, to: bytes) -> bool:
        s = self.state
        if s.is_promiscuous or to == BROADCAST:
            return True
        if to[0] & GROUP:
            return s.takes_all_groups or to in s.groups
        return to == s.mac or to in s.single

    # --- queues ---

    def serve(self, number: int, chain: Chain) -> int:
        if number == RECEIVE:
            return self._fill(chain)
        if number == CONTROL:
            return self._control(chain)
        self._send(chain)
        return 0

    def _fill(self, chain: Chain) -> int:
        arrived = self.state.arrived
        if not arrived:
            raise NotNow
        data = PLAIN + arrived[0]
        if length(chain.writable) < len(data):
            raise RingError("a buffer too small for a frame")
        arrived.pop(0)
        self.moved += len(data)
        return scatter(self.wires.dma, chain.writable, data)

    def _send(self, chain: Chain) -> None:
        size = length(chain.readable) - HEADER.size
        if size < 0:
            raise RingError("a frame without its header")
        self.moved += HEADER.size
        if not SHORTEST <= size <= LONGEST:
            return  # no wire carries it
        frame = gather(self.wires.dma, cut(chain.readable, HEADER.size, size))
        self.moved += size
        if self.state.is_up:
            for listener in self.on_frame:
                listener(frame)

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
            len(s.arrived) > WAITING
            or max(len(s.single), len(s.groups)) > MOST_ADDRESSES
            or any(not SHORTEST <= len(frame) <= LONGEST for frame in s.arrived)
            or any(len(address) != MAC_BYTES for address in s.single + s.groups)
        ):
            raise ValueError("snapshot: virtio_net has frames or addresses that cannot be")

    def close(self) -> None:
        self.on_frame.clear()
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
