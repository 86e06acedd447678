"""The kernel's selftests for x86 end in a guest as docs/results/selftests.md says they do.

Source: linux-source-6.1, tools/testing/selftests/x86; this computer's own processor.
Invariant: whatever ends otherwise than here is explained, by name, in that file.
"""

import re
from pathlib import Path

import pytest

from tests.guests import selftests
from tests.guests.fetched import fetched
from tests.guests.selftests import Ending
from tests.tree import ROOT
from understudy.guests.cache import Cache
from understudy.guests.entry import GuestError

pytestmark = pytest.mark.real_guest

TEXT, _, TEXT_32 = (
    (ROOT / "docs/results/selftests.md").read_text().partition("## On kernels of 32 bits")
)


def rows(text: str) -> dict[str, list[str]]:
    """A table's cells by the program's name."""
    found = re.findall(r"^\| (\w+_\d\d) \| (.*?) \|$", text, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in found}


TABLE, TABLE_32 = rows(TEXT), rows(TEXT_32)


@pytest.fixture(scope="module")
def programs() -> dict[str, bytes]:
    try:
        return selftests.programs()
    except GuestError as error:
        pytest.skip(f"the selftests cannot be built here: {error}")


@pytest.fixture(scope="module")
def in_guest(programs: dict[str, bytes]) -> dict[str, Ending]:
    return on(selftests.GUEST, programs)


def on(kernel: str, programs: dict[str, bytes], *, windows: bool = False) -> dict[str, Ending]:
    fetched(kernel)
    name = f"initramfs/selftests-{kernel}.cpio"
    initrd: Path = Cache().write(name, selftests.archive(programs, kernel))
    return selftests.in_guest(initrd, guest=kernel, windows=windows)


def test_the_transcript_is_understood() -> None:
    found = selftests.endings(
        "=== a_32\n[RUN]\tx\n[OK]\tx\nno new line\n=== status 0\n"
        "=== b_64\n[FAIL]\ty\n=== status 1\n=== c_64\n"
    )
    assert {name: end.agreed for name, end in found.items()} == {
        "a_32": (0, ("OK",)),
        "b_64": (1, ("FAIL",)),
    }
    assert [end.in_words() for end in found.values()] == ["0; 1 OK", "1; 1 FAIL"]


def test_every_difference_in_the_table_is_explained() -> None:
    assert len(TABLE) == 44
    explained = TEXT.partition("## Every difference explained")[2].partition("##")[0]
    for name, (ours, tcg, native, mark) in TABLE.items():
        assert (mark.strip() == "≠") == (len({ours, tcg, native}) > 1), name
        assert not mark.strip() or f"`{name}`" in explained, name


def test_every_difference_on_kernels_of_32_bits_is_explained() -> None:
    assert set(TABLE_32) == {name for name in TABLE if name.endswith("_32")}
    for name, (ours, tcg, mark) in TABLE_32.items():
        assert (mark.strip() == "≠") == (ours != tcg), name
        assert not mark.strip() or f"`{name}`" in TEXT_32, name


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kernel", ["686", "686-pae"])
def test_on_a_kernel_of_32_bits_they_end_as_the_table_says(
    kernel: str, programs: dict[str, bytes]
) -> None:
    ends = {name: end.in_words() for name, end in on(kernel, programs).items()}
    assert ends == {name: cells[0] for name, cells in TABLE_32.items()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_they_end_as_the_table_says(in_guest: dict[str, Ending]) -> None:
    ends = {name: end.in_words() for name, end in in_guest.items()}
    assert ends == {name: cells[0] for name, cells in TABLE.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kernel", [selftests.GUEST, "686-pae"])
def test_with_windows_they_end_as_the_table_says(kernel: str, programs: dict[str, bytes]) -> None:
    ends = on(kernel, programs, windows=True)
    table = TABLE if kernel == selftests.GUEST else TABLE_32
    assert {name: end.in_words() for name, end in ends.items()} == {
        name: cells[0] for name, cells in table.items()
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_they_end_as_on_this_computer(
    programs: dict[str, bytes], in_guest: dict[str, Ending]
) -> None:
    native = selftests.natively(programs)
    explained = TEXT.partition("## Every difference explained")[2].partition("##")[0]
    other = {
        name: f"{in_guest[name].in_words()} in the guest, {end.in_words()} here"
        for name, end in native.items()
        if end.status != in_guest[name].status and f"`{name}`" not in explained
    }
    assert native and not other
