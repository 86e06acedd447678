"""The same fragment under each technique of execution, and what a guest could see of it.

What: one VM a technique, used for many fragments; what a fragment has changed is put back.  One
that differs is made smaller for as long as it differs, each time in new VMs, and told in words:
which technique has what.  Source: none.
Invariant: all registers, x87 and SSE state, what retired, guest time, how it ended and all memory
are the same; a technique that would execute a fragment by VMX in its stead is counted.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Final

import pytest

from tests.matrix import fragment_stage as stage
from tests.matrix.fragment_code import Fragment, smaller
from tests.matrix.fragment_writer import fragment
from understudy.arch.vmcs import SEGMENTS
from understudy.execution.bt import Bt, window
from understudy.execution.bt.adaptation import TRAPS
from understudy.execution.deprivileged import Deprivileged
from understudy.execution.emulate import Emulate
from understudy.state import plain
from understudy.verdict import StopKind
from understudy.vm import VM

CPU: Final = "understudy,+smap,-pmu,-xsaves"
BUDGET: Final = 3000
DEADLINE_NS: Final = 1_000_000  # of guest time, which a HLT makes pass
TECHNIQUES: Final = ("vmx", "emulate", "deprivileged", "bt")
SHADOWS: Final = ("lazy", "vtlb", "eager")
NOWHERE: Final = "no RAM"
"""A guest whose tables or stack are where there is nothing: each technique ends it in its way."""
PAGE: Final = 4096
UNUSABLE: Final = 1 << 16
RF: Final = 1 << 16
ARITHMETIC: Final = 0x8D5  # flags; of a repeated SCAS or CMPS that goes on nobody can see them
LIVE: Final = ("cr2", "dr0", "dr1", "dr2", "dr3", "dr6", "xcr0", "pkru")
TIMER: Final = 2 << 17 | stage.DEADLINE  # TSC-deadline mode
ELSEWHERE: Final = {"PREFERRED32": 0xD000_0000, "FIRST64": 300}
"""For the window of bt's translations: two other places to begin with."""
PREFIXES: Final = rb"[\x26\x2e\x36\x3e\x40-\x4f\x64-\x67\xf2\xf3]*"
REPEATED: Final = re.compile(PREFIXES + rb"[\xa4\xa5\xaa\xab\x6c\x6d]")
"""A string instruction that stores, and its prefixes."""
LOOKS: Final = re.compile(
    PREFIXES + rb"\x0f(?:[\x02\x03]|\x00[\x20-\x2f\x60-\x6f\xa0-\xaf\xe0-\xef])"
)
"""LAR, LSL, VERR and VERW."""
KNOWN: Final = ("window", "itself", "descriptors", "resume")
"""Differences that are none of a technique's (decision 0091)."""
AT_DOUBLE_FAULT: Final = range(
    stage.HANDLERS + stage.DOUBLE_FAULT * stage.STRIDE,
    stage.HANDLERS + (stage.DOUBLE_FAULT + 1) * stage.STRIDE,
)
"""RIP there: one has been delivered."""
Difference = dict[str, dict[str, Any]]
"""By technique: what it has otherwise than VMX, and VMX's."""


class Machine:
    """One VM, for one fragment after the other."""

    def __init__(self, execution: str, paging: str, engine: str, *, virtualizable: bool) -> None:
        self.execution = execution
        self.vm = VM(
            "2M", execution=execution, paging=paging, engine=engine, cpu=CPU,
            virtualizable_isa=virtualizable,
        )  # fmt: skip
        self.vm.memory.write(0, bytes(stage.END))
        self.memory = bytes(stage.END)

    def begin(self, one: Fragment, image: bytes) -> None:
        """As if nothing had run before."""
        vm, vcpu = self.vm, self.vm.vcpus[0]
        vcpu.leave_guest()
        now = self.memory
        for at in range(0, stage.END, PAGE):
            if now[at : at + PAGE] != image[at : at + PAGE]:
                vm.memory.write(at, image[at : at + PAGE])
        vcpu.reset()
        vm.clock.offset = -vm.clock.source()
        vcpu.msrs.as_firmware_leaves_them()
        for index, value in ((0x1B, 0xFEE0_0D00), (0x80F, 0x1FF), (0x832, TIMER)):
            vcpu.msrs.write(index, value)
        vcpu.set_registers(one.registers)
        vcpu.guest.set_cr2(0)
        vcpu.guest.invalidate()
        self.before = vm.instructions

    def run(self, one: Fragment, image: bytes) -> dict[str, Any]:
        """All that the guest could see at its end."""
        self.begin(one, image)
        vm, vcpu = self.vm, self.vm.vcpus[0]
        for count in (*one.nmis, BUDGET):
            stop = vm.go(budget=count, deadline_ns=DEADLINE_NS - vm.clock.now())
            if stop.kind is not StopKind.BUDGET or count == BUDGET:
                break
            vcpu.events.nmi()
            vcpu.look_now()
        processor = vm.processors[0]
        seen: dict[str, Any] = {"end": stop.kind}
        if NOWHERE in stop.detail:
            self.memory = vm.memory.read(0, stage.END)
            return {}
        if stop.kind in (StopKind.ERROR, StopKind.TRIPLE_FAULT):  # tables may be where no RAM is
            seen["why"] = stop.detail.partition("\n")[0]
        seen |= vcpu.registers()
        for name in SEGMENTS:  # the rest of a null one nobody can see
            if seen[f"{name}_attr"] & UNUSABLE:
                seen[f"{name}_limit"] = 0
        live = processor.registers()
        seen |= {name: live[name] for name in LIVE}
        seen |= {"fx": processor.fxsave(), "retired": vm.instructions - self.before}
        seen |= {"time": vm.clock.now(), "apic": vcpu.apic.save()}
        seen |= {"msrs": plain(vcpu.msrs.state)["values"]}
        if stop.kind not in (StopKind.DEBUG_EXIT, StopKind.BUDGET):  # it ended in the midst
            seen |= {"cr2": 0, "rflags": seen["rflags"] & ~(RF | ARITHMETIC)}
        if stop.kind in (StopKind.ERROR, StopKind.TRIPLE_FAULT):  # that takes time, and timers
            seen |= {"time": 0, "retired": 0, "apic": b""}
        self.memory = vm.memory.read(0, stage.END)
        stack = seen["rsp"] if stop.kind is StopKind.TRIPLE_FAULT else None
        seen["memory"] = stage.comparable(self.memory, one.mode, stack)
        return seen

    def told(self) -> Counter[str]:
        """What shows that the technique was at work."""
        guest = self.vm.vcpus[0].guest
        if isinstance(guest, Emulate):
            return Counter(interpreted=guest.interpreted)
        if isinstance(guest, Bt):
            told = guest.translated
            return Counter(translated=told["instructions"], written=told["table writes"])
        return Counter(traps=guest.traps.total()) if isinstance(guest, Deprivileged) else Counter()


class Bench:
    """A VM for each technique."""

    def __init__(
        self, mode: str, rng: random.Random, techniques: Sequence[str] = TECHNIQUES,
        virtualizable: bool = True, shadows: Sequence[str] = SHADOWS,
    ) -> None:  # fmt: skip
        """`rng` chooses engines, and of these paging; `virtualizable`: ISA of "deprivileged"."""
        self.mode, self.stage = mode, stage.memory(mode)
        self.machines: list[Machine] = []
        self.compared = 0  # fragments
        self.chosen: list[str] = []
        for name in techniques:
            engine, shadow = rng.choice(("dbt", "dbt", "reference")), rng.choice(shadows)
            paging = "ept" if name in ("vmx", "emulate") else shadow
            is_virtualizable = name == "deprivileged" and virtualizable
            machine = Machine(name, paging, engine, virtualizable=is_virtualizable)
            guest, adapts = machine.vm.vcpus[0].guest, ""
            if isinstance(guest, Bt):
                guest.sites.first = rng.choice((1, 1, 2, TRAPS))
                adapts = f", called out after {guest.sites.first}"
            self.machines.append(machine)
            self.chosen.append(f"{name}: {paging}, {engine}{adapts}")

    def run(self, one: Fragment) -> Difference:
        """Who differs from the first, and in what."""
        image = one.image(self.stage)
        first, *others = (machine.run(one, image) for machine in self.machines)
        out: Difference = {}
        if not all((first, *others)):
            return out
        self.compared += 1
        for machine, seen in zip(self.machines[1:], others, strict=True):
            if seen != first:
                names = sorted(first.keys() | seen.keys())
                out[machine.execution] = {
                    name: (seen.get(name), first.get(name))
                    for name in names if seen.get(name) != first.get(name)
                }  # fmt: skip
        return out

    def close(self) -> None:
        for machine in self.machines:
            machine.vm.close()


class Found(AssertionError):
    """Techniques differ: a report."""


def fuzz(mode: str, fragments: Iterable[int], seed: int, renew: int = 500) -> Counter[str]:
    """Compare these, by number; what was done.  Found: a difference of no known kind.

    renew: after so many the VMs are new ones, with other engines and paging.
    """
    told: Counter[str] = Counter(dict.fromkeys(KNOWN, 0))
    bench: Bench | None = None

    def close() -> None:
        if bench is not None:
            told.update(compared=bench.compared)
            for machine in bench.machines:
                told.update(machine.told())
            bench.close()

    try:
        for number in fragments:
            choice = f"{seed} {mode} {number // renew}"
            if bench is None or not number % renew:
                close()
                bench = Bench(mode, random.Random(choice))
            one = made(mode, number, seed)
            if difference := bench.run(one):
                if why := known(one, choice, difference):
                    told[why] += 1
                else:
                    raise Found(report(one, number, seed, choice, difference))
                close()
                bench = None
    finally:
        close()
    return told


def known(one: Fragment, choice: str, difference: Difference) -> str:
    """What kind of difference, if it is none that counts."""
    if is_about_window(one, choice):
        return "window"
    done = does(one)
    if "itself" in done:
        return "itself"
    if "resume" in done and is_about_resume_flag(difference):
        return "resume"
    return "descriptors" if "descriptors" in done and set(difference) == {"bt"} else ""


def is_about_window(one: Fragment, choice: str) -> bool:
    """Whether a kernel has met bt's window where it has mapped nothing (docs/techniques/bt.md).

    Bt alone differs then, and no longer when its window is elsewhere.
    """
    if set(alone(one, choice)[0]) != {"bt"}:
        return False
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ELSEWHERE.items():
            patch.setattr(window, name, value)
        return not alone(one, choice)[0]


def is_about_resume_flag(difference: Difference) -> bool:
    """Whether only memory differs, and there only what may be RF of flags that were saved.

    That is the lowest bit of a byte, on whatever stack.
    """
    for names in difference.values():
        if set(names) != {"memory"}:
            return False
        one, other = names["memory"]
        if any(a ^ b > 1 for a, b in zip(one, other, strict=True)):
            return False
    return True


def does(one: Fragment) -> set[str]:
    """What it does, step by step, that techniques do differently (decision 0091).

    "itself": a repeated string instruction stores where it lies itself.  When it is fetched again
    is not said (SDM 3A, "Handling Self- and Cross-Modifying Code").
    "descriptors": a program has come to a kernel's LAR, LSL, VERR or VERW.  Under bt it finds the
    hypervisor's.
    "resume": a double fault is delivered: with RF as it is, and an exit before has set it.
    """
    done: set[str] = set()
    machine = Machine("vmx", "ept", "reference", virtualizable=False)
    try:
        machine.begin(one, one.image(stage.memory(one.mode)))
        vm, vcpu = machine.vm, machine.vm.vcpus[0]
        nmis = set(accumulate(one.nmis))
        for count in range(BUDGET):
            if count in nmis:
                vcpu.events.nmi()
                vcpu.look_now()
            before = vcpu.registers()
            rip, rdi = before["rip"], before["rdi"]
            code = vm.memory.read(rip, 8) if rip + 8 <= stage.END else b""
            stop = vm.go(budget=1, deadline_ns=DEADLINE_NS - vm.clock.now())
            after = vcpu.registers()
            low, high = sorted((rdi, after["rdi"]))
            if REPEATED.match(code) and low - 8 < rip < high + 8:
                done.add("itself")
            if before["cs"] & 3 and LOOKS.match(code):
                done.add("descriptors")
            if after["rip"] in AT_DOUBLE_FAULT:
                done.add("resume")
            if stop.kind is not StopKind.BUDGET:
                break
        return done
    finally:
        machine.vm.close()


def made(mode: str, number: int, seed: int) -> Fragment:
    """A fragment by its number."""
    return fragment(random.Random(f"{seed} {mode} {number}"), mode)


def alone(one: Fragment, choice: str) -> tuple[Difference, list[str]]:
    """Who differs in new VMs, and what those are."""
    bench = Bench(one.mode, random.Random(choice))
    try:
        return bench.run(one), bench.chosen
    finally:
        bench.close()


def report(one: Fragment, number: int, seed: int, choice: str, difference: Difference) -> str:
    """The smallest that differs, and how."""
    where = f"fragment {number} of seed {seed}, mode {one.mode}"
    who = next(iter(difference))
    small, (found, chosen) = one, alone(one, choice)
    if who not in found:
        return f"{where} differs only after others:\n{one.text()}\n{in_words(difference)}"
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for candidate in smaller(small):
            now, _ = alone(candidate, choice)
            if who in now:
                small, found, is_smaller = candidate, now, True
                break
    return f"{where} ({'; '.join(chosen)})\n{small.text()}\n{in_words(found)}"


def in_words(difference: Difference) -> str:
    """Which technique has what."""
    lines = []
    for technique, names in difference.items():
        lines.append(f"  {technique}, and vmx:")
        for name, (one, other) in names.items():
            if isinstance(one, bytes):
                longest = max(len(one), len(other))  # one that nobody compares is empty
                at = next(n for n in range(0, longest, 4) if one[n : n + 4] != other[n : n + 4])
                one, other = (f"{at:#x}: {text[at : at + 16].hex(' ', 4)}" for text in (one, other))
            lines.append(f"    {name}: {_text(one)}, {_text(other)}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    return hex(value) if isinstance(value, int) else str(value)
