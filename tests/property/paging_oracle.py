"""What a processor may do with an access, by the manual alone: the oracle of `test_paging`.

Source: SDM 3A, "Paging", "Caching Translation Information".  It shares no code with the walker
that it judges.

Each entry of the guest's tables has a history.  A translation may use, at each level, the value
that the entry has now or any that it has had since the guest last invalidated the address: that is
what TLBs and paging-structure caches amount to.

Invariant: the set of outcomes of an access is empty for no access.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

P, RW, US, A, D, PS, G = (1 << n for n in (0, 1, 2, 5, 6, 7, 8))
NX = 1 << 63
FLAGS = A | D
KEY_SHIFT = 59
W_, U_, I_, K_ = 2, 4, 16, 32  # of the error code
RESERVED_HIGH = ((1 << 52) - 1) & ~((1 << 46) - 1)


class Shape(NamedTuple):
    """A paging format, as the manual's figures draw it: shifts from the root."""

    name: str
    entry_bytes: int
    shifts: tuple[int, ...]
    large: tuple[int, ...]


IA32 = Shape("IA-32", 4, (22, 12), (22,))
PAE = Shape("PAE", 8, (30, 21, 12), (21,))
INTEL64 = Shape("Intel 64", 8, (39, 30, 21, 12), (30, 21))


class Access(NamedTuple):
    """One access of a program."""

    gva: int
    write: bool = False
    fetch: bool = False
    user: bool = False
    ac: bool = False


class Outcome(NamedTuple):
    """A page fault (`error`), or the byte that is reached; and the entries used on the way."""

    error: int | None
    gpa: int = -1
    shift: int = 0
    path: tuple[int, ...] = ()


@dataclass
class Mode:
    """Switches that decide what an access may do."""

    wp: bool = True
    nxe: bool = True
    smep: bool = False
    smap: bool = False
    pkru: int | None = None  # None: no protection keys


@dataclass
class Oracle:
    """The guest's tables, as they are and as they were."""

    shape: Shape
    memory: dict[int, bytearray] = field(default_factory=dict)  # gfn -> its bytes
    mode: Mode = field(default_factory=Mode)
    root: int = 0
    pdptes: tuple[int, ...] = ()
    now: int = 0
    history: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # gpa -> (when, was)
    synced: dict[int, int] = field(default_factory=dict)  # gva page -> when
    all_synced: int = 0

    # --- the guest's tables ---

    def entry(self, gpa: int) -> int:
        at, size = gpa & 0xFFF, self.shape.entry_bytes
        return int.from_bytes(self.memory[gpa >> 12][at : at + size], "little")

    def entry_at(self, gfn: int, index: int) -> int:
        """By table and index."""
        return self.entry((gfn << 12) + index * self.shape.entry_bytes)

    def write(self, gpa: int, data: bytes) -> None:
        """A store; what the entries were is remembered."""
        size = self.shape.entry_bytes
        self.now += 1
        for at in range(gpa & -size, gpa + len(data), size):
            self.history.setdefault(at, []).append((self.now, self.entry(at)))
        self.memory[gpa >> 12][gpa & 0xFFF : (gpa & 0xFFF) + len(data)] = data

    def set_flags(self, gpa: int, flags: int) -> None:
        """The processor's own writes to an entry."""
        at, size = gpa & 0xFFF, self.shape.entry_bytes
        value = (self.entry(gpa) | flags).to_bytes(size, "little")
        self.memory[gpa >> 12][at : at + size] = value

    def sync(self, gva: int) -> None:
        """The guest invalidates one page (what it has been is forgotten for its address)."""
        self.now += 1
        self.synced[gva >> 12] = self.now

    def sync_all(self) -> None:
        """The guest invalidates everything."""
        self.now += 1
        self.all_synced = self.now

    def since(self, gva: int) -> int:
        return max(self.all_synced, self.synced.get(gva >> 12, 0))

    def values(self, gpa: int, since: int) -> list[int]:
        """What an entry is, and what it was since then; the flags A and D do not matter."""
        found = [self.entry(gpa) & ~FLAGS]
        for when, was in self.history.get(gpa, ()):
            if when > since and was & ~FLAGS not in found:
                found.append(was & ~FLAGS)
        return found

    def is_settled(self, path: tuple[int, ...], gva: int) -> bool:
        """No entry of the path was written since the guest invalidated the address."""
        since = self.since(gva)
        return all(when <= since for gpa in path for when, _ in self.history.get(gpa, ())[-1:])

    # --- outcomes ---

    def outcomes(self, access: Access, *, fresh: bool = False) -> set[Outcome]:
        """All that the processor may do; with `fresh`, what it does if it has cached nothing."""
        since = self.now if fresh else self.since(access.gva)
        return set(self._walk(access, since, 0, self.root, True, True, True, ()))

    def fresh(self, access: Access) -> Outcome:
        (outcome,) = self.outcomes(access, fresh=True)
        return outcome

    def code(self, access: Access) -> int:
        fetch = access.fetch and (self._nx or self.mode.smep)
        return access.write * W_ | access.user * U_ | fetch * I_

    @property
    def _nx(self) -> bool:
        return self.mode.nxe and self.shape.entry_bytes == 8

    def _walk(
        self, access: Access, since: int, depth: int, table: int,
        user: bool, write: bool, execute: bool, path: tuple[int, ...],
    ) -> Iterator[Outcome]:  # fmt: skip
        shape, gva = self.shape, access.gva
        shift = shape.shifts[depth]
        width = 2 if shape is PAE and depth == 0 else 10 if shape is IA32 else 9
        index = gva >> shift & (1 << width) - 1
        at = table + index * shape.entry_bytes
        if shape is PAE and depth == 0:
            pdpte = self.pdptes[index]
            if not pdpte & P:
                yield Outcome(self.code(access))
                return
            yield from self._walk(access, since, 1, pdpte & -4096, user, write, execute, path)
            return
        for entry in self.values(at, since):
            if not entry & P:
                yield Outcome(self.code(access), path=path)
                continue
            is_page = shift == 12 or (shift in shape.large and bool(entry & PS))
            if self._is_reserved(entry, shift, is_page):
                yield Outcome(self.code(access) | 9, path=path)
                continue
            u, w = user and bool(entry & US), write and bool(entry & RW)
            x = execute and not (self._nx and entry & NX)
            if not is_page:
                below = entry & (0xFFFFF000 if shape is IA32 else 0x3FFF_FFFF_F000)
                if below >> 12 in self.memory:
                    yield from self._walk(access, since, depth + 1, below, u, w, x, (*path, at))
                else:
                    yield Outcome(self.code(access), path=(*path, at))  # a table that is no RAM
                continue
            key = K_ if self._key_refuses(access, entry, u) else 0
            if key or self._refuses(access, u, w, x):
                yield Outcome(self.code(access) | 1 | key, path=path)
                continue
            frame = self._frame(entry, shift)
            yield Outcome(None, frame | gva & (1 << shift) - 1, shift, (*path, at))

    def _is_reserved(self, entry: int, shift: int, is_page: bool) -> bool:
        if self.shape is IA32:
            return is_page and shift == 22 and bool(entry & 1 << 21)
        high = RESERVED_HIGH | (0 if self.shape is INTEL64 else 0x7FF << 52)
        if entry & high or (entry & NX and not self.mode.nxe):
            return True
        if shift == 39 and entry & PS:
            return True
        return is_page and shift > 12 and bool(entry & ((1 << shift) - 1) & ~0x1FFF)

    def _refuses(self, access: Access, user: bool, write: bool, execute: bool) -> bool:
        mode = self.mode
        if access.user:
            return not user or (access.write and not write) or (access.fetch and not execute)
        if access.fetch:
            return not execute or (mode.smep and user)
        if user and mode.smap and not access.ac:
            return True
        return access.write and not write and mode.wp

    def _key_refuses(self, access: Access, entry: int, user: bool) -> bool:
        mode = self.mode
        if mode.pkru is None or self.shape is not INTEL64 or not user or access.fetch:
            return False
        rights = mode.pkru >> 2 * (entry >> KEY_SHIFT & 15) & 3
        heeds = access.user or mode.wp
        return bool(rights & 1 or (rights & 2 and access.write and heeds))

    def _frame(self, entry: int, shift: int) -> int:
        if self.shape is IA32:
            if shift == 22:
                return entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32
            return entry & 0xFFFF_F000
        return entry & 0x3FFF_FFFF_F000 & -(1 << shift)
