"""Clients of the control socket: whatever they do, the VM runs and the next one is answered."""

import contextlib
import json
import random
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.walls.campaigns import Round, part
from tests.walls.campaigns.mutations import mutated, send
from understudy.control import ControlSocket, ask
from understudy.control.sockets import MOST_CLIENTS
from understudy.guests.entry import protected_mode
from understudy.verdict import Stop, StopKind
from understudy.vm import VM

CODE = 0x1000
ASKED: list[Any] = [
        {"do": "status"}, {"do": "counts"}, {"do": "describe"}, {"do": "paging"},
        {"do": "paging", "to": "vtlb"}, {"do": "paging", "to": "ept"}, {"do": "paging", "to": []},
        {"do": "inspect", "address": "rip"}, {"do": "inspect", "address": 1 << 63},
        {"do": "save", "file": "/nonexistent/folder/x"}, {"do": "save", "file": "a\0b"},
        {"do": None}, [], "x" * 70_000,
]  # fmt: skip
REQUESTS = [json.dumps(request).encode() + b"\n" for request in ASKED]


@part(rounds=40)
def clients() -> Iterator[Round]:
    """A few at a time, each cut off somewhere."""
    with tempfile.TemporaryDirectory() as folder, VM("16M") as vm:
        vm.memory.write(CODE, b"\xeb\xfe")
        vm.enter(protected_mode("walls", CODE))
        path, ends = Path(folder) / "vm.sock", list[Stop]()
        files: list[int] = []  # descriptors, before each round
        thread = threading.Thread(target=lambda: ends.append(vm.go()))

        def one(chance: random.Random) -> None:
            files.append(len(list(Path("/proc/self/fd").iterdir())))
            with contextlib.ExitStack() as stack:
                for _ in range(chance.randrange(1, MOST_CLIENTS + 4)):
                    client = stack.enter_context(socket.socket(socket.AF_UNIX))
                    with contextlib.suppress(OSError):
                        client.connect(str(path))
                        _talk(client, chance)
                assert ask(path, {"do": "status"}, timeout_s=30)["name"] == "vm"
            assert not ends, ends
            assert threading.active_count() < MOST_CLIENTS + 10
            assert files[-1] <= files[0] + MOST_CLIENTS, "descriptors are leaked"

        with ControlSocket(vm, path):
            thread.start()
            yield one
            vm.stop()
            thread.join()
        assert [stop.kind for stop in ends] == [StopKind.STOPPED]


def _talk(client: socket.socket, chance: random.Random) -> None:
    """A request or something like it, in pieces; the answer is read, or not, or in part."""
    line = mutated(chance.choice(REQUESTS), chance, REQUESTS)
    if b"stop" in line:
        return
    client.settimeout(0.05)
    send(client, line, chance, whole=0.8)
    if chance.random() < 0.5:
        client.recv(chance.choice((1, 100, 1 << 16)))
