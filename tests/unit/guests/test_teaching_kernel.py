"""The teaching kernel: what is in the package is what its sources make, wherever they lie."""

import re
import shutil
import subprocess

import pytest

from tests.tree import ROOT
from tests.unit.guests.flat_memory import FlatMemory
from tools import teaching_kernel
from understudy.execution.pv import interface
from understudy.guests import elf, pv, teaching
from understudy.guests.entry import GuestError

COMPILER = "gcc (Debian 12.2.0-14+deb12u1) 12.2.0"
"""With which the package's were built: another one makes other bytes."""


def _compiler() -> str:
    if shutil.which("gcc") is None:
        return "none"
    told = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True)
    return told.stdout.partition("\n")[0]


@pytest.mark.parametrize("name", teaching.GUESTS)
def test_its_bytes_are_those_of_its_sources(name: str) -> None:
    if (found := _compiler()) != COMPILER:
        pytest.skip(f"built by {COMPILER}, and here is {found}")
    kernel = teaching.GUESTS[name]
    assert teaching_kernel.built(*kernel) == kernel.path.read_bytes()


@pytest.mark.parametrize("name", teaching.GUESTS)
def test_it_is_a_kernel(name: str) -> None:
    kernel = teaching.GUESTS[name]
    image = elf.parse(kernel.path.read_bytes())
    assert image.is_64 == (kernel.bits == 64)
    assert min(segment.paddr for segment in image.loads) == 0x10_0000


def test_its_page_says_how_much_of_it_differs() -> None:
    page = (ROOT / "docs/techniques/pv.md").read_text("utf-8")
    common, native, own = (
        teaching_kernel.lines(*parts) for parts in (("common", "user"), ("native",), ("pv",))
    )
    assert f"\n| {common} | {native} | {own} |\n" in page
    assert max(native, own) < common / 3


@pytest.mark.parametrize("part", ["common", "user"])
def test_what_is_common_does_not_ask_which_kind_it_is(part: str) -> None:
    """But for the width, which both kinds have."""
    for source in (teaching.ROOM / part).glob("*.[chS]"):
        asked = re.findall(r"#\s*if\w*\s+(\S+)", source.read_text("utf-8"))
        assert set(asked) <= {"__x86_64__", *(name for name in asked if name.endswith("_H"))}


@pytest.mark.parametrize("name", teaching.GUESTS)
def test_only_the_paravirtual_ones_say_that_they_are(name: str) -> None:
    kernel = teaching.GUESTS[name]
    image = elf.parse(kernel.path.read_bytes())
    assert pv.is_paravirtual(image) == (kernel.kind == "pv")


@pytest.mark.parametrize("base", [1 << 56, (1 << 47) - (16 << 20), 0x1000, 1 << 63, 0])
def test_a_paravirtual_kernel_that_lies_nowhere_is_refused(base: int) -> None:
    """Its entry, and the address of its segment, as an ELF file of 64 bits has them."""
    raw = bytearray(teaching.GUESTS["teaching-pv"].path.read_bytes())
    raw[24:32] = raw[64 + 16 : 64 + 24] = (base + 0x10_0000).to_bytes(8, "little")
    memory = FlatMemory(16 << 20)
    with pytest.raises(GuestError, match="lies in no segment at its own addresses"):
        pv.load(memory, elf.parse(bytes(raw)), append="")


def test_a_long_command_line_is_refused() -> None:
    image = elf.parse(teaching.GUESTS["teaching-pv"].path.read_bytes())
    with pytest.raises(GuestError, match="longer than 2047 bytes"):
        pv.load(FlatMemory(16 << 20), image, append="x" * 2048)


def test_both_sides_have_agreed_on_the_same() -> None:
    header = (teaching.ROOM / "pv/hypervisor.h").read_text("utf-8")
    numbers = dict(re.findall(r"#define (\w+) (\d+)\n", header))
    for call in interface.Call:
        assert int(numbers[{"TIMER": "TIMER_IN"}.get(call.name, call.name)]) == call
    for most in ("MOST_UPDATES", "MOST_FRAMES", "MOST_TEXT"):
        assert int(numbers[most]) == getattr(interface, most)
    changes = re.search(r"enum change \{([^}]*)\}", header)
    assert changes and [word.strip() for word in changes[1].split(",")] == [
        change.name for change in interface.Change
    ]
    states = dict(re.findall(r"(\w+)_CHANGED = (\d)", header))
    assert states == {state.name: str(int(state)) for state in interface.State}
    shared = re.search(r"struct shared \{([^}]*)\}", header)
    assert shared
    offset, found = 0, {}
    for width, names in re.findall(r"u(\d+) ([^;]*);", shared[1]):
        for one in names.split(","):
            found[one.strip().upper()] = offset
            offset += int(width) // 8
    assert found == {part.name: int(part) for part in interface.Shared}
