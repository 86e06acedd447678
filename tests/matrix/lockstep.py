"""Two machines side by side, and the first instruction after which they differ.

What: runs a VM of each engine in equal steps, compares a hash of the whole processor after each
step and of all memory now and then, and if they differ runs them again in ever smaller steps.
Source: none.  Invariant: what is compared is everything that a guest can see, and all that is
counted; what the engines themselves count is not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from understudy.guests.entry import GuestError
from understudy.linux import VM as LinuxVM
from understudy.verdict import StopKind
from understudy.vm import VM

ENGINES = ("dbt", "reference")
PROMPT = b"understudy# "
AGAIN = (10_000, 100, 1)  # instructions in a step when a difference is looked for


def linux(
    engine: str = "dbt",
    guest: str = "cloud-amd64",
    clock: str = "virtual",
    append: str = "",
    paging: str = "ept",
    initrd: Path | None = None,
    cpu: str = "understudy",
    cpus: int = 1,
    agent: str = "auto",
) -> LinuxVM:
    """The guest, loaded; skips the test if it is not in the cache and cannot be fetched."""
    try:
        return LinuxVM.linux(
            guest,
            engine=engine,
            clock=clock,
            append=append,
            paging=paging,
            initrd=initrd,
            cpus=cpus,
            cpu=cpu,
            agent=agent,
        )
    except GuestError as problem:
        pytest.skip(f"no guest {guest}: {problem}")


def type_at_prompt(vm: VM, text: str) -> None:
    """Have `text` typed as soon as the guest's console shows a prompt."""
    heard = bytearray()

    def listen(data: bytes) -> None:
        if PROMPT not in heard:
            heard.extend(data)
            if PROMPT in heard:
                vm.console.send(text.encode())

    vm.console.on_output.append(listen)


def memory_hash(vm: VM) -> list[int]:
    """A hash of each 2 MBytes of the guest's RAM, wherever it lies on the host."""
    pieces = [
        extent
        for gfn, count in vm.memory.layout()
        for first in range(gfn, gfn + count, 512)
        for extent in vm.memory.p2m.within(first, min(512, gfn + count - first))
    ]
    return [vm.host.memory.hash(e.pfn << 12, e.frames << 12) for e in pieces]


def counted(vm: VM) -> dict[str, Any]:
    """All that is counted but what concerns the engine alone."""
    counts = vm.counts()
    del counts["engine"]
    return counts


@dataclass
class Pair:
    """The same guest under each engine, at the same instruction."""

    dbt: VM
    reference: VM
    stops: Sequence[str] = ("", "")

    @classmethod
    def of(cls, make: Callable[[str], VM]) -> "Pair":
        return cls(make("dbt"), make("reference"))

    def step(self, instructions: int, **limits: Any) -> bool:
        """Both go on by as much; whether they could.  limits: as `VM.go` has them."""
        self.stops = [
            vm.go(budget=instructions, **limits).kind for vm in (self.dbt, self.reference)
        ]
        return self.stops == [StopKind.BUDGET, StopKind.BUDGET]

    def agrees(self, with_memory: bool = False) -> bool:
        """Whether nothing differs."""
        one, other = self.dbt, self.reference
        return (
            self.stops[0] == self.stops[1]
            and one.instructions == other.instructions
            and one.processors[0].state_hash() == other.processors[0].state_hash()
            and (not with_memory or memory_hash(one) == memory_hash(other))
        )

    def difference(self) -> str:
        """What differs, in words."""
        one, other = ({**_seen(vm), "memory": memory_hash(vm)} for vm in (self.dbt, self.reference))
        lines = [
            f"  {name}: dbt {_text(one[name])}, reference {_text(other.get(name))}"
            for name in one
            if one[name] != other.get(name)
        ]
        lines.insert(0, f"  last stops: {self.stops}")
        return "\n".join([*lines, "the reference:", self.reference.describe()])

    def close(self) -> None:
        self.dbt.close()
        self.reference.close()


def _seen(vm: VM) -> dict[str, Any]:
    processor = vm.processors[0]
    state = {"fxsave": processor.fxsave().hex(), "tsc": processor.tsc}
    state |= {f"ymm{n}": processor.ymm(n).hex() for n in range(16)}
    return processor.registers() | state | counted(vm)


def _text(value: Any) -> str:
    return hex(value) if isinstance(value, int) else str(value)


def assert_agreement(
    make: Callable[[str], VM],
    *,
    step: int,
    memory_every: int,
    done: Callable[[Pair], bool] = lambda pair: False,
) -> str:
    """The engines agree after every `step` instructions until `done`, or until both end alike.

    Returns how the last step ended.  make: a VM for an engine, the same every time.
    memory_every: steps between hashes of memory.
    """
    pair = Pair.of(make)
    steps, goes_on, agrees = 0, True, True
    try:
        while goes_on and agrees and not done(pair):
            goes_on = pair.step(step)
            steps += 1
            agrees = pair.agrees(with_memory=steps % memory_every == 0)
        if agrees and pair.agrees(with_memory=True):
            return pair.stops[0]
        report = pair.difference()
    finally:
        pair.close()
    window = step * memory_every if agrees or steps % memory_every == 0 else step
    pytest.fail(
        f"the engines differ after {steps} steps of {step} instructions:\n{report}\n"
        + first_difference(make, max(steps * step - window, 0), window)
    )


def first_difference(make: Callable[[str], VM], start: int, window: int) -> str:
    """The first instruction after which the engines differ, from there on, memory included."""
    for step in AGAIN:
        if step > window:
            continue
        pair = Pair.of(make)
        try:
            if start:
                pair.step(start)
            goes_on = True
            before, at = pair.reference.describe(), pair.reference.instructions
            while pair.agrees(with_memory=True):
                before, at = pair.reference.describe(), pair.reference.instructions
                if at >= start + window or not goes_on:
                    return f"in steps of {step} they agree up to instruction {at}"
                goes_on = pair.step(step)
            report = f"first difference after instruction {at}, before:\n{before}\n"
            report += f"after {step} more:\n{pair.difference()}"
        finally:
            pair.close()
        start, window = at, step
    return report
