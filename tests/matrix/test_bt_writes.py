"""A write to a frame with translated code costs one fault a frame, however long it is.

What: instructions, repeated ones and a loop that clear or fill a frame from which something was
translated, from another frame and from their own, beside VMX; what VMX executed in place of a
translation is counted.
Invariant: what comes behind such a write in the same unit is what was written.
"""

import pytest

from tests.matrix import beside_vmx
from tests.matrix import programs as p
from tests.matrix.test_bt import ENDS, PAGINGS, agree, small
from tests.matrix.test_bt_hostile import with_program
from understudy.arch.address import PAGE
from understudy.verdict import StopKind

SUBROUTINE = p.CODE + PAGE
CALL = f"""
    be {SUBROUTINE.to_bytes(4, "little").hex()} | mov esi, SUBROUTINE
    ff d6                | call rsi
"""
COUNT = "b9 00 10 00 00 | mov ecx, 4096"
FROM_ANOTHER = {
    "REP STOSB": f"""
        89 f7                | mov edi, esi
        {COUNT}
        31 c0                | xor eax, eax
        f3 aa                | rep stosb
    """,
    "REP STOSB, downwards": f"""
        8d be ff 0f 00 00    | lea edi, [rsi + 4095]
        {COUNT}
        31 c0                | xor eax, eax
        fd                   | std
        f3 aa                | rep stosb
        fc                   | cld
    """,
    "REP MOVSB": f"""
        89 f7                | mov edi, esi
        be 00 00 12 00       | mov esi, DATA
        {COUNT}
        f3 a4                | rep movsb
    """,
    "FXSAVE": "0f ae 86 00 01 00 00 | fxsave [rsi + 0x100]",
    "XSAVE": """
        31 d2                | xor edx, edx
        b8 03 00 00 00       | mov eax, 3
        0f ae a6 00 01 00 00 | xsave [rsi + 0x100]
    """,
    "a loop": f"""
        {COUNT}
        c6 44 0e ff 00       | again: mov byte [rsi + rcx - 1], 0
        ff c9                | dec ecx
        75 f7                | jnz again
    """,
    "a call": """
        48 89 e3             | mov rbx, rsp
        8d a6 00 01 00 00    | lea esp, [rsi + 0x100]
        e8 00 00 00 00       | call next
        48 89 dc             | next: mov rsp, rbx
    """,
}
OSXSAVE = """
    0f 20 e0             | mov rax, cr4
    0d 00 06 04 00       | or eax, OSFXSR | OSXMMEXCPT | OSXSAVE
    0f 22 e0             | mov cr4, rax
"""


def program(body: str) -> str:
    """A subroutine is called in the next frame; then this."""
    first = f"{OSXSAVE}\n{CALL}\n{body}\n{ENDS}"
    gap = PAGE - len(p.assemble(first))
    return f"{first}\n" + "90" * gap + "| nop\nc3 | ret"


@pytest.mark.parametrize("paging", PAGINGS)
@pytest.mark.parametrize("name", FROM_ANOTHER)
def test_from_another_frame_nothing_is_handed_over(name: str, paging: str) -> None:
    stop, _, handed_over = agree(small(program(FROM_ANOTHER[name]), "dbt", paging), 1000, 100_000)
    assert stop == StopKind.DEBUG_EXIT
    assert not handed_over


# From 0x800 of its own frame on, or from right behind itself.
FROM_ITS_OWN = {
    "half of it": ("8d be 00 f8 ff ff | lea edi, [rsi - 0x800]", 0x800, 1),
    "and the next": ("8d be 00 f8 ff ff | lea edi, [rsi - 0x800]", 0x1800, 2),
    "what comes next": ("48 8d 3d 0b 00 00 00 | lea rdi, [rel behind]", 2, 1),
}


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize("name", FROM_ITS_OWN)
def test_from_its_own_frame_one_is_handed_over_for_each_frame(
    name: str, step: int, engine: str
) -> None:
    at, count, frames = FROM_ITS_OWN[name]
    body = f"""
        {at}
        b9 {count.to_bytes(4, "little").hex()} | mov ecx, count
        b0 90                | mov al, nop
        f3 aa                | rep stosb
        31 db                | xor ebx, ebx
        0f 0b                | behind: what is no instruction
    """
    if name != "what comes next":
        body = body.replace("0f 0b", "90 90")
    stop, _, handed_over = agree(small(program(body), engine, "lazy"), step, 100_000)
    assert stop == StopKind.DEBUG_EXIT
    assert handed_over == {"write to code": frames}


def test_a_program_that_writes_beside_its_kernels_code() -> None:
    """It is not translated itself, wherever it lies."""
    body = f"""
        bf {(p.CODE + 0x800).to_bytes(4, "little").hex()} | mov edi, CODE + 0x800
        {COUNT}
        f3 aa                | rep stosb
        eb fe                | forever
    """
    with with_program(body)("bt") as vm:
        vm.memory.write(p.CODE + 0x800, b"\xaa" * 0x1000)
        assert vm.go(budget=1000).kind == StopKind.BUDGET
        assert vm.memory.read(p.CODE + 0x800, 0x1000) == bytes(0x1000)
        assert not beside_vmx.guest_of(vm).handed_over


def test_the_table_that_could_map_the_window_is_cleared_at_once() -> None:
    """What is written there must be looked at, but not after each byte."""
    body = """
        bf 00 00 30 00       | mov edi, a copy of the root
        0f 20 de             | mov rsi, cr3
        b9 00 02 00 00       | mov ecx, 512
        f3 48 a5             | rep movsq
        bf 00 00 30 00       | mov edi, the copy
        0f 22 df             | mov cr3, rdi
        0f 20 df             | mov rdi, cr3
        81 c7 00 08 00 00    | add edi, the second half
        b9 00 08 00 00       | mov ecx, 2048
        31 c0                | xor eax, eax
        f3 aa                | rep stosb
    """
    stop, _, handed_over = agree(small(f"{body}\n{ENDS}", "dbt", "lazy"), 1000, 100_000)
    assert stop == StopKind.DEBUG_EXIT
    assert handed_over["write to code"] == 2  # the first time it is traced, too
