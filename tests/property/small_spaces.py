"""Address spaces of a few pages, for tests that need to know each table.

What: a guest whose first pages are given frames, one table on each level.  Source: none.
"""

from itertools import pairwise
from typing import Final

from tests.property.paging_machine import FORMATS, ROOTS, TABLES, Machine
from tests.property.paging_oracle import PAE, RW, US, P, Shape

FULL: Final = P | RW | US
PAGES: Final = [0, 0x1000]


def tables_of(shape: Shape) -> list[int]:
    """The frames (gfn) of the tables, from the root down."""
    return [ROOTS[0], *TABLES[2 : 1 + len(shape.shifts)]]


def link(machine: Machine, tables: list[int], flags: dict[int, int] | None = None) -> None:
    """Have the first entry of each name the next one.  `flags`: of tables that have others."""
    for above, below in pairwise(tables):
        own = (flags or {}).get(above, FULL)
        if machine.shape is PAE and above == ROOTS[0]:
            own = P
        machine.edit(above, 0, below << 12 | own, "store")


def mapped(paging: str, shape_name: str, frames: list[int]) -> tuple[Machine, int]:
    """A guest whose first pages are these frames; and the gfn of the table that says so.

    Frame 0 stands for that table itself.
    """
    machine = Machine(paging, FORMATS[shape_name], PAGES, 0)
    tables = tables_of(machine.shape)
    link(machine, tables)
    leaf = tables[-1]
    for index, gfn in enumerate(frames):
        machine.edit(leaf, index, (gfn or leaf) << 12 | FULL, "store")
    machine.load_cr3(ROOTS[0])
    return machine, leaf
