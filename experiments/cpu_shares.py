"""Each virtual machine gets processor time in proportion to its weight.

Claim: of VMs that all compute, with weights from 1 to 8, each gets within 4 % of the share that was
asked for.

Source: lecture, "Scheduling: Virtual CPUs"; Barham et al., "Xen and the Art of Virtualization"
(2003): weights 1 to 8, "within 4% of the expected".

Control: round robin, which knows no weights, misses the same bar.

Note: one pCPU, or two for 8 VMs (no vCPU can have more than one); slices of 0.1 ms; exact in
virtual time. Shares are told in thousandths of what was asked for.
"""

from pathlib import Path
from typing import Any

from understudy.host import Host
from understudy.lab import Bar, Experiment, Row, Table, control, every
from understudy.lab.spinners import ran, run_for, spinning
from understudy.sched.policy import Wish
from understudy.sched.share import Share

MS = 1_000_000
BAR = 40  # thousandths
ROUND_ROBIN = Path(__file__).parents[1] / "examples" / "round_robin.py"


def measure(policy: str, vms: int, pcpus: int) -> dict[str, Any]:
    """The share of each, after 40 rounds of slices."""
    weights = [1, 8] if vms == 2 else list(range(1, vms + 1))
    chosen: Wish = Share(slice_ns=100_000) if policy == "share" else ROUND_ROBIN
    with Host(pcpus=pcpus, ram="128M", policy=chosen) as host:
        made = [spinning(host, f"w{weight}", weight=weight) for weight in weights]
        run_for(host, 40 * sum(weights) * 100_000 // pcpus)
        times = [ran(vm) for vm in made]
        for vm in made:
            vm.close()
    relative = [
        round(1000 * time * sum(weights) / (sum(times) * weight))
        for time, weight in zip(times, weights, strict=True)
    ]
    return {"least": min(relative), "most": max(relative)}


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['policy']} {row['vms']} VMs on {row['pcpus']}"


def check(table: Table) -> list[Bar]:
    """The Xen paper's own bar."""

    def within(policy: str) -> Bar:
        return every(
            f"{policy}: each share is within 4 % of what was asked for",
            table.where(policy=policy),
            lambda r: r["least"] >= 1000 - BAR and r["most"] <= 1000 + BAR,
            lambda r: True,
            name=name,
        )

    return [within("share"), control("round robin misses it", within("round robin"))]


EXPERIMENT = Experiment(
    measure=measure,
    guest="2 and 8 VMs that compute, weights 1 to 8",
    sweep={"policy": ["share", "round robin"], "vms": [2, 8], "pcpus": [1, 2]},
    quick={"pcpus": [1]},
    where=lambda point: point["vms"] == 8 or point["pcpus"] == 1,
    slide=12,
    check=check,
)
