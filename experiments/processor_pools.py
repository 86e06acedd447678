"""Part of a host can be partitioned and part shared, and either changes while VMs run.

Claim: a vCPU in a partitioned pool is never switched and never waits, whatever runs in a shared
pool beside it; when its pCPU is moved to the shared pool, and its VM as well, all VMs share both
pCPUs evenly from then on; a new policy has its own slices from then on.

Source: lecture, "Scheduling: Virtual CPUs" ("a mix of both policies, and dynamically switch between
them for a given CPU").

Control: nothing is changed: the partitioned vCPU goes on without a switch.

Note: one VM in a pool of one pCPU, `others` VMs in the other; all compute. `own` is the part, in
thousandths of one pCPU, that the first VM had in each phase of 60 ms.
"""

from typing import Any

from understudy.host import Host
from understudy.lab import Bar, Experiment, Row, Table, absent, every
from understudy.lab.spinners import ran, run_for, spinning, switches
from understudy.sched.share import Share

MS = 1_000_000
PHASE = 60 * MS


def measure(others: int, change: str) -> dict[str, Any]:
    """Counts before and after."""
    pools = {"own": {"pcpus": 1, "policy": "partition"}}
    with Host(pcpus=2, ram="256M", policy=Share(slice_ns=5 * MS), pools=pools) as host:
        own = spinning(host, "own", pool="own")
        made = [own, *(spinning(host, f"{n}") for n in range(others))]
        run_for(host, PHASE)
        first, had = ran(own), switches(host)
        before = own.counts()["scheduling"][0]
        if change != "none":
            host.move(own, "default")
            host.move(1, "default")
        if change == "policy":
            host.use_policy(Share(slice_ns=MS))
        run_for(host, PHASE)
        after = own.counts()["scheduling"][0]
        found = {
            "own_before": round(1000 * first / PHASE),
            "own_after": round(1000 * (ran(own) - first) / PHASE),
            "own_switches_before": sum(before["switches"].values()),
            "own_switches": sum(after["switches"].values()) - sum(before["switches"].values()),
            "switches_before": had,
            "switches_after": switches(host) - had,
        }
        for vm in made:
            vm.close()
    return found


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['others']} others, change {row['change']}"


def check(table: Table) -> list[Bar]:
    """Exact, but for even shares, which a slice of 5 ms in 60 leaves within 1/12."""
    changed = [row for row in table.rows if row["change"] != "none"]
    return [
        every("before: the partitioned vCPU has its pCPU from the second turn on, unswitched",
              table.rows, lambda r: (r["own_before"], r["own_switches_before"]),
              lambda r: (999, 0), name=name),
        every("after: all share both pCPUs evenly", changed,
              lambda r: abs(r["own_after"] - 2000 / (r["others"] + 1)) <= 1000 / 12,
              lambda r: True, name=name),
        every("a policy of shorter slices switches more often", table.where(change="policy"),
              lambda r: r["switches_after"] > 2 * r["switches_before"], lambda r: True, name=name),
        absent(every("nothing changed: still no switch", table.where(change="none"),
                     lambda r: (r["own_after"], r["own_switches"]), lambda r: (1000, 0),
                     name=name)),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    measure=measure,
    guest="VMs that compute, on a host of two pCPUs in two pools",
    sweep={"others": [2, 3, 5], "change": ["none", "pools", "policy"]},
    quick={"others": [2]},
    slide=12,
    check=check,
)
