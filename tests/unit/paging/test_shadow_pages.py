"""Shadow pages: which linear addresses a processor must forget when an entry changes."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.fakes import fake_machine
from understudy.machine.host import Host
from understudy.paging.quadrants import DIRECT
from understudy.paging.roles import ROLES
from understudy.paging.shadow_page import ShadowPage
from understudy.paging.shadow_pages import FEW, MOST_PARENTS, MOST_STEPS, ShadowPages

TABLE = 0x27  # present, writable, user, accessed
PAGE = 0x67  # and dirty
HIGH = 0xFFFF_8000_0000_0000


@pytest.fixture
def tables() -> ShadowPages:
    with fake_machine():
        host = Host("64M")
    shadow: Any = SimpleNamespace(
        memory=host.memory, new_table=host.frame, pool=[], forget_regions=lambda: None,
        theirs=SimpleNamespace(here=lambda gfn: gfn + 1 << 12),
        p2m=SimpleNamespace(protected=()), put_back=lambda: None, end_lending=lambda slot: None,
    )  # fmt: skip
    return ShadowPages(shadow, lambda gfn: True)


def lay(tables: ShadowPages, *indices: int, root: int = 0) -> tuple[ShadowPage, list[ShadowPage]]:
    """A way of tables down to the last level: the root, and the tables below it."""
    top = page = tables.page(root, 4, DIRECT, ROLES[0])
    top.is_root = True
    below = []
    for level, index in zip((3, 2, 1), indices, strict=True):
        child = tables.page(level, level, DIRECT, ROLES[0])
        tables.link(page.hpa + 8 * index, child, TABLE)
        below.append(page := child)
    return top, below


def stale(tables: ShadowPages, root: ShadowPage) -> list[int] | None:
    """What a processor that walks from there must forget."""
    slots = tables.take_stale()
    return None if slots is None else tables.pages_at(slots, root)


def test_an_entry_knows_its_addresses(tables: ShadowPages) -> None:
    root, (upper, middle, leaf) = lay(tables, 1, 2, 3)
    first = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12
    assert tables.addresses(leaf.hpa + 8 * 4, root) == [first]
    assert tables.addresses(middle.hpa + 8 * 511, root) == [1 << 39 | 2 << 30 | 511 << 21]
    tables.link(middle.hpa + 8 * 9, leaf, TABLE)
    tables.link(root.hpa + 8 * 256, upper, TABLE)  # the first address that is not low
    assert set(tables.addresses(leaf.hpa + 8 * 4, root) or ()) == {
        first, first + (6 << 21), HIGH | first & (1 << 39) - 1,
        HIGH | first + (6 << 21) & (1 << 39) - 1,
    }  # fmt: skip


def test_what_only_another_root_leads_to_has_no_address(tables: ShadowPages) -> None:
    root, (*_, leaf) = lay(tables, 1, 2, 3)
    lay(tables, 5, 2, 3, root=7)
    empty = tables.page(8, 4, DIRECT, ROLES[0])
    assert tables.addresses(leaf.hpa, root) == [1 << 39 | 2 << 30 | 3 << 21]
    assert tables.addresses(leaf.hpa, tables.page(7, 4, DIRECT, ROLES[0])) == [
        5 << 39 | 2 << 30 | 3 << 21
    ]
    assert tables.addresses(leaf.hpa, empty) == []


def test_a_guest_that_makes_many_ways_is_not_followed(tables: ShadowPages) -> None:
    """512 * 512 * 512 addresses could lead to one entry."""
    root, (upper, middle, leaf) = lay(tables, 0, 0, 0)
    for index in range(MOST_STEPS):
        tables.link(middle.hpa + 8 * index, leaf, TABLE)
    assert tables.addresses(leaf.hpa, root) is None
    for index in range(512):
        tables.link(upper.hpa + 8 * index, middle, TABLE)
    second = tables.page(9, 3, DIRECT, ROLES[0])
    assert tables.addresses(middle.hpa, root) is None
    tables.link(second.hpa, middle, TABLE)
    assert len(middle.parents) == MOST_PARENTS + 1
    assert tables.addresses(middle.hpa, root) is None


def test_few_pages_are_named_and_many_are_not(tables: ShadowPages) -> None:
    root, (*_, middle, leaf) = lay(tables, 0, 0, 0)
    assert stale(tables, root) == []  # all of this is new: no processor keeps any of it
    for count, expected in ((1, True), (FEW, True), (FEW + 1, False)):
        for index in range(count):
            tables.map(leaf.hpa + 8 * index, index, PAGE)
        assert stale(tables, root) == []
        for index in range(count):
            tables.zap(leaf.hpa + 8 * index)
        taken = stale(tables, root)
        assert (sorted(taken) if taken else taken) == (
            [index << 12 for index in range(count)] if expected else None
        )
        assert stale(tables, root) == []
    tables.link(middle.hpa + 8, leaf, TABLE)  # two addresses each
    for index in range(FEW // 2 + 1):
        tables.map(leaf.hpa + 8 * index, index, PAGE)
        tables.map(leaf.hpa + 8 * index, index, PAGE & ~2)  # not writable any more
    assert stale(tables, root) is None


def test_a_table_that_goes_takes_everything_along(tables: ShadowPages) -> None:
    root, (*_, middle, leaf) = lay(tables, 0, 0, 0)
    tables.map(leaf.hpa, 0, PAGE)
    tables.zap(middle.hpa)
    assert leaf.hpa == 0
    assert stale(tables, root) is None
    assert stale(tables, root) == []
