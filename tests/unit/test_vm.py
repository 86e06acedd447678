"""The machine as a whole, with nothing behind it."""

import pytest

from tests.unit.fakes import FakeExit, fake_machine
from tests.unit.fixtures import CODE, bench
from understudy.arch.exit_reason import Reason
from understudy.devices.message import Delivery, Message
from understudy.machine.host import Host
from understudy.verdict import StopKind
from understudy.vm import VM


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": "16"}, "expected 1M to 256G"),
        ({"memory": "1T"}, "expected 1M to 256G"),
        ({"memory": "lots"}, "such as 256M"),
        ({"clock": "sundial"}, "expected one of virtual, wall"),
        ({"engine": "steam"}, "expected one of dbt, reference"),
        ({"paging": "none"}, "expected one of eager, ept, lazy, pv, vtlb"),
        ({"largest_page": "3K"}, "expected 4K, 2M or 1G"),
    ],
)
def test_a_wrong_option_is_named_with_the_right_ones(options: dict[str, str], words: str) -> None:
    with fake_machine(), pytest.raises(ValueError, match=words):
        VM(**options)  # type: ignore[arg-type]


def test_a_closed_vm_gives_everything_back() -> None:
    with fake_machine():
        host = Host("1G")
        free = host.frames.free_count
        first, second = VM("16M", host=host), VM("32M", host=host)
        assert free - host.frames.free_count > (48 << 20) >> 12
        first.close()
        first.close()
        second.close()
        assert host.frames.free_count == free
        assert host.processors == []
        with pytest.raises(RuntimeError, match="closed"):
            first.go()


def test_acpi_tables_are_there_and_ram_above_them_is_untouched() -> None:
    with bench() as b:
        assert b.vm.memory.read(0xE0000, 8) == b"RSD PTR " or b"RSD PTR " in b.vm.memory.read(
            0xE0000, 0x20000
        )


def test_interrupt_messages_reach_the_apic() -> None:
    with bench() as b:
        deliver = b.vm.interrupts.deliver
        b.apic.registers |= {0xD0: 1 << 24, 0xE0: 0xFFFF_FFFF}  # logical ID 1, flat model
        deliver(Message(0x31, 0))
        deliver(Message(0x32, 1, logical=True, delivery=Delivery.LOWEST, level=True))
        deliver(Message(0x05, 0))  # illegal vector
        deliver(Message(0x40, 0, delivery=Delivery.SMI))
        deliver(Message(0x41, 1))  # to a processor that there is not
        deliver(Message(0x42, 2, logical=True))
        assert b.apic.irr == {0x31, 0x32}
        deliver(Message(0, 0, delivery=Delivery.NMI))
        assert b.vm.vcpus[0].events.state.nmi


@pytest.mark.parametrize(
    ("icr", "nmis"),
    [
        (4 << 8, 1),  # physical, xAPIC ID 0
        (0xFF << 56 | 4 << 8, 1),
        (1 << 56 | 4 << 8, 0),
        (1 << 18 | 4 << 8, 1),
        (3 << 18 | 4 << 8, 0),
        (5 << 8, 0),  # INIT
    ],
)
def test_an_nmi_to_oneself(icr: int, nmis: int) -> None:
    with bench() as b:
        b.vm.vcpus[0].msrs.interrupt_command(icr)
        assert b.vm.vcpus[0].events.state.nmi == bool(nmis)


def test_typing_goes_through_the_serial_port() -> None:
    with bench() as b:
        b.vm.pc.com1.write(0, 4, 0x0B, 1)  # the guest is ready to hear: RTS
        b.vm.console.send(b"ls\n")
        b.play(FakeExit(Reason.CPUID, length=2))
        b.play(FakeExit(Reason.IO_INSTRUCTION, 0x3F8 << 16 | 8, 1))
        assert b.processor.live[0] == ord("l")


def test_a_row_of_the_configuration_is_a_device_on_the_board() -> None:
    row = ("uart16550", {"at": 0x3E8, "irq": 5, "name": "com3"})
    with bench(devices=[row]) as b:
        b.play(FakeExit(Reason.IO_INSTRUCTION, 0x3ED << 16 | 8, 1))
        assert b.processor.live[0] & 0xFF == 0x60
        assert "com3" in b.vm.inspect()["devices"]
    with pytest.raises(ValueError, match="port 0x3f8 is claimed twice"), bench(
        devices=[("uart16550", {"at": 0x3F8, "name": "com3"})]
    ):  # fmt: skip
        pass


def test_power_off_and_reset_end_the_run() -> None:
    with bench() as b:
        b.vm.bus.port_write(0x64, 1, 0xFE)
        assert b.play().kind == StopKind.RESET
        b.processor.script.clear()


def test_counts_are_plain_and_complete() -> None:
    with bench() as b:
        b.play(FakeExit(Reason.CPUID, length=2))
        counts = b.vm.counts()
        assert set(counts) == {
            "instructions", "exits", "kicks", "walk", "walk_caches", "tlb", "fills", "injected",
            "engine", "paging", "flushes", "evictions", "faults", "tables", "cr_accesses",
            "real_mode",
        }  # fmt: skip
        assert counts["walk"]["guest"] == {"1": 2}


def test_vms_share_no_state() -> None:
    with fake_machine():
        one, two = VM("16M"), VM("16M")
        one.memory.write(0x5000, b"one")
        one.bus.port_read(0x999, 1)
        assert two.memory.read(0x5000, 3) == b"\0\0\0"
        assert not two.bus.unclaimed
        assert one.vcpus[0].table is not two.vcpus[0].table


def test_a_listener_that_fails_ends_the_run_between_two_accesses() -> None:
    with bench() as b:
        heard: list[bytes] = []

        def fails(data: bytes) -> None:
            raise ValueError("mine")

        b.vm.console.on_output += [fails, heard.append]
        b.processor.set_gpr(0, ord("x"))
        out = FakeExit(Reason.IO_INSTRUCTION, 0x3F8 << 16, 1)
        with pytest.raises(ValueError, match="mine"):
            b.play(out)
        assert heard == [b"x"]  # the others hear it, and the guest has made its access once
        assert b.rip == CODE + 1
        b.vm.console.on_output.remove(fails)
        b.processor.script.clear()
        assert b.play().kind == StopKind.BUDGET


def test_a_callback_cannot_run_the_machine() -> None:
    with bench() as b:
        b.vm.console.on_output.append(lambda data: b.vm.go() and None)
        out = FakeExit(Reason.IO_INSTRUCTION, 0x3F8 << 16, 1)
        with pytest.raises(RuntimeError, match="vm is running: a callback cannot run it"):
            b.play(out)


def test_a_post_that_fails_does_not_take_the_others_with_it() -> None:
    with bench() as b:
        done: list[int] = []
        b.vm.post(lambda: 1 // 0 and None)
        b.vm.post(lambda: done.append(1))
        with pytest.raises(ZeroDivisionError):
            b.play()
        b.processor.script.clear()
        b.play()
        assert done == [1]


def test_a_technique_serves_all_processors() -> None:
    with fake_machine(), VM("16M", cpus=2, paging="lazy") as vm:
        vm.change_paging("vtlb")
        assert [vcpu.view.paging for vcpu in vm.vcpus] == [vm.pages, vm.pages]
