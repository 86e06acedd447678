"""Instructions on device memory: assembled by hand, carried out, compared with the manual."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fakes import FakeExit, FakeProcessor
from tests.unit.fixtures import CODE, Bench, bench
from understudy.arch.address import PHYSICAL
from understudy.arch.exit_reason import Reason
from understudy.arch.vmcs import Vmcs
from understudy.execution.vmx.exits import TABLE
from understudy.instructions.port_strings import CYCLE_NS
from understudy.machine.bus import Region, Space
from understudy.vcpu.activity import Activity
from understudy.verdict import StopKind

BASE = 0xC000_0000
DEVICE = BASE + 0x40  # mapped to gpa 3 GiB by the bench, where there is no RAM
RAX, RCX, RDX, RBX, RSI, RDI = 0, 1, 2, 3, 6, 7
CF, PF, AF, ZF, SF, OF = 1, 4, 16, 64, 128, 2048


@dataclass
class Register32:
    """A device: one value, and what was done to it."""

    value: int = 0
    log: list[tuple[str, int, int, int]] = field(default_factory=list)

    def read(self, region: int, offset: int, size: int) -> int:
        self.log.append(("read", BASE + offset, size, 0))
        return self.value & (1 << 8 * size) - 1

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        self.log.append(("write", BASE + offset, size, value))
        self.value = value


def device(b: Bench, value: int = 0) -> Register32:
    made = Register32(value)
    b.vm.bus.claim(Region(Space.MMIO, BASE, 0x1000, made))
    return made


def execute(b: Bench, code: str, gpa: int = DEVICE) -> None:
    b.vm.memory.write(b.rip, bytes.fromhex(code).ljust(16, b"\xcc"))
    b.play(FakeExit(Reason.EPT_VIOLATION, 0x181, gpa=gpa))


@pytest.mark.parametrize(
    ("code", "value", "rax", "size"),
    [
        ("8b 07", 0x1_8899_AABB, 0x8899_AABB, 4),  # mov eax,[rdi]
        ("48 8b 07", 0x1122_3344_5566_7788, 0x1122_3344_5566_7788, 8),
        ("66 8b 07", 0xAABB, 0xFFFF_FFFF_FFFF_AABB, 2),
        ("8a 07", 0x7F, 0xFFFF_FFFF_FFFF_FF7F, 1),
        ("8a 27", 0x7F, 0xFFFF_FFFF_FFFF_7FFF, 1),  # mov ah,[rdi]
        ("0f b6 07", 0x80, 0x80, 1),  # movzx eax,byte
        ("48 0f be 07", 0x80, 0xFFFF_FFFF_FFFF_FF80, 1),  # movsx rax,byte
        ("0f bf 07", 0x8000, 0xFFFF_8000, 2),  # movsx eax,word
        ("48 63 07", 0x8000_0000, 0xFFFF_FFFF_8000_0000, 4),  # movsxd rax,dword
        ("23 07", 0x0F0F_0F0F, 0x0F0F_0F0F, 4),  # and eax,[rdi]
        ("33 07", 0x1, 0xFFFF_FFFE, 4),  # xor eax,[rdi]
    ],
)
def test_loads(code: str, value: int, rax: int, size: int) -> None:
    with bench() as b:
        made = device(b, value)
        b.processor.live[RAX] = (1 << 64) - 1
        execute(b, code)
        assert b.processor.live[RAX] == rax
        assert made.log == [("read", DEVICE, size, 0)]
        assert b.rip == CODE + len(bytes.fromhex(code))


@pytest.mark.parametrize(
    ("code", "value", "size"),
    [
        ("89 07", 0x5566_7788, 4),
        ("48 89 07", 0x1122_3344_5566_7788, 8),
        ("66 89 07", 0x7788, 2),
        ("88 27", 0x77, 1),  # mov [rdi],ah
        ("c7 07 04 03 02 01", 0x0102_0304, 4),
        ("48 c7 07 ff ff ff ff", (1 << 64) - 1, 8),
        ("c6 07 12", 0x12, 1),
        ("0f c3 07", 0x5566_7788, 4),  # movnti
    ],
)
def test_stores(code: str, value: int, size: int) -> None:
    with bench() as b:
        made = device(b)
        b.processor.live[RAX] = 0x1122_3344_5566_7788
        execute(b, code)
        assert made.log == [("write", DEVICE, size, value)]


@pytest.mark.parametrize(
    ("code", "old", "new", "flags"),
    [
        ("83 0f 01", 0x80, 0x81, PF),  # or dword [rdi],1
        ("83 27 00", 0x80, 0, ZF | PF),
        ("83 07 01", 0xFFFF_FFFF, 0, CF | PF | AF | ZF),  # add
        ("83 2f 01", 0x8000_0000, 0x7FFF_FFFF, PF | AF | OF),  # sub
        ("83 17 00", 0x7FFF_FFFF, 0x8000_0000, PF | AF | SF | OF),  # adc, CF set before
        ("83 1f 00", 0, 0xFFFF_FFFF, CF | PF | AF | SF),  # sbb, CF set before
        ("ff 07", 0x7FFF_FFFF, 0x8000_0000, CF | PF | AF | SF | OF),  # inc keeps CF
        ("ff 0f", 1, 0, CF | PF | ZF),  # dec
        ("f7 17", 0x0F, 0xFFFF_FFF0, CF),  # not touches no flag
        ("f7 1f", 1, 0xFFFF_FFFF, CF | PF | AF | SF),  # neg
    ],
)
def test_read_modify_write(code: str, old: int, new: int, flags: int) -> None:
    with bench({"rflags": 0x203}) as b:
        made = device(b, old)
        execute(b, code)
        assert made.log == [("read", DEVICE, 4, 0), ("write", DEVICE, 4, new)]
        assert b.field(Vmcs.GUEST_RFLAGS) == 0x202 | flags


@pytest.mark.parametrize(
    ("code", "flags"),
    [("83 3f 05", ZF | PF), ("39 07", CF | AF | SF | PF), ("f7 07 04 00 00 00", 0)],
)
def test_comparisons_write_nothing(code: str, flags: int) -> None:
    with bench() as b:
        made = device(b, 5)
        b.processor.live[RAX] = 6
        execute(b, code)
        assert [entry[0] for entry in made.log] == ["read"]
        assert b.field(Vmcs.GUEST_RFLAGS) == 0x202 | flags


def test_exchange() -> None:
    with bench() as b:
        made = device(b, 7)
        b.processor.live[RAX] = 9
        execute(b, "87 07")
        assert (made.value, b.processor.live[RAX]) == (9, 7)


def test_strings_go_both_ways_and_count_down() -> None:
    with bench() as b:
        made = device(b, 0x41)
        b.processor.live[RCX], b.processor.live[RDI] = 3, 0x5000
        b.processor.live[RSI] = DEVICE
        execute(b, "f3 a4")  # rep movsb, device to RAM
        assert b.vm.memory.read(0x5000, 3) == b"AAA"
        assert [entry[1] for entry in made.log] == [DEVICE, DEVICE + 1, DEVICE + 2]
        assert (b.processor.live[RCX], b.processor.live[RDI]) == (0, 0x5003)
        assert b.rip == CODE + 2
        made.log.clear()
        b.processor.vmcs[Vmcs.GUEST_RFLAGS] = 0x602  # DF
        b.processor.live[RAX], b.processor.live[RCX], b.processor.live[RDI] = 5, 2, DEVICE
        execute(b, "f3 ab")  # rep stosd
        assert made.log == [("write", DEVICE, 4, 5), ("write", DEVICE - 4, 4, 5)]


def test_a_long_repetition_gives_way_to_events() -> None:
    with bench() as b:
        device(b)
        b.processor.live[RCX], b.processor.live[RDI] = 3000, 0x5000
        b.processor.live[RSI] = DEVICE
        execute(b, "f3 a4")
        assert b.rip == CODE
        assert b.processor.live[RCX] == 3000 - 1024
        assert b.vm.clock.now() >= 1024 * CYCLE_NS


def test_a_fault_of_the_other_operand_is_the_guests() -> None:
    with bench() as b:
        made = device(b)
        b.processor.live[RSI], b.processor.live[RDI] = DEVICE, 1 << 40
        execute(b, "a5")  # movsd to an address that is not mapped
        assert made.log == []
        assert b.injected == 1 << 31 | 1 << 11 | 3 << 8 | 14
        assert b.field(Vmcs.ENTRY_EXCEPTION_ERROR_CODE) == 2
        assert b.processor.root_registers["cr2"] == 1 << 40
        assert b.rip == CODE


def test_an_instruction_over_a_page_boundary_is_fetched_in_two_parts() -> None:
    with bench({"rip": CODE + 0xFFF}) as b:
        device(b, 3)
        execute(b, "8b 07")
        assert b.processor.live[RAX] == 3


def test_what_has_no_plan_is_executed_by_the_processor_on_lent_memory() -> None:
    with bench() as b:
        made = device(b, 0x1122_3344_5566_7788)
        b.vm.memory.write(CODE, bytes.fromhex("f2 48 0f 38 f1 07"))  # crc32 rax,[rdi]
        b.processor.live[RDI] = DEVICE
        seen: list[bytes] = []

        def step(processor: FakeProcessor) -> FakeExit:
            seen.append(b.vm.memory.read(DEVICE, 8))
            return FakeExit(Reason.MONITOR_TRAP_FLAG)

        b.processor.script.append(FakeExit(Reason.EPT_VIOLATION, 0x181, gpa=DEVICE))
        b.play(step)
        assert seen == [bytes.fromhex("8877665544332211")]
        assert made.log == [("read", DEVICE, 8, 0)]
        assert b.vm.memory.hpa(DEVICE) is None  # the page is gone


def test_a_device_that_lent_memory_does_not_cover_is_said() -> None:
    with bench() as b:
        device(b)
        b.vm.memory.write(CODE, bytes.fromhex("f2 48 0f 38 f1 07"))
        b.processor.live[RDI] = DEVICE
        for gpa in (DEVICE, DEVICE + 0x5000):
            b.processor.script.append(FakeExit(Reason.EPT_VIOLATION, 0x181, gpa=gpa))
        stop = b.vm.go()
        assert stop.kind == StopKind.ERROR
        assert "touches a device that it does not name" in stop.detail


def test_the_apic_page_is_the_apics() -> None:
    with bench() as b:
        b.processor.live[RAX] = 0x1FF
        execute(b, "89 07", gpa=0xFEE0_00F0)
        assert b.apic.registers[0xF0] == 0x1FF
        execute(b, "8b 1f", gpa=0xFEE0_00F0)
        assert b.processor.live[RBX] == 0x1FF


@settings(max_examples=400, deadline=None)
@given(
    st.binary(min_size=15, max_size=15),
    st.lists(st.integers(0, (1 << 64) - 1) | st.just(DEVICE), min_size=16, max_size=16),
    st.sampled_from([0xA09B, 0xC09B, 0x9B]),
)
def test_no_instruction_raises(code: bytes, registers: list[int], attr: int) -> None:
    """Whatever bytes a guest executes, it ends with a stop, a fault or the instruction done."""
    with bench({"cs_attr": attr}) as b:
        device(b)
        b.processor.live = registers
        b.vm.memory.write(CODE, code)
        b.processor.script.append(FakeExit(Reason.EPT_VIOLATION, 0x181, gpa=DEVICE))
        b.processor.script.append(FakeExit(Reason.MONITOR_TRAP_FLAG))  # for lent memory
        b.processor.script.append(FakeExit(Reason.BUDGET))
        assert b.vm.go().kind in (StopKind.BUDGET, StopKind.ERROR)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, (1 << 64) - 1), st.lists(st.integers(0, (1 << 64) - 1), min_size=16, max_size=16)
)
def test_no_exit_raises(word: int, registers: list[int]) -> None:
    """Any qualification with any registers, for every exit that can come."""
    with bench() as b:
        for reason in TABLE:
            b.processor.live = list(registers)
            b.vm.vcpus[0].state.activity = Activity.ACTIVE
            b.vm.vcpus[0].requested = None
            b.processor.script.clear()
            b.processor.script.append(
                FakeExit(reason, word, 3, word, word & PHYSICAL, instr_info=word & 0xFFFF_FFFF)
            )
            b.processor.script.append(FakeExit(Reason.MONITOR_TRAP_FLAG))  # for lent memory
            b.processor.script.append(FakeExit(Reason.BUDGET))
            b.processor.in_guest = False
            assert b.vm.go(deadline_ns=b.vm.clock.now() + 10_000_000).kind
