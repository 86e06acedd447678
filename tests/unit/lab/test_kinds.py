"""Memory by kinds over time: all of it at each moment, and a page that has no kind is told."""

from collections.abc import Iterator
from typing import Any

import pytest

from understudy.arch.address import PAGE
from understudy.host import Host
from understudy.lab.kinds import record
from understudy.overcommit import accounts
from understudy.overcommit.accounts import Kind
from understudy.overcommit.terms import Terms

PAGES = (4 << 20) // PAGE


def test_all_pages_are_of_some_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    with Host(ram="32M", overcommit=Terms(is_always=True, scan=0)) as host:
        vm = host.vm(PAGES * PAGE)
        row: dict[str, Any] = {}
        before = record(row, host.stock)
        vm.memory.write(3 << 20, b"something")
        after = record(row, host.stock)
        assert (row["moments"], row["off"]) == (2, 0)
        assert before.total() == after.total() == PAGES
        more = after[Kind.OWN] - before[Kind.OWN]
        assert more == before[Kind.FREE] - after[Kind.FREE] == row["free0"] - row["free1"] > 0
        runs = accounts._runs

        def without_the_last(*arguments: Any) -> Iterator[tuple[Kind, int]]:
            yield from list(runs(*arguments))[:-1]

        monkeypatch.setattr(accounts, "_runs", without_the_last)
        record(row, host.stock)
        assert row["off"] == 1
