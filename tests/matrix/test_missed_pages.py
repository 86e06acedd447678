"""A guest that is told of its misses does something else meanwhile, and is told when to go on.

Source: Linux, Documentation/virt/kvm/x86/msr.rst.  Counts are asserted, and virtual times.
"""

import struct
from collections.abc import Sequence
from typing import Any

import pytest

from tests.matrix import programs as p
from tests.matrix.test_overcommit import made
from understudy.host import Host
from understudy.linux import VM
from understudy.paging import Paging
from understudy.sched.seat import State
from understudy.vcpu.async_pf import MOST
from understudy.verdict import StopKind

READ_NS, MS = 300_000, 1_000_000
FIRST, PAGE = 0x20_0000, 0x1000
AREA, TOLD, READY, SUM = p.DATA, 0x13_0000, 0x13_1000, p.DATA + 0x40
EOI = 0xFEE0_00B0
PF, VECTOR = 14, 0x50
SUMS = """
    b0 ff                | mov al, 0ffh
    e6 21                | out 21h, al
    31 d2                | xor edx, edx
    b9 06 4d 56 4b       | mov ecx, KVM_ASYNC_PF_INT
    b8 50 00 00 00       | mov eax, 50h
    0f 30                | wrmsr
    b9 02 4d 56 4b       | mov ecx, KVM_ASYNC_PF_EN
    b8 0b 00 12 00       | mov eax, AREA | 0bh
    0f 30                | wrmsr
    fb                   | sti
    31 c0                | xor eax, eax
    48 03 07             | next: add rax, [rdi]
    48 81 c7 00 10 00 00 | add rdi, 4096
    48 39 f7             | cmp rdi, rsi
    72 f1                | jb next
    fa                   | again: cli
    49 8d 88 00 10 00 00 | lea rcx, [r8 + READY - TOLD]
    4c 39 c9             | cmp rcx, r9
    74 04                | je done
    fb                   | sti
    f4                   | hlt
    eb ef                | jmp again
    48 89 43 40          | done: mov [rbx + 40h], rax
    e6 f4                | out 0f4h, al
"""
"""Adds the first words of pages, and halts until each token has come back.

RBX: the area; RDI, RSI: the pages; R8, R9: where tokens are written down as they are told; R10: the
APIC's register for the end of an interrupt."""
NOT_PRESENT = """
    83 3b 01             | cmp dword [rbx], 1
    75 16                | jne bad
    0f 20 d2             | mov rdx, cr2
    41 89 10             | mov [r8], edx
    49 83 c0 04          | add r8, 4
    c7 03 00 00 00 00    | mov dword [rbx], 0
    48 83 c4 08          | add rsp, 8
    48 cf                | iretq
    0f 0b                | bad: ud2
"""
PAGE_READY = """
    50                   | push rax
    8b 53 04             | mov edx, [rbx + 4]
    41 89 11             | mov [r9], edx
    49 83 c1 04          | add r9, 4
    c7 43 04 00 00 00 00 | mov dword [rbx + 4], 0
    31 d2                | xor edx, edx
    b9 07 4d 56 4b       | mov ecx, KVM_ASYNC_PF_ACK
    b8 01 00 00 00       | mov eax, 1
    0f 30                | wrmsr
    41 c7 02 00 00 00 00 | mov dword [r10], 0
    58                   | pop rax
    48 cf                | iretq
"""


def summing(host: Host, pages: int, program: str = SUMS, **options: Any) -> VM:
    """A VM that is about to sum pages up, all of which are out."""
    vm = host.vm("16M", name="sums", cpu="max", table_memory="2M", **options)
    idtr = p.handle(vm, PF, NOT_PRESENT) | p.handle(vm, VECTOR, PAGE_READY)
    for n in range(pages):
        vm.memory.write_u64(FIRST + n * PAGE, n + 1)
    for gpa in (AREA, TOLD, READY):
        vm.memory.write(gpa, bytes(PAGE))
    p.start(
        vm,
        program,
        rbx=AREA,
        rdi=FIRST,
        rsi=FIRST + pages * PAGE,
        r8=TOLD,
        r9=READY,
        r10=EOI,
        **idtr,
    )
    evict(host, vm, range(FIRST // PAGE, FIRST // PAGE + pages))
    return vm


def evict(host: Host, vm: VM, gfns: Sequence[int]) -> None:
    """Just these go into the swap file."""
    swap = host.stock.swap
    assert swap is not None
    choose = swap._victims.choose
    swap._victims.choose = lambda p2m, count, may_go: list(gfns)  # type: ignore[method-assign]
    assert swap.reclaim(vm.memory.p2m, len(gfns)) == len(gfns)
    swap._victims.choose = choose  # type: ignore[method-assign]


def tokens(vm: VM, at: int) -> tuple[int, ...]:
    """Those that the guest has written down."""
    words = struct.unpack("<1024I", vm.memory.read(at, PAGE))
    return words[: words.index(0)]


def counts(vm: VM) -> dict[str, int]:
    return dict(vm.vcpus[0].kvm.async_pf.state.counts)


def over(host: Host, vm: VM) -> int:
    """Run it to its end: virtual time since, in ns."""
    began = host.schedule.time.now()
    while vm.ended is None:
        assert host.schedule.time.now() < began + 200 * MS
        host.run(deadline_ns=host.schedule.time.now() + MS // 10)
    assert vm.ended.kind == StopKind.DEBUG_EXIT
    return host.schedule.time.now() - began


def run(pages: int, program: str = SUMS, **options: Any) -> dict[str, Any]:
    """All that is found after it has run alone."""
    with made("64M", is_always=True, scan=0, read_ns=READ_NS) as host:
        vm = summing(host, pages, program, **options)
        swap, reads = host.stock.swap, host.stock.swap.read if host.stock.swap else 0
        assert swap is not None
        ns = over(host, vm)
        host.schedule.settle()
        return {
            "told": tokens(vm, TOLD), "ready": tokens(vm, READY), "counts": counts(vm), "ns": ns,
            "sum": vm.memory.read_u64(SUM), "reads": swap.read - reads,
            "blocked": vm.claim.seats[0].counts.ns[State.BLOCKED], "retired": vm.instructions,
        }  # fmt: skip


@pytest.mark.parametrize("paging", Paging.ALL)
def test_it_goes_on_and_is_told_when_each_page_has_come(paging: str) -> None:
    pages = 50
    found = run(pages, paging=paging)
    assert found["sum"] == sum(range(1, pages + 1)) and found["reads"] == pages
    assert found["counts"] == {"not present told": pages, "ready told": pages}
    assert len(set(found["told"])) == pages and found["ready"] == found["told"]
    assert found["ns"] < 2 * READ_NS, "all of them at the same time"
    assert run(pages, paging=paging) == found, "two runs are the same"


def test_who_waits_for_as_many_as_can_be_waits_as_ever() -> None:
    found = run(MOST + 36)
    assert found["counts"] == {
        "not present told": MOST + 35, "waited instead": 1, "ready told": MOST + 35,
    }  # fmt: skip
    assert found["ready"] == found["told"]


def test_control_who_has_not_enabled_it_waits_for_each() -> None:
    pages = 50
    found = run(pages, SUMS.replace("b8 0b 00 12 00", "b8 0a 00 12 00"))
    assert found["sum"] == sum(range(1, pages + 1)) and found["reads"] == pages
    assert found["counts"] == {} and found["told"] == found["ready"] == ()
    assert found["blocked"] >= pages * READ_NS


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_copy_is_told_what_is_outstanding(elsewhere: bool) -> None:
    """Also on a host of its own, which has memory enough."""
    pages = 50
    with made("64M", is_always=True, scan=0, read_ns=READ_NS) as host:
        vm = summing(host, pages)
        while counts(vm).get("not present told", 0) < pages:
            host.run(deadline_ns=host.schedule.time.now() + MS // 100)
        assert counts(vm) == {"not present told": pages}
        again = VM.restore(vm.save(), host=None if elsewhere else host)
        with again:
            if elsewhere:
                again.go()
            else:
                over(host, again)
            assert tokens(again, READY) == tokens(again, TOLD) and len(tokens(again, READY)) == 50
            assert again.memory.read_u64(SUM) == sum(range(1, pages + 1))
        over(host, vm)
        assert tokens(vm, READY) == tokens(vm, TOLD)


LIES = {
    "an area where no RAM is": (b"\x0b\x00\x12\x00", b"\x0b\x00\x00\xfe"),
    "a vector of an exception": (b"\xb8\x50", b"\xb8\x0e"),
    "it acknowledges nothing": (b"\xb8\x01\x00\x00\x00\x0f\x30", b"\xb8\0\0\0\0\x0f\x30"),
    "it never takes the flags": (b"\xc7\x03\0\0\0\0", b"\xc7\x03\1\0\0\0"),
    "it never takes a token": (b"\xc7\x43\x04\0\0\0\0", b"\xc7\x43\x04\1\0\0\0"),
    "it never comes out of its handler": (b"\x0f\x20\xd2", b"\xeb\xfe\x90"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_guest_that_lies_harms_only_itself(lie: str) -> None:
    """Another VM of its host has its own misses told as ever."""
    with made("64M", is_always=True, scan=0, read_ns=READ_NS) as host:
        liar, other = summing(host, 50), summing(host, 50)
        said, meant = LIES[lie]
        for at in (p.CODE, p.HANDLERS + PF * 64, p.HANDLERS + VECTOR * 64):
            liar.memory.write(at, liar.memory.read(at, 64).replace(said, meant))
        over(host, other)
        assert tokens(other, READY) == tokens(other, TOLD) and len(tokens(other, TOLD)) == 50
        host.run(deadline_ns=host.schedule.time.now() + 40 * MS)
        assert liar.ended is None or liar.ended.kind != StopKind.ERROR
