"""Everything that is counted of a VM, as plain values.

Source: ours.  Invariant: counting changes nothing; what the guest has no part in (kicks, the
engine's own work) stands apart from what two runs must agree on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from understudy.paging import Paging
from understudy.silicon import Processor
from understudy.telling import Telling
from understudy.vcpu.loop import Vcpu


def counted(
    vcpus: Sequence[Vcpu], processors: Sequence[Processor], paging: Paging
) -> dict[str, Any]:
    """The sums over all processors."""
    guests = [vcpu.guest for vcpu in vcpus]
    raw = [processor.counters() for processor in processors]
    own = _sum([guest.own_counts() for guest in guests if isinstance(guest, Telling)])
    return {
        "instructions": sum(vcpu.retired for vcpu in vcpus),
        "exits": _sum([vcpu.counts.named_exits() for vcpu in vcpus]),
        "kicks": sum(vcpu.counts.kicks for vcpu in vcpus),
        "walk": _sum([one["walk"] for one in raw]),
        "walk_caches": _sum([one["walk_caches"] for one in raw]),
        "tlb": {
            "misses": sum(one["tlb_misses"] for one in raw),
            "instruction_misses": sum(one["itlb_misses"] for one in raw),
        },
        "paging": paging.name,
        "fills": paging.fills,
        "flushes": paging.flushes,
        "evictions": paging.evictions,
        "faults": dict(paging.faults),
        "real_mode": paging.real_mode_spells,
        "tables": paging.table_count,
        "cr_accesses": _sum([vcpu.counts.named_cr_accesses() for vcpu in vcpus]),
        "injected": _sum([dict(sorted(v.events.state.injected.items())) for v in vcpus]),
        "engine": _sum([one["engine"] for one in raw]),
    } | ({"execution": own} if own else {})


def _sum(parts: Sequence[Mapping[Any, Any]]) -> dict[str, Any]:
    """Added up key by key, however deep."""
    keys = dict.fromkeys(key for part in parts for key in part)
    out: dict[str, Any] = {}
    for key in keys:
        values = [part[key] for part in parts if key in part]
        out[str(key)] = _sum(values) if isinstance(values[0], Mapping) else sum(values)
    return out
