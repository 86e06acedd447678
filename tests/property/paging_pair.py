"""Two processors of one guest on the same tables: one edits them while the other uses them.

What: `paging_machine` with a processor to a seat.  Whoever sits there is compared with the oracle:
memory and its history are common, registers and what was invalidated when are each one's own.
Source: SDM 3A, "Propagation of Paging-Structure Changes to Multiple Processors"; Linux,
`native_flush_tlb_multi`.
Invariants checked: those of `paging_machine`, for each processor: one's INVLPG is not the other's,
and after a shootdown neither uses what was.
"""

from dataclasses import dataclass, field

from tests.property.paging_machine import ROOTS, Machine
from tests.property.paging_oracle import Access, Mode, Shape
from understudy.vcpu.loop import Vcpu


@dataclass
class Seat:
    """What is one processor's own."""

    vcpu: Vcpu
    mode: Mode
    root: int
    pdptes: tuple[int, ...]
    all_synced: int
    synced: dict[int, int] = field(default_factory=dict)


class Pair(Machine):
    """Two processors, of which one executes at a time."""

    def __init__(self, paging: str, shape: Shape, pages: list[int], room: int) -> None:
        super().__init__(paging, shape, pages, room, cpus=2)
        oracle = self.oracle
        self.here = 0
        self.seats = [
            Seat(vcpu, oracle.mode, oracle.root, oracle.pdptes, oracle.all_synced)
            for vcpu in self.vm.vcpus
        ]

    def turn(self) -> None:
        """It is the other's turn."""
        oracle, old = self.oracle, self.seats[self.here]
        old.mode, old.root, old.pdptes = oracle.mode, oracle.root, oracle.pdptes
        old.all_synced, old.synced = oracle.all_synced, oracle.synced
        self.here = 1 - self.here
        new = self.seats[self.here]
        oracle.mode, oracle.root, oracle.pdptes = new.mode, new.root, new.pdptes
        oracle.all_synced, oracle.synced = new.all_synced, new.synced
        self.vcpu, self.guest = new.vcpu, new.vcpu.guest

    def shoot_down(self, gva: int) -> None:
        """As a kernel does: invalidate here, then have the other do it."""
        for _ in self.seats:
            self.invlpg(gva)
            self.turn()

    def reload(self) -> None:
        """The same for everything: each loads CR3 again."""
        for _ in self.seats:
            self.load_cr3(self.oracle.root >> 12)
            self.turn()

    def beside(self, access: Access, value: int) -> None:
        """The other processor accesses memory in between."""
        self.turn()
        self.touch(access, value)
        self.turn()

    def same_space(self) -> None:
        """Threads of one process: both use the first root."""
        for _ in self.seats:
            self.load_cr3(ROOTS[0])
            self.turn()
