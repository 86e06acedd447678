"""What KVM's paravirtual features keep of a vCPU: each promise of its docstring, and its MSRs."""

import pytest

from understudy.arch.msr import Msr
from understudy.guests.entry import CODE_32, protected_mode, write_gdt
from understudy.machine.p2m import GuestMemoryError
from understudy.vcpu.activity import Activity
from understudy.vcpu.kvm import Kvm
from understudy.vcpu.loop import Vcpu
from understudy.verdict import StopKind
from understudy.vm import VM

PLACE, STEAL, DATA = 0x2000, 0x3000, 0x12_0000
AWAY = STEAL + 16
EDGE, LEVEL = False, True
ISR_50 = 0x120  # the word of the in-service register that has vectors 40H to 5FH


def byte(vm: VM, gpa: int) -> int:
    return vm.memory.read(gpa, 1)[0]


def in_service(vcpu: Vcpu, vector: int = 0x50, level: bool = EDGE) -> Kvm:
    """An interrupt has gone in; its end may be said in memory."""
    vcpu.msrs.write(Msr.KVM_PV_EOI, PLACE | 1)
    vcpu.apic.raise_vector(vector, level)
    vcpu.apic.accept()
    vcpu.kvm.offer()
    return vcpu.kvm


def test_an_interrupt_is_ended_when_the_guest_says_so_in_memory() -> None:
    with VM("4M", cpu="max") as vm:
        (vcpu,) = vm.vcpus
        kvm = in_service(vcpu)
        assert byte(vm, PLACE) == 1 and vcpu.apic.read(ISR_50, 0)
        vm.memory.write(PLACE, b"\0")
        kvm.settle()
        assert vcpu.apic.read(ISR_50, 0) == 0
        assert kvm.state.counts == {"ended in memory": 1}
        kvm.settle()
        assert kvm.state.counts == {"ended in memory": 1}


def test_one_that_is_not_ended_is_to_be_ended_at_the_apic() -> None:
    with VM("4M", cpu="max") as vm:
        (vcpu,) = vm.vcpus
        in_service(vcpu).settle()
        assert byte(vm, PLACE) == 0 and vcpu.apic.read(ISR_50, 0)
        assert vcpu.kvm.state.counts == {"taken back": 1}
        vcpu.msrs.apic_write(0xFEE0_00B0, 4, 0)
        assert vcpu.apic.read(ISR_50, 0) == 0


def test_a_guest_that_looks_at_its_apic_finds_it_as_it_is() -> None:
    with VM("4M", cpu="max") as vm:
        (vcpu,) = vm.vcpus
        in_service(vcpu)
        vm.memory.write(PLACE, b"\0")
        assert vcpu.msrs.apic_read(0xFEE0_0000 + ISR_50, 4) == 0


def test_nothing_is_offered_if_the_end_has_consequences() -> None:
    for level, waits in ((LEVEL, False), (EDGE, True)):
        with VM("4M", cpu="max") as vm:
            (vcpu,) = vm.vcpus
            if waits:  # in a lower class: it is to go in after the end
                vcpu.apic.raise_vector(0x31, EDGE)
            assert not in_service(vcpu, level=level).state.offered
            assert byte(vm, PLACE) == 0


def test_where_there_is_no_memory_nothing_is_offered() -> None:
    with VM("4M", cpu="max") as vm:
        (vcpu,) = vm.vcpus
        vcpu.msrs.write(Msr.KVM_PV_EOI, 1 << 40 | 1)
        vcpu.apic.raise_vector(0x50, EDGE)
        vcpu.apic.accept()
        vcpu.kvm.offer()
        assert not vcpu.kvm.state.offered


@pytest.mark.parametrize(
    ("msr", "first", "good", "bad"),
    [(Msr.KVM_PV_EOI, 0, PLACE | 1, PLACE | 3), (Msr.KVM_POLL_CONTROL, 1, 0, 2)],
)
def test_an_msr_keeps_its_value_and_refuses_reserved_bits(
    msr: Msr, first: int, good: int, bad: int
) -> None:
    with VM("4M", cpu="max") as vm:
        msrs = vm.vcpus[0].msrs
        assert msrs.read(msr) == first
        msrs.write(msr, good)
        with pytest.raises(KeyError):
            msrs.write(msr, bad)
        assert msrs.read(msr) == good
        vm.vcpus[0].reset()
        assert msrs.read(msr) == first


def test_hidden_features_have_no_msrs() -> None:
    with VM("4M", cpu="max,-pv_eoi,-poll_control,-clocksource") as vm:
        for msr in (Msr.KVM_PV_EOI, Msr.KVM_POLL_CONTROL, Msr.KVM_SYSTEM_TIME_NEW):
            with pytest.raises(KeyError):
                vm.vcpus[0].msrs.write(msr, 0)


def test_who_was_away_flushes_if_that_was_left_to_be_done() -> None:
    with VM("4M", cpu="max") as vm:
        (vcpu,) = vm.vcpus
        kvm, flushed = vcpu.kvm, list[int]()
        kvm.flush = lambda: flushed.append(byte(vm, AWAY))
        kvm.leave()
        assert not kvm.state.away  # nobody has said where to tell it
        vcpu.msrs.write(Msr.KVM_STEAL_TIME, STEAL | 1)
        for left, expected in ((0, []), (2, [0])):
            kvm.leave()
            assert byte(vm, AWAY) == 1 and vcpu.attention
            vm.memory.write(AWAY, bytes((1 | left,)))
            kvm.come_back()
            assert (byte(vm, AWAY), flushed) == (0, expected)
        vm.pc.kvmclock.stolen(0, 7)
        kvm.leave()
        vm.pc.kvmclock.stolen(0, 8)
        assert byte(vm, AWAY) == 1  # the time that is told beside it leaves it alone


def test_init_forgets_nothing_that_others_were_told() -> None:
    with VM("4M", cpu="max") as vm:
        (vcpu,) = vm.vcpus
        kvm, flushed = vcpu.kvm, list[int]()
        kvm.flush = lambda: flushed.append(byte(vm, AWAY))
        vcpu.msrs.write(Msr.KVM_STEAL_TIME, STEAL | 1)
        kvm.leave()
        vm.memory.write(AWAY, b"\3")
        kvm.reset()
        kvm.come_back()
        assert (byte(vm, AWAY), flushed) == (0, [0])
        kvm.leave()
        vcpu.msrs.write(Msr.KVM_STEAL_TIME, 0)
        vm.memory.write(AWAY, b"\3")
        kvm.come_back()
        assert byte(vm, AWAY) == 3  # it is not told there any more


def test_a_guest_that_does_not_look_is_not_told() -> None:
    with VM("4M", cpu="understudy,+steal_time") as vm:
        (vcpu,) = vm.vcpus
        vcpu.msrs.write(Msr.KVM_STEAL_TIME, STEAL | 1)
        vcpu.kvm.leave()
        assert byte(vm, AWAY) == 0


KICK = "b8 05 00 00 00 31 db b9 01 00 00 00 0f 01 c1 89 47 04 fa f4"
"""mov eax,5; xor ebx,ebx; mov ecx,1; vmcall; mov [edi+4],eax; cli; hlt"""
WAIT = "fa f4 c7 07 01 00 00 00 fa f4"
"""cli; hlt; mov dword [edi],1; cli; hlt"""
LATER = "b9 40 42 0f 00 e2 fe"  # mov ecx,1000000; loop $


@pytest.mark.parametrize("waiter_is_late", [False, True])
@pytest.mark.parametrize("cpu", ["max", "max,-pv_unhalt"])
def test_a_kick_ends_a_halt_without_interrupts_also_one_that_comes_later(
    cpu: str, waiter_is_late: bool
) -> None:
    with VM("4M", cpu=cpu, cpus=2) as vm:
        write_gdt(vm.memory, CODE_32)
        codes = (KICK, LATER + WAIT) if waiter_is_late else (LATER + KICK, WAIT)
        for n, code in enumerate(codes):
            at = 0x10_0000 + n * 0x1000
            vm.memory.write(at, bytes.fromhex(code))
            vm.vcpus[n].set_registers(dict(protected_mode("kick", at, rdi=DATA).registers))
            vm.vcpus[n].state.activity = Activity.ACTIVE
        assert vm.go(budget=10_000_000).kind == StopKind.STUCK
        offered = cpu == "max"
        assert vm.memory.read_u32(DATA) == offered
        assert vm.memory.read_u32(DATA + 4) == (0 if offered else (1 << 32) - 1000)


def test_a_byte_of_guest_memory_is_exchanged() -> None:
    with VM("4M") as vm:
        vm.memory.write(PLACE, b"\x12\x34")
        assert vm.memory.exchange(PLACE + 1, 0x56) == 0x34
        assert vm.memory.read(PLACE, 2) == b"\x12\x56"
        with pytest.raises(GuestMemoryError):
            vm.memory.exchange(1 << 40, 0)
        with pytest.raises(IndexError):
            vm.host.memory.exchange(vm.host.memory.size, 0)


def test_a_snapshot_keeps_what_is_offered() -> None:
    with VM("4M", cpu="max") as vm:
        in_service(vm.vcpus[0])
        vm.memory.write(PLACE, b"\0")
        saved = vm.save()
    with VM.restore(saved) as vm:
        (vcpu,) = vm.vcpus
        assert vcpu.apic.read(ISR_50, 0)
        vcpu.kvm.settle()
        assert vcpu.apic.read(ISR_50, 0) == 0


@pytest.mark.parametrize(
    ("clock", "cpu", "is_shown"),
    [
        ("wall", "understudy", True),
        ("wall", "baseline", True),
        ("wall", "understudy,-pv_eoi", False),
        ("wall", "understudy,-hypervisor", False),
        ("wall", "understudy,-apic", False),
        ("virtual", "understudy", False),
    ],
)
def test_in_real_time_an_interrupt_ends_without_an_exit(
    clock: str, cpu: str, is_shown: bool
) -> None:
    with VM("4M", clock=clock, cpu=cpu) as vm:
        assert ("pv_eoi" in vm.vcpus[0].model.shown) == is_shown
