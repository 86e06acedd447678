"""Virtio entropy device: random bytes for the guest's own generator.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Entropy Device".  The bytes are SHAKE256 of a seed
and a count, so that in virtual time two runs are the same run.

Invariants: no two requests get the same bytes, resets and reboots included; a clone gets others
than its origin, once it has been given its own seed.
"""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Final

from understudy.devices.virtio.pci import VirtioPci, VirtioState
from understudy.devices.virtio.queue import Chain, length
from understudy.devices.wires import Wires
from understudy.state import U64

KIND: Final = 4
CLASS: Final = 0xFF0000  # no class that PCI knows
QUEUE_SIZE: Final = 64
MOST: Final = 1 << 16  # bytes that one request gets; a driver may find fewer than it asked for
SEED_BYTES: Final = 32
FIRST: Final = hashlib.sha256(b"understudy entropy").digest()
"""The seed of a VM whose runs must all be the same."""


def derived(seed: bytes, clone: int) -> bytes:
    """The seed of this clone: the same in every run, and another for each."""
    return hashlib.sha256(seed + clone.to_bytes(8, "little")).digest()


@dataclass
class RngState(VirtioState):
    """Where in its bytes it is."""

    seed: Annotated[bytes, SEED_BYTES] = FIRST
    requests: U64 = 0  # carried out


class Rng(VirtioPci, name="virtio_rng"):
    """One queue, which the device fills."""

    battery = ("seed", "requests")
    state: RngState

    def __init__(self, wires: Wires, *, seed: bytes = FIRST) -> None:
        if not isinstance(seed, bytes) or len(seed) != SEED_BYTES:
            raise ValueError(f"virtio_rng: a seed {seed!r:.40}, expected {SEED_BYTES} bytes")
        super().__init__(wires, KIND, CLASS, (QUEUE_SIZE,))
        self.first = seed
        self.state = self.power_on()

    def power_on(self) -> RngState:
        return self.fresh(RngState, seed=self.first)

    def serve(self, number: int, chain: Chain) -> int:
        s = self.state
        count = min(length(chain.writable), MOST)
        source = s.seed + s.requests.to_bytes(8, "little")
        s.requests = s.requests + 1 & (1 << 64) - 1
        return self.dma.scatter(chain.writable, hashlib.shake_256(source).digest(count))

    def reseed(self, seed: bytes) -> None:
        """This is a copy of the VM that had the seed before: it gets its own."""
        self.state.seed = seed
