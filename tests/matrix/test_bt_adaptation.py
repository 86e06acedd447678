"""An instruction that keeps trapping on page tables is called out, and copied again when it stops.

What: the teaching kernel's writes to one of its tables, counted from the first; small programs that
write tables and then elsewhere by the same instructions, beside VMX after each instruction.
Source: Adams and Agesen, "A Comparison of Software and Hardware Techniques for x86 Virtualization".
"""

import pytest

from tests.matrix import programs as p
from tests.matrix.beside_vmx import guest_of, together
from tests.matrix.test_bt import ENDS, PAGINGS, small
from understudy.execution.bt.adaptation import INNOCENT, MOST, SITES_KEPT, TRAPS, Sites
from understudy.execution.bt.technique import Bt
from understudy.guests.entry import PAGE_TABLES_GPA
from understudy.lab.teaching import booted, counted
from understudy.verdict import StopKind

ENTRY = PAGE_TABLES_GPA + 0x2000 + 8 * 300  # maps 2 MBytes of which no program here knows
TIMES = 100
STORES = {64: 1, 32: 2}  # that write one entry


def little(value: int) -> str:
    return value.to_bytes(4, "little").hex()


def loop(body: str, address: int, times: int) -> str:
    """EDI and EBX: the address, and what is there."""
    return f"""
        bf {little(address)}   | mov edi, address
        48 8b 1f               | mov rbx, [rdi]
        b9 {little(times)}     | mov ecx, times
        ff d5                  | call rbp
    """


WRITES = {
    "MOV": "48 89 1f | mov [rdi], rbx",
    "MOV, half": "89 1f | mov [rdi], ebx",
    "XCHG": "48 89 d8 48 87 07 | mov rax, rbx; xchg [rdi], rax",
    "BTS": "48 0f ba 2f 05 | bts qword [rdi], 5",
    "AND": "48 83 27 ff | and qword [rdi], -1",
    "CMPXCHG": "48 89 d8 f0 48 0f b1 1f | mov rax, rbx; lock cmpxchg [rdi], rbx",
    "STOSQ": "48 89 d8 57 48 ab 5f | mov rax, rbx; push rdi; stosq; pop rdi",
}


def program(write: str, times: tuple[int, int, int]) -> str:
    """A subroutine writes an entry, then data, then the entry again."""
    body = p.assemble(write)
    code = body + bytes.fromhex("ff c9") + bytes((0x75, 0xFE - 2 - len(body) & 0xFF)) + b"\xc3"
    calls = "".join(loop(write, at, n) for at, n in zip((ENTRY, p.DATA, ENTRY), times, strict=True))
    main = p.assemble(f"{calls}\n{ENDS}")
    at = p.CODE + 5 + len(main)
    return f"bd {little(at)} | mov ebp, subroutine\n{main.hex()} |\n{code.hex()} |"


@pytest.mark.parametrize("bits", [64, 32])
def test_the_eighth_trap_is_the_last(bits: int) -> None:
    with booted("bt", "eager", bits) as vm:
        first, again = (counted(vm, "ptemod", TIMES) for _ in range(2))
    stores, traps = STORES[bits], TRAPS - 1  # the first was when the kernel began
    assert first["faults"]["trace"] == traps * stores
    assert first["execution"]["translated"]["called out"] == stores
    written = TIMES + 1  # the first makes the entry
    assert first["execution"]["translated"]["table writes"] == (written - traps) * stores
    assert not again["faults"].get("trace")
    assert again["execution"]["translated"]["table writes"] == TIMES * stores


@pytest.mark.parametrize("paging", PAGINGS)
@pytest.mark.parametrize("name", WRITES)
def test_whatever_it_writes_it_does_the_same(name: str, paging: str) -> None:
    make = small(program(WRITES[name], (3 * TRAPS, 3 * INNOCENT, 5 * TRAPS)), "dbt", paging)
    with make("bt") as one, make("vmx") as other:
        assert together(one, other, 1, 10_000) == StopKind.DEBUG_EXIT
        guest, told = guest_of(one), one.counts()["execution"]["translated"]
        traces = one.counts()["faults"]["trace"]
    assert isinstance(guest, Bt)
    if paging != "eager":
        assert traces <= 2
        return
    if name == "STOSQ":
        assert told["called out"] == 1
        assert "table writes" not in told
        assert traces == 8 * TRAPS
        return
    assert told["called out"] == 2
    assert told["copied again"] == 1
    assert traces == 3 * TRAPS  # eight, then sixteen
    assert told["table writes"] == 2 * TRAPS + 3 * INNOCENT + 3 * TRAPS


def test_where_only_the_first_of_many_writes_would_trap_it_is_copied_again() -> None:
    make = small(program(WRITES["MOV"], (3 * INNOCENT, 1, 1)), "dbt", "lazy")
    with make("bt") as one, make("vmx") as other:
        guest = guest_of(one)
        assert isinstance(guest, Bt)
        guest.sites.first = 1
        assert together(one, other, 1, 10_000) == StopKind.DEBUG_EXIT
        found = one.counts()
    told = found["execution"]["translated"]
    assert found["faults"]["trace"] == told["called out"] == told["copied again"] == 1
    assert told["table writes"] == INNOCENT


def test_sites_that_are_kept_are_few() -> None:
    sites = Sites()
    sites.first = 1
    called = [sites.trapped(rip) for rip in range(2 * SITES_KEPT)]
    assert sum(called) == len(sites.called_out) == SITES_KEPT // 2
    assert all(called[: SITES_KEPT // 2])
    for rip in range(INNOCENT):
        sites.refuse(rip)
    assert not any(sites.trapped(0) for _ in range(1000))


def test_each_time_it_takes_twice_as_many_up_to_a_bound() -> None:
    sites, times = Sites(), []
    for _ in range(5):
        times.append(1)
        while not sites.trapped(1):
            times[-1] += 1
        assert not sites.wrote(1, is_guilty=True)
        assert not any(sites.wrote(1, is_guilty=False) for _ in range(INNOCENT))
        assert sites.wrote(1, is_guilty=False)
    assert times == [TRAPS, 2 * TRAPS, 4 * TRAPS, MOST, MOST]


def test_one_that_was_guilty_often_may_write_elsewhere_for_a_while() -> None:
    sites = Sites()
    assert any(sites.trapped(1) for _ in range(TRAPS))
    assert not any(sites.wrote(1, is_guilty=True) for _ in range(1000))
    assert [sites.wrote(1, is_guilty=False) for _ in range(MOST)].index(True) == MOST - 1
