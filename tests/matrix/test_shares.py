"""Weights, caps and pools: who gets how much of a host's processors, and changes while they run.

Source: Barham et al., "Xen and the Art of Virtualization" (2003): shares within 4 % of what was
asked for; lecture, "Scheduling: Virtual CPUs".
"""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.matrix import programs as p
from tests.matrix.shared import napping, running_ns, shares, spinning
from understudy.host import Host
from understudy.sched.policy import PolicyError
from understudy.sched.share import Share
from understudy.vcpu.activity import Activity

MS = 1_000_000
WITHIN = 0.04
ROOT = Path(__file__).parents[2]


def far_off(got: list[float], wanted: list[float]) -> float:
    """The largest relative distance."""
    return max(abs(g / (w / sum(wanted)) - 1) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("pcpus", "weights"), [
    (1, [1, 8]), (1, [1, 2, 3, 4, 5, 6, 7, 8]), (2, [1, 1, 2, 2]),
])  # fmt: skip
def test_shares_are_as_the_weights(pcpus: int, weights: list[float]) -> None:
    with Host(pcpus=pcpus, ram="128M", policy=Share(slice_ns=100_000)) as host:
        vms = [spinning(host, f"w{n}", weight=w) for n, w in enumerate(weights)]
        assert far_off(shares(host, vms, 150 * MS), weights) < WITHIN
        for vm in vms:
            vm.close()


def test_a_share_without_weights_is_the_control() -> None:
    """Round robin knows no weights: the bar that shares meet is one that others miss."""
    policy = str(ROOT / "examples" / "round_robin.py")
    with Host(pcpus=1, ram="64M", policy=policy) as host:
        vms = [spinning(host, f"w{w}", weight=w) for w in (1, 8)]
        assert far_off(shares(host, vms, 50 * MS), [1, 8]) > WITHIN
        for vm in vms:
            vm.close()


def test_weights_change_while_they_run() -> None:
    with Host(pcpus=1, ram="64M", policy=Share(slice_ns=MS)) as host:
        vms = [spinning(host, name) for name in "ab"]
        assert far_off(shares(host, vms, 50 * MS), [1, 1]) < WITHIN
        vms[0].weight = 3
        assert far_off(shares(host, vms, 80 * MS), [3, 1]) < WITHIN
        for vm in vms:
            vm.close()


@pytest.mark.parametrize("value", [0, -1, 1e-308, 1e-4, 1e308, 10**400, math.nan, math.inf, True])
def test_a_weight_or_cap_that_no_policy_can_count_with_is_refused(value: float) -> None:
    with Host(pcpus=1, ram="16M") as host, spinning(host, "a") as vm:
        for name in ("weight", "cap"):
            with pytest.raises(ValueError, match=f"{name}: expected a number from 0.001 to"):
                setattr(vm, name, value)
        host.run(deadline_ns=MS)
        assert (vm.weight, vm.cap) == (1, None)


@pytest.mark.parametrize("value", [0.001, 1_000_000])
def test_the_least_and_the_most_of_them(value: float) -> None:
    with Host(pcpus=1, ram="16M") as host:
        vms = [spinning(host, name, weight=weight) for name, weight in (("a", value), ("b", 1))]
        host.run(deadline_ns=50 * MS)
        vms[0].cap = value
        host.run(deadline_ns=350 * MS)
        assert sum(map(running_ns, vms)) == 350 * MS
        for vm in vms:
            vm.close()


def test_a_cap_holds_though_nobody_else_runs() -> None:
    with Host(pcpus=2, ram="64M") as host, spinning(host, "capped", cap=0.25) as vm:
        host.run(deadline_ns=400 * MS)
        assert abs(running_ns(vm) - 100 * MS) <= MS / 5
        vm.cap = None
        host.run(deadline_ns=500 * MS)
        assert running_ns(vm) >= 200 * MS - MS


def test_who_sleeps_has_no_claim_on_it_and_wakes_soon() -> None:
    with Host(pcpus=1, ram="64M") as host:
        spins = [spinning(host, name) for name in "ab"]
        naps = napping(host, "naps")
        host.run(deadline_ns=20 * MS)
        before = naps.counts()["scheduling"][0]
        host.run(deadline_ns=60 * MS)
        after = naps.counts()["scheduling"][0]
        wakes = after["wakes"] - before["wakes"]
        assert wakes > 100
        waited = (after["wait_ns"] - before["wait_ns"]) / wakes
        assert waited <= 50_000, waited  # a turn
        for vm in [*spins, naps]:
            vm.close()


def test_work_moves_to_idle_pcpus() -> None:
    with Host(pcpus=2, ram="64M") as host:
        vms = [spinning(host, name) for name in "abc"]
        first = shares(host, vms, 90 * MS)
        assert far_off(first, [1, 1, 1]) < WITHIN
        assert all(pcpu.running_ns >= 90 * MS - 6 * MS for pcpu in host.schedule.pcpus)
        assert sum(vm.counts()["scheduling"][0]["migrations"] for vm in vms) > 0
        for vm in vms:
            vm.close()


def test_half_is_partitioned_and_half_is_shared_and_both_change() -> None:
    pools: dict[str, Any] = {"own": {"pcpus": 1, "policy": "partition"}}
    with Host(pcpus=2, ram="64M", pools=pools) as host:
        own = spinning(host, "own", pool="own")
        vms = [spinning(host, name) for name in "ab"]
        host.run(deadline_ns=50 * MS)
        counts = [vm.counts()["scheduling"][0] for vm in [own, *vms]]
        assert counts[0]["switches"] == {} and counts[0]["steal_ns"] == 50_000
        assert all(one["switches"] for one in counts[1:])
        with pytest.raises(PolicyError, match="policy partition"):
            vms[0].pool = "own"
        with pytest.raises(PolicyError, match="is the last of pool own"):
            host.move(1, "default")
        host.move(own, "default")
        host.move(1, "default")
        assert far_off(shares(host, [own, *vms], 90 * MS), [1, 1, 1]) < WITHIN
        host.use_policy(Share(slice_ns=MS))
        before = sum(pcpu.switches["slice"] for pcpu in host.schedule.pcpus)
        host.run(deadline_ns=host.schedule.time.now() + 30 * MS)
        after = sum(pcpu.switches["slice"] for pcpu in host.schedule.pcpus)
        assert after - before >= 30  # with slices of 5 ms there would be 12 at most
        with pytest.raises(PolicyError, match="policy partition"):
            host.use_policy("partition")
        for vm in [own, *vms]:
            vm.close()


LOCK = """
    b8 01 00 00 00    | acquire: mov eax, 1
    87 07             | xchg [rdi], eax
    85 c0             | test eax, eax
    74 09             | jz got
    f3 90             | spin: pause
    83 3f 00          | cmp dword [rdi], 0
    75 f9             | jne spin
    eb ec             | jmp acquire
    b9 80 84 1e 00    | got: mov ecx, 2000000
    ff c9             | hold: dec ecx
    75 fc             | jnz hold
    c7 07 00 00 00 00 | mov dword [rdi], 0
    48 ff c3          | inc rbx
    eb d8             | jmp acquire
"""


def contended(yields: bool) -> tuple[int, int, dict[str, int]]:
    """Two vCPUs on one pCPU want one lock: how often they had it, PAUSE exits, and switches."""
    with Host(pcpus=1, ram="64M", yields=yields) as host, host.vm("2M", cpus=2) as vm:
        p.start(vm, LOCK, rdi=p.DATA)
        second = vm.vcpus[1]
        second.set_registers(vm.vcpus[0].registers())
        second.state.activity = Activity.ACTIVE
        host.run(deadline_ns=200 * MS)
        had = sum(vcpu.registers()["rbx"] for vcpu in vm.vcpus)
        return had, vm.counts()["exits"].get("PAUSE", 0), dict(host.schedule.pcpus[0].switches)


def test_who_spins_lets_the_holder_of_the_lock_go_first() -> None:
    """Lock-holder preemption: without yielding, half the time goes into spinning."""
    without, with_it = contended(False), contended(True)
    assert without[1] == 0 and set(without[2]) == {"slice"}
    assert with_it[1] > 0 and with_it[2]["yield"] > 0
    assert with_it[0] >= 1.7 * without[0]
    assert with_it == contended(True)


@pytest.mark.parametrize(("options", "words"), [
    ({"pcpus": 0}, "pcpus=0: expected 1 to 256"),
    ({"policy": "fair"}, "policy 'fair': expected one of partition, share"),
    ({"pools": {"a": {"pcpus": 3}}}, "pools: 3 pCPUs in all, and the host has 2"),
    ({"pools": {"a": {"cpus": 1}}}, "pool 'a': 'cpus' is no key"),
    ({"clock": "sun"}, "clock 'sun': expected one of"),
])  # fmt: skip
def test_a_wrong_host_is_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")) as caught:
        Host(**({"pcpus": 2} | options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("many", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_many_come_and_go(many: int) -> None:
    with Host(pcpus=2, ram="64M") as host:
        free = set()
        for n in range(many):
            with spinning(host, f"{n}"):
                host.run(deadline_ns=host.schedule.time.now() + 160_000)
            free.add(host.frames.free_count)
        assert len(free) <= 2, free  # a pCPU has its VMXON region from when it is first used
        assert host.vms == [] and host.vpids.allocate() == 1
