"""A broken rule in a paging technique is found: the state machine of `test_paging` can fail.

What: one mutation for each rule, of the kind that such code has had elsewhere.  Source: none.
Invariant: each mutation is caught within the steps that the quick run takes; without one, the
same steps find nothing (`test_paging`).
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.property.test_paging import check
from understudy.execution.vmx.technique import Vmx
from understudy.paging import guest_walk, shadow_pages, vtlb
from understudy.paging.eager import Eager
from understudy.paging.ept import Ept
from understudy.paging.guest_tables import GuestTables
from understudy.paging.lazy import Lazy
from understudy.paging.mirror import Mirror
from understudy.paging.reverse_map import ReverseMap
from understudy.paging.shadow_pages import ShadowPages
from understudy.paging.view import ShadowView
from understudy.paging.vtlb import Vtlb, VtlbView

Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]


def nothing(*_args: Any, **_more: Any) -> None:
    """Instead of what should be done."""


def tells_nobody(patch: Patch, name: str) -> None:
    """A method of a virtual TLB changes its tables, and not what the processor has read of them."""
    plain = getattr(VtlbView, name)

    def quiet(self: Any, what: Any) -> None:
        self.guest.invalidate = nothing
        plain(self, what)
        del self.guest.invalidate

    patch.setattr(VtlbView, name, quiet)


def missed_invlpg(patch: Patch) -> None:
    """INVLPG leaves the entry where it is."""
    patch.setattr(VtlbView, "invlpg", lambda self, gva: self.guest.invalidate())


def missed_invlpg_of_a_large_page(patch: Patch) -> None:
    """INVLPG drops the piece that it names and not the rest of the guest's large page."""
    patch.setattr(VtlbView, "_drop_large", nothing)


def missed_cr3(patch: Patch) -> None:
    """A load of CR3 keeps what was cached."""
    patch.setattr(VtlbView, "cr3_write", lambda self: self.read_regime())


def processor_not_told(patch: Patch) -> None:
    """The tables change, but the processor keeps what it had read of them."""
    patch.setattr(Mirror, "settle", nothing)


def pages_not_told(patch: Patch) -> None:
    """Single pages change, but the processor keeps what it had read of their entries."""
    plain = Vmx.forget

    def forget(self: Vmx, addresses: Any) -> None:
        if addresses is None:
            plain(self, addresses)

    patch.setattr(Vmx, "forget", forget)


def told_of_one_way_only(patch: Patch) -> None:
    """Of an entry to which several addresses lead, the processor forgets one."""
    plain = ShadowPages.addresses

    def addresses(self: ShadowPages, slot: int, root: Any) -> list[int] | None:
        return (plain(self, slot, root) or [])[:1]

    patch.setattr(ShadowPages, "addresses", addresses)


def demotion_not_applied(patch: Patch) -> None:
    """An entry that is still there is left as it was, whatever it allows now."""
    plain = Mirror.resync

    def resync(self: Mirror, page: Any, index: int) -> None:
        entry = self._guest_entry(page, index)
        if not entry & 1 or not self.read_u64(page.hpa + 8 * index):
            plain(self, page, index)

    patch.setattr(Mirror, "resync", resync)


def given_to_programs_and_not_told(patch: Patch) -> None:
    """A page becomes a program's; what SMEP and SMAP refuse then, the processor still does."""
    plain = shadow_pages._allows_less

    def allows_less(old: int, new: int) -> bool:
        return plain(old, new if old & guest_walk.USER else new & ~guest_walk.USER)

    patch.setattr(shadow_pages, "_allows_less", allows_less)


def forgotten_dirty_flag(patch: Patch) -> None:
    """A page may be written before the guest's entry is dirty."""
    plain = ShadowPages.map

    def map(self: ShadowPages, slot: int, gfn: int, guest: int, is_large: bool = False) -> None:
        plain(self, slot, gfn, guest | guest_walk.DIRTY, is_large)

    patch.setattr(ShadowPages, "map", map)


def forgotten_dirty_flag_in_a_cache(patch: Patch) -> None:
    """The same where entries stand alone."""
    plain = vtlb.page_entry

    def entry(hpa: int, found: Any, error: int, *, may_write: bool) -> int:
        return plain(hpa, found, error | guest_walk.E_WRITE, may_write=may_write)

    patch.setattr(vtlb, "page_entry", entry)


def forgotten_accessed_flag(patch: Patch) -> None:
    """A hidden fault fills the shadow and leaves the guest's entries alone."""
    patch.setattr(GuestTables, "mark", nothing)


def untraced_table(patch: Patch) -> None:
    """A table that gets a shadow can still be written unseen."""
    patch.setattr(ShadowPages, "protect", nothing)


def stale_large_page(patch: Patch) -> None:
    """A table comes to lie in a large page, which stays writable as a whole."""
    plain = ShadowPages.protect

    def protect(self: ShadowPages, gfn: int) -> None:
        large, self.reverse._large = self.reverse._large, {}
        plain(self, gfn)
        self.reverse._large = large

    patch.setattr(ShadowPages, "protect", protect)


def upper_level_not_applied(patch: Patch) -> None:
    """Only entries of the last level follow the guest's writes."""
    plain = Mirror.resync

    def resync(self: Mirror, page: Any, index: int) -> None:
        if page.level == 1:
            plain(self, page, index)

    patch.setattr(Mirror, "resync", resync)


def half_of_an_ia32_table(patch: Patch) -> None:
    """Both shadows of an IA-32 table are taken for its first half."""
    plain = Mirror._guest_entry

    def guest_entry(self: Mirror, page: Any, index: int) -> int:
        if page.role.entry_bytes == 4 and page.level == 1:
            return self.read_entry((page.gfn << 12) + 4 * index, 4)
        return plain(self, page, index)

    patch.setattr(Mirror, "_guest_entry", guest_entry)


def no_synchronization(patch: Patch) -> None:
    """The shadows do not catch up."""
    patch.setattr(Lazy, "synchronize", nothing)


def changed_and_changed_back(patch: Patch) -> None:
    """An entry that was used while it was different is not looked at again."""
    patch.setattr(Lazy, "note_entered", nothing)


def not_protected_again(patch: Patch) -> None:
    """A table that was written once is never traced again."""
    plain = Lazy.synchronize

    def synchronize(self: Lazy) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(ShadowPages, "protect", nothing)
            plain(self)

    patch.setattr(Lazy, "synchronize", synchronize)


def moved_frame(patch: Patch) -> None:
    """The p2m changes and the tables do not."""
    for technique in (Vtlb, Mirror):
        patch.setattr(technique, "p2m_change", nothing)


def moved_large_page(patch: Patch) -> None:
    """A frame moves, and the large page that it was in stays."""
    patch.setattr(ReverseMap, "large", lambda self, gfn: frozenset())
    patch.setattr(ReverseMap, "add_large", nothing)


def moved_and_not_told(patch: Patch) -> None:
    """A frame moves, but the processor keeps what it had read of the entries that went."""
    tells_nobody(patch, "p2m_change")


def written_while_protected(patch: Patch) -> None:
    """The hypervisor sets the guest's flags in a frame that it has write-protected."""

    def set_entry(self: GuestTables, at: int, entry: int, size: int) -> None:
        put = self.write_u64 if size == 8 else self.write_u32
        put(self.look_up(at >> 12) + (at & 0xFFF), entry)

    patch.setattr(GuestTables, "_set_entry", set_entry)


def step_without_end(patch: Patch) -> None:
    """What one instruction was let through for stays open."""
    patch.setattr(ShadowView, "put_back", lambda self: self.patched.clear())


def smep_forgotten(patch: Patch) -> None:
    """A supervisor's fetch from a user page is believed to be allowed."""
    plain = guest_walk.Regime.__init__

    def init(self: Any, *values: Any) -> None:
        plain(self, *values)
        self.smep = False

    patch.setattr(guest_walk.Regime, "__init__", init)


def ept_not_invalidated(patch: Patch) -> None:
    """The EPT changes, but the processor keeps what it had read of it."""
    patch.setattr(Ept, "invalidate", nothing)


def evicted_and_not_told(patch: Patch) -> None:
    """Tables are evicted and used again, but the processor keeps what it had read of them."""
    tells_nobody(patch, "evict")


def evicted_and_remembered(patch: Patch) -> None:
    """What is remembered of a walk still names a table that was evicted."""
    plain = VtlbView.evict

    def evict(self: Any, target: int) -> None:
        kept = dict(self.regions)
        plain(self, target)
        self.regions.update(kept)

    patch.setattr(VtlbView, "evict", evict)


def accessed_flag_kept(patch: Patch) -> None:
    """The guest clears a flag, and the entry that stood for it stays usable."""
    plain = Eager.table_written

    def table_written(self: Eager, gpa: int, length: int) -> None:
        size = self.views[0].role.entry_bytes
        entry = self.read_entry(gpa & -size, size)
        if entry & 1 and not entry & guest_walk.ACCESSED:
            return
        plain(self, gpa, length)

    patch.setattr(Eager, "table_written", table_written)


ANY_FORMAT = ("IA-32", "PAE", "Intel 64")
ROWS: list[tuple[Mutation, str, tuple[str, ...]]] = [
    (missed_invlpg, "vtlb", ANY_FORMAT),
    (missed_invlpg_of_a_large_page, "vtlb", ("IA-32",)),
    (missed_cr3, "vtlb", ANY_FORMAT),
    (forgotten_dirty_flag_in_a_cache, "vtlb", ANY_FORMAT),
    (forgotten_accessed_flag, "vtlb", ANY_FORMAT),
    (moved_frame, "vtlb", ANY_FORMAT),
    (moved_large_page, "vtlb", ("PAE", "Intel 64")),
    (moved_large_page, "lazy", ("Intel 64",)),
    (moved_and_not_told, "vtlb", ANY_FORMAT),
    (written_while_protected, "vtlb", ("Intel 64",)),
    (step_without_end, "vtlb", ("Intel 64",)),
    (smep_forgotten, "vtlb", ("Intel 64",)),
    (processor_not_told, "eager", ANY_FORMAT),
    (pages_not_told, "eager", ANY_FORMAT),
    (pages_not_told, "lazy", ANY_FORMAT),
    (pages_not_told, "vtlb", ANY_FORMAT),
    (told_of_one_way_only, "eager", ("PAE", "Intel 64")),
    (demotion_not_applied, "eager", ANY_FORMAT),
    (given_to_programs_and_not_told, "eager", ("Intel 64",)),
    (forgotten_dirty_flag, "eager", ANY_FORMAT),
    (untraced_table, "eager", ANY_FORMAT),
    (stale_large_page, "eager", ("PAE", "Intel 64")),
    (upper_level_not_applied, "eager", ANY_FORMAT),
    (half_of_an_ia32_table, "eager", ("IA-32",)),
    (accessed_flag_kept, "eager", ANY_FORMAT),
    (moved_frame, "eager", ANY_FORMAT),
    (no_synchronization, "lazy", ANY_FORMAT),
    (changed_and_changed_back, "lazy", ("Intel 64",)),
    (not_protected_again, "lazy", ("PAE",)),
    (demotion_not_applied, "lazy", ("Intel 64",)),
    (evicted_and_not_told, "vtlb", ("IA-32",)),
    (evicted_and_remembered, "vtlb", ("Intel 64",)),
    (ept_not_invalidated, "ept", ("Intel 64",)),
]


RARE = {
    missed_invlpg_of_a_large_page, stale_large_page, changed_and_changed_back,
    evicted_and_not_told, given_to_programs_and_not_told,
}  # fmt: skip
"""What only comes about after thousands of steps (the last two: tests/walls/test_eviction.py and
test_pages_given_to_programs.py have them directly)."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("mutation", "paging", "shape"),
    [
        pytest.param(
            mutation, paging, shape, id=f"{mutation.__name__}-{paging}-{shape}",
            marks=[pytest.mark.slow] if mutation in RARE else [],
        )
        for mutation, paging, shapes in ROWS
        for shape in shapes
    ],
)  # fmt: skip
def test_a_broken_rule_is_found(
    mutation: Mutation, paging: str, shape: str, monkeypatch: Patch
) -> None:
    mutation(monkeypatch)
    with pytest.raises(Exception) as caught:
        check(paging, shape, 80_000)  # it ends where it is found
    assert not isinstance(caught.value, AttributeError | NameError), caught.value
