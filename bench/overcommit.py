"""What it costs to look for guest frames with the same contents.

Run: `python -m bench.overcommit`.  Each figure is the least of several rounds through all frames,
in processor time of the thread, all in: reading, hashing, looking up, the p2m; the median stands
beside it.  The last rows are of guests that have booted, with their page tables (EPT).
Source: none.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

from understudy.arch.address import PAGE
from understudy.host import Host
from understudy.machine.memory import GuestMemory
from understudy.overcommit.sharing import Sharing
from understudy.overcommit.terms import Terms

GUESTS = 4
FRAMES = 1 << 13  # of each guest: 32 MBytes
ROUNDS = 5
OWN, ALIKE, MIXED = "no two alike", "the same in each guest", "a third each: own, alike, zero"
DEBIANS = f"{GUESTS} Debians of 128 MBytes that have booted"


def contents(kind: str, number: int, gfn: int, chance: random.Random) -> bytes:
    """What a guest has in a frame."""
    if kind == MIXED and gfn % 3 == 2:
        return bytes(PAGE)
    if kind == ALIKE or (kind == MIXED and gfn % 3):
        return gfn.to_bytes(8, "little") * (PAGE // 8)
    return chance.randbytes(64) * (PAGE // 64)


@contextmanager
def filled(kind: str, guests: int, frames: int) -> Iterator[Sharing]:
    """So many guests, none of which was scanned."""
    chance = random.Random(1)
    with Host(ram=(guests * frames + 64 * guests + 64) * PAGE) as host:
        sharing, memories = Sharing(host), []
        for number in range(guests):
            memory = GuestMemory(host, frames * PAGE)
            memory.populate()
            for gfn in range(frames):
                memory.write(gfn * PAGE, contents(kind, number, gfn, chance))
            sharing.join(memory.p2m)
            memories.append(memory)
        yield sharing
        for memory in memories:
            memory.close()


def rounds(kind: str, count: int, guests: int = GUESTS, frames: int = FRAMES) -> list[float]:
    """Microseconds a frame, of each round: of the first, which shares, and of those behind it."""
    found = []
    with filled(kind, guests, frames) as sharing:
        for _ in range(count):
            begin = time.thread_time()
            sharing.scan(guests * frames)
            found.append((time.thread_time() - begin) / (guests * frames) * 1e6)
    return found


def debians(count: int, guests: int = GUESTS) -> list[float]:
    """The same of Debians: microseconds a frame that they have."""
    found = []
    with Host(pcpus=2, ram="2G", overcommit=Terms(is_always=True, scan=0)) as host:
        vms = [host.linux("cloud-amd64", memory="128M", name=f"vm{n}") for n in range(guests)]
        host.run(until=lambda: all(vm.session.channel.is_there for vm in vms))
        sharing = Sharing(host)
        for vm in vms:
            sharing.join(vm.memory.p2m)
        frames = sum(extent.frames for vm in vms for extent in vm.memory.p2m)
        for _ in range(count):
            begin = time.thread_time()
            sharing.scan(frames)
            found.append((time.thread_time() - begin) / frames * 1e6)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.overcommit", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    print("| a frame that is scanned | µs, the least | µs, the median |\n|---|---|---|")
    for kind in (OWN, ALIKE, MIXED):
        firsts = [rounds(kind, 1)[0] for _ in range(2)]
        tell(kind, firsts, rounds(kind, options.rounds + 1)[1:])
    first, *again = debians(options.rounds + 1)
    tell(DEBIANS, [first], again)


def tell(kind: str, firsts: list[float], again: list[float]) -> None:
    """Two rows."""
    print(f"| {kind}, for the first time | {min(firsts):.2f} | {max(firsts):.2f} |")
    print(
        f"| the same, once more | {min(again):.2f} | {statistics.median(again):.2f} |", flush=True
    )


if __name__ == "__main__":
    main()
