"""An interpreter pays for every instruction, a processor for none that it executes itself.

Claim: interpreting, the hypervisor executes tens to hundreds of its own instructions for each of
the guest's, sensitive or not; where hardware executes the guest, it executes none for an
instruction that does not exit.

Source: lecture, "Dealing with problematic ISAs": to interpret is the way that works on any ISA, and
"very slow".

Control: under VT-x the same loops, twice as long, cost the hypervisor not one instruction more.

Note: the hypervisor's machine is Python's, so its instructions are bytecodes, which are counted
exactly; each is some ten to a hundred of the computer's. Counted is what further rounds of a loop
add, so that decoding, starting and stopping are in neither. CLI and STI are the sensitive ones:
they do not exit here either way.
"""

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from understudy.guests.entry import CODE_64, long_mode, write_gdt
from understudy.lab import Bar, Experiment, Row, Table, absent, every
from understudy.linux import VM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CODE, DATA = 0x10_0000, 0x12_0000
BODIES: Final = {  # what stands four times in the loop
    "move": "48 89 c3",  # mov rbx, rax
    "add": "48 01 c3",  # add rbx, rax
    "load": "48 8b 1e",  # mov rbx, [rsi]
    "store": "48 89 1e",  # mov [rsi], rbx
    "read-modify-write": "48 01 06",  # add [rsi], rax
    "push and pop": "50 5b",  # push rax; pop rbx
    "CLI and STI": "fa fb",
}
TIMES: Final = 4
LEAST, MOST = 10, 1000  # bytecodes for an instruction
ROUNDS: Final = 200


class Bytecodes:
    """Counts the bytecodes that Python executes, while it is entered."""

    def __init__(self) -> None:
        self.count = 0

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.count += event == "opcode"
        return self._trace

    def __enter__(self) -> "Bytecodes":
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *problem: object) -> None:
        sys.settrace(self._before)


def _loop(execution: str, code: bytes, rounds: int) -> tuple[int, int]:
    """Bytecodes, and the guest's instructions, of so many rounds (and a start and an end)."""
    with VM("4M", execution=execution) as vm:
        vm.memory.write(CODE, code + bytes.fromhex("48 ff c9 75") + bytes((251 - len(code),)))
        vm.memory.write(CODE + len(code) + 5, bytes.fromhex("e6 f4"))  # out 0xf4, al
        write_gdt(vm.memory, CODE_64)
        vm.enter(long_mode(vm.memory, "loop", CODE, rcx=rounds, rsi=DATA, rsp=DATA - 64))
        with Bytecodes() as counted:
            vm.go()
        return counted.count, vm.instructions


def measure(execution: str, body: str, rounds: int) -> dict[str, Any]:
    """What `rounds` further rounds add."""
    code = bytes.fromhex(BODIES[body]) * TIMES
    (some, few), (all, many) = (_loop(execution, code, n * rounds) for n in (1, 2))
    added = all - some
    return {
        "instructions": many - few,
        "bytecodes": added,
        "per_instruction": added / (many - few),
    }


def _name(row: Row) -> str:
    return f"{row['execution']}: {row['body']}"


def check(table: Table) -> list[Bar]:
    """Nothing under VT-x, and something for every instruction under interpretation."""
    interpreted, executed = (table.where(execution=name) for name in ("emulate", "vmx"))
    return [
        every(f"interpreted, an instruction costs {LEAST} to {MOST} bytecodes", interpreted,
              lambda r: LEAST <= r["per_instruction"] <= MOST, lambda r: True, name=_name),
        absent(every("executed by hardware, it costs none", executed,
                     lambda r: r["bytecodes"], lambda r: 0, name=_name)),
        every("a round has as many instructions as the listing, however it is executed", table.rows,
              lambda r: r["instructions"],
              lambda r: ROUNDS * (2 + TIMES * (1 + (" and " in r["body"]))), name=_name),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """Bytecodes for each instruction of a body."""
    from understudy.lab.figure import bars

    bodies = table.values("body")

    def cost(body: str, execution: str) -> float | None:
        rows = table.where(body=body, execution=execution)
        return rows[0]["per_instruction"] if rows else None

    series = {
        name: [cost(body, name) for body in bodies] for name in table.values("execution")
    }  # fmt: skip
    bars(figure.add_subplot(), list(bodies), series, "bytecodes for each instruction of the guest")


EXPERIMENT = Experiment(
    measure=measure,
    guest="loops of a few instructions",
    sweep={"execution": ["emulate", "vmx"], "body": list(BODIES), "rounds": [ROUNDS]},
    columns=["execution", "body", "instructions", "bytecodes", "per_instruction"],
    slide=49,
    check=check,
    draw=draw,
)
