"""The guest's tables change while an instruction has been lent rights, and around large pages.

What: a device writes the entry of a page whose write is let through, or a large page takes the
place of its table; a large page in pieces and INVLPG; tables that leave while they are compared.
Source: SDM 3A, "Caching Translation Information".
Invariants: what was lent does not come back over what is new; INVLPG leaves nothing of its page.
"""

from typing import Any

import pytest

from tests.frame_owner import FrameOwner
from tests.property.paging_machine import DATA, FORMATS, PLACES, ROOTS, TABLES, WORD, Machine
from tests.property.paging_oracle import PAE, PS, RW, US, A, Access, D, Mode, P
from tests.property.small_spaces import FULL, mapped, tables_of
from understudy.paging import Paging
from understudy.vcpu.activity import Goal

SHADOWS = sorted(set(Paging.ALL) - {"ept"})
READ_ONLY = P | US | A | D


def lending(paging: str, *pages: int) -> tuple[Machine, int, Any]:
    """A guest without CR0.WP whose pages are read-only, and in the middle of a store to them."""
    machine, leaf = mapped(paging, "Intel 64", [*pages])
    machine.set_mode(Mode(wp=False))
    for index, gfn in enumerate(pages):
        machine.edit(leaf, index, gfn << 12 | READ_ONLY, "store")
    machine.load_cr3(ROOTS[0])
    view: Any = machine.vcpu.view
    at = 0xFFE if len(pages) > 1 else 8
    machine.begin(machine.kernel_code + PLACES["store"], rdi=at, eax=0x77, ac=True)
    machine.vcpu.run(Goal(None, lambda: bool(view.patched)))
    assert view.patched
    return machine, leaf, view


@pytest.mark.parametrize("paging", SHADOWS)
def test_an_entry_that_a_device_writes_is_not_put_back(paging: str) -> None:
    machine, leaf, _ = lending(paging, DATA[0])
    entry = DATA[1] << 12 | P | RW | US | A | D
    machine.vm.memory.write(leaf << 12, entry.to_bytes(8, "little"))
    machine.finish()
    machine.must("invlpg", rdi=0)
    old = machine.vm.memory.p2m.lookup(DATA[0])
    assert old is not None
    machine.take(DATA[0])
    machine.vm.host.memory.write(old << 12, b"\xee" * 4096)  # it is another's now
    expected = int.from_bytes(machine.real(DATA[1])[8:12], "little")
    assert machine.gadget("load", rdi=8, ac=True).eax == expected
    machine.close()


def test_nothing_is_lent_in_a_table_that_is_free() -> None:
    machine, _, view = lending("vtlb", DATA[0], DATA[1])
    entry = 0x400 << 12 | FULL | PS | A | D
    machine.vm.memory.write(TABLES[3] << 12, entry.to_bytes(8, "little"))
    exits = iter(range(8))
    machine.vcpu.run(Goal(None, lambda: next(exits, None) is None))
    free = set(machine.vm.pages.pool)  # type: ignore[attr-defined]
    assert not [slot for slot, _ in view.patched if slot & -4096 in free]
    assert view.lent.keys() == {slot for slot, _ in view.patched}
    machine.close()


@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_invlpg_leaves_nothing_of_a_large_page_that_was_split(paging: str, shape_name: str) -> None:
    """Another of its pages was used since, so that its table has taken the large page's place."""
    machine, leaf = mapped(paging, shape_name, [*DATA[:2]])
    shape = machine.shape
    above = tables_of(shape)[-2]
    assert shape is not PAE or above != ROOTS[0]
    machine.edit(above, 0, 0x400 << 12 | FULL | PS, "store")
    machine.load_cr3(ROOTS[0])
    for gva in (0x1000, 0):
        machine.touch(Access(gva, ac=True), 0)
    machine.edit(above, 0, leaf << 12 | FULL, "store")
    machine.touch(Access(0, True, ac=True), 0x1234)
    machine.must("invlpg", rdi=0x1000)
    expected = int.from_bytes(machine.real(DATA[1])[8:12], "little")
    assert machine.gadget("load", rdi=0x1008, ac=True).eax == expected
    machine.close()


@pytest.mark.parametrize("paging", ["eager", "lazy"])
def test_a_table_leaves_for_the_one_that_is_compared(paging: str) -> None:
    """Its shadow goes with it, and so does the one below, which was just being looked at."""
    machine, leaf = mapped(paging, "Intel 64", [*DATA[:3]])
    upper = TABLES[3]
    machine.touch(Access(0, True, ac=True), 0x5AFE_0000)
    machine.edit(leaf, 7, 0x300 << 12, "store")
    machine.touch(Access(0x1000, True, ac=True), 0x5AFE_0000)
    machine.vcpu.leave_guest()
    pages: Any = machine.vm.pages

    def exchange(gfn: int) -> None:
        machine.give_back(gfn)
        if gfn == leaf and upper not in machine.homes:
            machine.take(upper)

    FrameOwner(machine.allow, exchange).own(machine.vm.memory.p2m)
    machine.take(leaf)
    pages.unwatched.begin_turn(5, is_seen=False)
    pages.unwatched.end()
    if paging == "lazy":
        pages.unsync.clear()  # as if the write had been elsewhere
        pages.entered = {one for one in pages.entered if one[0].gfn == leaf}
    for gfn in (leaf, DATA[0], DATA[1]):
        machine.take(gfn)
    pages.synchronize()
    pages.settle()
    assert all(slot & -4096 in pages.tables.at for slot in pages.tables.reverse._small_of)
    machine.must("invlpg", rdi=0)
    machine.touch(Access(0, True, ac=True), 0x5AFE_0002)
    machine.close()


@pytest.mark.parametrize("shape_name", FORMATS)
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_a_table_of_the_walk_itself_is_written_where_nothing_may_be(
    paging: str, shape_name: str
) -> None:
    """It becomes a traced one only when the walk is entered, and CR0.WP lets the write through."""
    machine, leaf = mapped(paging, shape_name, [])
    shape = machine.shape
    above = tables_of(shape)[-2]
    index = WORD // shape.entry_bytes
    gva = index << shape.shifts[-2]
    machine.edit(above, index, leaf << 12 | FULL, "store")
    machine.edit(leaf, 0, above << 12 | P, "store")
    machine.set_mode(Mode(wp=False, nxe=machine.oracle.mode.nxe))
    machine.load_cr3(ROOTS[0])
    machine.touch(Access(gva, True, ac=True), 0x5AFE_0000)
    assert machine.oracle.fresh(Access(gva, ac=True)).error is not None
    machine.must("invlpg", rdi=gva)
    machine.oracle.sync(gva)
    machine.touch(Access(gva, ac=True), 0)
    machine.close()
