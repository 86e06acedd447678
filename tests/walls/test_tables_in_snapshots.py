"""Shadow tables in a snapshot: which guest frame an entry stands for, and what is refused.

What: two guest frames that have one host frame, saved and restored under each technique; images
that were made up, by which a guest would get frames of the host.  Source: none.
Invariants: an entry stands for the frame that the guest's tables name; tables that are restored
are tables, and lead to frames of the guest alone.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.property.paging_machine import DATA, Machine
from tests.property.paging_oracle import Access
from tests.property.small_spaces import mapped
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.words import Flag
from understudy.paging import Paging
from understudy.paging.portable import ENTRY
from understudy.vm import VM

Saved = dict[str, Any]


def used(paging: str) -> Machine:
    """A guest that has used three pages."""
    machine, _ = mapped(paging, "Intel 64", [*DATA[:3]])
    for page in range(3):
        machine.touch(Access(page << 12, ac=True), 0)
    machine.vcpu.leave_guest()
    return machine


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_two_guest_frames_on_one_host_frame_are_two(paging: str) -> None:
    machine = used(paging)
    p2m, host = machine.vm.memory.p2m, machine.vm.host
    machine.vm.memory.write(DATA[1] << 12, machine.vm.memory.read(DATA[0] << 12, 4096))
    p2m.owners[Flag.SHARED] = CopyOnWrite(host)
    one, other = p2m.lookup(DATA[0]), p2m.lookup(DATA[1])
    assert one is not None and other is not None
    p2m.protect(DATA[0], 1, Flag.SHARED)
    host.frames.share(one, 1)
    p2m.map(DATA[1], one, 1, Flag.SHARED)
    host.frames.free(other, 1)
    for page in (1, 0):
        machine.gadget("load", rdi=page << 12 | 8, ac=True)
    machine.vcpu.leave_guest()
    with VM.restore(machine.vm.save()) as copy:
        copy.memory.write(DATA[0] << 12, b"the first one alone")
        pages: Any = copy.pages
        if paging == "vtlb":
            maps = [copy.vcpus[0].view.reverse]  # type: ignore[attr-defined]
        else:
            maps = [] if paging == "ept" else [pages.tables.reverse]
        for reverse in maps:
            found = {gfn: slot for slot, gfn in reverse._small_of.items() if gfn in DATA[:2]}
            assert found.keys() == {*DATA[:2]}
            for gfn, slot in found.items():
                assert copy.host.memory.read_u64(slot) >> 12 & 0xFFFFF == copy.memory.p2m.lookup(
                    gfn
                )
    machine.close()


def _small_page_in_a_directory(saved: Saved) -> None:
    view = saved["tables"]["views"][0]
    view["directories"] = [[0, ENTRY.pack(5, 0x400 << 12 | 0x67).hex()]]


def _large_page_in_a_leaf(saved: Saved) -> None:
    view = saved["tables"]["views"][0]
    view["leaves"] = [[0, ENTRY.pack(5, 0x400 << 12 | 0xE7).hex()]]


def _no_address(saved: Saved) -> None:
    saved["tables"]["views"][0]["leaves"] = [[1 << 40, ""]]


def _two_tables(saved: Saved) -> None:
    saved["tables"]["views"][0]["leaves"] = [[0, ""], [0, ""]]


def _lent_beyond(saved: Saved) -> None:
    name = [0, 0] if "views" in saved["tables"] else saved["tables"]["in_use"][0]
    saved["steps"][0] = {"lent": [[name, 5000, 6]], "is_watched": True}


def _entered_beyond(saved: Saved) -> None:
    saved["tables"]["entered"] = [[*saved["tables"]["in_use"][0], -5000]]


def _table_that_is_a_page(saved: Saved) -> None:
    for page in saved["tables"]["pages"]:
        for link in page[-1]:
            link[2] |= 1 << 7


ROWS: list[tuple[str, Callable[[Saved], None], str]] = [
    ("vtlb", _small_page_in_a_directory, "small page in a directory"),
    ("vtlb", _large_page_in_a_leaf, "large page in a table"),
    ("vtlb", _no_address, "no address"),
    ("vtlb", _two_tables, "two tables"),
    ("vtlb", _lent_beyond, "expected 9 bits"),
    ("eager", _lent_beyond, "expected 9 bits"),
    ("lazy", _entered_beyond, "expected 9 bits"),
    ("eager", _table_that_is_a_page, "names no table"),
    ("lazy", _table_that_is_a_page, "names no table"),
]


@pytest.mark.parametrize(("paging", "spoil", "words"), ROWS)
def test_what_was_made_up_is_refused(
    paging: str, spoil: Callable[[Saved], None], words: str
) -> None:
    machine = used(paging)
    pages: Any = machine.vm.pages
    saved = pages.save()
    spoil(saved)
    with pytest.raises(ValueError, match=words):
        pages.load(saved)
    machine.close()
