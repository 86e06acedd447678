"""Guests that say too much or too little, and terms that cannot be.

What: reports of free pages that overlap or have no end, statistics that would bring memory back,
hints that were counted twice; folders, policies and plans that are none.
Source: VIRTIO 1.2, "Memory Balloon Device"; Waldspurger, "Memory Resource Management in VMware ESX
Server".
"""

from pathlib import Path
from typing import Any

import pytest

from understudy.arch.address import PAGE
from understudy.devices.virtio.balloon import MOST_REPORTED, ONE_PAGE, REPORTING, TAGS, Balloon
from understudy.devices.virtio.queue import Chain
from understudy.host import Host
from understudy.machine.host import Host as Computer
from understudy.machine.memory import GuestMemory
from understudy.overcommit.accounts import Kind, accounts
from understudy.overcommit.plan import Need, Plan, PlanError, State, orders
from understudy.overcommit.sharing import Sharing
from understudy.overcommit.terms import Terms
from understudy.overcommit.working_set import WorkingSet

MEGA = 1 << 20


def test_what_is_reported_twice_counts_once_and_there_is_an_end() -> None:
    with Host(ram="200M") as host:
        vm = host.vm(64 * MEGA, balloon=True)
        balloon = vm.pc.part("virtio_balloon", Balloon)
        whole = Chain(0, (), ((0, 64 * MEGA),) * 8)
        balloon.moved = 0
        balloon.serve(REPORTING, whole)
        assert balloon.state.reported == balloon.moved // ONE_PAGE == 64 * MEGA // PAGE
        endless = Chain(0, (), tuple((n << 31, 1 << 31) for n in range(8)))
        balloon.serve(REPORTING, endless)
        assert balloon.state.reported == 64 * MEGA // PAGE + MOST_REPORTED


def test_statistics_bring_nothing_back() -> None:
    with Host(ram="200M", overcommit=Terms(is_always=True)) as host:
        vm = host.vm(64 * MEGA, balloon=True)
        holding = host.stock.holdings[vm.memory.p2m]
        assert holding.steering is not None
        balloon = holding.steering.balloon
        balloon.pages.inflate([(0x1000, 2000)])
        balloon.state.statistics = {TAGS.index("available_memory"): 0}
        assert balloon.statistics["available_memory"] == 0
        for pages in (1000, 0):
            holding.give(pages)
            assert holding.steering.goal == 2000
        holding.give(-500)
        assert holding.steering.goal == 1500


def test_a_frame_is_one_hint() -> None:
    with Computer("4M") as host:
        sharing, memory = Sharing(host), GuestMemory(host, MEGA)
        memory.populate()
        sharing.join(memory.p2m)
        for round in range(6):
            for gfn in range(64):
                memory.write(gfn * PAGE, bytes([round + 1, gfn]) * 8)
            sharing.scan(256)
        own = sum(host.frames.references(memory.p2m.lookup(gfn) or 0) == 1 for gfn in range(256))
        assert sharing.hints <= own
        memory.close()


def test_a_plan_that_forgets_somebody_is_told_so() -> None:
    class Forgetful(Plan, name="forgetful"):
        """Thinks of nobody."""

        def divide(self, needs: Any, pages: int) -> dict[str, int]:
            return {}

    del Plan.ALL["forgetful"]
    need = Need("one", 1, 2, 1, 1)
    with pytest.raises(PlanError, match=r"forgetful: no pages for \['one'\]"):
        orders(Forgetful(), State.HIGH, [need], 10, {"one": 2})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folder": Path("/nowhere")}, "expected a folder"),
        ({"victims": "nobody"}, "swap policy"),
        ({"plan": "nothing"}, "plan"),
    ],
)
def test_terms_that_cannot_be_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Terms(**options)


@pytest.mark.parametrize(("group", "merged"), [("", True), ("red", False)])
def test_groups_have_nothing_in_common(group: str, merged: bool) -> None:
    with Host(ram="64M", overcommit=Terms(is_always=True)) as host:
        one, other = host.vm(MEGA), host.vm(MEGA, sharing_group=group)
        for vm in (one, other):
            for gfn in range(64):
                vm.memory.write(gfn * PAGE, bytes([gfn + 1]) * PAGE)
        assert host.stock.sharing is not None
        for _ in range(2):
            host.stock.sharing.scan(1024)
        assert (one.memory.hpa(0) == other.memory.hpa(0)) == merged


def test_who_samples_a_vm_by_himself_is_told_what_to_do() -> None:
    with Host(ram="64M") as host:
        one = host.vm(16 * MEGA, name="one")
        own = WorkingSet(one.memory)
        own.begin()
        (account,) = accounts(host.stock).vms
        assert account.kinds[Kind.SAMPLED] == own.samples
        with pytest.raises(PlanError, match=r"one: .*close that WorkingSet first"):
            host.vm(64 * MEGA)
        assert not host.stock.is_on and len(host.stock.holdings) == 1
        host.stock.tick()
        own.close()
        host.vm(64 * MEGA)
        assert host.stock.is_on


def test_a_group_is_a_name() -> None:
    with Host(ram="64M") as host, pytest.raises(ValueError, match="sharing_group"):
        host.vm(MEGA, sharing_group="x" * 65)
