"""A network of VMs of this process: a switch that learns who is where.

Source: IEEE 802.1D, "Learning Bridge"; ours.
Invariants: frames leave in the order in which they came, to ports in the order in which they were
plugged in, so that where VMs take turns a run follows from what they send; a port holds so many
addresses, and with more forgets its own, never another's; a network ends with its last port.
"""

import threading
from collections import OrderedDict
from typing import Any, ClassVar, Final

from understudy.backends.cable import Cable
from understudy.backends.frame import GROUP, Frame

MOST_ADDRESSES: Final = 64
"""That one port has."""


class Lan:
    """A switch, by its name."""

    ALL: ClassVar[dict[str, "Lan"]] = {}
    lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, name: str) -> None:
        self.name = name
        self.ports: list[LanPort] = []
        self.place: dict[bytes, LanPort] = {}  # addresses, and behind which port they are
        self.forwarded = self.flooded = 0  # frames, to the one port that is known, and to all

    def forward(self, port: "LanPort", frame: Frame) -> None:
        """A frame has come in there."""
        self._learn(port, frame.source)
        to = self.place.get(frame.to)
        if to is not None:
            self.forwarded += 1
            if to is not port:
                to.arrive(frame)
            return
        self.flooded += 1
        for other in self.ports:
            if other is not port:
                other.arrive(frame)

    def _learn(self, port: "LanPort", address: bytes) -> None:
        if address[0] & GROUP:
            return
        if (before := self.place.get(address)) is not port:
            if before is not None:
                del before.addresses[address]
            if len(port.addresses) >= MOST_ADDRESSES:
                oldest, _ = port.addresses.popitem(last=False)
                del self.place[oldest]
            self.place[address] = port
            port.addresses[address] = None
        else:
            port.addresses.move_to_end(address)


class LanPort(Cable):
    """A port of a switch, and the cable to it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.addresses: OrderedDict[bytes, None] = OrderedDict()  # the latest last
        with Lan.lock:
            self.lan = Lan.ALL.setdefault(name, Lan(name))
            self.lan.ports.append(self)

    def send(self, frame: Frame) -> bool:
        with Lan.lock:
            if self in self.lan.ports:
                self.lan.forward(self, frame)
        return True

    def inspect(self) -> dict[str, Any]:
        lan = self.lan
        return super().inspect() | {
            "lan": lan.name, "ports": len(lan.ports), "forwarded": lan.forwarded,
            "flooded": lan.flooded, "addresses": [one.hex(":") for one in self.addresses],
        }  # fmt: skip

    def close(self) -> None:
        with Lan.lock:
            if self in self.lan.ports:
                self.lan.ports.remove(self)
                for address in self.addresses:
                    del self.lan.place[address]
                self.addresses.clear()
                if not self.lan.ports:
                    del Lan.ALL[self.lan.name]
            super().close()
