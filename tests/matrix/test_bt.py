"""A guest whose kernel is translated does exactly what it does in VMX operation, on any ISA.

What: the same guest under binary translation, on a processor whose sensitive instructions do not
all trap, and under VMX with the same paging technique; after every so many instructions all
registers, what was retired and the TSC are the same.
Invariant: VM entries are counted, so that a comparison of VMX with itself does not pass for one.
"""

from collections import Counter

import pytest

from tests.matrix import beside_vmx
from tests.matrix import programs as p
from tests.matrix.beside_vmx import Make
from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.control import ControlError, actions
from understudy.execution.bt import Bt, cache, translations, window
from understudy.linux import VM as LinuxVM
from understudy.verdict import StopKind

PAGINGS = ("eager", "lazy", "vtlb")


def agree(make: Make, step: int, most: int) -> tuple[str, Counter[str], Counter[str]]:
    return beside_vmx.agree(make, step, most, "bt")


def small(program: str, engine: str, paging: str, **handlers: str) -> Make:
    return beside_vmx.small(program, engine, paging, virtualizable=False, **handlers)


def linux(guest: str, paging: str, engine: str = "dbt") -> Make:
    return beside_vmx.linux(guest, paging, engine, virtualizable=False)


@pytest.mark.parametrize("paging", PAGINGS)
@pytest.mark.parametrize("engine", ["dbt", "reference"])
def test_a_line_is_printed(engine: str, paging: str) -> None:
    stop, traps, handed_over = agree(small(p.HELLO, engine, paging), 1, 1000)
    assert stop == StopKind.DEBUG_EXIT
    assert traps == {"OUT": 7}
    assert not handed_over


@pytest.mark.parametrize("engine", ["dbt", "reference"])
def test_a_timer_interrupts(engine: str) -> None:
    make = small(p.PIT, engine, "lazy", v20=p.PIT_HANDLER)
    stop, traps, handed_over = agree(make, 7, 100_000)
    assert stop == StopKind.DEBUG_EXIT
    assert traps == {"OUT": 14, "HLT": 5, "IRETQ": 1}  # before its target is known
    assert not handed_over


def test_the_built_in_guest() -> None:
    stop, _, handed_over = agree(linux("hello", "lazy"), 1, 100_000)
    assert stop == StopKind.POWEROFF
    assert not handed_over


KINDS = """
    be 00 00 12 00       | mov esi, DATA
    b9 05 00 00 00       | mov ecx, 5
    e8 33 00 00 00       | next: call sub
    48 8d 05 2c 00 00 00 | lea rax, [rel sub]
    ff d0                | call rax
    48 89 06             | mov [rsi], rax
    ff 16                | call [rsi]
    9c                   | pushfq
    5b                   | pop rbx
    fa                   | cli
    9c                   | pushfq
    5a                   | pop rdx
    fb                   | sti
    8c c8                | mov eax, cs
    66 41 8c d1          | mov r9w, ss
    88 0d 02 00 00 00    | mov [rel patched + 2], cl
    83 c5 11             | patched: add ebp, 0x11
    48 8d 05 03 00 00 00 | lea rax, [rel over]
    ff e0                | jmp rax
    f4                   | hlt
    ff c9                | over: dec ecx
    75 ca                | jnz next
    e6 f4                | out 0xf4, al
    41 01 c8             | sub: add r8d, ecx
    c3                   | ret
"""


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("engine", ["dbt", "reference"])
def test_calls_jumps_flags_and_code_that_is_written(engine: str, step: int) -> None:
    stop, traps, handed_over = agree(small(KINDS, engine, "lazy"), step, 1000)
    assert stop == StopKind.DEBUG_EXIT
    assert traps == {"OUT": 1}
    assert handed_over == {"write to code": 5}  # MOV, each time it is executed


ENDS = "e6 f4 | out 0xf4, al"
FAULTS = {
    "a return to where nothing can be": "6a 00 48 c7 04 24 00 00 00 00 48 0f ba 2c 24 3e c3",
    "a push where there is no stack": "48 bc 00 00 00 00 02 00 00 00 9c",
    "a call without a stack": "48 bc 00 00 00 00 02 00 00 00 e8 00 00 00 00",
    "an indirect call through nothing": "31 c0 48 0f ba e8 21 ff 10",
    "what is no instruction": "0f 0b",
    "a breakpoint": "cc",
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("engine", ["dbt", "reference"])
def test_faults_are_where_the_guest_has_them(engine: str, name: str) -> None:
    """The stack may be the fault: then it ends in a triple fault, here as there."""
    handlers = {"v03": ENDS, "v06": ENDS, "v0d": ENDS, "v0e": ENDS}
    stop, _, _ = agree(small(FAULTS[name], engine, "lazy", **handlers), 1, 1000)
    assert stop != StopKind.BUDGET


def test_a_guest_that_lies_about_what_it_costs() -> None:
    lies = """
        48 b8 18 00 00 00 00 80 ff ff | mov rax, EXTRA, in the window
        83 00 7f                      | again: add dword [rax], 127
        eb fb                         | jmp again
    """
    with small(lies, "dbt", "lazy")("bt") as vm:
        assert vm.go(budget=10_000).kind == StopKind.BUDGET
        assert vm.instructions == 10_000


def test_a_full_cache_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cache, translations, window):
        monkeypatch.setattr(module, "CHUNK", 1)
    monkeypatch.setattr(cache, "CHUNK_BYTES", PAGE)
    monkeypatch.setattr(cache, "CODE_BYTES", PAGE)
    made = small(KINDS, "dbt", "lazy")
    with made("bt") as vm:
        vm.go(budget=100)
        assert vm.counts()["execution"]["translated"]["caches"] > 1
    stop, _, _ = agree(made, 1, 1000)
    assert stop == StopKind.DEBUG_EXIT


def test_another_frame_is_other_code() -> None:
    with small(KINDS, "dbt", "lazy")("bt") as vm:
        vm.go(budget=20)
        gfn, guest = p.CODE >> PAGE_SHIFT, beside_vmx.guest_of(vm)
        assert isinstance(guest, Bt) and guest.has_code(gfn)
        old = vm.memory.p2m.lookup(gfn)
        vm.memory.p2m.map(gfn, vm.host.frames.allocate(), 1)
        assert old is not None and not guest.has_code(gfn)
        vm.host.release(old)


def test_what_is_counted_and_shown() -> None:
    with small(KINDS, "dbt", "lazy")("bt") as vm:
        vm.go(budget=200)
        told = vm.counts()["execution"]
        assert told["translated"]["units"] > 5
        assert 0 < told["translated"]["copies"] < told["translated"]["instructions"]
        assert told["handed_over"] == {"write to code": 5}
        text = actions.unit(vm, {"address": f"{p.CODE + 0x3C:#x}"})
        assert "dec ecx" in text and "callout" in text
        with pytest.raises(ControlError, match="no code at 0x5 is translated"):
            actions.unit(vm, {"address": "0x5"})
    with small(KINDS, "dbt", "lazy")("vmx") as vm, pytest.raises(ControlError, match="'bt'"):
        actions.unit(vm, {"address": f"{p.CODE:#x}"})


def test_a_snapshot_goes_on_as_the_guest_would() -> None:
    with small(KINDS, "dbt", "lazy")("bt") as vm:
        vm.go(budget=37)
        image = vm.snapshot()
        (clone,) = image.fork(1)
        with clone:
            assert clone.go(budget=1000).kind == StopKind.DEBUG_EXIT
            assert vm.go(budget=1000).kind == StopKind.DEBUG_EXIT
            assert beside_vmx.seen(clone) == beside_vmx.seen(vm)
        image.close()


@pytest.mark.real_guest
@pytest.mark.parametrize("paging", PAGINGS)
@pytest.mark.parametrize("guest", ["cloud-amd64", "686"])
def test_the_beginning_of_a_boot(guest: str, paging: str) -> None:
    _, traps, handed_over = agree(linux(guest, paging), 100_000, 6_000_000)
    assert traps["MOV CR"] and not traps["CLI"]
    assert handed_over.total() < 2000


@pytest.mark.real_guest
@pytest.mark.slow
@pytest.mark.parametrize("guest", ["cloud-amd64", "686"])
def test_a_whole_boot(guest: str) -> None:
    _, traps, handed_over = agree(linux(guest, "lazy"), 1_000_000, 280_000_000)
    assert sum(traps.values()) > 20_000
    assert handed_over.total() < 5000


@pytest.mark.real_guest
@pytest.mark.slow
@pytest.mark.parametrize(
    ("guest", "paging"),
    [
        ("686", "lazy"), ("686", "vtlb"), ("cloud-amd64", "eager"), ("686-pae", "lazy"),
        ("amd64", "lazy"),
    ],
)  # fmt: skip
def test_commands_and_a_power_off(guest: str, paging: str) -> None:
    with linux(guest, paging)("bt") as vm:
        assert isinstance(vm, LinuxVM)
        vm.wait_for_agent(timeout_wall_s=3000)
        result = vm.run("uname -s; ls / | wc -l", timeout_wall_s=900)
        assert result.output.startswith("Linux\n")
        vm.power_off(timeout_wall_s=900)


@pytest.mark.parametrize("paging", PAGINGS)
def test_that_code_was_fetched_makes_no_other_code_of_it(paging: str) -> None:
    """The accessed flags that the first walk to code sets are no reason to translate it anew."""
    loads = "0f 20 d8 0f 22 d8 | mov rax, cr3; mov cr3, rax\n" * 3
    with small(f"{loads}{ENDS}", "dbt", paging)("bt") as vm:
        assert vm.go(budget=1000).kind == StopKind.DEBUG_EXIT
        told = vm.counts()["execution"]["translated"]
    assert told["caches"] == 1
