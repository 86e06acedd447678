"""The experiments themselves: their claims hold, their figures draw, and their checks can fail.

The bare-metal ones run whole in their quick form; of the Linux ones a part (a kernel, two
techniques), the rest is `understudy lab --all --quick`, which is slow.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tree import ROOT
from understudy.lab import figure, sweep
from understudy.lab.discover import Loaded, find, folder, names
from understudy.lab.linux_session import session
from understudy.lab.store import Store
from understudy.lab.table import DONE, Record, Table
from understudy.lab.verdict import Status, judge

ALL = {loaded.name: loaded for loaded in find(folder(), [])}
LINUX = [name for name, loaded in ALL.items() if loaded.experiment.measure is session]
DISKS = ["balloon_first", "io_levels", "kvm_features"]  # a Linux of their own at each point
HOSTS = ["alike_debians", "missed_pages", "share_before_swap"]  # a host of its own at each
SEVERAL = [pytest.mark.real_guest, pytest.mark.slow, pytest.mark.timeout(1200)]
BARE = [name for name in ALL if name not in [*LINUX, *DISKS, *HOSTS]]


def test_all_of_the_issue_are_there() -> None:
    of_linux = {"boot_exits", "exit_costs", "fork_and_wait", "page_faults", "process_switch"}
    assert of_linux == set(LINUX)
    assert {"walk_references", "walk_caches", "page_table_writes", "address_spaces"} < set(BARE)
    assert {"cpu_shares", "time_slices", "processor_pools", "lock_holders"} < set(BARE)
    assert {"interrupt_batches", "idle_tax", "working_set", "interpretation"} < set(BARE)
    assert set(DISKS) | set(HOSTS) <= set(ALL)
    assert sorted(ALL) == names(folder())


def _spoiled(table: Table, column: str) -> Table:
    """The same table, with one count of one point off by one."""
    records = list(table.records)
    at = next(n for n, r in enumerate(records) if r.status == DONE and column in r.values)
    values = dict(records[at].values)
    values[column] += 1
    records[at] = replace(records[at], values=values)
    return Table(records)


EXACT = {
    "walk_references": ("guest_references", "references", "on_hit", "load_pdptes"),
    "walk_caches": ("first", "next_page", "other_name"),
    "page_table_writes": ("traps", "exits"),
    "io_levels": ("kicks",),
    "kvm_features": ("used",),
    "page_sharing": ("consumed", "shared", "freed", "copies_own", "copies_once", "wrong"),
    "cpu_shares": ("too_far",),
    "time_slices": ("switches",),
    "processor_pools": ("own_before", "own_switches_before"),
    "idle_tax": ("too_far", "steps_too_far"),
    "swap_lookups": ("went", "in_file", "read", "wrong"),
    "double_paging": ("host_read", "guest_written", "wrong", "most_there"),
    "balloon_or_swap": ("instructions", "exits"),
    "idle_machine": ("too_far",),
    "alike_debians": ("booted", "exits", "ended"),
    "balloon_first": ("right", "off"),
    "share_before_swap": ("booted", "off", "looked_up"),
    "missed_pages": ("sum", "told", "seen"),
    "working_set": ("touched",),
    "interrupt_batches": ("packets", "seen", "taken", "switched_to"),
    "lock_holders": ("pause_exits", "slices", "yielded"),
    "interpretation": ("instructions",),
    "sensitive_instructions": ("traps",),
    "address_spaces": ("hidden_faults", "cr3_exits", "exits", "used_again"),
    "paravirtual_features": ("exits",),
    "paravirtual_costs": ("exits",),
    "nanobenchmarks": ("exits", "beyond", "instructions"),
    "fork_prices": ("true", "trace", "hidden", "other"),
    "time_stamps": ("comes", "executes", "beyond"),
}


@pytest.fixture(
    scope="module",
    params=[
        *BARE,
        *(pytest.param(name, marks=pytest.mark.real_guest) for name in DISKS),
        *(pytest.param(name, marks=SEVERAL) for name in HOSTS),
    ],
)
def measured(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Loaded, Table]:
    loaded = ALL[request.param]
    store = Store(tmp_path_factory.mktemp("results"))
    plan = sweep.plan([loaded], store, quick=True)
    sweep.run(plan, store, workers=0)
    return loaded, plan.table(loaded)


def test_the_claim_holds_at_every_point(measured: tuple[Loaded, Table]) -> None:
    verdict = judge(*measured)
    broken = [record.reason for record in verdict.table.records if record.status != DONE]
    assert broken == []
    assert [bar for bar in verdict.bars if not bar.holds] == []
    assert verdict.status is Status.PASSED
    assert any(bar.is_control for bar in verdict.bars)


def test_a_count_that_is_off_by_one_fails_the_claim(measured: tuple[Loaded, Table]) -> None:
    loaded, table = measured
    for column in EXACT[loaded.name]:
        assert judge(loaded, _spoiled(table, column)).status is Status.FAILED, column


def test_the_figure_draws(measured: tuple[Loaded, Table]) -> None:
    loaded, table = measured
    png, svg = figure.render(loaded.experiment.draw, table, loaded.name)
    assert png.startswith(b"\x89PNG")
    assert figure.render(loaded.experiment.draw, table, loaded.name) == (png, svg)
    page = figure.inline(svg, "a title")
    assert page.startswith("<svg role=")
    assert figure.INK not in page
    assert "var(--ink)" in page


@pytest.fixture(scope="module")
def lives() -> dict[str, dict[str, Any]]:
    return {paging: session("cloud-amd64", paging) for paging in ("lazy", "ept")}


def _of(lives: dict[str, dict[str, Any]], loaded: Loaded) -> Table:
    select = loaded.experiment.select
    return Table(
        [
            Record({"kernel": "cloud-amd64", "paging": paging}, DONE, select(found))
            for paging, found in lives.items()
        ]
    )


@pytest.mark.real_guest
@pytest.mark.parametrize("name", LINUX)
def test_the_claims_about_linux_hold(name: str, lives: dict[str, dict[str, Any]]) -> None:
    loaded = ALL[name]
    verdict = judge(loaded, _of(lives, loaded))
    assert [bar for bar in verdict.bars if bar.holds is False] == []
    assert sum(bool(bar.holds) for bar in verdict.bars) >= 3
    assert figure.render(loaded.experiment.draw, verdict.table, name)[0]
    column = "hypervisor" if name == "exit_costs" else "instructions"
    assert judge(loaded, _spoiled(verdict.table, column)).status is Status.FAILED


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.timeout(1200)
def test_all_of_them_quickly(tmp_path: Path) -> None:
    """Also what `make lab QUICK=1` does."""
    done = subprocess.run(
        [sys.executable, "-m", "understudy", "lab", "--all", "--quick", "--output", str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "report.html").read_text()
    assert f"{len(ALL)} claims: {len(ALL)} passed" in page
    assert "<script" not in page
    assert 'src="' not in page
