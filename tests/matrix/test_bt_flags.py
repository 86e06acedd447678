"""POPF, IRET and RDTSC in translated code: without a trap where that is right, with one elsewhere.

What: programs that execute them in all the ways that a kernel can, under binary translation and in
VMX operation; after every so many instructions all registers, what was retired and the TSC are the
same.  Invariant: how many of them trapped is asserted, so that none passes by trapping always.
"""

import pytest

from tests.matrix import beside_vmx
from tests.matrix import programs as p
from tests.matrix.beside_vmx import Make
from tests.matrix.test_bt_hostile import with_program
from understudy.execution.bt import technique
from understudy.execution.bt.layout import Layout
from understudy.execution.bt.translate import translate
from understudy.guests.entry import CODE_32, GDT_GPA, Entry, protected_mode, write_gdt
from understudy.verdict import StopKind
from understudy.vm import VM

ENDS = "e6 f4 | out 0xf4, al"
ENDINGS = {"v06": ENDS, "v0a": ENDS, "v0b": ENDS, "v0c": ENDS, "v0d": ENDS, "v0e": ENDS}
ENGINES = ("dbt", "reference")
TIMES = 10


def kernel(program: str, engine: str = "dbt", paging: str = "lazy", **handlers: str) -> Make:
    return beside_vmx.small(program, engine, paging, virtualizable=False, **(ENDINGS | handlers))


def kernel32(program: str) -> Make:
    def make(execution: str) -> VM:
        vm = VM(
            "16M", execution=execution, engine="dbt", paging="lazy", cpu=beside_vmx.CPU,
            virtualizable_isa=False,
        )  # fmt: skip
        vm.memory.write(p.CODE, p.assemble(program))
        write_gdt(vm.memory, CODE_32)
        vm.enter(Entry(protected_mode("test", p.CODE, rsp=0x20_0000).registers, "test"))
        return vm

    return make


def loop(body: str, times: int = TIMES) -> str:
    """A program that executes this so many times, counted in EBP."""
    length = len(p.assemble(body)) + 4
    return f"""
        bd {times:02x} 00 00 00 | mov ebp, times
        {body}
        ff cd                   | dec ebp
        75 {-length & 0xFF:02x} | jnz body
        {ENDS}
    """


def return_to_self(before: str = "", flags: str = "9c | pushfq") -> str:
    """An IRETQ to what comes next, with something in front of it."""
    return f"""
        8c d0          | mov eax, ss
        50             | push rax
        54             | push rsp
        48 83 04 24 08 | add qword [rsp], 8
        {flags}
        8c c8          | mov eax, cs
        50             | push rax
        48 8d 05 {3 + len(p.assemble(before)):02x} 00 00 00 | lea rax, [rel there]
        50             | push rax
        {before}
        48 cf          | iretq
    """  # there:


FLAGS = """
    9c                   | pushfq
    5b                   | pop rbx
    fa                   | cli
    9c                   | pushfq
    9c                   | pushfq
    48 81 0c 24 {on}     | or qword [rsp], on
    9d                   | popfq
    9c                   | pushfq
    59                   | pop rcx
    fb                   | sti
    9d                   | popfq
    9c                   | pushfq
    5a                   | pop rdx
    53                   | push rbx
    9d                   | popfq
"""


def flags(on: int) -> str:
    return FLAGS.format(on=on.to_bytes(4, "little").hex(" "))


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("engine", ENGINES)
def test_popf(engine: str, step: int) -> None:
    """Of IF, of flags that programs may change, and of DF, AC and ID."""
    body = flags(0xC00) + flags(0x24_00D5)
    stop, traps, handed_over = beside_vmx.agree(kernel(loop(body), engine), step, 1000, "bt")
    assert stop == StopKind.DEBUG_EXIT
    assert traps == {"OUT": 1}
    assert not handed_over


@pytest.mark.parametrize("flag", [1 << 12, 3 << 12, 1 << 14, 1 << 16, 1 << 17, 1 << 19, 1 << 20])
def test_popf_of_what_is_not_changed_here(flag: int) -> None:
    """IOPL, NT, RF, VM, VIF, VIP: the hypervisor does it; with IOPL 3 then, nothing else traps."""
    body = f"9c | pushfq\n 48 81 0c 24 {flag.to_bytes(4, 'little').hex()} | or\n 9d | popfq"
    body += "\n 9c | pushfq\n 58 | pop rax\n 6a 02 | push 2\n 9d | popfq"
    stop, traps, _ = beside_vmx.agree(kernel(loop(body)), 1, 1000, "bt")
    assert stop == StopKind.DEBUG_EXIT
    changes_iopl = flag in (1 << 12, 3 << 12)
    assert traps["POPFQ"] == TIMES * (1 + changes_iopl)


@pytest.mark.parametrize("step", [1, 5, 1000])
@pytest.mark.parametrize("engine", ENGINES)
def test_iret_inside_level_0(engine: str, step: int) -> None:
    make = kernel(loop(return_to_self()), engine)
    stop, traps, handed_over = beside_vmx.agree(make, step, 1000, "bt")
    assert stop == StopKind.DEBUG_EXIT
    assert traps == {"OUT": 1, "IRETQ": 1}  # before its target is known
    assert not handed_over


RETURN_TO_SELF_32 = """
    9c                   | pushfd
    8c c8                | mov eax, cs
    50                   | push eax
    e8 00 00 00 00       | call next
    83 04 24 05          | next: add dword [esp], 5
    cf                   | iretd
"""
TIME_32 = "0f 31 | rdtsc\n 89 c3 | mov ebx, eax\n 9c | pushfd\n 5e | pop esi\n fb | sti\n fa | cli"


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_32_bit_code(step: int) -> None:
    """The same of a kernel of 32-bit code; its stack and its data are reached otherwise."""
    popf = "9c | pushfd\n fb | sti\n 9d | popfd\n 9c | pushfd\n 5a | pop edx"
    body = "\n".join((RETURN_TO_SELF_32, TIME_32, popf))
    stop, traps, handed_over = beside_vmx.agree(kernel32(loop(body)), step, 2000, "bt")
    assert stop == StopKind.DEBUG_EXIT
    assert traps == {"OUT": 1, "IRETD": 1}
    assert not handed_over


AT = (GDT_GPA + 0x10).to_bytes(4, "little").hex(" ")
BEFORE_IRET = {
    "another code segment": f"80 04 25 {AT} 01 | add byte [gdt + 16], 1",
    "no code segment": f"c6 04 25 {(GDT_GPA + 0x15).to_bytes(4, 'little').hex()} 13 | mov byte",
    "another stack": f"80 04 25 {(GDT_GPA + 0x18).to_bytes(4, 'little').hex()} 01 | add byte",
    "a selector of level 1": "80 4c 24 08 01 | or byte [rsp + 8], 1",
    "another selector": "80 74 24 08 18 | xor byte [rsp + 8], 0x18",
    "a long selector": "80 4c 24 0a 01 | or byte [rsp + 10], 1",
    "no stack segment": "c6 44 24 20 00 | mov byte [rsp + 32], 0",
    "a single step": "80 4c 24 11 01 | or byte [rsp + 17], 1",
    "a nested task": "80 4c 24 11 40 | or byte [rsp + 17], 0x40",
    "the resume flag": "80 4c 24 12 01 | or byte [rsp + 18], 1",
    "another IOPL": "80 4c 24 11 30 | or byte [rsp + 17], 0x30",
    "nowhere": "80 74 24 06 01 | xor byte [rsp + 6], 1",
    "a stack that is nowhere": "80 74 24 1e 01 | xor byte [rsp + 30], 1",
    "a stack without a frame": "48 bc 00 00 00 00 02 00 00 00 | mov rsp, 1 << 33",
    "half a frame": "48 c7 c4 f0 ff ff ff | mov rsp, -16",
}


@pytest.mark.parametrize("name", BEFORE_IRET)
def test_iret_of_what_is_not_done_here(name: str) -> None:
    """Two plain ones, of which the second knows its target, then one that differs."""
    before = BEFORE_IRET[name]
    last = f"83 fd 01 | cmp ebp, 1\n 75 {len(p.assemble(before)):02x} | jne\n {before}"
    make = kernel(loop(return_to_self(last), 3), v01=ENDS)
    stop, traps, _ = beside_vmx.agree(make, 1, 1000, "bt")
    assert stop != StopKind.BUDGET
    assert (traps["IRETQ"] == 1) == (name in NO_TRAPS)


NO_TRAPS = ("a stack without a frame", "half a frame", "a stack that is nowhere")
"""There IRET faults, or is done; where RSP points then is nobody's business."""


def test_a_table_that_is_loaded_anew() -> None:
    """LGDT with a limit that leaves the code segment out: IRET faults, and then the fault does."""
    body = """
        68 00 00 0f 00 | push 0xf0000
        66 c7 04 24 07 00 | mov word [rsp], 7
        0f 01 14 24    | lgdt [rsp]
    """
    make = kernel(loop(return_to_self(), 2).replace(ENDS, body + return_to_self()))
    stop, _, _ = beside_vmx.agree(make, 1, 1000, "bt")
    assert stop == StopKind.TRIPLE_FAULT


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("engine", ENGINES)
def test_time(engine: str, step: int) -> None:
    """Between calls and returns, of which each executes more than the guest's instruction."""
    body = """
        0f 31             | rdtsc
        48 89 c3          | mov rbx, rax
        e8 01 00 00 00    | call sub
        90                | nop
        0f 01 f9          | sub: rdtscp
        48 01 d8          | add rax, rbx
        9c                | pushfq
        0f 31             | rdtsc
        9d                | popfq
        0f 92 c1          | setc cl
        58                | pop rax
    """
    make = kernel(loop(body), engine)
    stop, traps, handed_over = beside_vmx.agree(make, step, 1000, "bt")
    assert stop == StopKind.DEBUG_EXIT
    assert traps == {"OUT": 1}
    assert not handed_over


def test_time_that_a_guest_has_set() -> None:
    """Then the processor's is another, and RDTSC traps."""
    body = """
        b9 10 00 00 00 | mov ecx, IA32_TIME_STAMP_COUNTER
        31 d2          | xor edx, edx
        0f 30          | wrmsr
        0f 31          | rdtsc
        0f 31          | rdtsc
    """
    stop, traps, _ = beside_vmx.agree(kernel(loop(body)), 1, 1000, "bt")
    assert stop == StopKind.DEBUG_EXIT
    assert traps["RDTSC"] == 2 * TIMES


@pytest.mark.parametrize("step", [1, 7, 100_000])
@pytest.mark.parametrize(
    "lets",
    [
        "68 02 02 00 00 | push 0x202\n 9d | popfq",
        return_to_self(flags="68 02 02 00 00 | push 0x202"),
    ],
    ids=["popf", "iret"],
)
def test_an_interrupt_that_waits(lets: str, step: int) -> None:
    """It comes behind the POPF or the IRET that lets it in, to the instruction."""
    start, arm, _ = p.DEADLINES.partition("    0f 31  ")
    assert arm
    program = f"""
        {start}
        0f 31          | next: rdtsc
        05 64 00 00 00 | add eax, 100
        83 d2 00       | adc edx, 0
        b9 e0 06 00 00 | mov ecx, IA32_TSC_DEADLINE
        0f 30          | wrmsr
        b9 c8 00 00 00 | mov ecx, 200
        e2 fe          | loop $
        {lets}
        90             | nop
        fa             | cli
        83 fb 03       | cmp ebx, 3
        75 {-31 - len(p.assemble(lets)) & 0xFF:02x} | jne next
        {ENDS}
    """
    make = kernel(program, v40=p.DEADLINE_HANDLER)
    stop, traps, _ = beside_vmx.agree(make, step, 10_000, "bt")
    assert stop == StopKind.DEBUG_EXIT
    assert traps["POPFQ"] + traps["IRETQ"] >= 3


@pytest.mark.parametrize("null", ["68 03 00 00 00 | push 3", "6a 00 | push 0"])
def test_a_return_to_a_program_leaves_it_no_inner_segments(null: str) -> None:
    """Their limits stay, as the processor leaves them; a null selector becomes zero."""
    start = "6a 18 | push 0x18\n 0f a1 | pop fs\n" + null + "\n 0f a9 | pop gs"
    make = with_program("90 | nop\n eb fe | jmp $", start=start)
    stop, traps, _ = beside_vmx.agree(make, 1, 50, "bt")
    assert stop == StopKind.BUDGET
    assert traps["IRETQ"] == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_timer_that_is_early_in_the_middle_of_pushf(engine: str) -> None:
    """For it counts what is executed beyond the guest's instructions; what is pushed has IF."""
    start, arm, _ = p.DEADLINES.partition("    0f 31  ")
    assert arm
    program = f"""
        {start}
        0f 31          | rdtsc
        05 d0 07 00 00 | add eax, 2000
        83 d2 00       | adc edx, 0
        b9 e0 06 00 00 | mov ecx, IA32_TSC_DEADLINE
        0f 30          | wrmsr
        48 83 cf ff    | or rdi, -1
        fb             | sti
        9c             | next: pushfq
        5e             | pop rsi
        48 21 f7       | and rdi, rsi
        85 db          | test ebx, ebx
        74 f7          | jz next
        {ENDS}
    """
    make = kernel(program, engine, v40=p.DEADLINE_HANDLER)
    stop, _, _ = beside_vmx.agree(make, 10_000, 10_000, "bt")
    assert stop == StopKind.DEBUG_EXIT


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(
    "code",
    ["9c | pushf", "9d | popf", "cf", "0f 31", "0f 01 f9", "c3", "ff d0", "ff e0", "c2 04 00"],
)
def test_no_sequence_is_longer_than_what_is_taken_for_one(code: str, bits: int) -> None:
    raw = p.assemble(code)
    if bits == 64 and raw == b"\xcf":
        raw = b"\x48\xcf"
    out = translate(
        Layout(0xF000_0000, bits), 0xF020_0000, raw + b"\xf4" * 200, 0x40_0000, is_virtual=True
    )
    steps = [mark.steps for mark in out.marks.values()]
    assert steps and max(steps) < technique.FEW
    assert max(steps) - min(0, *steps) < technique.LONGEST_SEQUENCE
