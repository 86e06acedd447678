"""How a host deals with more memory than it has: what its user may choose.

Source: ours; the thresholds, the tax and the samples are Waldspurger's, see `plan`, `working_set`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from understudy.clock import NS_PER_SECOND
from understudy.overcommit import plan as plans
from understudy.overcommit import victims as policies
from understudy.overcommit.plan import PlanError
from understudy.quantities import bytes_of

SCAN: Final = 5000  # guest frames a second of host time: some per cent of a processor's time
READ_NS: Final = 100_000  # of virtual time: what a disk without moving parts takes


@dataclass(frozen=True)
class Terms:
    """The choices for one host."""

    is_always: bool = False
    """Also while all of its VMs fit into its RAM; else from the first one on that does not."""
    plan: plans.Wish = "idle_tax"
    """Who gets how much."""
    scan: int = SCAN
    """Guest frames a second of host time that are looked at to be shared; 0: nothing is shared."""
    looks_up: bool = True
    """Whether a frame is looked up, to be shared, before it is swapped out."""
    balloons: bool = True
    """Whether guests that have a balloon are asked first."""
    swap: int | str | None = None
    """Bytes of the swap file, at most; None: as many as its VMs may need."""
    victims: policies.Wish = "random"
    """Which frame of a VM is swapped out next."""
    read_ns: int = READ_NS
    """Virtual time in which a page is read from the swap file: who misses it waits, others go on.

    In real time it takes what it takes; others go on there, too."""
    folder: Path | None = None
    """Where the swap file is, which has no name there; None: where temporary files are."""

    def __post_init__(self) -> None:
        if type(self.scan) is not int or self.scan < 0:
            raise PlanError(f"scan={self.scan!r}: expected pages a second, 0 for none")
        if type(self.read_ns) is not int or not 0 <= self.read_ns <= NS_PER_SECOND:
            raise PlanError(f"read_ns={self.read_ns!r}: expected 0 to {NS_PER_SECOND} ns")
        if self.swap is not None and bytes_of(self.swap) < 0:
            raise PlanError(f"swap={self.swap!r}: expected bytes, 0 for none")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise PlanError(f"folder={str(self.folder)!r}: expected a folder for the swap file")
        plans.plan_of(self.plan)
        policies.victims_of(self.victims)
