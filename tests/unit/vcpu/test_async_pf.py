"""Asynchronous page faults: who is told of a miss, when the page is told as ready, and the MSRs."""

import random
from collections.abc import Iterator
from contextlib import suppress

import pytest

from understudy.arch.exception import Vector
from understudy.arch.msr import Msr
from understudy.guests.entry import CODE_32, protected_mode, write_gdt
from understudy.machine.frames import OutOfFrames
from understudy.vcpu.activity import Activity
from understudy.vcpu.async_pf import AGAIN_NS, BOTH, MOST, AsyncPf
from understudy.vcpu.loop import Vcpu
from understudy.vm import VM

AREA, NS = 0x3000, 100_000
ALWAYS, IF = 1 << 1, 1 << 9
VECTOR = 0x50
IRR_50 = 0x220  # the word of the interrupt request register that has vectors 40H to 5FH
NOWHERE = 1 << 40
EN, INT, ACK = Msr.KVM_ASYNC_PF_EN, Msr.KVM_ASYNC_PF_INT, Msr.KVM_ASYNC_PF_ACK


@pytest.fixture
def vm() -> Iterator[VM]:
    """A guest that takes them, in its kernel too, and is about to take interrupts."""
    with VM("4M", cpu="max") as vm:
        ready(vm)
        yield vm


def ready(vm: VM, enable: int = AREA | BOTH | ALWAYS) -> None:
    write_gdt(vm.memory, CODE_32)
    vm.vcpus[0].set_registers(
        dict(protected_mode("test", 0x10_0000).registers) | {"rflags": IF | 2}
    )
    control = vm.vcpus[0].guest.control()
    vm.vcpus[0].guest.load_control(control._replace(cr0=control.cr0 | 1 << 31))
    vm.vcpus[0].msrs.write(INT, VECTOR)
    vm.vcpus[0].msrs.write(EN, enable)


def missed(vcpu: Vcpu, ns: int = NS) -> int:
    """It misses a page: the token that it is told, or 0."""
    vcpu.page.wait(ns)
    token = vcpu.kvm.async_pf.tell_missed()
    assert vcpu.state.activity == (Activity.ACTIVE if token else Activity.WAIT_FOR_PAGE)
    return token


def told(vm: VM) -> tuple[int, int]:
    """Flags and token, as the guest finds them."""
    return vm.memory.read_u32(AREA), vm.memory.read_u32(AREA + 4)


def take_flags(vm: VM) -> None:
    vm.memory.write_u32(AREA, 0)


def passes(vm: VM, ns: int) -> None:
    """Guest time, as if other VMs ran."""
    (vcpu,) = vm.vcpus
    vcpu.guest.advance(ns)
    vm.clock.run_due()


def take(vm: VM) -> int:
    """The guest's handler of the interrupt: the token."""
    token = told(vm)[1]
    vm.memory.write_u32(AREA + 4, 0)
    vm.vcpus[0].msrs.write(ACK, 1)
    return token


def counts(vm: VM) -> dict[str, int]:
    return dict(vm.vcpus[0].kvm.async_pf.state.counts)


def test_a_miss_is_told_and_later_that_the_page_is_ready(vm: VM) -> None:
    (vcpu,) = vm.vcpus
    token = missed(vcpu)
    assert token not in (0, 0xFFFF_FFFF) and token >> 32 == 0
    assert told(vm) == (1, 0)
    passes(vm, NS - 1)
    assert told(vm) == (1, 0) and not vcpu.apic.read(IRR_50, 0)
    passes(vm, 1)
    assert told(vm) == (1, token) and vcpu.apic.read(IRR_50, 0) == 1 << VECTOR - 0x40
    assert vcpu.attention
    assert counts(vm) == {"not present told": 1, "ready told": 1}


def test_pages_that_have_come_are_told_one_after_the_other(vm: VM) -> None:
    (vcpu,) = vm.vcpus
    tokens = []
    for ns in (3 * NS, NS, 2 * NS):
        tokens.append(missed(vcpu, ns))
        take_flags(vm)
    passes(vm, 3 * NS)
    assert len(set(tokens)) == 3
    assert [take(vm) for _ in range(4)] == [tokens[1], tokens[2], tokens[0], 0]
    assert counts(vm) == {"not present told": 3, "ready told": 3}


def test_a_token_waits_until_the_last_one_is_taken_and_acknowledged(vm: VM) -> None:
    (vcpu,) = vm.vcpus
    missed(vcpu)
    take_flags(vm)
    second = missed(vcpu)
    passes(vm, NS)
    vm.memory.write_u32(AREA + 4, 0)
    passes(vm, NS)
    assert told(vm)[1] == 0, "it has not acknowledged the first"
    vm.memory.write_u32(AREA + 4, 7)
    vcpu.msrs.write(ACK, 1)
    assert told(vm)[1] == 7, "its word is not free"
    vcpu.msrs.write(ACK, 0)
    vm.memory.write_u32(AREA + 4, 0)
    assert told(vm)[1] == 0
    vcpu.msrs.write(ACK, 1)
    assert told(vm)[1] == second


@pytest.mark.parametrize("why", [
    "disabled", "not by interrupt", "kernel", "IF", "flags", "no paging", "event", "nowhere",
])  # fmt: skip
def test_who_cannot_be_told_waits_as_long_as_ever(vm: VM, why: str) -> None:
    (vcpu,) = vm.vcpus
    match why:
        case "disabled":
            vcpu.msrs.write(EN, AREA)
        case "not by interrupt":
            vcpu.msrs.write(EN, AREA | 1)
        case "kernel":
            vcpu.msrs.write(EN, AREA | BOTH)
        case "IF":
            vcpu.guest.rflags = 2
        case "flags":
            vm.memory.write_u32(AREA, 1)
        case "no paging":
            control = vcpu.guest.control()
            vcpu.guest.load_control(control._replace(cr0=control.cr0 & ~(1 << 31)))
        case "event":
            vcpu.fault(Vector.UD)
        case "nowhere":
            vcpu.msrs.write(EN, NOWHERE | BOTH | ALWAYS)
    assert missed(vcpu) == 0
    assert vcpu.page.state.at == vm.clock.now() + NS
    is_on = why not in ("disabled", "not by interrupt")
    assert counts(vm) == ({"waited instead": 1} if is_on else {})
    passes(vm, NS)
    assert vcpu.state.activity is Activity.ACTIVE and not vcpu.apic.read(IRR_50, 0)


def test_as_many_as_linux_has(vm: VM) -> None:
    (vcpu,) = vm.vcpus
    for _ in range(MOST):
        assert missed(vcpu)
        take_flags(vm)
    assert not missed(vcpu)
    passes(vm, NS)
    assert not missed(vcpu) or told(vm)[1], "one is in its hands, the others wait for that"
    found = [take(vm) for _ in range(MOST)]
    assert len(set(found)) == MOST and 0 not in found


@pytest.mark.parametrize("how", ["EN", "reset", "INIT"])
def test_what_is_outstanding_is_forgotten(vm: VM, how: str) -> None:
    (vcpu,) = vm.vcpus
    missed(vcpu)
    take_flags(vm)
    missed(vcpu, 2 * NS)
    passes(vm, NS)
    match how:
        case "EN":
            vcpu.msrs.write(EN, 0)
        case "reset":
            vcpu.reset()
        case "INIT":
            vcpu.kvm.reset()
    assert vcpu.msrs.read(INT) == (VECTOR if how == "EN" else 0) and vcpu.msrs.read(EN) == 0
    ready(vm)
    vm.memory.write_u32(AREA + 4, 0)
    passes(vm, 3 * NS)
    vcpu.msrs.write(ACK, 1)
    assert told(vm)[1] == 0


def test_a_snapshot_keeps_them(vm: VM) -> None:
    (vcpu,) = vm.vcpus
    tokens = [missed(vcpu)]
    take_flags(vm)
    passes(vm, NS // 2)
    tokens.append(missed(vcpu))
    passes(vm, NS // 2)
    with VM.restore(vm.save()) as again:
        assert take(again) == tokens[0]
        passes(again, NS // 2 - 1)
        assert told(again)[1] == 0
        passes(again, 1)
        assert take(again) == tokens[1]
        take_flags(again)
        assert missed(again.vcpus[0]) not in (*tokens, 0)


def test_a_technique_that_takes_over_tells_the_same_guest() -> None:
    with VM("4M", cpu="understudy,+async_pf", paging="vtlb") as vm:
        (vcpu,) = vm.vcpus
        ready(vm)
        first = missed(vcpu)
        take_flags(vm)
        before, vm.execution = vcpu.guest, "emulate"
        vcpu.attend()
        assert vcpu.guest is not before
        second, heard = missed(vcpu), list[bool]()
        assert first and second
        vcpu.guest.notify = lambda: heard.append(True)
        passes(vm, NS)
        assert heard == [True], "also one that sleeps"
        assert [take(vm), take(vm)] == [first, second]


def test_a_host_without_a_frame_is_asked_again(vm: VM, monkeypatch: pytest.MonkeyPatch) -> None:
    (vcpu,) = vm.vcpus
    token = missed(vcpu)
    with monkeypatch.context() as patch:

        def none(gpa: int) -> int:
            raise OutOfFrames

        patch.setattr(vm.memory, "read_u32", none)
        passes(vm, NS)
    assert told(vm)[1] == 0
    passes(vm, AGAIN_NS)
    assert take(vm) == token


def test_in_real_time_a_miss_is_told_as_well() -> None:
    with VM("4M", cpu="max", clock="wall") as vm:
        (vcpu,) = vm.vcpus
        ready(vm)
        token = missed(vcpu)
        assert told(vm) == (1, 0)
        while vm.clock.now() < vcpu.kvm.async_pf.state.coming[0][0]:
            assert told(vm) == (1, 0)
        vm.clock.run_due()
        assert told(vm) == (1, token) and counts(vm) == {"not present told": 1, "ready told": 1}


@pytest.mark.parametrize(
    ("msr", "good", "bad"),
    [(EN, AREA | 0xB, 1 << 2), (EN, 0, 1 << 4), (EN, 0, 1 << 5), (INT, 0xFF, 0x100), (ACK, 0, 2)],
)
def test_an_msr_keeps_its_value_and_refuses_reserved_bits(msr: Msr, good: int, bad: int) -> None:
    with VM("4M", cpu="understudy,+async_pf") as vm:
        msrs = vm.vcpus[0].msrs
        assert msrs.read(msr) == 0
        msrs.write(msr, good)
        with pytest.raises(KeyError):
            msrs.write(msr, bad)
        assert msrs.read(msr) == good


@pytest.mark.parametrize(
    ("cpu", "eax"),
    [
        ("understudy", 0), ("baseline", 0), ("understudy,+async_pf", 1 << 14 | 1 << 4),
        ("understudy,+async_pf_int", 1 << 14 | 1 << 4), ("max", 1 << 14 | 1 << 4),
        ("max,-async_pf", 0), ("max,-async_pf_int", 0), ("max,-apic", 0), ("max,-hypervisor", 0),
    ],
)  # fmt: skip
def test_both_bits_are_shown_or_none(cpu: str, eax: int) -> None:
    with VM("4M", cpu=cpu) as vm:
        (vcpu,) = vm.vcpus
        if "-hypervisor" not in cpu:
            assert vcpu.model.plain[0x4000_0001][0] & (1 << 14 | 1 << 10 | 1 << 4) == eax
        if not eax:
            for msr in (EN, INT, ACK):
                with pytest.raises(KeyError):
                    vcpu.msrs.read(msr)
                with pytest.raises(KeyError):
                    vcpu.msrs.write(msr, 0)


def check(asynchronous: AsyncPf) -> None:
    own = asynchronous.state
    assert len(own.coming) + len(own.ready) <= MOST
    made = own.counts["not present told"]
    assert made >= own.counts["ready told"] + len(own.coming) + len(own.ready)


def test_whatever_a_guest_does_only_it_is_harmed(vm: VM) -> None:
    """It writes anything anywhere, acknowledges what it likes, or never."""
    dice, (vcpu,) = random.Random(7), vm.vcpus
    areas = (AREA, AREA, AREA, 0, 0x3F_FFC0, 0x40_0000, NOWHERE, 0xFEE0_0000, (1 << 64) - 64)
    for _ in range(10_000):
        match dice.randrange(12):
            case 0 | 1 | 2:
                if vcpu.state.activity is Activity.ACTIVE:
                    missed(vcpu, dice.randrange(1, 2 * NS))
            case 3 | 9 | 10:
                passes(vm, dice.randrange(1, NS))
            case 4 | 11:
                vm.memory.write_u32(AREA + dice.choice((0, 4)), dice.choice((0, 0, 0, 1)))
            case 5:
                vcpu.msrs.write(ACK, dice.randrange(2))
            case 6:
                with suppress(KeyError):
                    vcpu.msrs.write(
                        EN, dice.choice(areas) | dice.choice((BOTH | 2,) * 9 + (0, 9, 0x3F))
                    )
            case 7:
                vcpu.msrs.write(INT, dice.randrange(256))
            case 8:
                vcpu.guest.rflags = dice.choice((2, IF | 2, IF | 2))
        check(vcpu.kvm.async_pf)
    assert all(counts(vm)[word] >= 40 for word in ("not present told", "ready told"))
