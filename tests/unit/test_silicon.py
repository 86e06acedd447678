"""The pins, seen from Python: memory, the local APIC, a processor in real-address mode."""

import contextlib
import signal
import threading
from typing import Any

import pytest

silicon = pytest.importorskip("understudy.silicon", reason="the compiled half is not built")

ENGINES = ("reference", "dbt")
RESET = 0xF_FFF0
CODE = 0x1000
HALT, MMIO, PIO, BUDGET, KICK = 0x1_0002, 0x1_0004, 0x1_0005, 0x1_0000, 0x1_0001


def machine(engine: str, code: str, clock: str = "virtual") -> Any:
    """A processor that runs `code` (hexadecimal) in real-address mode at 0:1000."""
    memory = silicon.Memory(1 << 20)
    memory.write(CODE, bytes.fromhex(code))
    processor = silicon.Processor(memory, engine, clock)
    processor.set_registers({"cs": 0, "cs_base": 0, "rip": CODE, "rsp": 0x8000})
    return processor, memory


class TestMemory:
    def test_reads_what_was_written(self) -> None:
        m = silicon.Memory(8192)
        m.write(10, b"abc")
        m.write(13, memoryview(bytearray(b"de")))
        m.write_u32(0x100, 0x1234_5678)
        m.write_u64(0x108, 1 << 63)
        assert (m.read(9, 7), m.read_u32(0x100)) == (b"\0abcde\0", 0x1234_5678)
        assert (m.read(0x100, 1), m.read_u64(0x108)) == (b"\x78", 1 << 63)

    def test_any_contiguous_buffer_may_be_written(self) -> None:
        m = silicon.Memory(4096)
        m.write(0, memoryview(b"\1\0\0\0\2\0\0\0").cast("I"))
        assert m.read(0, 8) == b"\1\0\0\0\2\0\0\0"

    @pytest.mark.parametrize(
        ("method", "arguments"),
        [
            ("read", (4096, 1)),
            ("read", ((1 << 64) - 1, 2)),
            ("write", (4095, b"ab")),
            ("read_u64", (4089,)),
            ("write_u64", (4089, 0)),
            ("read_u32", (4093,)),
            ("write_u32", (4093, 0)),
            ("fill", (4000, 97)),
            ("discard", (0, 8192)),
            ("hash", (1, 4096)),
            ("dirty", (0, 2)),
        ],
    )
    def test_a_range_that_is_not_all_inside_is_an_index_error(
        self, method: str, arguments: tuple[Any, ...]
    ) -> None:
        with pytest.raises(IndexError, match="expected a range inside"):
            getattr(silicon.Memory(4096), method)(*arguments)

    def test_a_size_that_cannot_be_is_a_value_error(self) -> None:
        for size in (0, 1 << 60):
            with pytest.raises(ValueError, match="expected"):
                silicon.Memory(size)

    def test_a_view_is_the_memory_and_outlives_its_owner(self) -> None:
        m = silicon.Memory(8192)
        view = memoryview(m)
        view[100:103] = b"xyz"
        assert (m.read(100, 3), len(view), view.readonly) == (b"xyz", 8192, False)
        del m
        assert view[100:103] == b"xyz"

    def test_only_touched_frames_cost_and_discarded_ones_are_given_back(self) -> None:
        m = silicon.Memory(1 << 30)
        assert m.resident_bytes() == 0
        m.fill(0x5000, 4096, 7)
        assert m.resident_bytes() == 4096
        before = m.hash(0, 1 << 20)
        assert m.resident_bytes() == 4096  # hashing holes gives them no frames
        m.discard(0x5000, 4096)
        assert (m.resident_bytes(), m.read_u64(0x5000)) == (0, 0)
        assert m.hash(0, 1 << 20) != before
        with pytest.raises(ValueError, match="multiples of 4096"):
            m.discard(1, 4096)

    def test_frames_are_compared_and_holes_stay_holes(self) -> None:
        m = silicon.Memory(8 * 4096)
        m.fill(0, 8192, 7)
        m.write(2 * 4096 - 1, b"!")
        m.write(3 * 4096, m.read(4096, 4096))
        before = m.resident_bytes()
        pairs = [(0, 1), (1, 3), (3, 1), (0, 2), (2, 4), (5, 5)]
        assert m.alike(pairs) == bytes([0, 1, 1, 0, 1, 1])
        assert m.resident_bytes() == before == 3 * 4096
        assert m.alike([]) == b""
        for pair in ((0, 8), (8, 0), (0, (1 << 64) - 1)):
            with pytest.raises(IndexError, match="expected a range inside"):
                m.alike([(0, 0), pair])

    def test_dirty_marks_are_set_by_writes_and_cleared_by_looking(self) -> None:
        m = silicon.Memory(4 * 4096)
        m.dirty(0, 4)
        m.write(4095, b"ab")
        m.write_u32(3 * 4096, 0)
        assert m.dirty(0, 4, False) == m.dirty(0, 4) == b"\1\1\0\1"
        assert m.dirty(0, 4) == bytes(4)

    def test_equal_bytes_have_equal_hashes(self) -> None:
        a, b = silicon.Memory(8192), silicon.Memory(8192)
        for m, at in ((a, 0), (b, 4096)):
            m.write(at + 5, b"same")
        assert a.hash(0, 4096) == b.hash(4096, 4096)
        b.write(4096, b"\1")
        assert a.hash(0, 4096) != b.hash(4096, 4096)


class TestLocalApic:
    def test_an_interrupt_from_request_to_end(self) -> None:
        apic = silicon.LocalApic(2)
        apic.write(0xF0, 0x1FF, 0)
        assert (apic.pending(), apic.read(0x20, 0)) == (-1, 2 << 24)
        apic.raise_vector(0x31, level=True)
        assert (apic.pending(), apic.accept(), apic.pending()) == (0x31, 0x31, -1)
        apic.write(0xB0, 0, 0)
        assert (apic.take_eois(), apic.take_eois()) == ([0x31], [])

    def test_an_acknowledge_of_nothing_is_the_spurious_vector(self) -> None:
        apic = silicon.LocalApic()
        apic.write(0xF0, 0x1FE, 0)
        assert apic.accept() == 0xFE

    def test_an_ipi_to_others_comes_out(self) -> None:
        apic = silicon.LocalApic()
        assert apic.write(0x300, 0xC_4500, 0) == 0xC_4500
        assert apic.wrmsr(0x1B, 0xFEE0_0D00, 0) is None
        assert apic.wrmsr(0x830, 5 << 32 | 0x40FD, 0) == 5 << 32 | 0x40FD

    def test_general_protection_is_a_key_error(self) -> None:
        apic = silicon.LocalApic()
        with pytest.raises(KeyError, match="0x802"):
            apic.rdmsr(0x802, 0)
        with pytest.raises(KeyError, match="0x1b"):
            apic.wrmsr(0x1B, 0x400, 0)

    def test_the_timer_says_when_it_must_be_looked_at(self) -> None:
        apic = silicon.LocalApic()
        apic.write(0xF0, 0x1FF, 0)
        apic.write(0x320, 0x4_0051, 0)
        assert apic.deadline() == (1 << 64) - 1
        apic.wrmsr(0x6E0, 1000, 0)
        assert apic.deadline() == 1000
        apic.tick(1000)
        assert (apic.pending(), apic.rdmsr(0x6E0, 1000)) == (0x51, 0)

    def test_saved_and_loaded_it_is_the_same(self) -> None:
        apic, other = silicon.LocalApic(7), silicon.LocalApic()
        apic.write(0xF0, 0x1FF, 0)
        apic.raise_vector(0x77)
        apic.tpr = 0x20
        other.load(apic.save())
        assert (other.save(), other.pending(), other.tpr) == (apic.save(), 0x77, 0x20)
        for wrong in (b"", apic.save()[:-8], apic.save() + b"x", b"\xff" * len(apic.save())):
            with pytest.raises(ValueError, match="expected what LocalApic"):
                other.load(wrong)
        assert other.save() == apic.save()


@pytest.mark.parametrize("engine", ENGINES)
class TestProcessor:
    def test_runs_from_the_reset_vector(self, engine: str) -> None:
        memory = silicon.Memory(1 << 20)
        memory.write(RESET, bytes.fromhex("ea00100000"))  # jmp 0:1000
        memory.write(CODE, bytes.fromhex("b8050001c0f4"))  # mov ax,5; add ax,ax; hlt
        processor = silicon.Processor(memory, engine)
        processor.set_registers({"cs_base": 0xF_0000})  # the memory ends below 4 GBytes
        assert processor.run().reason == HALT
        assert (processor.gpr(0), processor.retired, processor.tsc) == (10, 4, 4)
        assert processor.registers()["rip"] == CODE + 6

    def test_budget_stops_after_exactly_that_many(self, engine: str) -> None:
        processor, _ = machine(engine, "ebfe")  # jmp $
        assert processor.run(1000).reason == BUDGET
        assert processor.run(1).reason == BUDGET
        assert processor.retired == 1001

    def test_ports_and_missing_memory_stop_a_bare_machine(self, engine: str) -> None:
        processor, _ = machine(engine, "e680")  # out 80h,al
        exit = processor.run()
        assert (exit.reason, exit.length, exit.qualification >> 16) == (PIO, 2, 0x80)
        processor, _ = machine(engine, "a00000")  # mov al,[0]
        processor.set_registers({"ds_base": 0x10_0000})
        exit = processor.run()
        assert (exit.reason, exit.gpa, exit.length) == (MMIO, 0x10_0000, 1)

    def test_kick_from_another_thread_stops_an_endless_loop(self, engine: str) -> None:
        processor, _ = machine(engine, "ebfe")
        timer = threading.Timer(0.02, processor.kick)
        timer.start()
        assert processor.run().reason == KICK
        timer.join()

    def test_only_one_thread_runs_it(self, engine: str) -> None:
        processor, _ = machine(engine, "ebfe")

        def run() -> None:
            while True:
                with contextlib.suppress(RuntimeError):  # while the other thread looks at it
                    processor.run()
                    return

        thread = threading.Thread(target=run)
        thread.start()
        with pytest.raises(RuntimeError, match="already running"):
            while thread.is_alive():
                processor.gpr(0)
        processor.kick()
        thread.join()
        assert processor.gpr(0) == 0

    def test_a_signal_interrupts_the_run_and_raises(self, engine: str) -> None:
        processor, _ = machine(engine, "ebfe")

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            with pytest.raises(KeyboardInterrupt):
                processor.run()
        finally:
            signal.signal(signal.SIGALRM, before)
        assert processor.run(10).reason == BUDGET

    def test_the_apic_timer_wakes_a_halted_machine_when_time_passes(self, engine: str) -> None:
        processor, memory = machine(engine, "fbf4ebfd")  # sti; hlt; jmp back to hlt
        memory.write(4 * 0x40, bytes.fromhex("00200000"))
        memory.write(0x2000, bytes.fromhex("43cf"))  # inc bx; iret
        processor.apic.write(0xF0, 0x1FF, 0)
        processor.apic.write(0x320, 0x40, 0)
        processor.apic.write(0x3E0, 0xB, 0)
        processor.apic.write(0x380, 5000, processor.tsc)
        exit = processor.run()
        assert (exit.reason, exit.qualification, processor.gpr(3)) == (HALT, 5000, 0)
        processor.advance(exit.qualification - processor.tsc)
        assert (processor.run().reason, processor.gpr(3)) == (HALT, 1)
        assert processor.counters()["injected"] == {0x40: 1}

    def test_a_saved_processor_goes_on_in_another(self, engine: str) -> None:
        code = "4089074381e3ff0febf7"  # inc ax; mov [bx],ax; inc bx; and bx,0fffh; jmp
        first, memory = machine(engine, code)
        first.set_registers({"ds_base": 0x4_0000})
        first.run(777)
        state, copy = first.save(), silicon.Memory(1 << 20)
        copy.write(0, memory.read(0, 1 << 20))
        second = silicon.Processor(copy, engine)
        second.load(state)
        assert second.state_hash() == first.state_hash()
        for processor in (first, second):
            processor.run(12_345)
        assert second.state_hash() == first.state_hash()
        assert memory.hash(0, 1 << 20) == copy.hash(0, 1 << 20)
        assert second.counters()["itlb_misses"] == first.counters()["itlb_misses"]
        second.set_gpr(7, 1)
        assert second.state_hash() != first.state_hash()

    def test_bytes_that_are_no_processor_change_nothing(self, engine: str) -> None:
        processor, _ = machine(engine, "40ebfd")
        processor.run(100)
        good, before = processor.save(), processor.state_hash()
        reserved = good[:16] + good[16:].replace(bytes.fromhex("801f0000"), b"\xff" * 4, 1)
        for wrong in (b"", good[:-8], good + bytes(8), good[:-3], b"\0" * len(good), reserved):
            with pytest.raises(ValueError, match="saved processor"):
                processor.load(wrong)
            assert processor.state_hash() == before

    def test_registers_by_name(self, engine: str) -> None:
        processor, _ = machine(engine, "f4")
        values = {"r15": 1 << 63, "cr2": 0x1234, "dr0": 5, "fs_base": 9, "lstar": 7, "cr8": 3}
        processor.set_registers(values)
        assert values.items() <= processor.registers().items()
        assert processor.apic.tpr == 0x30
        with pytest.raises(KeyError, match="rxx"):
            processor.set_registers({"rxx": 0})
        with pytest.raises(ValueError, match="es_limit"):
            processor.set_registers({"es_limit": 1 << 32})
        with pytest.raises(ValueError, match="cr4"):
            processor.set_registers({"cr4": 1 << 40})
        with pytest.raises(IndexError, match="0 to 15"):
            processor.gpr(16)
        with pytest.raises(KeyError, match="0x12345"):
            processor.rdmsr(0x12345)

    def test_fxsave_and_fxrstor_are_inverse_and_refuse_reserved_bits(self, engine: str) -> None:
        processor, _ = machine(engine, "f4")
        image = bytearray(processor.fxsave())
        image[160:176] = bytes(range(16))
        processor.fxrstor(bytes(image))
        assert processor.fxsave() == bytes(image)
        image[27] = 1
        with pytest.raises(ValueError, match="MXCSR"):
            processor.fxrstor(bytes(image))
        with pytest.raises(ValueError, match="512"):
            processor.fxrstor(b"")

    def test_a_walk_lists_every_reference_in_both_dimensions(self, engine: str) -> None:
        processor, memory = machine(engine, "f4")
        for level, table in ((4, 0x10000), (3, 0x11000), (2, 0x12000), (1, 0x13000)):
            memory.write_u64(table, 0x5000 | 3 if level == 1 else table + 0x1000 | 3)
        for table in (0x20000, 0x21000):
            memory.write_u64(table, table + 0x1000 | 7)
        memory.write_u64(0x22000, 0xB7)  # a 2-MByte page, write-back
        pae, long = 1 << 5, 1 << 10 | 1 << 8
        one = processor.walk(0x123, 0x10000, pae, long)
        assert one == [
            ("guest", 4, 0x10000, 0x11003),
            ("guest", 3, 0x11000, 0x12003),
            ("guest", 2, 0x12000, 0x13003),
            ("guest", 1, 0x13000, 0x5003),
        ]
        two = processor.walk(0x123, 0x10000, pae, long, 0x20000 | 0x1E)
        host = [("host", 4), ("host", 3), ("host", 2)]
        expected = [step for level in (4, 3, 2, 1) for step in (*host, ("guest", level))]
        assert [reference[:2] for reference in two] == expected + host
        assert processor.counters()["walk"] == {"guest": {}, "host": {}}

    def test_code_of_a_guest_is_found_in_both_dimensions(self, engine: str) -> None:
        processor, memory = machine(engine, "f4")
        for level, table in ((4, 0x10000), (3, 0x11000), (2, 0x12000), (1, 0x13000)):
            memory.write_u64(table, 0x5000 | 3 if level == 1 else table + 0x1000 | 3)
        for table in (0x20000, 0x21000):
            memory.write_u64(table, table + 0x1000 | 7)
        memory.write_u64(0x22000, 0xB7)  # a 2-MByte page, write-back
        memory.write(0x5FFE, b"abcd")
        paging, pae, long = 1 << 31 | 1, 1 << 5, 1 << 10 | 1 << 8
        for eptp in (0, 0x20000 | 0x1E):
            regime = (paging, 0x10000, pae, long, eptp)
            assert processor.fetch(0xFFE, 15, *regime) == b"ab"  # the next page is not mapped
            assert processor.fetch(0x1000, 15, *regime) == b""
        assert processor.fetch(0x5FFE, 4, 0, 0, 0, 0, 0) == b"abcd"
        assert processor.counters()["walk"] == {"guest": {}, "host": {}}
        with pytest.raises(silicon.VmFail, match="no current VMCS"):
            processor.fetch(0, 1)
        with pytest.raises(ValueError, match="at most 64"):
            processor.fetch(0, 65, 0, 0, 0, 0, 0)

    def test_linear_addresses_are_read_through_the_live_tables(self, engine: str) -> None:
        processor, memory = machine(engine, "f4")
        memory.write(0xFFE, b"abcd")
        assert processor.read_linear(0xFFE, 4) == b"abcd"
        assert processor.translate(0x1234) == 0x1234
        with pytest.raises(ValueError, match="not mapped to memory"):
            processor.read_linear((1 << 20) - 1, 2)

    def test_outside_vmx_operation_vmx_instructions_fail(self, engine: str) -> None:
        processor, _ = machine(engine, "f4")
        with pytest.raises(silicon.VmFail, match="VMfailInvalid") as caught:
            processor.vmread(0x681E)
        assert (caught.value.number, processor.in_guest) == (0, False)


@pytest.mark.parametrize(
    ("engine", "clock", "word"), [("fast", "virtual", "engine"), ("dbt", "sun", "clock")]
)
def test_an_unknown_engine_or_clock_is_named(engine: str, clock: str, word: str) -> None:
    with pytest.raises(ValueError, match=f"{word}=.*expected"):
        silicon.Processor(silicon.Memory(4096), engine, clock)


def test_the_wall_clock_cannot_be_advanced() -> None:
    processor, _ = machine("reference", "f4", "wall")
    with pytest.raises(ValueError, match="virtual"):
        processor.advance(1)


def test_a_busy_processor_lets_other_threads_run() -> None:
    """`run` gives up the interpreter lock: this thread computes while the other is inside."""
    processor, _ = machine("reference", "ebfe")
    thread = threading.Thread(target=processor.run)
    thread.start()
    assert sum(range(1000)) == 499_500
    processor.kick()
    thread.join()


def test_host_features_are_named_truths() -> None:
    features = silicon.host_features()
    assert features["sse3"] in (True, False)
    assert {"sse42", "avx", "bmi1", "bmi2"} <= features.keys()
