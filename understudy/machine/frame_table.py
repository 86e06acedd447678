"""A table of words, one for each guest frame, that is small where memory is in long runs.

A radix of two levels: gigabytes, and blocks of 512 frames in them.  A gigabyte or a block whose
words are one row (see `words`) is kept as its first word alone; so a guest's memory costs a few
integers until something (sharing, ballooning) breaks it up, and whether a large page may map a
block is known at once.

For each one in pieces it is counted how often a neighbor does not go on where the one before ends.
A change of one frame adjusts that count, so it costs the same however many pieces there are.

Invariants: a list or an array is never one row; what has no RAM at all is not in the table.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.machine.words import (
    ABSENT,
    FRAMES,
    PRESENT,
    PROTECTED,
    RAM,
    WIDTH,
    Words,
    breaks,
    count,
    row,
    rows,
    with_flags,
)

GIGA_SHIFT: Final = 18  # gfn >> 18 is a number of a gigabyte
GIGA: Final = 1 << GIGA_SHIFT
LARGE: Final = FRAMES << PAGE_SHIFT  # from the first word of a block to that of the next
FEW: Final = 8  # frames of a block: to change them one by one costs less
MOST: Final = 1 << WIDTH - PAGE_SHIFT  # guest frames, and host frames

Blocks: TypeAlias = "list[int | Words]"
Piece = tuple[int, int, int]
"""(gfn, word of the first frame, frames in a row)"""


class FrameTable:
    """gfn -> word.  `protected`, `absent`: how many frames have a flag of that kind."""

    def __init__(self) -> None:
        self._gigas: dict[int, int | Blocks] = {}
        self._breaks: dict[int, int] = {}  # of each gigabyte in pieces
        self._breaks_in: dict[int, int] = {}  # of each block (gfn >> 9) in pieces
        self.protected = 0
        self.absent = 0

    # --- looking ---

    def word(self, gfn: int) -> int:
        """What is known of a frame; no flags if it is no RAM."""
        giga = self._gigas.get(gfn >> 18)
        if isinstance(giga, list):
            block = giga[gfn >> 9 & 511]
            return block + ((gfn & 511) << 12) if isinstance(block, int) else block[gfn & 511]
        return 0 if giga is None else giga + ((gfn & 0x3FFFF) << 12)

    def row(self, gfn: int, most: int) -> tuple[int, int]:
        """The word of a frame, and how many (at most) go on from it, as far as one can see."""
        giga = self._gigas.get(gfn >> 18)
        if giga is None:
            return 0, 1
        if isinstance(giga, int):
            return giga + ((gfn & 0x3FFFF) << 12), min(GIGA - (gfn & 0x3FFFF), most)
        block, at = giga[gfn >> 9 & 511], gfn & 511
        if isinstance(block, int):
            return block + (at << 12), min(FRAMES - at, most)
        word = block[at]
        end = at + 1
        while end < FRAMES and end - at < most and block[end] - word == end - at << 12:
            end += 1
        return word, end - at

    def uniform(self, gfn: int, level: int) -> int | None:
        """The word of `gfn`, the first frame of a page of this level, if all in it are one row.

        Level 1 is a frame, 2 a block, 3 a gigabyte, 4 what 512 gigabytes are (and never a row).
        None: they are in pieces.  A word without flags: nothing is there.
        """
        if level == 1:
            return self.word(gfn)
        if level == 4:
            return None if any(number >> 9 == gfn >> 27 for number in self._gigas) else 0
        giga = self._gigas.get(gfn >> 18)
        if giga is None:
            return 0
        if isinstance(giga, int):
            return giga + ((gfn & 0x3FFFF) << 12)
        if level == 3:
            return None
        block = giga[gfn >> 9 & 511]
        return block if isinstance(block, int) else None

    def words(self, gfn: int) -> Words:
        """The words of the block around `gfn`; not to be changed."""
        giga = self._gigas.get(gfn >> 18)
        if isinstance(giga, list) and not isinstance(block := giga[gfn >> 9 & 511], int):
            return block
        return row(self.word(gfn & -FRAMES))

    def gigabytes(self) -> list[int]:
        """The numbers of the gigabytes in which there is anything."""
        return sorted(self._gigas)

    def blocks(self) -> list[int]:
        """The first frames (gfn) of the blocks of 512 in which host frames may be."""
        found = []
        for number in self.gigabytes():
            giga = self._gigas[number]
            for n in range(FRAMES):
                block = giga[n] if isinstance(giga, list) else giga
                if not isinstance(block, int) or block & PRESENT:
                    found.append((number << 9 | n) << 9)
        return found

    @property
    def end(self) -> int:
        """Behind the last gigabyte of which anything is said (gfn)."""
        return max(self._gigas, default=-1) + 1 << GIGA_SHIFT

    def pieces(self, gfn: int = 0, end: int = MOST) -> Iterator[Piece]:
        """All RAM in [gfn, end), in order; rows are cut at the ends of blocks or gigabytes."""
        numbers: Iterable[int] = range(gfn >> GIGA_SHIFT, (end - 1 >> GIGA_SHIFT) + 1)
        if end - gfn > GIGA:
            numbers = [n for n in self.gigabytes() if gfn < n + 1 << GIGA_SHIFT and n << 18 < end]
        for number in numbers:
            giga = self._gigas.get(number)
            first = number << GIGA_SHIFT
            if isinstance(giga, int):
                yield _cut(first, giga, GIGA, gfn, end)
            elif giga is not None:
                low, high = max(gfn - first, 0) >> 9, min(end - first - 1 >> 9, 511)
                for n in range(low, high + 1):
                    block, at = giga[n], first + (n << 9)
                    if not isinstance(block, int):
                        low_frame, high_frame = max(gfn - at, 0), min(end - at, FRAMES)
                        yield from rows(at, block, low_frame, high_frame)
                    elif block & RAM:
                        yield _cut(at, block, FRAMES, gfn, end)

    # --- changing ---

    def _put(self, gfn: int, word: int) -> None:
        """Change the word of one frame."""
        number, n, at = gfn >> 18, gfn >> 9 & 511, gfn & 511
        blocks = self._gigas.get(number)
        if not isinstance(blocks, list):
            if self.word(gfn) == word or (blocks is None and not word & RAM):
                return
            blocks = self._split(number)
        block = blocks[n]
        if isinstance(block, int):
            if block + (at << 12) == word:
                return
            block = row(block)
            self._breaks_in[gfn >> 9] = 0
            self._place(number, blocks, n, block)
        old, found = block[at], self._breaks_in[gfn >> 9]
        if at:
            going_on = block[at - 1] + 4096
            found += (going_on != word) - (going_on != old)
        if at < 511:
            going_on = block[at + 1] - 4096
            found += (going_on != word) - (going_on != old)
        block[at] = word
        self.protected += bool(word & PROTECTED) - bool(old & PROTECTED)
        self.absent += bool(word & ABSENT) - bool(old & ABSENT)
        if found:
            self._breaks_in[gfn >> 9] = found
        else:
            self._close(number, blocks, n, block[0])

    def _copy(self, other: "FrameTable") -> None:
        """Become what another table is."""
        for number, giga in other._gigas.items():
            if isinstance(giga, list):
                giga = [block if isinstance(block, int) else block[:] for block in giga]
            self._gigas[number] = giga
        self._breaks, self._breaks_in = dict(other._breaks), dict(other._breaks_in)
        self.protected, self.absent = other.protected, other.absent

    def _clear(self) -> None:
        for table in (self._gigas, self._breaks, self._breaks_in):
            table.clear()
        self.protected = self.absent = 0

    def _fill(self, gfn: int, frames: int, word: int, step: int = PAGE) -> None:
        """Put a row that begins with `word` in place of what was there; step 0: `word` in each."""
        for at, size in _parts(gfn, frames, GIGA if step else FRAMES):
            first = word + (at - gfn) * step
            number, n = at >> GIGA_SHIFT, at >> 9 & 511
            if size == 1:
                self._put(at, first)
            elif size == GIGA:
                self._fill_giga(number, first)
            elif step and self.uniform(at & -FRAMES, 2) == first - ((at & 511) << PAGE_SHIFT):
                pass
            elif step and size == FRAMES:
                blocks = self._split(number)
                self._note(blocks[n], -1)
                self._note(first, 1)
                self._close(number, blocks, n, first)
            else:
                new = range(first, first + size * step, step) if step else [first] * size
                self._replace(at, array("Q", new))

    def _replace(self, gfn: int, new: Words) -> None:
        """Put these words in place of those of one block from `gfn` on."""
        number, n, at = gfn >> GIGA_SHIFT, gfn >> 9 & 511, gfn & 511
        words = self._open(number, n)
        end = at + len(new)
        self._note(words[at:end], -1)
        words[at:end] = new
        self._note(new, 1)
        self._settle(number, n, words)

    def _flag(self, gfn: int, frames: int, on: int, off: int) -> list[tuple[int, int]]:
        """Add flags and remove flags wherever there is RAM.

        Returns runs (gfn, frames) that hold all words that have changed, and others of a block.
        """
        runs: list[tuple[int, int]] = []
        for at, size in _parts(gfn, frames):
            giga = self._gigas.get(at >> GIGA_SHIFT)
            if giga is None:
                continue
            if size == GIGA and isinstance(giga, int):
                new = (giga | on) & ~off
                if new != giga:
                    self._fill_giga(at >> GIGA_SHIFT, new)
                    append(runs, at, GIGA)
                continue
            for part in range(at, at + size, FRAMES):
                self._flag_block(part, min(at + size - part, FRAMES), on, off, runs)
        return runs

    def _flag_all(self, on: int, off: int) -> list[tuple[int, int]]:
        """The same for all RAM that there is."""
        runs: list[tuple[int, int]] = []
        for number in self.gigabytes():
            for gfn, frames in self._flag(number << GIGA_SHIFT, GIGA, on, off):
                append(runs, gfn, frames)
        return runs

    def _flag_block(
        self, gfn: int, size: int, on: int, off: int, runs: list[tuple[int, int]]
    ) -> None:
        word = self.uniform(gfn & -FRAMES, 2)
        if size < FEW:
            for frame in range(gfn, gfn + size):
                old = self.word(frame)
                new = (old | on) & ~off
                if old & RAM and new != old:
                    self._put(frame, new)
                    append(runs, frame, 1)
        elif word is None:
            olds = self.words(gfn)[gfn & 511 : (gfn & 511) + size]
            news = with_flags(olds, on, off)
            if news != olds:
                self._replace(gfn, news)
                append(runs, gfn, size)
        elif word & RAM and (word | on) & ~off != word:
            word += (gfn & 511) << PAGE_SHIFT
            self._fill(gfn, size, (word | on) & ~off)
            append(runs, gfn, size)

    # --- pieces coming and going ---

    def _split(self, number: int) -> Blocks:
        """A gigabyte as a list of blocks.  Some word in it is about to change."""
        giga = self._gigas.get(number)
        if isinstance(giga, list):
            return giga
        first = number << GIGA_SHIFT + PAGE_SHIFT if giga is None else giga
        blocks: Blocks = list(range(first, first + FRAMES * LARGE, LARGE))
        self._gigas[number], self._breaks[number] = blocks, 0
        return blocks

    def _open(self, number: int, n: int) -> Words:
        """A block as an array.  Some word in it is about to change."""
        blocks = self._split(number)
        block = blocks[n]
        if isinstance(block, int):
            block = row(block)
            self._breaks_in[number << 9 | n] = 0
            self._place(number, blocks, n, block)
        return block

    def _settle(self, number: int, n: int, words: Words) -> None:
        """Many words of a block have changed."""
        found = breaks(words)
        if found:
            self._breaks_in[number << 9 | n] = found
        else:
            self._close(number, self._split(number), n, words[0])

    def _close(self, number: int, blocks: Blocks, n: int, first: int) -> None:
        """A block has become one row."""
        self._breaks_in.pop(number << 9 | n, None)
        found = self._place(number, blocks, n, first)
        if not found:
            del self._breaks[number]
            base = blocks[0]
            assert isinstance(base, int)
            if base & RAM:
                self._gigas[number] = base
            else:
                del self._gigas[number]

    def _place(self, number: int, blocks: Blocks, n: int, block: "int | Words") -> int:
        """Put a block into a gigabyte; how often its blocks do not go on."""
        found = self._breaks[number]
        old = blocks[n]
        if n:
            before = blocks[n - 1]
            found += _is_break(before, block) - _is_break(before, old)
        if n < FRAMES - 1:
            after = blocks[n + 1]
            found += _is_break(block, after) - _is_break(old, after)
        blocks[n] = block
        self._breaks[number] = found
        return found

    def _fill_giga(self, number: int, word: int) -> None:
        old = self._gigas.get(number)
        if isinstance(old, list):
            del self._breaks[number]
            for n, block in enumerate(old):
                self._note(block, -1)
                self._breaks_in.pop(number << 9 | n, None)
        elif old is not None:
            self._note(old, -1, GIGA)
        if word & RAM:
            self._gigas[number] = word
            self._note(word, 1, GIGA)
        else:
            self._gigas.pop(number, None)

    def _note(self, words: "int | Words", sign: int, frames: int = FRAMES) -> None:
        """Count the frames of a row or of an array in, or out."""
        if isinstance(words, int):
            self.protected += sign * frames * bool(words & PROTECTED)
            self.absent += sign * frames * bool(words & ABSENT)
            return
        self.protected += sign * count(words, PROTECTED)
        self.absent += sign * count(words, ABSENT)


def _is_break(before: "int | Words", after: "int | Words") -> bool:
    return not (isinstance(before, int) and isinstance(after, int) and after - before == LARGE)


def _cut(first: int, word: int, frames: int, low: int, high: int) -> Piece:
    """A row, cut to [low, high)."""
    gfn = max(first, low)
    return gfn, word + (gfn - first << PAGE_SHIFT), min(first + frames, high) - gfn


def _parts(gfn: int, frames: int, largest: int = GIGA) -> Iterator[tuple[int, int]]:
    """[gfn, gfn+frames) in whole gigabytes, whole blocks, and parts of blocks."""
    end = gfn + frames
    while gfn < end:
        if not gfn & GIGA - 1 and end - gfn >= GIGA == largest:
            size = GIGA
        else:
            size = min(FRAMES - (gfn & 511), end - gfn)
        yield gfn, size
        gfn += size


def append(runs: list[tuple[int, int]], gfn: int, frames: int) -> None:
    """Add a run after the others, joined with the last one if it goes on there."""
    if runs and sum(runs[-1]) == gfn:
        gfn, frames = runs[-1][0], runs[-1][1] + frames
        runs.pop()
    runs.append((gfn, frames))
