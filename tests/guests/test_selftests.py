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

TEXT = (ROOT / "docs/results/selftests.md").read_text()
TABLE = {
    name: cells.split(" | ")
    for name, cells in re.findall(r"^\| (\w+_\d\d) \| (.*?) \|$", TEXT, re.MULTILINE)
}


@pytest.fixture(scope="module")
def programs() -> dict[str, bytes]:
    try:
        return selftests.programs()
    except GuestError as error:
        pytest.skip(f"the selftests cannot be built here: {error}")


@pytest.fixture(scope="module")
def in_guest(programs: dict[str, bytes]) -> dict[str, Ending]:
    fetched(selftests.GUEST)
    initrd: Path = Cache().write("initramfs/selftests.cpio", selftests.archive(programs))
    return selftests.in_guest(initrd)


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


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_they_end_as_the_table_says(in_guest: dict[str, Ending]) -> None:
    ends = {name: end.in_words() for name, end in in_guest.items()}
    assert ends == {name: cells[0] for name, cells in TABLE.items()}


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
