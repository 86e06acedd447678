"""Closing a memory and its processors: everything is back at once, and any later use says why not.

No test here may depend on the garbage collector or on who still refers to a closed object.
"""

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

silicon = pytest.importorskip("understudy.silicon", reason="the compiled half is not built")

ENGINES = ("reference", "dbt")
FRAME = 4096
# Long mode over identity-mapped tables; INC EAX twenty times, a store, a call, a pop, a jump back.
TABLES = ((0x8000, 0x9003), (0x9000, 0xA003), (0xA000, 0x83))
CODE = b"\xff\xc0" * 20 + bytes.fromhex("88042500500000 e800000000 58 ebca")
STATE = {
    "cr0": 0x8001_0033,
    "cr3": 0x8000,
    "cr4": 0x20,
    "efer": 0x500,
    "cs_attr": 0xA09B,
    "cs_base": 0,
    "ss_attr": 0xC093,
    "rip": 0x1000,
    "rsp": 0x7000,
}
BUDGET, KICK = 0x1_0000, 0x1_0001


def busy_machine(engine: str, size: int = 1 << 24) -> tuple[Any, Any]:
    """A memory, and a processor in 64-bit mode that has run some thousand instructions."""
    memory = silicon.Memory(size)
    for hpa, entry in TABLES:
        memory.write_u64(hpa, entry)
    memory.write(0x1000, CODE)
    processor = silicon.Processor(memory, engine)
    processor.set_registers(STATE)
    assert processor.run(5000).reason == BUDGET
    return memory, processor


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def memory_kbytes() -> tuple[int, int]:
    """Resident and mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmRSS"].split()[0]), int(fields["VmSize"].split()[0])


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


class TestMemory:
    @pytest.mark.usefixtures("no_collector")
    def test_hundreds_made_and_closed_leave_nothing_behind(self) -> None:
        kept = []  # who still refers to them does not matter

        def turn() -> None:
            memory, processor = busy_machine("dbt")
            memory.fill(1 << 20, 1 << 20, 0x55)
            cycle: list[Any] = [memory, processor, processor.apic]
            cycle.append(cycle)
            kept.append(cycle)
            memory.close()

        for _ in range(20):
            turn()
        before = (descriptors(), *memory_kbytes())
        for _ in range(300):
            turn()
        after = (descriptors(), *memory_kbytes())
        assert after[0] == before[0]
        # 300 of them would be 300 MB resident, and 37 GB of addresses.
        assert after[1] - before[1] < 4096
        assert after[2] - before[2] < 64 << 10

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("read", (0, 1)),
            ("write", (0, b"a")),
            ("read_u64", (0,)),
            ("write_u64", (0, 1)),
            ("read_u32", (0,)),
            ("write_u32", (0, 1)),
            ("fill", (0, 1)),
            ("discard", (0, FRAME)),
            ("resident_bytes", ()),
            ("alike", ([(0, 0)],)),
            ("dirty", (0, 1)),
            ("hash", (0, 1)),
            ("exchange", (0, 1)),
            ("is_here", None),
            ("gather", ([(0, 1)],)),
            ("scatter", ([(0, 1)], b"x")),
            ("size", None),
            ("fd", None),
        ],
    )
    def test_any_later_use_says_that_it_is_closed(self, name: str, arguments: Any) -> None:
        memory = silicon.Memory(FRAME)
        memory.close()
        memory.close()
        assert repr(memory) == "Memory(closed)"
        with pytest.raises(RuntimeError, match=r"^this memory is closed$"):
            used = getattr(memory, name)
            used(*arguments)

    def test_neither_views_nor_processors_can_be_made_of_a_closed_one(self) -> None:
        memory = silicon.Memory(FRAME)
        memory.close()
        with pytest.raises(RuntimeError, match=r"^this memory is closed$"):
            memoryview(memory)
        with pytest.raises(RuntimeError, match=r"^this memory is closed$"):
            silicon.Processor(memory)

    def test_every_method_is_among_those_that_are_tested(self) -> None:
        (mark,) = TestMemory.test_any_later_use_says_that_it_is_closed.pytestmark
        tested = {name for name, _ in mark.args[1]}
        there = {n for n in dir(silicon.Memory) if not n.startswith("_")}
        assert there - tested == {"close"}

    def test_a_living_view_is_refused_and_nothing_happens(self) -> None:
        memory, processor = busy_machine("dbt")
        view = memoryview(memory)
        part = view[0x1000:0x2000]
        view.release()
        with pytest.raises(BufferError, match=r"1 view\(s\) of this memory are alive"):
            memory.close()
        assert bytes(part[:2]) == b"\xff\xc0"
        assert processor.run(100).reason == BUDGET
        part.release()
        memory.close()

    def test_its_processors_are_closed_with_it(self) -> None:
        memory, first = busy_machine("dbt")
        second = silicon.Processor(memory, "reference")
        apic = first.apic
        memory.close()
        for use in (first.run, second.run, second.save, lambda: apic.read(0x20, 0)):
            with pytest.raises(RuntimeError, match=r"^this processor is closed, with its memory$"):
                use()

    def test_while_one_of_its_processors_runs_nothing_is_closed(self) -> None:
        memory, idle = busy_machine("reference")
        running = silicon.Processor(memory)
        running.set_registers(STATE)
        reasons: list[int] = []
        thread = threading.Thread(target=lambda: reasons.append(running.run().reason))
        thread.start()
        refused = False
        end = time.monotonic() + 20
        while not refused and time.monotonic() < end:
            try:
                running.gpr(0)  # RuntimeError as soon as it runs
            except RuntimeError:
                with pytest.raises(RuntimeError, match="already running"):
                    memory.close()
                refused = True
        assert idle.run(10).reason == BUDGET
        while thread.is_alive():
            running.kick()
            thread.join(0.01)
        assert (refused, reasons) == (True, [KICK])
        memory.close()


class TestProcessor:
    @pytest.mark.parametrize("engine", ENGINES)
    def test_any_later_use_says_that_it_is_closed(self, engine: str) -> None:
        memory, processor = busy_machine(engine)
        apic = processor.apic
        processor.close()
        processor.close()
        processor.kick()
        uses = [
            processor.run,
            processor.vmlaunch,
            processor.gprs,
            processor.registers,
            processor.counters,
            processor.save,
            processor.flush,
            lambda: processor.load(b""),
            lambda: processor.walk(0, 0, 0, 0),
            lambda: processor.tsc,
            lambda: processor.apic.read(0x20, 0),
            lambda: apic.read(0x20, 0),
        ]
        for use in uses:
            with pytest.raises(RuntimeError, match=r"^this processor is closed$"):
                use()
        assert memory.read(0x1000, 2) == b"\xff\xc0"
        memory.close()

    def test_the_memory_and_other_processors_go_on(self) -> None:
        memory, first = busy_machine("dbt")
        second = silicon.Processor(memory)
        second.set_registers(STATE)
        first.close()
        assert second.run(5000).reason == BUDGET
        memory.close()
