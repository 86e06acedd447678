"""VM generation ID: a number in the guest's memory that is another one in each copy of a VM.

A guest that finds another number than before knows that it is a clone, or that it was put back to
an earlier moment: what must be unique (random numbers above all) it makes anew.

Source: Microsoft, "Virtual Machine Generation ID"; Linux's driver is `vmgenid`.  The number lies in
memory that firmware keeps for itself; where, and which general-purpose event tells of a new one,
is in the ACPI tables.

Not modeled: the number does not change when the guest starts again; the specification lets it.

Invariants: what the memory holds after `install` or `renew` is the number; only `renew` changes
it, and always tells.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final
from uuid import UUID

from understudy.devices import Device
from understudy.devices.wires import Wires

BYTES: Final = 16
FIRST: Final = hashlib.sha256(b"understudy").digest()[:BYTES]
"""That of a VM which is nobody's copy, where every run must be the same."""


def derived(origin: bytes, clone: int) -> bytes:
    """The number of this clone: the same in every run, and another for each."""
    return hashlib.sha256(origin + clone.to_bytes(8, "little")).digest()[:BYTES]


@dataclass
class VmGenIdState:
    """The number."""

    generation: Annotated[bytes, BYTES] = FIRST


class VmGenId(Device, name="vmgenid"):
    """The number at `gpa`.  `notify` is called when it has changed."""

    battery = ("generation",)
    state: VmGenIdState

    def __init__(
        self,
        wires: Wires,
        *,
        gpa: int = 0,
        generation: bytes = FIRST,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(wires)
        if len(generation) != BYTES:
            raise ValueError(f"a generation of {len(generation)} bytes: expected {BYTES}")
        self.gpa, self.first, self.notify = gpa, generation, notify
        self.state = self.power_on()

    def power_on(self) -> VmGenIdState:
        return VmGenIdState(self.first)

    def install(self) -> None:
        """Put the number where the tables say that it is."""
        self.wires.dma.write(self.gpa, self.state.generation)

    def renew(self, generation: bytes) -> None:
        """This is a copy of the VM that had the number before: it gets its own, and is told."""
        if len(generation) != BYTES:
            raise ValueError(f"a generation of {len(generation)} bytes: expected {BYTES}")
        self.state.generation = generation
        self.install()
        self.notify()

    def inspect(self) -> dict[str, Any]:
        return {"generation": str(UUID(bytes_le=self.state.generation)), "gpa": f"{self.gpa:#x}"}
