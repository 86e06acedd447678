"""Everybody who walks tables sees what the processor's own walker sees.

What: random tables of every format; the processor's walk, the one for faults and the one for
`inspect` go through the same entries at the same addresses, and the last two agree on where it
leads.
Source: none; the machine's walker is written in Rust and shares nothing with ours.
Invariant: tables lie in memory, so that only what they contain decides.
"""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.arch import paging_formats
from understudy.arch.paging_formats import EPT, LARGE, Format, Path, descend
from understudy.inspection import Registers, linear, reader
from understudy.paging.guest_walk import E_WRITE, GuestFault, Regime

silicon = pytest.importorskip("understudy.silicon", reason="the compiled half is not built")

FRAMES = 8
SIZE = FRAMES << 12
PG, WP, PSE, PAE, LA57, LMA, NXE = 1 << 31, 1 << 16, 1 << 4, 1 << 5, 1 << 12, 1 << 10, 1 << 11
MODES = {
    "ia32": (0, 0),
    "ia32-pse": (PSE, 0),
    "pae": (PAE, 0),
    "pae-nx": (PAE, NXE),
    "4-level": (PAE, LMA),
    "4-level-nx": (PAE, LMA | NXE),
    "5-level": (PAE | LA57, LMA | NXE),
}
INDICES = (0, 1, 3)  # of entries that are not 0; PDPTEs, too, have all of them
MEMORY = silicon.Memory(SIZE)
PROCESSOR = silicon.Processor(MEMORY, "reference", "virtual")

# Mostly what a guest would write: bits that are 1 or 0 in one entry of eight only are drawn apart.
rare = st.sampled_from([0] * 7 + [1])
Entries = dict[tuple[int, int], int]


@st.composite
def entries(draw: st.DrawFn, present: st.SearchStrategy[int]) -> Entries:
    """By frame and index."""
    out = {}
    for frame in range(FRAMES):
        for index in INDICES:
            flags = draw(present) | draw(st.sampled_from([0, 0, LARGE]))
            odd = draw(rare) << draw(st.integers(3, 63))
            out[frame, index] = draw(st.integers(0, FRAMES - 1)) << 12 | flags | odd
    return out


@st.composite
def places(draw: st.DrawFn, form: Format) -> int:
    """An address whose indices are among those of `entries`; canonical."""
    place = sum(draw(st.sampled_from(INDICES)) << level.shift for level in form.levels)
    assert place < 1 << form.linear_bits - 1 or form.linear_bits == 32
    return place | draw(st.integers(0, 0xFFF))


def fill(table: Entries, size: int) -> None:
    MEMORY.fill(0, SIZE)
    for (frame, index), entry in table.items():
        raw = entry & (1 << 8 * size) - 1
        MEMORY.write((frame << 12) + size * index, raw.to_bytes(size, "little"))


def inside(path: Path) -> Path:
    """As far as the tables lie in memory; the processor's own reads go on beyond it."""
    cut = next((n for n, (at, _) in enumerate(path) if at >= SIZE), len(path))
    return path[:cut]


def read(at: int, size: int) -> int:
    return int.from_bytes(MEMORY.read(at, size), "little") if at + size <= SIZE else 0


def seen(gva: int, cr3: int, cr4: int, efer: int, eptp: int = 0) -> list[tuple[str, int, int]]:
    """What the processor's walk reads: (dimension, address, entry)."""
    walked = PROCESSOR.walk(gva, cr3, cr4, efer, eptp)
    return [(dimension, at, entry) for dimension, _, at, entry in walked]


def for_mode(mode: str) -> Callable[[st.DataObject], tuple[Regime, Registers, int]]:
    def draw(data: st.DataObject) -> tuple[Regime, Registers, int]:
        cr4, efer = MODES[mode]
        form = paging_formats.choose(PG, cr4, efer)
        assert form is not None
        flags = st.sampled_from([7, 7, 7, 3, 5, 1, 0x67, 6])
        fill(data.draw(entries(flags)), form.entry_bytes)
        cr3 = data.draw(st.integers(0, FRAMES - 1)) << 12
        registers = Registers(PG | WP, cr3, cr4, efer, None)
        return Regime(*registers[:4]), registers, data.draw(places(form))

    return draw


@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
def test_the_walks_of_a_guests_tables(mode: str, data: st.DataObject) -> None:
    regime, registers, gva = for_mode(mode)(data)
    theirs = tuple((at, entry) for _, at, entry in seen(gva, *registers[1:4]))
    looked = linear("walk", registers, gva, reader(MEMORY.read), "gpa")
    steps = tuple((s.at, s.entry) for s in looked.steps)
    steps = steps[1:] if regime.is_pae else steps
    assert inside(theirs) == steps[: len(inside(theirs))]
    try:
        found = regime.walk(read, gva, E_WRITE)
    except GuestFault as fault:
        if not fault.error & 1:  # not by rights or a reserved bit, which end no look
            assert looked.address is None
        return
    assert found.path == theirs == steps
    assert looked.address == found.gpa


@given(data=st.data())
def test_the_walks_of_the_ept(data: st.DataObject) -> None:
    """The first thing that the processor looks up is where CR3 points."""
    rights = st.sampled_from([0x37, 0x37, 0x37, 0x31, 0x35, 7, 7, 7, 5, 0])
    fill(data.draw(entries(rights)), 8)
    place = data.draw(places(EPT)) & ~0xFFF & paging_formats.FRAME
    eptp = data.draw(st.integers(0, FRAMES - 1)) << 12 | 3 << 3 | 6
    theirs = []
    for dimension, at, entry in seen(0, place, PAE, LMA, eptp):
        if dimension == "guest" or len(theirs) == len(EPT.levels):
            break
        theirs.append((at, entry))
        if not entry & EPT.present:
            break
    path = descend(EPT, EPT.rows, read, eptp & EPT.root, place)[-1]
    common = inside(tuple(theirs))
    assert common == tuple(path)[: len(common)]
    assert len(path) == len(theirs) or len(common) < len(theirs)
