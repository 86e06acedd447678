"""What each exit does to the guest."""

import pytest

from tests.unit.fakes import FakeExit
from tests.unit.fixtures import CODE, bench
from understudy.arch.exception import Vector
from understudy.arch.exit_reason import Reason
from understudy.arch.msr import Msr
from understudy.arch.vmcs import Vmcs
from understudy.execution.vmx.exits import TABLE, handles
from understudy.verdict import StopKind

VALID = 1 << 31
GP, UD = VALID | 1 << 11 | 3 << 8 | 13, VALID | 3 << 8 | 6
IMPOSSIBLE = {
    "INIT", "SIPI", "IO_SMI", "OTHER_SMI", "MOV_DR",
    "TPR_BELOW_THRESHOLD", "APIC_ACCESS", "APIC_WRITE", "VIRTUALIZED_EOI",
    "GDTR_IDTR_ACCESS", "LDTR_TR_ACCESS", "PML_FULL", "XSAVES", "XRSTORS",
    "HALT", "SHUTDOWN", "MMIO", "PIO", "EVENT", "LOST", "SENSITIVE",
}  # fmt: skip
"""Exits that our controls do not ask for."""


def test_every_exit_that_can_come_has_an_answer() -> None:
    assert {reason.name for reason in Reason if reason not in TABLE} == IMPOSSIBLE


def test_a_reason_has_one_answer() -> None:
    with pytest.raises(TypeError, match="CPUID has two handlers"):
        handles(Reason.CPUID)(TABLE[Reason.CPUID])


def test_cpuid_answers_in_the_low_halves_and_goes_on() -> None:
    with bench() as b:
        b.processor.live[:4] = [0x1_4000_0000, 0, 7, 7]
        b.play(FakeExit(Reason.CPUID, length=2))
        rax, rcx, rdx, rbx = b.processor.live[:4]
        assert rax == 0x4000_0001
        words = (rbx, rcx, rdx)
        assert b"".join(w.to_bytes(4, "little") for w in words) == b"KVMKVMKVM\0\0\0"
        assert b.rip == CODE + 2
        assert b.vm.counts()["exits"] == {"CPUID": 1}


@pytest.mark.parametrize(("attr", "is_shown"), [(0xA09B, True), (0xC09B, False)])
def test_cpuid_shows_syscall_to_64_bit_code_only(attr: int, is_shown: bool) -> None:
    with bench({"cs_attr": attr}) as b:
        b.processor.live[0] = 0x8000_0001
        b.play(FakeExit(Reason.CPUID, length=2))
        assert bool(b.processor.live[2] & 1 << 11) == is_shown
        assert b.processor.live[2] & 1 << 29  # and all else: here, long mode


@pytest.mark.parametrize("reason", ["VMXON", "VMRESUME", "GETSEC", "MONITOR", "RDRAND", "RSM"])
def test_hidden_features_are_undefined(reason: str) -> None:
    with bench() as b:
        b.play(FakeExit(Reason[reason], length=3))
        assert b.injected == UD
        assert b.rip == CODE


def test_an_unknown_msr_is_a_general_protection_fault_and_is_counted() -> None:
    with bench() as b:
        b.processor.live[1] = 0x1234
        b.play(FakeExit(Reason.RDMSR, length=2))
        assert b.injected == GP
        assert b.field(Vmcs.ENTRY_EXCEPTION_ERROR_CODE) == 0
        b.play(FakeExit(Reason.WRMSR, length=2))
        assert b.injected == GP
        assert b.rip == CODE
        assert b.vm.vcpus[0].msrs.state.unknown == {0x1234: 2}
        assert "unknown MSRs: 0x1234: 2" in b.vm.describe()


def test_a_known_msr_is_read_and_written_in_halves() -> None:
    with bench() as b:
        b.processor.live[:3] = [0xFFFF_FFFF_0000_0006, Msr.IA32_MTRR_PHYSBASE0 + 2, 0x1]
        b.play(FakeExit(Reason.WRMSR, length=2))
        b.processor.live[0] = b.processor.live[2] = 0
        b.play(FakeExit(Reason.RDMSR, length=2))
        assert b.processor.live[0] == 6
        assert b.processor.live[2] == 1
        assert b.rip == CODE + 4


def port(number: int, size: int, is_in: bool, **more: int) -> FakeExit:
    qualification = number << 16 | is_in << 3 | size - 1
    return FakeExit(Reason.IO_INSTRUCTION, qualification | more.pop("flags", 0), 1, **more)


@pytest.mark.parametrize(
    ("size", "rax"), [(1, 0xAAAA_AAAA_AAAA_AAFF), (2, 0xAAAA_AAAA_AAAA_FFFF), (4, 0xFFFF_FFFF)]
)
def test_in_changes_as_much_of_rax_as_hardware(size: int, rax: int) -> None:
    with bench() as b:
        b.processor.live[0] = 0xAAAA_AAAA_AAAA_AAAA
        b.play(port(0x500, size, True))
        assert b.processor.live[0] == rax
        assert b.rip == CODE + 1


def test_out_reaches_the_serial_line() -> None:
    with bench() as b:
        heard: list[bytes] = []
        b.vm.console.on_output.append(heard.append)
        b.processor.live[0] = 0xFF41
        b.play(port(0x3F8, 1, False))
        assert b"".join(heard) == b"A"


def test_a_debug_exit_ends_the_run_after_its_instruction() -> None:
    with bench() as b:
        b.processor.live[0] = 42
        stop = b.play(port(0xF4, 1, False))
        assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, 42)
        assert b.rip == CODE + 1


def mov_cr(number: int, gpr: int, kind: int = 0) -> FakeExit:
    return FakeExit(Reason.CR_ACCESS, gpr << 8 | kind << 4 | number, 3)


@pytest.mark.parametrize(
    ("cr0", "is_allowed"),
    [
        (0xC001_0011, True),  # cache disabled
        (0xE001_0011, True),
        (0xA001_0011, False),  # NW without CD
        (0x8001_0010, False),  # PG without PE
        (0x1_8001_0011, False),
    ],
)
def test_cr0_as_the_manual_checks_it(cr0: int, is_allowed: bool) -> None:
    with bench() as b:
        b.processor.live[3] = cr0
        b.play(mov_cr(0, 3))
        if is_allowed:
            assert b.field(Vmcs.CR0_READ_SHADOW) == cr0
            assert b.field(Vmcs.GUEST_CR0) == cr0 | 0x20
            assert b.rip == CODE + 3
        else:
            assert b.injected == GP
            assert b.rip == CODE


def test_turning_paging_on_activates_long_mode() -> None:
    with bench({"cr0": 0x11, "efer": 0x100}) as b:
        assert not b.field(Vmcs.GUEST_EFER) & 0x400
        b.processor.live[0] = 0xC000_0011
        b.play(mov_cr(0, 0))
        assert b.field(Vmcs.GUEST_EFER) == 0x500
        assert b.field(Vmcs.ENTRY_CONTROLS) & 1 << 9


def test_turning_pae_paging_on_loads_its_four_entries() -> None:
    with bench({"cr0": 0x11, "efer": 0, "cr3": 0x3020}) as b:
        for n in range(4):
            b.vm.memory.write_u64(0x3020 + 8 * n, 0x1000 * n | 1)
        b.processor.live[0] = 0xC000_0011
        b.play(mov_cr(0, 0))
        assert [b.field(Vmcs.GUEST_PDPTE0 + 2 * n) for n in range(4)] == [  # type: ignore[arg-type]
            0x0001, 0x1001, 0x2001, 0x3001,
        ]  # fmt: skip


def test_a_reserved_bit_of_cr4_is_refused() -> None:
    with bench() as b:
        b.play(mov_cr(4, 0))
        assert b.injected == GP


def test_cr8_is_the_task_priority() -> None:
    with bench() as b:
        b.processor.live[9] = 5
        b.play(mov_cr(8, 9))
        assert b.apic.tpr == 0x50
        b.play(mov_cr(8, 10, kind=1))
        assert b.processor.live[10] == 5
        b.processor.live[9] = 16
        b.play(mov_cr(8, 9))
        assert b.injected == GP


def test_a_hypercall_that_nobody_offers() -> None:
    for dpl, result in ((0, -1000), (3, -1)):
        with bench({"ss_attr": 0xC093 | dpl << 5}) as b:
            b.play(FakeExit(Reason.VMCALL, length=3))
            assert b.processor.live[0] == result & (1 << 64) - 1


def test_a_triple_fault_is_shown_decoded() -> None:
    with bench() as b:
        b.vm.memory.write(CODE, b"\xf4\x90")
        stop = b.play(FakeExit(Reason.TRIPLE_FAULT))
        assert stop.kind == StopKind.TRIPLE_FAULT
        for words in ("rip=0000000000100000", "CR0(PG WP ET PE)", "hlt", "EFER(LMA LME)"):
            assert words in stop.detail


@pytest.mark.parametrize(
    ("exit", "words"),
    [
        (FakeExit(29, qualification=0x77), "MOV_DR (29) at rip 0x100000"),
        (FakeExit(200), "REASON_200"),
        (FakeExit(33, entry_failure=True), "INVALID_GUEST_STATE"),
        (FakeExit(48, qualification=4, gpa=1 << 30), "executes at gpa 0x40000000"),
        (FakeExit(48, qualification=0x81, gpa=1 << 30), "a page table of the guest"),
        (FakeExit(48, qualification=2, gpa=1 << 30, idt_info=VALID | 0x80E), "was delivered to"),
    ],
)
def test_what_cannot_go_on_stops_loudly(exit: FakeExit, words: str) -> None:
    with bench() as b:
        stop = b.play(exit)
        assert stop.kind == StopKind.ERROR
        assert words in stop.detail
        assert "cr3=0x1000" in stop.detail


def test_skipping_clears_the_shadow_and_reports_single_steps() -> None:
    with bench({"rflags": 0x302}) as b:
        b.processor.vmcs[Vmcs.GUEST_INTERRUPTIBILITY_STATE] = 0b1001
        b.play(FakeExit(Reason.CPUID, length=2))
        assert b.field(Vmcs.GUEST_INTERRUPTIBILITY_STATE) == 0b1000
        assert b.field(Vmcs.GUEST_PENDING_DEBUG_EXCEPTIONS) == 1 << 14


def test_an_instruction_that_is_done_ends_the_resume_flag_and_one_that_faults_sets_it() -> None:
    with bench({"rflags": 0x1_0202}) as b:
        b.play(FakeExit(Reason.CPUID, length=2))
        assert b.field(Vmcs.GUEST_RFLAGS) == 0x202
        b.play(FakeExit(Reason.VMXON, length=4))
        assert b.injected == UD
        assert b.field(Vmcs.GUEST_RFLAGS) == 0x1_0202


def test_a_double_fault_is_no_fault_and_clears_the_resume_flag() -> None:
    with bench({"rflags": 0x1_0202}) as b:
        b.vm.vcpus[0].fault(Vector.DF, 0)
        assert b.field(Vmcs.GUEST_RFLAGS) == 0x202


def test_rip_wraps_as_the_code_segment_does() -> None:
    for attr, after in ((0xC09B, 1), (0xA09B, 0x1_0000_0001)):
        with bench({"rip": 0xFFFF_FFFF, "cs_attr": attr}) as b:
            b.play(FakeExit(Reason.CPUID, length=2))
            assert b.rip == after
