"""The teaching kernel as a guest that does one thing N times, and what that costs.

Source: guests/teaching/user/program.c, the shell's command `many`.  Invariant: nothing else happens
between the two lines that the guest prints around it, but for its timer, 100 times a second.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, Self

from understudy.console import Console
from understudy.lab import native
from understudy.lab.techniques import since
from understudy.linux import VM
from understudy.silicon import Processor
from understudy.verdict import Stop

BUDGET: Final = 2_000_000_000
PROMPT, BEGIN, END = b"$ ", b"begin\n", b"end\n"


class Machine(Protocol):
    """What runs it: a VM, or a computer without a hypervisor."""

    @property
    def console(self) -> Console: ...
    @property
    def processors(self) -> Sequence[Processor]: ...
    @property
    def instructions(self) -> int: ...
    def counts(self) -> dict[str, Any]: ...
    def go(self, *, budget: int, until: Callable[[], bool]) -> Stop: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


def kernel(execution: str, bits: int = 64) -> str:
    """The guest for a technique of execution."""
    return f"teaching{'-pv' if execution == 'pv' else ''}{'' if bits == 64 else '-32'}"


def booted(execution: str, paging: str, bits: int = 64, append: str = "", **options: Any) -> VM:
    """A VM whose guest waits for a command."""
    vm = VM.linux(
        kernel(execution, bits), execution=execution, paging=paging, append=append, memory="32M",
        virtualizable_isa=execution == "deprivileged", **options,
    )  # fmt: skip
    _to_prompt(vm)
    return vm


def bare(bits: int = 64) -> native.Computer:
    """The same without a hypervisor."""
    computer = native.Computer(kernel("native", bits))
    _to_prompt(computer)
    return computer


def _to_prompt(vm: Machine) -> None:
    try:
        said = bytearray()
        vm.console.on_output.append(said.extend)
        _until(vm, said, PROMPT)
        vm.console.on_output.remove(said.extend)
    except BaseException:
        vm.close()
        raise


def counted(vm: Machine, what: str, times: int) -> dict[str, Any]:
    """What is counted while the guest does it."""
    said = bytearray()
    vm.console.on_output.append(said.extend)
    vm.console.send(f"many {what} {times}\r".encode())
    _until(vm, said, BEGIN)
    before = vm.counts()
    _until(vm, said, END)
    after = vm.counts()
    _until(vm, said, PROMPT)
    vm.console.on_output.remove(said.extend)
    return since(after, before)


def kinds(found: dict[str, Any]) -> dict[str, int]:
    """What was counted, sorted: true, trace and hidden faults, writes to tables that are called out
    by translated code, and every other way to come to the hypervisor.
    """
    own, exits = found.get("execution", {}), sum(found["exits"].values())
    came = own.get("crossings", exits) + sum(own.get("handed_over", {}).values())
    faults = {kind: found["faults"].get(kind, 0) for kind in ("true", "trace", "hidden")}
    faults["called out"] = own.get("translated", {}).get("table writes", 0)
    return faults | {"other": came - sum(faults.values())}


def between(vm: Machine, what: str, few: int, many: int) -> dict[str, int]:
    """How many more of each kind it takes to do it `many` times, not `few`."""
    less, more = (kinds(counted(vm, what, times)) for times in (few, many))
    return {kind: more[kind] - less[kind] for kind in more}


def executed(vm: Machine, what: str) -> tuple[float, float]:
    """The guest's own instructions for one time, and the processor's."""
    found = []
    for times in (100, 200):  # as many digits, so all around it is the same
        guest, processor = vm.instructions, vm.processors[0].retired
        counted(vm, what, times)
        found.append((vm.instructions - guest, vm.processors[0].retired - processor))
    (guest, processor), (more, more_by_processor) = found
    return (more - guest) / 100, (more_by_processor - processor) / 100


def beyond(vm: Machine, what: str) -> float:
    """Instructions that the processor executes beyond the guest's own, for one time."""
    guest, processor = executed(vm, what)
    return processor - guest


def _until(vm: Machine, said: bytearray, text: bytes) -> None:
    stop = vm.go(budget=BUDGET, until=lambda: text in said)
    if text not in said:
        raise RuntimeError(f"expected {text!r} of the guest, got {stop.kind} after {bytes(said)!r}")
