"""What a processor costs: memory only where it works, and no stack worth mentioning."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_silicon_close import busy_machine

silicon = pytest.importorskip("understudy.silicon", reason="the compiled half is not built")

MAKE_AND_RUN = """
from tests.unit.test_silicon_close import busy_machine
for engine in ("dbt", "reference"):
    memory, processor = busy_machine(engine)
    memory.close()
print("done")
"""


def private_kbytes() -> int:
    """What this process alone has resident, files' pages aside."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["RssAnon"].split()[0])


class TestMemory:
    @pytest.mark.parametrize("engine", ["dbt", "reference"])
    def test_a_processor_that_did_little_costs_little(self, engine: str) -> None:
        kept = [busy_machine(engine) for _ in range(4)]
        before = private_kbytes()
        kept += [busy_machine(engine) for _ in range(16)]
        each = (private_kbytes() - before) / 16
        for memory, _ in kept:
            memory.close()
        assert each < 600

    def test_a_large_memory_costs_nothing_to_make(self) -> None:
        before = private_kbytes()
        kept = [silicon.Memory(1 << 36) for _ in range(8)]  # 2**24 frames each
        assert private_kbytes() - before < 256
        for memory in kept:
            memory.close()


class TestStack:
    def test_a_small_thread_makes_and_runs_processors(self) -> None:
        outcome: list[Any] = []

        def work() -> None:
            for engine in ("dbt", "reference"):
                memory, processor = busy_machine(engine)
                saved = processor.save()
                processor.load(saved)
                outcome.append(processor.run(5000).reason)
                memory.close()

        usual = threading.stack_size(256 << 10)
        try:
            thread = threading.Thread(target=work)
            thread.start()
        finally:
            threading.stack_size(usual)
        thread.join()
        assert outcome == [0x1_0000, 0x1_0000]

    def test_a_process_with_a_small_stack_does_too(self) -> None:
        shell = ["sh", "-c", 'ulimit -s 512 && exec "$0" -c "$1"', sys.executable, MAKE_AND_RUN]
        done = subprocess.run(shell, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
