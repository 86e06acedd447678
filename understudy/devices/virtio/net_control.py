"""What a card's driver tells it by the control queue, and what the card keeps of that.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Network Device", "Control Virtqueue".

Invariant: a command that is refused has changed nothing.
"""

from dataclasses import dataclass, field
from typing import Annotated, Final

from understudy.backends.frame import BROADCAST, GROUP, MAC_BYTES
from understudy.devices.virtio.net_flows import BUCKETS, NO_FLOWS
from understudy.devices.virtio.pci import VirtioState
from understudy.state import U16, U62, U64

# --- The specification ---

CTRL_RX, MQ, CTRL_MAC_ADDR = 1 << 18, 1 << 22, 1 << 23  # VIRTIO_NET_F_*
PROMISC, ALLMULTI = (0, 0), (0, 1)  # class and command; VIRTIO_NET_CTRL_RX_*
TABLE_SET, ADDR_SET = (1, 0), (1, 1)  # of VIRTIO_NET_CTRL_MAC_*
PAIRS_SET: Final = (4, 0)  # VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET

# --- Ours ---

MOST_ADDRESSES: Final = 64  # in each of the tables; with more, all such frames pass
USUAL_MAC: Final = b"\x52\x54\x00\x00\x00\x01"  # locally administered


@dataclass
class NetState(VirtioState):
    """What the guest filters, what has passed, and how far a limit of speed is used up."""

    own: Annotated[bytes, MAC_BYTES] = USUAL_MAC  # what the card has from its maker
    mac: Annotated[bytes, MAC_BYTES] = USUAL_MAC  # what the driver has set
    former: Annotated[bytes, MAC_BYTES] = BROADCAST  # what it had when it was cloned
    is_up: bool = True
    is_promiscuous: bool = True
    takes_all_groups: bool = False
    pairs: U16 = 1  # of queues, that the driver uses
    flows: Annotated[bytes, BUCKETS] = NO_FLOWS  # the pair from which each bucket of them was sent
    single: list[bytes] = field(default_factory=list)  # addresses beside its own
    groups: list[bytes] = field(default_factory=list)
    sent: U64 = 0  # frames, as they came from the driver
    sent_bytes: U64 = 0
    received: U64 = 0
    received_bytes: U64 = 0
    refused: U64 = 0  # frames of the driver that no wire carries
    lost: U64 = 0  # frames that came when the guest could not take them
    free_at: list[U62] = field(default_factory=lambda: [0, 0])  # in, out: by the limit of speed

    def passes(self, to: bytes) -> bool:
        """Whether the guest wants frames for this address."""
        if self.is_promiscuous or to == BROADCAST:
            return True
        if to[0] & GROUP:
            return self.takes_all_groups or to in self.groups
        return to in (self.mac, self.former) or to in self.single

    def obey(self, command: tuple[int, int], data: bytes, most_pairs: int) -> bool:
        """Do what the driver says; whether that can be.  `most_pairs`: those that the card has."""
        accepted = self.driver_features
        is_switch = bool(accepted & CTRL_RX) and len(data) == 1
        if command == PROMISC and is_switch:
            self.is_promiscuous = bool(data[0])
        elif command == ALLMULTI and is_switch:
            self.takes_all_groups = bool(data[0])
        elif command == ADDR_SET and accepted & CTRL_MAC_ADDR and len(data) == MAC_BYTES:
            self.mac = data
        elif command == TABLE_SET and accepted & CTRL_RX and (tables := _tables(data)):
            single, groups = tables
            self.is_promiscuous |= len(single) > MOST_ADDRESSES
            self.takes_all_groups |= len(groups) > MOST_ADDRESSES
            self.single, self.groups = single[:MOST_ADDRESSES], groups[:MOST_ADDRESSES]
        elif command == PAIRS_SET and accepted & MQ and len(data) == 2:
            pairs = int.from_bytes(data, "little")
            if not 1 <= pairs <= most_pairs:
                return False
            self.pairs = pairs
        else:
            return False
        return True


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
