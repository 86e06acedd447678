"""Random kernel fragments do the same under VMX, interpreted, deprivileged and translated.

What: fragments that once differed, each with what it is about; random ones, a few here and many by
`make fuzz-fragments`; and techniques made wrong, which must be found and told in words.
Source: SDM 2, SDM 3A.
"""

import os
import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
from iced_x86 import Mnemonic

from tests.matrix import fragment_bench
from tests.matrix import fragment_stage as stage
from tests.matrix.fragment_bench import KNOWN, SHADOWS, Bench, Found, fuzz, in_words
from tests.matrix.fragment_code import Fragment, Item
from tests.matrix.fragment_stage import LONG, MODES, PAE, TWO_LEVEL, UNPAGED
from understudy.arch.msr import Msr
from understudy.execution.bt import translate
from understudy.execution.deprivileged import instructions
from understudy.guest import Guest
from understudy.verdict import StopKind

FRAGMENTS = int(os.environ.get("FUZZ_FRAGMENTS", "2000"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
STEP = 500  # fragments of one mode in one test
STEPS = range(FIRST, FIRST + -(-FRAGMENTS // len(MODES)), STEP)
REST = stage.BLOCKS - 2
IRET = "68 23000000 68 80af0100 68 02020000 68 1b000000 68 00f00000 cf"  # to the program
IRETQ = "68 23000000 68 80af0100 68 02020000 68 2b000000 68 00f00000 48 cf"
SOON = "0f31 83c0 {:02x} 83d200 b9e0060000 0f30"  # an interrupt, so many ticks after RDTSC


class Case(NamedTuple):
    """What once differed."""

    about: str
    mode: str
    kernel: str
    program: str = ""
    registers: Mapping[str, int] = MappingProxyType({})
    nmis: tuple[int, ...] = ()
    after: str = ""  # the kernel's next block


CASES = [
    Case("POPF that sets TF traps behind the next one", LONG, "68 570d0000 9d"),
    Case("where the last x87 instruction was", LONG, "d9e8"),
    Case("a null selector after IRET keeps its limit", TWO_LEVEL, IRET),
    Case("SYSRET is #GP in a program", LONG, IRETQ, "0f07"),
    Case("XSETBV is #UD without CR4.OSXSAVE", LONG, "31c9 31d2 b803000000 0f01d1"),
    Case("reserved bits of CR0 stay clear", UNPAGED, "0f20c0 0fbaf806 0f22c0"),
    Case("an INT that faults does not retire", UNPAGED, "cd50"),
    Case("nor if its gate is not for programs", PAE, IRET, "cd50"),
    Case("VMLAUNCH is #UD", LONG, "0f01c2"),
    Case("POP SS counts by the stack that it was", TWO_LEVEL, "68 b0000000 17"),
    Case("SMSW in a program", LONG, IRETQ, "480f01e2"),
    Case("SIDT in a program", LONG, IRETQ, "0f010c25 b5700100"),
    Case("a store through a null segment", PAE, IRET, "8c1d a0500100"),
    Case("a far jump that is refused marks no descriptor", TWO_LEVEL, "ea 07e00000 2b00"),
    Case("nor is one with the RPL of a program allowed", LONG, "6a0b 6808e00000 48ff2c24"),
    Case("nor by its own operand", PAE, "ea 07e00000 0b00"),
    Case("STI in the shadow of POP SS", PAE, "6a10 17 fb cd21"),
    Case("a timer between STI and PUSHF", PAE, SOON.format(10) + "9c"),
    Case("and in the shadow of an STI", TWO_LEVEL, SOON.format(7) + "fafb 9090"),
    Case("INS into what is read-only", TWO_LEVEL,
         "b890000000 8ec0 66ba8000 bff9500100 b903000000 6d"),
    Case("a program loads a null selector", UNPAGED, IRET, "8ee8", {"rax": 0}),
    Case("RF when INT pushes flags", UNPAGED, IRET.replace("02020000", "02022100")),
    Case("IRET at level 0 sets VIP", LONG,
         "89e0 6a10 50 68 02001a00 6a08 68 13e00000 48cf 9c"),
    Case("and the next IRET clears it", UNPAGED,
         "b902000000 68 57021000 6a08 68 12e00000 cf 68 d3080400 6a08 68 1fe00000 cf 4975e3 9c"),
    Case("VMCALL in 32-bit code", PAE, "0f01c1 0f22d0"),
    Case("REX before another prefix means nothing", LONG, "b8 09e00000 482effd0"),
    Case("and of two REX the last counts, which selects no index where RIP is the base", LONG,
         "454bc025 e9ab1c5d c7", "", {"r12": 0xA0CA}),
    Case("POP GS reads all that it drops", TWO_LEVEL, "bcfe9f0100 0fa9", "", {"cr4": 0x200600}),
    Case("a fault of ENTER on the way", TWO_LEVEL, "c8 9bb1 43", "", {"rbp": 0x15C51}),
    Case("where memory was lent for an operand there is none the second time", UNPAGED,
         "0f011560d04000 0f011560d04000"),
    Case("SMAP keeps the processor from its tables, whatever AC says", LONG,
         "0f01cb 48b8ffff00000093cf00 4889042500400100 66c704254a9000000040 c604254c90000001"
         "b848000000 0f00d0 b804000000 8ed8", "", {"cr4": 0x200620}),
    Case("a null selector's base, and an interrupt right behind it", LONG,
         "b93f080000 b841000000 31d2 0f30 fa fb 0fa1"),
    Case("a program sees its IOPL", LONG, IRETQ.replace("02020000", "02120000"), "9c 58"),
    Case("a program with IOPL 3 sets IF", LONG, IRETQ.replace("02020000", "47300000"),
         "6668 9606 669d 669c 5a"),
    Case("a program that has IF clear sees it", LONG, IRETQ.replace("02020000", "02000000"),
         "669c 5a"),
    Case("IRET of a program that has NT", TWO_LEVEL, IRET,
         "6668 4648 669d 6883020000 681b000000 6816f10000 cf"),
    Case("a jump to what is behind an STI has no shadow", TWO_LEVEL,
         SOON.format(9) + "b005 fafb fec8 75fc 90"),
    Case("CR0.PG forgets translations also where the write exits, for CR0.NE", UNPAGED,
         "0f20c0 0fbaf81f 0fbaf805 0f22c0 9090 90"),
    Case("real mode gives a register rights that was null", UNPAGED, IRET,
         after="0f20c0 0fbaf000 0f22c0 b80c000000 8ee0"),
    Case("code is fetched when it is executed", TWO_LEVEL, "68 45230100 c3", nmis=(2,)),
    Case("a table's accessed flag likewise, by a direct jump", TWO_LEVEL, "e9 00200000", nmis=(1,)),
    Case("a timer is over before the next instruction is fetched", LONG, "90", nmis=(27,),
         after=SOON.format(16) + "c7042570400400 03e00000 0f013c2500e00000 68c20a2000 9d"),
    Case("an NMI in the shadow of STI", LONG, "fb 90 90", nmis=(1,)),
    Case("and one in the handler of another", LONG, "90 90 90", nmis=(1, 2, 3)),
    Case("an NMI behind a program's single step", LONG, IRETQ, "68 02030000 9d 90 90", nmis=(9,)),
    Case("and in 32 bits", TWO_LEVEL, IRET, "68 02030000 9d 90 90", nmis=(9,)),
    Case("INS and OUTS no times", LONG, "31c9 66ba8000 f36c f366 6f f26e 48c1e120 67f36c 90"),
    Case("and in 32 bits, with a count in ECX alone", PAE, "b900000100 66ba8000 67f36c f36e 90"),
    Case("a frame is pushed from above", TWO_LEVEL, "bc 0ec00100 a1 00000000"),
    Case("a system call of a program that has just set TF", TWO_LEVEL, IRET,
         "68 02030000 9d 0f34 90"),
    Case("and in 64 bits", LONG, IRETQ, "68 02030000 9d 0f05 90"),
    Case("DR7 has no bit 11", PAE, "b800fb0000 0f23f8 0f21fa"),
    Case("an instruction that exits ends a shadow", UNPAGED, SOON.format(2) + "90 fa fb e480"),
]  # fmt: skip


def fragment_of(case: Case) -> Fragment:
    """Its blocks, and registers that are no surprise."""
    mode = case.mode
    own = {
        "rflags": 2, "cr0": 0x10033 | (0 if mode == UNPAGED else 1 << 31),
        "cr4": 0x600 | (0x20 if mode in (LONG, PAE) else 0), "rdi": stage.DATA, "rsi": stage.DATA,
    }  # fmt: skip
    kernel, program, after = (
        (Item(bytes.fromhex(code)),) for code in (case.kernel, case.program, case.after)
    )
    rest = ((),) * (REST - 1)
    registers = stage.registers(mode) | own | dict(case.registers)
    blocks = (kernel, after, *rest), (program, (), *rest)
    return Fragment(mode, *blocks, registers, (1,) * (REST + 1), bytes(256), case.nmis)


@pytest.mark.parametrize("shadow", SHADOWS)
@pytest.mark.parametrize("case", CASES, ids=[case.about for case in CASES])
def test_what_once_differed(case: Case, shadow: str) -> None:
    bench = Bench(case.mode, random.Random(case.about), shadows=(shadow,))
    try:
        difference = bench.run(fragment_of(case))
        assert not difference, f"{bench.chosen}\n{in_words(difference)}"
        assert bench.compared == 1
    finally:
        bench.close()


@pytest.mark.parametrize("first", STEPS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.timeout(0)
def test_random_fragments(mode: str, first: int) -> None:
    told = fuzz(mode, range(first, first + STEP), SEED)
    print(f"{mode} from {first}: {dict(told)}")
    assert told["compared"] > STEP * 0.8
    assert sum(told[kind] for kind in KNOWN) <= (1 if len(STEPS) == 1 else 2)
    assert told["traps"] > STEP
    assert told["translated"] > 10 * STEP
    assert told["interpreted"] > 10 * STEP


def _wrong_cli(patch: pytest.MonkeyPatch) -> None:
    def cli(guest: Guest, instruction: object) -> None:
        guest.skip(1)

    patch.setitem(instructions.KERNEL, Mnemonic.CLI, cli)


def _wrong_ident(patch: pytest.MonkeyPatch) -> None:
    kept = translate.is_sensitive
    patch.setattr(translate, "is_sensitive", lambda one: one.mnemonic != Mnemonic.LAR and kept(one))


def test_a_kernel_that_meets_the_window_is_told_from_a_difference() -> None:
    def is_about_window(code: str) -> bool:
        one = fragment_of(Case("", TWO_LEVEL, code))
        return fragment_bench.is_about_window(one, "1")

    lar = "b808000000 0f02c8"
    assert is_about_window("a1 000000f0")
    assert not is_about_window(lar)
    with pytest.MonkeyPatch.context() as patch:
        _wrong_ident(patch)
        assert not is_about_window(lar)
        with pytest.raises(AssertionError, match="bt, and vmx"):
            test_what_once_differed(Case("LAR", TWO_LEVEL, lar), "lazy")


def test_a_string_instruction_that_overwrites_itself_is_told_too() -> None:
    to = "bf00e00000 be00100100 b9{} f3a5"  # from where there is data
    for count, found in (("40000000", {"itself"}), ("01000000", set())):
        one = fragment_of(Case("", PAE, to.format(count)))
        assert fragment_bench.does(one) == found


def test_a_double_fault_whose_handler_meets_an_nmi_is_told_too() -> None:
    code = "bc 00000000 6a00"  # no stack
    one = fragment_of(Case("", LONG, code, nmis=(3,)))
    assert fragment_bench.does(one) == {"resume"}
    assert fragment_bench.does(fragment_of(Case("", LONG, "90"))) == set()
    with_flag, without = bytes(8), bytes((0, 0, 1, 0, 0, 0, 0, 0))
    about = fragment_bench.is_about_resume_flag
    assert about({"bt": {"memory": (with_flag, without)}})
    assert not about({"bt": {"memory": (with_flag, without), "rax": (0, 1)}})
    for other in (bytes((0, 0, 3, 0)), bytes((0, 2, 1, 0))):
        assert not about({"bt": {"memory": (bytes(4), other)}})


@pytest.mark.parametrize("code", ["0f02c1", "660f03c1", "0f00e1", "0f00e9"])
def test_a_program_that_looks_at_descriptors_is_told_too(code: str) -> None:
    """It comes to such an instruction by itself in none that is written."""
    for mode, go in ((LONG, IRETQ), (TWO_LEVEL, IRET)):
        assert fragment_bench.does(fragment_of(Case("", mode, go, code))) == {"descriptors"}
        assert not fragment_bench.does(fragment_of(Case("", mode, code + go, "90")))


@pytest.mark.parametrize(("wrong", "who"), [(_wrong_cli, "deprivileged"), (_wrong_ident, "bt")])
def test_what_is_wrong_is_found_and_made_small(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[pytest.MonkeyPatch], None], who: str
) -> None:
    wrong(monkeypatch)
    with pytest.raises(Found) as found:
        fuzz(LONG, range(1000), 1)
    text = str(found.value)
    assert f"{who}, and vmx:" in text
    assert sum(len(line.split(";")) for line in text.splitlines() if "  kernel" in line) <= 4, text


def test_deprivileged_on_the_isa_as_it_is_stays_out() -> None:
    """What slips through there is seen."""
    bench = Bench(LONG, random.Random(1), ("vmx", "deprivileged"), virtualizable=False)
    try:
        assert bench.run(fragment_of(Case("", LONG, "9c 5a")))["deprivileged"]["rdx"]
    finally:
        bench.close()


def test_a_timer_that_is_over_when_vmx_has_to_execute_something() -> None:
    """Its interrupt would end each entry at once, for ever."""
    bench = Bench(LONG, random.Random(1), ("vmx", "deprivileged"))
    try:
        vm = bench.machines[1].vm
        one = fragment_of(Case("", LONG, "90 90 90"))
        bench.machines[1].begin(one, one.image(bench.stage))
        assert vm.go(budget=1).kind is StopKind.BUDGET
        vm.processors[0].wrmsr(Msr.IA32_TSC_DEADLINE, 1)
        guest = vm.vcpus[0].guest
        guest.rflags |= 1 << 8  # a single step
        assert vm.go(budget=2, wall_seconds=60).kind is StopKind.BUDGET
    finally:
        bench.close()
