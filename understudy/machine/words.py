"""What is known of one guest frame, in one word; and 512 such words at once.

A word is an address and flags, as an entry of a page table is: the pfn (or, where no host frame is
there, the gfn) in bits 51:12, what state the frame is in below.  So a run of frames in one state is
a row of words with a difference of 4096, whether the frames are there or not.

The 512 words of 2 MBytes can be handled as one integer: its fields are 64 bits wide, and no word
has more than 52, so that sums of two do not run into the next field.

Source: none.  Invariant: a word with neither `PRESENT` nor a flag of `ABSENT` is no RAM.
"""

from array import array
from collections.abc import Iterator
from typing import Final, TypeAlias

from understudy.arch.address import PAGE

Words: TypeAlias = "array[int]"

FRAMES: Final = 512  # of a block: what one large page of 2 MBytes holds
WIDTH: Final = 52  # of a physical address, and so of a word


class Flag:
    """The states of a frame.  Those of `ABSENT` and `PROTECTED` have owners, see `p2m`."""

    PRESENT: Final = 1 << 0  # a host frame is there
    SWAPPED: Final = 1 << 1  # its contents are kept elsewhere
    BALLOONED: Final = 1 << 2  # the guest has promised not to use it
    FREE: Final = 1 << 3  # the guest has no use for what was in it
    SAMPLED: Final = 1 << 4  # it is watched whether somebody needs it
    SHARED: Final = 1 << 6  # somebody else may have the same host frame: copy before a write
    LOGGED: Final = 1 << 7  # the next write will be written down
    TRANSLATED: Final = 1 << 9  # there is a translation of code in it
    SEALED: Final = 1 << 8  # of whoever else wants to hear of the next write


PRESENT: Final = Flag.PRESENT
ABSENT: Final = 0x03E  # RAM, but taken away: by whom
ELSEWHERE: Final = ABSENT & ~(Flag.BALLOONED | Flag.FREE)  # the owner has the contents
PROTECTED: Final = 0xFC0  # may only be read: because of whom
RAM: Final = PRESENT | ABSENT
FLAGS: Final = PAGE - 1
ADDRESS: Final = -PAGE

ONES: Final = sum(1 << 64 * n for n in range(FRAMES))
_RAMP: Final = sum(n << 12 + 64 * n for n in range(FRAMES))
_NEXT: Final = PAGE * ONES
_ALL_FLAGS: Final = FLAGS * ONES
_NEIGHBORS: Final = (1 << 64 * (FRAMES - 1)) - 1
_BIG: Final = ((1 << 60) - 1) * ONES
BYTES: Final = 8 * FRAMES


def number_of(words: "Words | bytes") -> int:
    """512 words as one integer."""
    return int.from_bytes(words, "little")


def words_of(number: int, frames: int = FRAMES) -> Words:
    """And back."""
    return array("Q", number.to_bytes(8 * frames, "little"))


def row(first: int) -> Words:
    """The words of 512 frames in a row, all in the state of the first."""
    return words_of(first * ONES + _RAMP)


def rows(first: int, words: Words, low: int, high: int) -> Iterator[tuple[int, int, int]]:
    """The rows of RAM among words[low:high], of frames from `first` on: (gfn, word, frames)."""
    start, begin, going_on = low, 0, -1
    for at, word in enumerate(words[low:high], low):
        if word != going_on:
            if begin & RAM:
                yield first + start, begin, at - start
            start, begin = at, word
        going_on = word + 4096
    if begin & RAM:
        yield first + start, begin, high - start


def where(number: int, flags: int) -> int:
    """1 in each field whose word has any of these flags, else 0."""
    return ((number & flags * ONES) + _ALL_FLAGS) >> 12 & ONES


def nonzero(number: int) -> int:
    """1 in each field that is not zero, else 0.  Fields have at most 60 bits."""
    return number + _BIG >> 60 & ONES


def count(words: Words, flags: int) -> int:
    """How many of 512 words, or less, have any of these flags."""
    return where(number_of(words), flags).bit_count()


def breaks(words: Words) -> int:
    """How many of 512 words do not go on where the one before ends.  0: they are one row."""
    number = number_of(words)
    return nonzero((number + _NEXT ^ number >> 64) & _NEIGHBORS).bit_count()


def with_flags(words: Words, on: int, off: int) -> Words:
    """512 words, or less, with flags added and removed wherever there is RAM."""
    number = number_of(words)
    ram = where(number, RAM)
    return words_of((number | ram * on) & ~(ram * off), len(words))
