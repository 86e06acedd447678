"""Frames that move or leave while a page fault is being answered.

What: a page that is a table of its own walk and becomes a copy when the walk sets a flag in it; a
page that is missed, and for which the table that maps it has to go.  Source: none.
Invariants: an access reaches the frame that the p2m names when it is done; what is kept of a walk
is kept only while the tables that it names are in use.
"""

import pytest

from tests.frame_owner import FrameOwner
from tests.property.paging_machine import DATA, FORMATS, WORD
from tests.property.paging_oracle import A, Access, D
from tests.property.small_spaces import FULL, mapped
from understudy.paging import Paging


@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
@pytest.mark.parametrize("write", [False, True])
def test_a_table_that_maps_itself_becomes_a_copy(paging: str, shape_name: str, write: bool) -> None:
    """The accessed flag is set in the copy, and that is what the access must reach."""
    machine, leaf = mapped(paging, shape_name, [0])
    machine.protect(leaf, copy_on_write=True)
    assert not machine.oracle.entry_at(leaf, 0) & (A | D)
    machine.touch(Access(0, write, ac=True), 0)
    assert machine.oracle.entry_at(leaf, 0) & A
    machine.edit(leaf, WORD // machine.shape.entry_bytes, DATA[0] << 12 | FULL, "store")
    machine.touch(Access(0, ac=True), 0)
    machine.close()


@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_a_table_leaves_for_the_page_that_it_maps(paging: str, shape_name: str) -> None:
    """A host without a frame left takes the one that was asked for longest ago."""
    machine, leaf = mapped(paging, shape_name, [*DATA[:3]])

    def exchange(gfn: int) -> None:
        machine.give_back(gfn)
        if gfn == DATA[1] and leaf not in machine.homes:
            machine.take(leaf)

    FrameOwner(machine.allow, exchange).own(machine.vm.memory.p2m)
    for page in range(3):
        machine.touch(Access(page << 12, True, ac=True), 0x5AFE_0000)
    machine.take(DATA[1])
    for page in (1, 2, 0, 1, 2):
        machine.touch(Access(page << 12, True, ac=True), 0x5AFE_0000 | page)
    machine.close()


@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_what_maps_other_frames_stays(paging: str, shape_name: str) -> None:
    """One frame moves: one page is missed."""
    machine, _ = mapped(paging, shape_name, [*DATA[:6]])
    pages = [page << 12 for page in range(6)]
    for gva in pages:
        machine.touch(Access(gva, True, ac=True), 0x5AFE_0000)
    before = machine.vm.pages.fills
    machine.move(DATA[1])
    for gva in pages:
        machine.touch(Access(gva, ac=True), 0x5AFE_0000)
    assert machine.vm.pages.fills == before + (paging != "ept")
    machine.close()
