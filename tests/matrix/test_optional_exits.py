"""Exits that a user asked for change what is counted, and nothing else.

Source: ours.  Invariant: two runs in virtual time, one with these exits, are the same run.
"""

import pytest

from tests.guests.fetched import fetched
from tests.matrix import programs as p
from understudy.execution import Execution
from understudy.execution.vmx.optional_exits import OPTIONAL
from understudy.linux import VM
from understudy.vm import VM as Bare

REASONS = {
    "cr3": "CR_ACCESS", "cr3-load": "CR_ACCESS", "cr3-store": "CR_ACCESS", "invlpg": "INVLPG",
    "pause": "PAUSE", "rdtsc": "RDTSC", "rdpmc": "RDPMC", "wbinvd": "WBINVD",
}  # fmt: skip
"""By which each says that it came."""
CODE = {
    "cr3": "0f 22 d8", "cr3-load": "0f 22 d8", "cr3-store": "0f 20 d8", "invlpg": "0f 01 3f",
    "pause": "f3 90", "rdtsc": "0f 31", "rdpmc": "0f 33", "wbinvd": "0f 09",
}  # fmt: skip
HALT = "fa f4"
OUT = "b0 05 e6 f4 | mov al, 5; out 0xf4, al"


def test_each_has_a_row_here() -> None:
    assert (
        REASONS.keys()
        == CODE.keys()
        == OPTIONAL.keys()
        == Execution.ALL["vmx"].optional_exits.keys()
    )


@pytest.mark.parametrize("name", OPTIONAL)
def test_asked_for_it_exits_once_and_else_never(name: str) -> None:
    """The truth table: one instruction, with its control 0 and 1."""
    found = []
    own = OPTIONAL[name]
    others = tuple(
        other for other, one in OPTIONAL.items()
        if not (one.primary & own.primary or one.secondary & own.secondary)
    )  # fmt: skip
    for exits in ((), (name,), others):
        with Bare("4M", exits=exits, cpu="max") as vm:
            vm.memory.write(0x1000, bytes.fromhex(CODE[name] + HALT))
            vm.vcpus[0].set_registers({"rip": 0x1000, "cs_base": 0, "cs": 0, "rcx": 0})
            vm.go(budget=100)
            found.append((vm.counts()["exits"].get(REASONS[name], 0), vm.vcpus[0].retired))

    assert [count for count, _ in found] == [0, 1, 0]
    assert len({retired for _, retired in found}) == 1


TECHNIQUES = [
    (execution, paging, name)
    for execution, technique in sorted(Execution.ALL.items())
    for paging in technique.goes_with()
    for name in technique.optional_exits
]


@pytest.mark.parametrize(("execution", "paging", "name"), TECHNIQUES)
def test_every_technique_does_what_it_names(execution: str, paging: str, name: str) -> None:
    """In a kernel of 64 bits; what else exits is as it is without, but for hidden faults."""
    found = []
    for exits in ((), (name,)):
        is_isa = Execution.ALL[execution].needs_all_traps
        with Bare(
            "16M", execution=execution, paging=paging, exits=exits, virtualizable_isa=is_isa
        ) as vm:
            code = f"0f 20 d8 | mov rax, cr3\n{CODE[name]} | it\n{OUT}"
            p.start(vm, code, rdi=p.DATA, rcx=0, **p.handle(vm, 13, OUT))
            stop = vm.go(budget=100)
            exited = vm.counts()["exits"]
            found.append((stop.status, vm.instructions, exited.get(REASONS[name], 0), exited))
    (status, instructions, before, without), (*same, after, asked) = found
    assert same == [status, instructions]
    assert after >= 1 and (after == 1 or name.startswith("cr3"))
    assert before in (0, after)
    others = (set(without) | set(asked)) - {REASONS[name], "EXCEPTION_OR_NMI"}
    assert {one: without.get(one) for one in others} == {one: asked.get(one) for one in others}


@pytest.mark.parametrize("execution", ["deprivileged", "bt"])
def test_what_would_not_come_is_refused(execution: str) -> None:
    with pytest.raises(ValueError, match=r"exits 'pause': expected one of cr3, .*, wbinvd"):
        Bare("16M", execution=execution, paging="lazy", exits=("pause",))


@pytest.mark.parametrize("name", sorted(OPTIONAL.keys() - {"pause"}))
def test_only_rdtsc_makes_translated_code_trap_for_time(name: str) -> None:
    with Bare("16M", execution="bt", paging="lazy", exits=(name,)) as vm:
        p.start(vm, f"0f 31 | rdtsc\n{OUT}")
        vm.go(budget=100)
        counts = vm.counts()
        assert counts["exits"].get("RDTSC", 0) == (name == "rdtsc")
        for what in ("handed_over", "traps"):
            assert ("RDTSC" in counts["execution"][what]) == (name == "rdtsc")


def test_one_name_asks_for_both_ways_of_cr3() -> None:
    with Bare("4M", exits=("cr3",)) as vm:
        vm.memory.write(0x1000, bytes.fromhex(CODE["cr3-store"] + CODE["cr3-load"] + HALT))
        vm.vcpus[0].set_registers({"rip": 0x1000, "cs_base": 0, "cs": 0})
        vm.go(budget=100)
        assert vm.counts()["exits"]["CR_ACCESS"] == 2


@pytest.mark.real_guest
@pytest.mark.parametrize("paging", ["ept", "lazy"])
def test_a_boot_is_the_same_to_the_last_instruction(paging: str) -> None:
    fetched("cloud-amd64")
    ends, exits = [], []
    for asked in ((), tuple(OPTIONAL)):
        with VM.linux("cloud-amd64", exits=asked, paging=paging, memory="128M") as vm:
            vm.wait_for_prompt()
            said = vm.run("dmesg").output
            registers = [vcpu.guest.registers() for vcpu in vm.vcpus]
            ends.append((said, vm.clock.now(), vm.vcpus[0].retired, registers))
            exits.append(vm.counts()["exits"])
    assert ends[0] == ends[1]
    assert exits[1]["PAUSE"] > 1000 and exits[1]["RDTSC"] > 1000
    assert exits[0].keys() < exits[1].keys()
