"""What the parts of a VM hold, as plain values by place: to see what a snapshot has forgotten.

Every object of this project that can be reached from the VM's parts is looked at, whatever it is;
what is plain in it is kept, what is not plain is wiring, and is followed or left out.

Source: ours.  Invariants: nothing is named that could be found by walking; two VMs in the same
state give the same values, wherever on a host they are.
"""

import re
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, Final

from understudy.arch.vmcs import Vmcs
from understudy.clock import Alarm, Clock
from understudy.machine.host import Host
from understudy.machine.memory import GuestMemory
from understudy.machine.p2m import P2m
from understudy.silicon import LocalApic, Processor, VmFail
from understudy.vm import VM

SCALARS: Final = (bool, int, str, bytes, bytearray, float, type(None))
ELSEWHERE: Final = (Host, GuestMemory, P2m, VM)
"""No parts of it, or compared frame by frame elsewhere."""

HOST_OWN: Final = re.compile(
    r"HOST_.*|EPT_POINTER|.*BITMAPS?.*|EXIT_.*|GUEST_LINEAR_ADDRESS|VM_EXIT.*|IDT_VECTORING.*|.*PREEMPTION.*"
)
"""Fields of a VMCS that are the hypervisor's own, or that say of the last exit what it was."""

Values = dict[str, Any]


LEFT_OUT: Final = re.compile(
    # Where the hypervisor's own structures lie on this host.
    r".*\.operation\.(bitmap|vmcs|root\.(region|table|own\['cr3'\]))|.*\.view\.(eptp|root\.hpa)|.*\['processor'\]"
    # Under shadow paging it is the hypervisor's; the guest's own is in what the technique saves.
    r"|.*vmcs\[GUEST_CR3\]"
    # Tables are made anew, of what `Paging.save` says in guest frames: that is compared.
    r"|paging\.(reserve|root|loaded|tables\{\}|_leaves|pool|pointers|directories|leaves)"
    r"|paging\..*\.(hpa|parents|at|links|reverse|traced|traced_in|stale)"
    # What is looked up again, and what a part that was made anew has to make known.
    r"|.*\.hpas|paging\.theirs\._regimes|.*\.view\.(regions|devices)|board\.bus\._pages|bus\._pages"
    r"|.*\.(is_stale|_is_stale|_stale|attention)|.*\['attention'\]"
    # Of CR4 only the bits that the hypervisor owns are read there.
    r"|.*vmcs\[CR4_READ_SHADOW\]"
)
"""The places that need not be equal, each with its reason."""


def held(vm: VM) -> Values:
    """Every plain value that the VM's parts hold, by place."""
    for vcpu in vm.vcpus:
        vcpu.leave_guest()
    found: Values = {}
    seen: dict[int, Any] = {}  # by id, and kept alive, so that no other has that id
    saved = {f"{name} saved": part.save() for name, part in vm.parts.items()}
    roots = {**vm.parts, **saved, "clock": vm.clock, "config": vm.config}
    waiting = deque[tuple[str, Any]](roots.items())
    while waiting:
        place, one = waiting.popleft()
        if LEFT_OUT.fullmatch(place) or isinstance(one, ELSEWHERE):
            continue
        if isinstance(one, SCALARS):
            found[place] = one
        elif isinstance(one, Alarm):
            found[place] = one.when
        elif isinstance(one, Clock):
            found[f"{place}.now"] = one.now()
            found[f"{place}.next"] = one.next_deadline()
        elif isinstance(one, Processor):
            waiting.extend((f"{place}.{name}", value) for name, value in silicon(one).items())
        elif isinstance(one, LocalApic):
            found[place] = one.save()
        elif id(one) not in seen:
            if type(one).__module__ != "builtins":
                seen[id(one)] = one
            waiting.extend((f"{place}{name}", value) for name, value in inside(one))
    return found


def silicon(processor: Processor) -> Values:
    """What a processor holds of its guest, between two runs, and all that it has counted."""
    counters = processor.counters()
    del counters["engine"]
    fields: Values = {}
    for field in Vmcs:
        if not HOST_OWN.fullmatch(field.name):
            with suppress(VmFail):  # this processor has no such field
                fields[f"vmcs[{field.name}]"] = processor.vmread(field)
    registers = processor.registers()
    del registers["cr3"]  # the hypervisor's
    seen = {"fxsave": processor.fxsave(), "tsc": processor.tsc, "registers": registers}
    return {**seen, **fields, "counters": counters}


def inside(one: Any) -> Iterator[tuple[str, Any]]:
    """What a container or an object of ours holds, with its name there."""
    if isinstance(one, dict):
        for key in sorted(one, key=repr):
            if isinstance(key, int | str | tuple):
                yield f"[{int(key) if isinstance(key, int) else key!r}]", one[key]
    elif isinstance(one, set | frozenset):
        if all(isinstance(item, SCALARS) for item in one):
            yield "{}", repr(sorted(one, key=repr))
    elif isinstance(one, list | tuple | deque):
        yield from ((f"[{number}]", item) for number, item in enumerate(one))
    elif is_dataclass(one) and not isinstance(one, type):
        yield from ((f".{field.name}", getattr(one, field.name)) for field in fields(one))
    elif type(one).__module__.split(".")[0] not in sys.stdlib_module_names:
        names = {*getattr(one, "__dict__", ()), *getattr(type(one), "__slots__", ())}
        yield from ((f".{name}", getattr(one, name, None)) for name in sorted(names))


def differences(one: Values, other: Values) -> list[str]:
    """The places at which two VMs differ, with both values."""
    missing = object()
    return [
        f"{place}: {one.get(place, '-')!r:.60} and {other.get(place, '-')!r:.60}"
        for place in sorted({*one, *other})
        if one.get(place, missing) != other.get(place, missing)
    ]
