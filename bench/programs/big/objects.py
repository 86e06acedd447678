"""Debian's CPython: objects and methods, dictionaries, generators, JSON, regular expressions."""

import json
import re
import sys
import zlib


class Task:
    """A piece of work that others wait for."""

    __slots__ = ("cost", "name", "needs")

    def __init__(self, name: str, cost: int, needs: list[str]) -> None:
        self.name, self.cost, self.needs = name, cost, needs

    def finish(self, done: dict[str, int]) -> int:
        """When it is done, if it begins once all that it needs is."""
        return self.cost + max((done[name] for name in self.needs), default=0)


def draws(seed: int, below: int):
    """Numbers as good as random."""
    while True:
        seed = seed * 16807 % 2147483647
        yield seed % below


def queens(n: int, row: int = 0, columns: int = 0, down: int = 0, up: int = 0) -> int:
    """Ways to place `n` queens."""
    if row == n:
        return 1
    free, count = ~(columns | down | up) & ((1 << n) - 1), 0
    while free:
        bit = free & -free
        free ^= bit
        count += queens(n, row + 1, columns | bit, (down | bit) << 1, (up | bit) >> 1)
    return count


def work(size: int) -> int:
    """A number that depends on all that is computed."""
    numbers, total = draws(1, 1000), 0
    for turn in range(size):
        tasks: list[Task] = []
        for i in range(400):
            needs = [f"t{next(numbers) % i}" for _ in range(3)] if i else []
            tasks.append(Task(f"t{i}", next(numbers), needs))
        done: dict[str, int] = {}
        for task in tasks:
            done[task.name] = task.finish(done)
        text = json.dumps([{"name": t.name, "needs": t.needs, "at": done[t.name]} for t in tasks])
        told = re.sub(r'"t(\d)(\d*)"', lambda m: f'"{m[2]}-{m[1]}"', text)
        again = sorted(json.loads(told), key=lambda entry: (-entry["at"], entry["name"]))
        total += zlib.crc32(repr(again[:50]).encode()) + queens(6) + turn
    return total % 0xFFFFFFFF


print("S", flush=True)
print(f"E {work(int(sys.argv[1])):08x}", flush=True)
