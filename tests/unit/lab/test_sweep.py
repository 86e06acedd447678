"""Planning and measuring: what is known is not run, what is other code does not count."""

from dataclasses import replace
from pathlib import Path

import pytest

from understudy.commands import lab as command
from understudy.guests import GuestError, debian
from understudy.lab import sweep
from understudy.lab.discover import LabError, find, folder
from understudy.lab.store import Store
from understudy.lab.table import BROKEN, DONE, SKIPPED

TEXT = '''"""Twice.

Claim: twice is two times.

Source: this test.
"""

from understudy.lab import Experiment, every


def measure(n, kernel="none"):
    return {"twice": 2 * n}


def select(values):
    return {"half": values["twice"] // 2}


def check(table):
    return [every("halves", table.rows, lambda r: r["half"], lambda r: r["n"], name=str)]


EXPERIMENT = Experiment(measure=measure, guest="none", sweep={"n": [1, 2, 3]}, select=select,
                        check=check)
'''


def _folder(tmp_path: Path, *names: str) -> Path:
    place = tmp_path / "own"
    place.mkdir()
    for name in names:
        (place / f"{name}.py").write_text(TEXT)
    return place


def test_points_are_measured_once_and_shown_through_select(tmp_path: Path) -> None:
    loaded = find(_folder(tmp_path, "twice_a"), [])
    store = Store(tmp_path / "results")
    first = sweep.plan(loaded, store)
    assert len(first.tasks) == 3
    sweep.run(first, store, workers=0)
    assert first.table(loaded[0]).rows == [{"n": n, "half": n} for n in (1, 2, 3)]
    again = sweep.plan(loaded, store)
    assert again.tasks == {}
    assert [record.is_old for record in again.table(loaded[0]).records] == [True] * 3
    assert len(sweep.plan(loaded, store, fresh=True).tasks) == 3
    assert sweep.kept(again, store) == 3


@pytest.mark.real_guest
def test_experiments_that_measure_the_same_share_the_points() -> None:
    loaded = find(folder(), ["fork_and_wait", "page_faults"])
    plan = sweep.plan(loaded, Store(Path("/nonexistent")), say=lambda text, share: None)
    wanted = [len(points) for _, points in plan.wanted]
    assert len(plan.tasks) + len(plan.known) == wanted[0] == wanted[1]


def test_a_worker_with_other_code_measures_nothing(tmp_path: Path) -> None:
    loaded = find(_folder(tmp_path, "twice_b"), [])
    task = next(iter(sweep.plan(loaded, Store(tmp_path)).tasks.values()))
    assert sweep.measure(task).status == DONE
    outcome = sweep.measure(replace(task, key=replace(task.key, version="another")))
    assert outcome.status == BROKEN
    assert "start it from the same sources" in outcome.reason


def test_a_guest_that_cannot_be_had_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise GuestError("no package client here")

    monkeypatch.setattr(debian, "fetch", refuse)
    (loaded,) = find(_folder(tmp_path, "twice_c"), [])
    object.__setattr__(loaded.experiment, "sweep", {"n": [1], "kernel": ["686"]})
    plan = sweep.plan([loaded], Store(tmp_path))
    (record,) = plan.table(loaded).records
    assert (record.status, plan.tasks) == (SKIPPED, {})
    assert record.reason == "guest 686: no package client here"


def test_without_the_optional_packages_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "NEEDED", ("no_such_package_here",))
    with pytest.raises(LabError, match=r"no_such_package_here\): pip install 'understudy\[lab\]'"):
        command._require()


def test_without_sources_one_line_says_so(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="they are in the source tree; name their folder"):
        find(tmp_path / "nowhere", [])
