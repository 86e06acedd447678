"""The bit layouts of both halves agree: two people read the same page of the manual."""

import pytest

from understudy.arch.address import TOP
from understudy.arch.bits import Bits
from understudy.arch.cr import CR0, CR4, RFLAGS
from understudy.arch.msr import EFER
from understudy.arch.paging_entry import EptPage
from understudy.arch.vmcs import AccessRights
from understudy.paging import guest_walk as walk

silicon = pytest.importorskip("understudy.silicon", reason="the compiled half is not built")

OURS: dict[str, type[Bits]] = {
    "CR0": CR0,
    "CR4": CR4,
    "EFER": EFER,
    "RFLAGS": RFLAGS,
    "EPT": EptPage,
    "ACCESS_RIGHTS": AccessRights,
}
ONLY_IN_THE_MACHINE = {"RFLAGS": {"IOPL"}}
"""Fields that no decision depends on."""

WIDEST = 52  # SDM 3A, "Paging": no processor's physical addresses have more bits

MANUAL = {
    "PTE": {"P": 0, "RW": 1, "US": 2, "A": 5, "D": 6, "PS": 7, "G": 8, "XD": 63},
    "PF": {"P": 0, "W": 1, "U": 2, "RSVD": 3, "I": 4},
}
"""SDM 3A, "4-Level Paging and 5-Level Paging" and "Page-Fault Exceptions": single bits."""


@pytest.mark.parametrize("name", OURS)
def test_fields_of_the_same_name_are_at_the_same_place(name: str) -> None:
    ours = {field.name: (field.high, field.low) for field in OURS[name].FIELDS}
    theirs = {field: (high, low) for field, high, low in silicon.LAYOUTS[name]}
    if "ADDR" in theirs:  # theirs is the widest there can be, ours ends at MAXPHYADDR
        assert theirs["ADDR"][0] == WIDEST - 1
        theirs["ADDR"] = TOP, theirs["ADDR"][1]
    assert theirs.keys() - ours.keys() == ONLY_IN_THE_MACHINE.get(name, set())
    assert {field: ours[field] for field in theirs.keys() & ours.keys()} == {
        field: theirs[field] for field in theirs.keys() & ours.keys()
    }


@pytest.mark.parametrize("name", MANUAL)
def test_layouts_that_only_the_machine_has_are_the_manuals(name: str) -> None:
    theirs = {field: (high, low) for field, high, low in silicon.LAYOUTS[name]}
    assert theirs == {field: (bit, bit) for field, bit in MANUAL[name].items()}


def test_a_walk_of_the_hypervisor_reads_the_bits_that_the_machine_reads() -> None:
    theirs = {field: 1 << low for field, _, low in silicon.LAYOUTS["PTE"]}
    ours = {"P": walk.PRESENT, "RW": walk.WRITABLE, "US": walk.USER, "A": walk.ACCESSED,
            "D": walk.DIRTY, "PS": walk.LARGE, "XD": walk.NO_EXECUTE}  # fmt: skip
    assert ours == {field: theirs[field] for field in ours}


def test_every_layout_is_compared() -> None:
    assert silicon.LAYOUTS.keys() == OURS.keys() | MANUAL.keys()


@pytest.mark.parametrize("name", sorted(OURS.keys() | MANUAL.keys()))
def test_fields_descend_and_do_not_overlap(name: str) -> None:
    above = 64
    for field, high, low in silicon.LAYOUTS[name]:
        assert above > high >= low >= 0, field
        above = low
