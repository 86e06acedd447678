"""A guest that aims at its translations: at where they lie, at what they store, at the window.

What: such a guest goes on as in VMX operation where the window is nothing that it can reach, and
ends where it destroys its own translation.
Invariant: whatever it does, `go` comes back.
"""

from contextlib import closing

import iced_x86 as iced
import pytest

from tests.matrix import beside_vmx
from tests.matrix import programs as p
from tests.matrix.beside_vmx import CPU, Make
from understudy.arch.address import PAGE
from understudy.assembly import overhead_of
from understudy.config import Config
from understudy.execution.bt import Bt, cache, sources
from understudy.execution.bt.cache import Cache
from understudy.execution.bt.layout import CODE_BYTES, Layout
from understudy.execution.bt.sources import CodeFrames
from understudy.execution.bt.translate import translate
from understudy.execution.deprivileged import Deprivileged
from understudy.guests.entry import PAGE_TABLES_GPA
from understudy.machine.frames import OutOfFrames
from understudy.machine.host import Host
from understudy.verdict import StopKind
from understudy.vm import VM

JUMP = bytes.fromhex("eb00")  # to the next one


def kernel(program: str, paging: str = "lazy", **handlers: str) -> Make:
    return beside_vmx.small(program, "dbt", paging, virtualizable=False, **handlers)


def with_program(program: str, paging: str = "lazy", start: str = "") -> Make:
    """A kernel that leaves for a program, which reaches all of the first GByte."""

    def make(execution: str) -> VM:
        vm = VM(
            "16M", execution=execution, engine="dbt", paging=paging, cpu=CPU,
            virtualizable_isa=False,
        )  # fmt: skip
        p.start_program(vm, program, start)
        return vm

    return make


@pytest.mark.parametrize("offset", [0x0000, 0x0101, 0x0002])
def test_a_program_jumps_into_the_window(offset: int) -> None:
    """To a place, to the middle of something, into a sequence: a program has no translations."""
    make = with_program(f"""
        48 b8 {offset.to_bytes(2, "little").hex()} 18 00 00 80 ff ff | mov rax, CODE + offset
        ff e0                                                       | jmp rax
    """)
    with make("bt") as vm, make("vmx") as other:
        assert vm.go(budget=1000).kind == other.go(budget=1000).kind == StopKind.TRIPLE_FAULT
        assert vm.instructions == other.instructions
        for name in ("rip", "rax", "rcx", "rsp"):
            assert vm.vcpus[0].registers()[name] == other.vcpus[0].registers()[name]


@pytest.mark.parametrize("at", [0x18, 0x1C, 0x0C, 0x20])
def test_a_call_pushes_onto_what_its_translation_stores(at: int) -> None:
    """To where a branch goes, to a part of it, to saved registers, to what is counted."""
    program = f"""
        48 8d 05 0e 00 00 00                | lea rax, [rel there]
        ff d0                               | call rax, to have it in the table
        48 bc {at:02x} 00 00 00 00 80 ff ff | mov rsp, the window + at
        ff d0                               | call rax
        ff c3                               | there: inc ebx
        83 fb 02                            | cmp ebx, 2
        74 01                               | je done
        c3                                  | ret
        b0 2a                               | done: mov al, 42
        e6 f4                               | out 0xf4, al
    """
    with kernel(program)("bt") as vm:
        assert vm.go(budget=1000).kind == StopKind.DEBUG_EXIT


@pytest.mark.parametrize("paging", ["eager", "lazy", "vtlb"])
@pytest.mark.parametrize("high", [0, 1])
@pytest.mark.parametrize("first", ["e6 80 | out 0x80, al", "90 | nop"])
def test_the_window_makes_room(paging: str, high: int, first: str) -> None:
    """For a mapping in its addresses, or in others below the same entry of the root.

    The second time it is used without a trap between.
    """
    root = PAGE_TABLES_GPA.to_bytes(4, "little").hex()
    entry = (PAGE_TABLES_GPA + 0x800).to_bytes(4, "little").hex()
    make = kernel(
        f"""
        48 8b 04 25 {root}  | mov rax, [root]
        48 89 04 25 {entry} | mov [root + 0x800], rax
        {first}
        48 bb 00 00 10 {high * 0x40:02x} 00 80 ff ff | mov rbx, CODE, above all that
        48 8b 13                                   | mov rdx, [rbx]
        e6 f4                                      | out 0xf4, al
        """,
        paging,
    )
    stop, _, _ = beside_vmx.agree(make, 1000, 1000, "bt")
    assert stop == StopKind.DEBUG_EXIT


@pytest.mark.parametrize(
    ("code", "is_copied"),
    [
        ("c4 e1 78 10 05 10 00 00 00", True),  # vmovups xmm0, [rip + 16]
        ("c4 a1 78 10 05 10 00 00 00", False),  # with X
        ("c5 f8 10 05 10 00 00 00", True),
        ("62 f1 7c 08 10 05 10 00 00 00", True),
        ("62 b1 7c 08 10 05 10 00 00 00", False),
        ("42 8b 05 10 00 00 00", False),  # mov eax, [rip + 16], with X
        ("2e 2e 2e 2e 2e 2e 2e 2e 2e 8b 05 10 00 00 00", False),  # no byte more fits
        ("2e 2e 2e 2e 2e 2e 2e 2e 8b 05 10 00 00 00", True),
    ],
)
def test_what_is_relative_to_rip_is_copied_only_if_it_stays_the_same(
    code: str, is_copied: bool
) -> None:
    raw = bytes.fromhex(code)
    out = translate(
        Layout(0xFFFF << 47, 64), 0x1000, raw + b"\xf4" * 16, 0x40_0000, is_virtual=True
    )
    assert (out.copies == 1) == is_copied
    assert (out.pc in out.callouts) != is_copied
    if is_copied:
        copy = iced.Decoder(64, bytes(out.out), ip=out.pc).decode()
        assert copy.memory_index == iced.Register.NONE
        assert copy.memory_displacement == 0x40_0010 + len(raw)


@pytest.mark.parametrize("frames", [1, 100, 200])
def test_a_cache_for_which_there_is_no_room_takes_none(frames: int) -> None:
    with closing(Host(1 << 20)) as host:
        host.frame(host.frames.free_count - frames)
        with pytest.raises(OutOfFrames):
            Cache(host, Layout(0, 64))
        assert host.frames.free_count == frames


@pytest.mark.parametrize("frames", [5, 100])
def test_a_vcpu_for_which_there_is_no_room_takes_none(frames: int) -> None:
    with kernel("f4 | hlt")("vmx") as vm, closing(Host(1 << 21)) as host:
        host.frame(host.frames.free_count - frames)
        vcpu = vm.vcpus[0]
        with pytest.raises(OutOfFrames):
            Bt(host, vm.processors[0], vcpu.view.paging, vcpu.model)
        assert host.frames.free_count == frames


def test_a_vcpu_that_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise RuntimeError("no")

    with kernel("f4 | hlt")("vmx") as vm:
        monkeypatch.setattr(Deprivileged, "__init__", fail)
        before, vcpu = vm.host.frames.free_count, vm.vcpus[0]
        with pytest.raises(RuntimeError):
            Bt(vm.host, vm.processors[0], vcpu.view.paging, vcpu.model)
        assert vm.host.frames.free_count == before
        assert not CodeFrames.of(vm.memory.p2m).guests


def test_what_translations_need_is_counted() -> None:
    """The full window, and what a new cache takes before the old one is gone."""
    one, two = (overhead_of(Config(execution="bt", paging="lazy", cpus=n)) for n in (1, 2))
    assert two - one == one - overhead_of(Config(paging="lazy")) == Bt.beside
    with kernel("f4 | hlt")("bt") as vm:
        guest = beside_vmx.guest_of(vm)
        assert isinstance(guest, Bt)
        guest._renew(Layout(0xFFFF << 47, 64))
        full = len(guest.space.frames()) + 2 * len(guest.cache.frames())
        chunks = CODE_BYTES // cache.CHUNK_BYTES * cache.CHUNK
        assert (full + chunks) * PAGE <= Bt.beside


@pytest.mark.parametrize(
    "code",
    ["e9 00 00 00 40", "e8 00 00 00 40", "0f 84 00 00 00 40", "eb 70", "74 70"],
)
def test_a_direct_branch_to_where_nothing_can_be_is_not_translated(code: str) -> None:
    raw = bytes.fromhex(code)
    out = translate(
        Layout(0xFFFF << 47, 64), 0x1000, raw + b"\xf4" * 16, (1 << 47) - 32, is_virtual=True
    )
    assert out.pc in out.callouts
    assert all(link.target < 1 << 47 for link in out.links)


def test_what_is_noted_of_translations_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """PUSHFQ has the longest sequence."""
    monkeypatch.setattr(cache, "NOTES_KEPT", 1000)
    with kernel("9c | pushfq" + "\n9c | pushfq" * 2499 + "\n e6 f4 | out 0xf4, al")("bt") as vm:
        guest = beside_vmx.guest_of(vm)
        assert isinstance(guest, Bt)
        while vm.go(budget=10).kind == StopKind.BUDGET:
            assert len(guest.cache.entries) < 1100
            assert guest.cache.notes < 2000
        assert vm.counts()["execution"]["translated"]["caches"] > 2


def test_what_is_noted_of_tables_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One page of code, which the guest has mapped by many tables."""
    monkeypatch.setattr(sources, "TABLES_KEPT", 16)
    code, tables, count = 0x30_0000, 0x40_0000, 64
    with VM("16M", execution="bt", paging="lazy", cpu=CPU) as vm:
        p.start(vm, "48 b8 00 00 00 00 80 00 00 00 | mov rax, 1 << 39\n ff e0 | jmp rax")
        vm.memory.write(code, p.assemble("48 05 00 00 20 00 | add rax, 0x200000\n ff e0 | jmp rax"))
        directory, first = tables + PAGE, tables + 2 * PAGE
        places = {PAGE_TABLES_GPA + 8: tables | 7, tables: directory | 7}
        for n in range(count):
            places |= {directory + 8 * n: first + n * PAGE | 7, first + n * PAGE: code | 3}
        for at, entry in places.items():
            vm.memory.write(at, entry.to_bytes(8, "little"))
        guest = beside_vmx.guest_of(vm)
        assert isinstance(guest, Bt)
        for _ in range(count):
            assert vm.go(budget=2).kind == StopKind.BUDGET
            assert len(guest.tables.others) < 16 + 5
        assert vm.counts()["execution"]["translated"]["caches"] > 3


@pytest.mark.parametrize("count", [cache.MANY - 1, 4 * cache.MANY])
def test_a_frame_is_dropped_that_was_translated_at_many_addresses(count: int) -> None:
    with closing(Host("64M")) as host, closing(Cache(host, Layout(0xFFFF << 47, 64))) as made:
        for n in range(count + 2):
            pc, _ = made.room(2048)
            code = made.translate(pc, JUMP, 0x1000 + n * len(JUMP))
            unit = cache.Unit.of(code, JUMP)
            unit.gfns = (5, 6) if 0 < n <= count else (7,)
            made.add(unit, bytes(code.out))
        pcs = list(made.entries.values())
        assert made.drop(5) == count
        assert [made.unit_of(pc) is not None for pc in pcs] == [True, *[False] * count, True]
        assert made.by_frame == {6: {}, 7: dict.fromkeys(map(made.unit_of, (pcs[0], pcs[-1])))}
        assert set(made.entries.values()) == {pcs[0], pcs[-1]}
        assert made.drop(7) == 2 and not made.entries and not made.stubs
