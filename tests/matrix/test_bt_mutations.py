"""A translator that is wrong is found: each rule that it keeps, broken once.

What: a fault planted in how code is translated, or in what becomes of translations when something
changes, and a guest that is compared with VMX after each instruction.  Source: the faults that such
code has had elsewhere.
Invariant: without the fault the same guest, compared in the same way, finds nothing.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.matrix import beside_vmx
from tests.matrix import programs as p
from tests.matrix.test_bt import ENDS, KINDS, small
from tests.matrix.test_bt_flags import BEFORE_IRET, loop, return_to_self
from understudy.arch.address import PAGE
from understudy.execution.bt import flags, translate
from understudy.execution.bt.cache import Cache
from understudy.execution.bt.sequences import Code
from understudy.execution.bt.sources import Tables
from understudy.execution.bt.technique import Bt
from understudy.verdict import StopKind

Patch = pytest.MonkeyPatch


def nothing(*_args: Any, **_more: Any) -> None:
    """Instead of what should be done."""


def sensitive_as_ident(patch: Patch) -> None:
    """A sensitive instruction is copied."""
    patch.setattr(translate, "is_sensitive", lambda instruction: False)


def pushf_as_ident(patch: Patch) -> None:
    """PUSHF pushes what the processor has."""
    patch.setattr(Code, "pushf", lambda self: self.plain(b"\x9c"))


def popf_as_ident(patch: Patch) -> None:
    """POPF changes the processor's flags, and not the guest's IF."""
    patch.setattr(flags, "popf", lambda code: code.plain(b"\x9d"))


def selectors_as_ident(patch: Patch) -> None:
    """MOV reads the selector that the processor has."""
    patch.setattr(translate, "READABLE", {})
    sensitive_as_ident(patch)


def missed_write(patch: Patch) -> None:
    """A frame with translated code is written, and the translations stay."""
    patch.setattr(Cache, "drop", lambda self, gfn: 0)


def wrong_return_address(patch: Patch) -> None:
    """A call pushes the address behind the right one."""
    plain = Code.call
    patch.setattr(Code, "call", lambda self, target, back: plain(self, target, back + 1))


def translated_return_address(patch: Patch) -> None:
    """A call pushes an address of its translation."""
    plain = Code.call
    patch.setattr(Code, "call", lambda self, target, _back: plain(self, target, self.here))


def stale_chain(patch: Patch) -> None:
    """A jump still leads to a translation that is gone."""
    plain = Cache._forget

    def forget(self: Cache, unit: Any) -> None:
        kept, self.incoming = self.incoming, {}
        plain(self, unit)
        self.incoming = kept

    patch.setattr(Cache, "_forget", forget)


def stale_target(patch: Patch) -> None:
    """An indirect branch still finds a translation that is gone."""
    plain = Cache._forget

    def forget(self: Cache, unit: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Cache, "_put", nothing)
            plain(self, unit)

    patch.setattr(Cache, "_forget", forget)


def stale_tables(patch: Patch) -> None:
    """The guest's tables lead elsewhere, and what was translated stays."""
    patch.setattr(Tables, "are_same", lambda *_args: True)


def registers_not_put_back(patch: Patch) -> None:
    """A fault inside a sequence shows the registers that this uses."""
    patch.setattr(Bt, "_undo", nothing)


def time_not_taken_back(patch: Patch) -> None:
    """RDTSC shows what was executed beyond the guest's instructions."""
    patch.setattr(flags, "read_time", lambda code, instruction: code.plain(instruction))


def descriptors_not_read(patch: Patch) -> None:
    """IRET does not see that a segment has changed."""
    patch.setattr(flags, "_same_descriptor_or_trap", nothing)


SUBROUTINE = p.CODE + PAGE


def in_another_frame(call: str) -> str:
    """A subroutine that is changed between two calls; who calls it lies in another frame."""
    start = f"""
        be {SUBROUTINE.to_bytes(4, "little").hex()} | mov esi, SUBROUTINE
        b9 05 00 00 00 | mov ecx, 5
    """
    length = len(p.assemble(call)) + 3 + 2 + 2
    body = f"""
        {call}
        88 4e 02       | mov [rsi + 2], cl
        ff c9          | dec ecx
        75 {-length & 0xFF:02x} | jnz
        {ENDS}
    """
    gap = PAGE - len(p.assemble(start + body))
    return start + body + "90" * gap + "| nop\n 83 c5 11 | add ebp, 0x11\n c3 | ret"


def direct() -> str:
    """With the displacement of its CALL."""
    return in_another_frame(f"e8 {(PAGE - 15).to_bytes(4, 'little').hex()} | call SUBROUTINE")


# An entry of the directory leads to the same page, moved by 2 MBytes; then CR3 is loaded.
REMAPS = """
    bf 08 40 00 00       | mov edi, the directory's second entry
    be 00 10 30 00       | mov esi, 0x301000
    c7 06 83 c5 01 c3    | mov dword [rsi], add ebp, 1; ret
    c7 86 00 00 20 00 83 c5 02 c3 | mov dword [rsi + 0x200000], add ebp, 2; ret
    ff d6                | call rsi
    48 81 07 00 00 20 00 | add qword [rdi], 0x200000
    0f 20 d8             | mov rax, cr3
    0f 22 d8             | mov cr3, rax
    ff d6                | call rsi
    e6 f4                | out 0xf4, al
"""
CHANGES = BEFORE_IRET["another code segment"]
LAST = f"83 fd 01 | cmp ebp, 1\n 75 {len(p.assemble(CHANGES)):02x} | jne\n {CHANGES}"
RETURNS = loop(return_to_self(LAST), 3)
ROWS: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "LAR": ("8c c8 | mov eax, cs\n 0f 02 c8 | lar ecx, eax", sensitive_as_ident),
    "VERR": ("8c c8 | mov eax, cs\n 0f 00 e0 | verr ax", sensitive_as_ident),
    "PUSHF": ("9c | pushfq\n 58 | pop rax", pushf_as_ident),
    "POPF": ("68 02 02 00 00 | push 0x202\n 9d | popfq", popf_as_ident),
    "MOV from CS": ("8c c8 | mov eax, cs", selectors_as_ident),
    "a write to code": (KINDS, missed_write),
    "a return": (KINDS, wrong_return_address),
    "a return to a translation": (KINDS, translated_return_address),
    "a chain": (direct(), stale_chain),
    "a target": (in_another_frame("ff d6 | call rsi"), stale_target),
    "tables": (REMAPS, stale_tables),
    "registers": ("b8 07 00 00 00 | mov eax, 7\n 31 c9 | xor ecx, ecx\n"
                  "48 c7 c4 00 00 00 80 | mov rsp, nowhere\n 9c | pushfq", registers_not_put_back),
    "time": ("9c | pushfq\n 0f 31 | rdtsc", time_not_taken_back),
    "descriptors": (RETURNS, descriptors_not_read),
}  # fmt: skip


def compare(program: str) -> None:
    """After each instruction, and at the end of all at once."""
    handlers = {"v06": ENDS, "v0b": ENDS, "v0d": ENDS, "v0e": ENDS}
    make = small(f"{program}\n{ENDS}", "dbt", "lazy", **handlers)
    for step in (1, 1000):
        stop, _, _ = beside_vmx.agree(make, step, 1000, "bt")
        assert stop != StopKind.BUDGET


@pytest.mark.parametrize("name", ROWS)
def test_it_is_found(name: str, monkeypatch: Patch) -> None:
    program, mutate = ROWS[name]
    compare(program)
    mutate(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        compare(program)
