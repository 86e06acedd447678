"""A guest grows everything that it can, for so many seconds; how large does this process become?

    python tests/walls/ten_minutes.py vtlb 600

Source: none.  It ends with status 1 if the process takes more than RAM, budgets and 10 %, or if the
neighbor on the same host does not answer.
"""

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.matrix.programs import HELLO, start
from tests.walls.growth import MEMORY, STEPS, growing
from understudy.machine.host import Host
from understudy.vm import VM

RAM = 64 << 20
SLICE_S = 5.0


def resident() -> int:
    """Bytes of this process that are in the computer's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) << 12


def main() -> None:
    """Run it."""
    paging, seconds = sys.argv[1], float(sys.argv[2])
    with Host("256M") as host:
        neighbor = VM("4M", host=host, paging=paging)
        vm = growing(paging=paging, host=host, memory=RAM)
        start(neighbor, HELLO)
        neighbor.go(budget=1000)
        most = vm.memory.size + vm.pages.reserve.count * 4096
        begun, largest, step = resident(), 0, 0
        vm.memory.write(MEMORY, bytes([1]) * (RAM - MEMORY))  # it reads the rest by itself
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            vm.vcpus[0].leave_guest()
            vm.vcpus[0].guest.set_gpr(3, STEPS[step % len(STEPS)])
            step += 1
            vm.go(wall_seconds=SLICE_S)
            start(neighbor, HELLO)
            assert neighbor.go(budget=1000).status == 42, "the neighbor does not answer"
            largest = max(largest, resident() - begun)
        print(f"{paging}: {largest >> 10} KiB more, at most {most * 1.1 / 1024:.0f} expected; "
              f"{vm.counts()['evictions']} evictions, {vm.instructions} instructions")  # fmt: skip
        assert largest <= most * 1.1


if __name__ == "__main__":
    main()
