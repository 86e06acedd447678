"""Translations kept on disk: a unit that was made once need not be made again.

A unit's key is all that it was made of: the guest's code, its address, where the window lies, the
kind of time, what the guest's processor has not got, and the translator itself.  So another kernel,
another guest, another version of this program finds only what it would make itself.  The file's own
digest tells what is damaged.

Source: Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization",
for what a translation is; the file's form is ours.
Invariants: a file that is not whole, not ours, or another version's is as if it were not there; of
one that somebody has made up, nothing outside the unit's own bytes is believed: what it leads to
runs as the guest's kernel, with the guest's rights.
"""

import hashlib
from array import array
from collections.abc import Collection, Iterable, Iterator
from functools import cache as once
from importlib.metadata import version
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import Final

from understudy import plain_file
from understudy.arch import address, cr
from understudy.execution.bt import flags, layout, sequences, translate
from understudy.execution.bt.cache import Unit
from understudy.execution.bt.layout import Layout
from understudy.execution.bt.sequences import Code, Link
from understudy.execution.deprivileged import instructions
from understudy.guests.cache import Cache
from understudy.guests.entry import GuestError
from understudy.instructions import operands

MAGIC: Final = b"understudy bt 1\n"
DIGEST: Final = 32
HEAD: Final = Struct("<QHHHHHH")
"""RIP; bytes of the guest's code and of the unit; instructions, copies, links, words that move."""
LINK: Final = Struct("<HHQ")
WORD: Final = 2
KEPT_BYTES: Final = 64 << 20
"""Of one file, and of what one run adds."""
MODULES: Final = (layout, sequences, flags, translate, instructions, operands, address, cr)
"""Those that decide what a unit is."""
VARIANTS_KEPT: Final = 16
"""Units of one address."""


@once
def translator() -> bytes:
    """A digest of what makes units."""
    digest = hashlib.sha256(version("iced-x86").encode())
    for module in MODULES:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.digest()


class Library:
    """The units for one place of the window."""

    def __init__(
        self, where: Layout, *, is_virtual: bool, hidden: Collection[int] = (),
        cache: Cache | None = None,
    ) -> None:  # fmt: skip
        """is_virtual, hidden: as `translate` has them; cache: other than that of guests."""
        self._cache = Cache() if cache is None else cache
        how = repr((where, is_virtual, sorted(hidden)))
        self._key = hashlib.sha256(translator() + how.encode()).digest()
        self.name = f"translations/{self._key.hex()[:16]}"
        self._mask = where.mask
        self._units: dict[int, list[bytes]] = {}  # by RIP
        self._used: dict[bytes, None] = {}  # those of this run, in their order
        self._has_more, self._added = False, 0
        self._add(records(self._body()))

    def _add(self, units: Iterable[tuple[int, bytes]]) -> None:
        for rip, raw in units:
            if len(known := self._units.setdefault(rip, [])) < VARIANTS_KEPT:
                known.append(raw)

    def _body(self) -> bytes:
        """What the file says, if it is to be believed."""
        try:
            raw = plain_file.read(self._cache.root / self.name)
        except OSError:
            return b""
        begin = len(MAGIC) + len(self._key)
        body = raw[begin + DIGEST :]
        is_ours = raw[:begin] == MAGIC + self._key
        return body if is_ours and raw[begin:][:DIGEST] == hashlib.sha256(body).digest() else b""

    def find(self, rip: int, guest: bytes, pc: int) -> tuple[Unit, bytes] | None:
        """The unit of this code, and its translation to be put at `pc`."""
        for raw in self._units.get(rip, ()):
            length = HEAD.unpack_from(raw)[1]
            if guest.startswith(raw[HEAD.size : HEAD.size + length]) and is_sound(raw):
                self._used[raw] = None
                return unpacked(raw, pc, self._mask)
        return None

    def note(self, code: Code, guest: bytes) -> None:
        """One more, if there is room."""
        raw, units = packed(code, guest[: code.seen]), self._units.setdefault(code.starts[0][1], [])
        self._added += len(raw)
        if self._added > KEPT_BYTES or len(units) >= VARIANTS_KEPT:
            return
        units.append(raw)
        self._used[raw] = None
        self._has_more = True

    def save(self) -> None:
        """Keep what there is, this run's first; where that cannot be, the next makes it again."""
        if not self._has_more:
            return
        self._add(records(self._body()))  # another may have saved meanwhile
        kept, size = [], 0
        rest = (raw for units in self._units.values() for raw in units)
        for raw in dict.fromkeys((*self._used, *rest)):
            size += len(raw)
            if size > KEPT_BYTES:
                break
            kept.append(raw)
        body = b"".join(kept)
        try:
            self._cache.write(self.name, MAGIC + self._key + hashlib.sha256(body).digest() + body)
        except GuestError:
            return
        self._has_more = False


def records(body: bytes) -> Iterator[tuple[int, bytes]]:
    """RIP and bytes of each unit; they end where one is none."""
    at = 0
    while at < len(body):
        try:
            rip, guest, length, starts, _, links, moves = HEAD.unpack_from(body, at)
        except StructError:
            return
        size = HEAD.size + guest + length + 2 * WORD * starts + LINK.size * links + WORD * moves
        raw = body[at : at + size]
        if len(raw) != size:
            return
        yield rip, raw
        at += size


def is_sound(raw: bytes) -> bool:
    """Whether all that it points to is in its own code."""
    _, guest, length, starts, copies, links, moves = HEAD.unpack_from(raw)
    offsets, chains, words = parts(raw)
    return (
        guest > 0 and 0 < length <= layout.LARGEST and copies <= starts
        and starts > 0 and not offsets[0] and not offsets[1]
        and all(at < length for at in offsets[::2]) and all(at < guest for at in offsets[1::2])
        and all(place + 4 <= length and stub < length for place, stub, _ in chains)
        and all(at + 4 <= length for at in words)
        and links == len(chains) and moves == len(words)
    )  # fmt: skip


def parts(raw: bytes) -> tuple[list[int], list[tuple[int, int, int]], list[int]]:
    """Offsets of instructions, links, and offsets of words that move."""
    _, guest, length, starts, _, links, _ = HEAD.unpack_from(raw)
    at = HEAD.size + guest + length
    offsets = array("H", raw[at : at + 2 * WORD * starts]).tolist()
    at += 2 * WORD * starts
    chains = list(LINK.iter_unpack(raw[at : at + LINK.size * links]))
    return offsets, chains, array("H", raw[at + LINK.size * links :]).tolist()


def packed(code: Code, guest: bytes) -> bytes:
    """A unit as if its code lay at 0."""
    out, pc = bytearray(code.out), code.pc
    move(out, code.moves, pc)
    unit = Unit.of(code, guest)
    head = HEAD.pack(
        unit.rip, len(guest), len(out), len(code.starts), code.copies, len(code.links),
        len(code.moves),
    )  # fmt: skip
    links = b"".join(LINK.pack(link.place - pc, link.stub - pc, link.target) for link in code.links)
    return head + guest + bytes(out) + unit.starts + links + array("H", code.moves).tobytes()


def unpacked(raw: bytes, pc: int, mask: int) -> tuple[Unit, bytes]:
    """The same, to be put at `pc`."""
    rip, guest, length, starts, copies, _, _ = HEAD.unpack_from(raw)
    at = HEAD.size + guest
    out = bytearray(raw[at : at + length])
    _, chains, words = parts(raw)
    move(out, words, -pc)
    links = [Link(target & mask, pc + place, pc + stub) for place, stub, target in chains]
    first = at + length
    unit = Unit(
        rip, pc, raw[HEAD.size : at], length, raw[first : first + 2 * WORD * starts], links,
        copies=copies,
    )  # fmt: skip
    return unit, bytes(out)


def move(out: bytearray, words: list[int], by: int) -> None:
    """Have what is relative to RIP mean the same as it lies `by` lower."""
    for at in words:
        value = int.from_bytes(out[at : at + 4], "little") + by & 0xFFFF_FFFF
        out[at : at + 4] = value.to_bytes(4, "little")
