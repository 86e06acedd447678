"""A snapshot is a hostile file: it is refused at once, or it is a VM like any other.

Source: what the campaigns of `tests/walls/campaigns/snapshots.py` have found.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.walls.mutations import Place, at
from tests.walls.snapshots import of_hello
from understudy import image_file
from understudy.image_file import SnapshotError, pack, unpack
from understudy.machine.host import Host
from understudy.vm import VM

BOARD, CPU = "board", "vcpu0"
REFUSED: dict[Place, Any] = {
    (BOARD, "rtc", "state", "flags"): 0x100,
    (BOARD, "rtc", "state", "ram"): "00" * 127,
    (BOARD, "rtc", "alarms", "alarm"): ["x", 1],
    (BOARD, "acpi", "state", "enable"): 1 << 48,
    (BOARD, "vmgenid", "state", "generation"): "00" * 15,
    (BOARD, "kvmclock", "state", "system_time"): [],
    (BOARD, "ioapic", "state", "table"): [0] * 25,
    (BOARD, "pit8254", "state", "counters"): [],
    (CPU, "guest", "control"): [0, 0, 0, 0, [0] * 5],
    (CPU, "guest", "fields", "rip"): 1 << 64,
    ("offset",): 1 << 100,
    ("now",): 1 << 62,
    ("paging", "pool"): 1 << 40,
    ("config", "table_memory"): -4096,
}


@pytest.mark.parametrize("place", REFUSED, ids=lambda place: "-".join(place))
def test_what_no_machine_is_in_is_refused_at_once(place: Place) -> None:
    state, pieces = unpack(memoryview(of_hello("vtlb")))
    holder = at(state, place[:-1])
    assert place[-1] in holder
    holder[place[-1]] = REFUSED[place]
    with Host("64M") as host:
        free = host.frames.free_count
        with pytest.raises(SnapshotError):
            VM.restore(b"".join(pack(state, pieces)), host=host)
        assert (host.frames.free_count, host.processors) == (free, [])


def test_what_nobody_could_read_again_is_not_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(image_file, "LONGEST_HEADER", 1 << 20)
    path = tmp_path / "much.usnap"
    with pytest.raises(SnapshotError, match="much written to a disk's overlay"):
        image_file.write(path, pack({"much": "x" * (1 << 20)}, []))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("paging", ["eager", "lazy"])
def test_who_executes_has_a_root_whatever_was_saved(paging: str) -> None:
    state, pieces = unpack(memoryview(of_hello(paging)))
    assert len(state["paging"]["tables"]["in_use"][0]) == 4
    state["paging"]["tables"]["in_use"] = [[]]
    with VM.restore(b"".join(pack(state, pieces))) as vm, VM.restore(of_hello(paging)) as plain:
        for one in (vm, plain):
            one.go(budget=5000)
        assert vm.vcpus[0].registers() == plain.vcpus[0].registers()


@pytest.mark.parametrize("paging", ["eager", "lazy"])
@pytest.mark.parametrize("wrong", ["paging is off", "another root", "no root", "a step"])
def test_shadow_tables_are_those_of_the_mode_that_was_saved(paging: str, wrong: str) -> None:
    state, pieces = unpack(memoryview(of_hello(paging)))
    control, tables = state[CPU]["guest"]["control"], state["paging"]["tables"]
    assert control[0] >> 31 == 1 and tables["in_use"][0][1] == 4
    if wrong == "paging is off":
        control[0] &= ~(1 << 31)
    elif wrong == "another root":  # one of a lower level, for when CR3 is loaded again
        lower = next(page for page in tables["pages"] if page[1] < 4)
        tables["roots"].insert(0, [[lower[3], 77], lower[:4]])
    elif wrong == "no root":
        control[1] += 4096
    else:
        tables["stepped"] = [["x"]]
    with Host("64M") as host:
        free = host.frames.free_count
        with pytest.raises(SnapshotError):
            VM.restore(b"".join(pack(state, pieces)), host=host)
        assert (host.frames.free_count, host.processors) == (free, [])
