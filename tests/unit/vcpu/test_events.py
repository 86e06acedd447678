"""Which event goes into the guest, and what waits for a window."""

from tests.frame_owner import FrameOwner
from tests.unit.fakes import FakeExit
from tests.unit.fixtures import Bench, bench
from understudy.arch.exit_reason import Reason
from understudy.arch.vmcs import Vmcs
from understudy.arch.vmx_controls import PrimaryControls
from understudy.guest import Event, Kind

INTERRUPT_WINDOW = PrimaryControls.INTERRUPT_WINDOW_EXITING.mask
NMI_WINDOW = PrimaryControls.NMI_WINDOW_EXITING.mask
VALID = 1 << 31
NMI = VALID | 2 << 8 | 2
CPUID = FakeExit(Reason.CPUID, length=2)


def windows(b: Bench) -> int:
    return b.field(Vmcs.PRIMARY_CONTROLS) & (INTERRUPT_WINDOW | NMI_WINDOW)


def test_an_interrupt_goes_in_when_the_guest_takes_it() -> None:
    with bench() as b:
        b.apic.irr = {0x30, 0x40}
        b.vm.vcpus[0].look()
        b.play()
        assert b.injected == VALID | 0x40
        assert b.apic.irr == {0x30}
        assert windows(b) == INTERRUPT_WINDOW  # for the second one


def test_one_that_must_wait_opens_a_window_and_leaves_the_apic_alone() -> None:
    for state in ({"rflags": 2}, {}):
        with bench(state) as b:
            if not state:
                b.processor.vmcs[Vmcs.GUEST_INTERRUPTIBILITY_STATE] = 1  # blocking by STI
            b.apic.irr = {0x30}
            b.vm.vcpus[0].look()
            b.play()
            assert b.injected == 0
            assert b.apic.irr == {0x30}
            assert windows(b) == INTERRUPT_WINDOW
            b.processor.vmcs[Vmcs.GUEST_RFLAGS] = 0x202
            b.processor.vmcs[Vmcs.GUEST_INTERRUPTIBILITY_STATE] = 0
            b.play(FakeExit(Reason.INTERRUPT_WINDOW))
            assert b.injected == VALID | 0x30
            assert windows(b) == 0


def test_the_8259s_come_first_if_the_apic_lets_them_through() -> None:
    with bench() as b:
        b.apic.irr = {0x30}
        vectors = [0x21]
        b.vm.vcpus[0].events.acknowledge = vectors.pop
        b.vm.interrupts.extint(True)
        b.apic.extint_open = True
        b.vm.vcpus[0].look()
        b.play()
        assert b.injected == VALID | 0x21
        assert vectors == []
        assert b.apic.lints == [(0, True)]
    with bench() as b:
        b.apic.extint_open = False
        b.vm.interrupts.extint(True)
        b.play()
        assert b.injected == 0
        assert windows(b) == 0


def test_an_nmi_precedes_interrupts_and_waits_for_its_own_window() -> None:
    with bench() as b:
        events = b.vm.vcpus[0].events
        b.apic.irr = {0x30}
        for _ in range(3):
            events.nmi()
        b.vm.vcpus[0].look()
        b.play()
        assert b.injected == NMI
        assert not events.state.nmi  # those that came together are one
        assert windows(b) == INTERRUPT_WINDOW
        b.processor.vmcs[Vmcs.ENTRY_INTERRUPTION_INFORMATION] = 0
        b.processor.vmcs[Vmcs.GUEST_INTERRUPTIBILITY_STATE] = 8  # blocking by NMI
        for _ in range(2):
            events.nmi()
        b.vm.vcpus[0].look()
        b.play()
        assert b.injected == VALID | 0x30
        assert windows(b) == NMI_WINDOW


def test_an_event_whose_delivery_was_interrupted_is_delivered_again_first() -> None:
    with bench({"rflags": 2}) as b:
        b.apic.irr = {0x30}
        p2m = b.vm.memory.p2m
        pfn = p2m.lookup(5)
        assert pfn is not None
        FrameOwner(p2m.unprotect, lambda gfn: p2m.map(gfn, pfn, 1)).own(p2m)
        p2m.take(5, 1)
        page_fault = VALID | 1 << 11 | 3 << 8 | 14
        b.play(
            FakeExit(Reason.EPT_VIOLATION, gpa=0x5000, idt_info=page_fault | 1 << 12, idt_error=6)
        )
        assert b.injected == page_fault
        assert b.field(Vmcs.ENTRY_EXCEPTION_ERROR_CODE) == 6
        assert windows(b) == INTERRUPT_WINDOW
        assert b.vm.counts()["injected"] == {"0x0e": 1}
        assert b.apic.irr == {0x30}


def test_a_software_interrupt_keeps_its_length_and_an_nmi_is_unblocked() -> None:
    with bench() as b:
        events = b.vm.vcpus[0].events
        events.requeue(Event(0x80, Kind.SOFTWARE_INTERRUPT, length=2))
        b.vm.vcpus[0].look()
        b.play()
        assert b.injected == VALID | 4 << 8 | 0x80
        assert b.field(Vmcs.ENTRY_INSTRUCTION_LENGTH) == 2
        b.processor.vmcs[Vmcs.GUEST_INTERRUPTIBILITY_STATE] = 8
        events.requeue(Event(2, Kind.NMI))
        b.vm.vcpus[0].look()
        b.play()
        assert b.injected == NMI
        assert b.field(Vmcs.GUEST_INTERRUPTIBILITY_STATE) == 0


def test_real_mode_gets_no_error_codes() -> None:
    with bench({"cr0": 0x10, "efer": 0}) as b:
        b.vm.vcpus[0].fault(13, 0)
        b.play()
        assert b.injected == VALID | 3 << 8 | 13


def test_nothing_is_asked_while_nothing_waits() -> None:
    """An exit to a trivial handler costs no VMCS accesses beyond those of the handler."""
    with bench() as b:
        b.play(CPUID)
        b.processor.written.clear()
        b.play(CPUID, CPUID)
        assert b.processor.written == [Vmcs.GUEST_RIP, Vmcs.GUEST_RIP]
