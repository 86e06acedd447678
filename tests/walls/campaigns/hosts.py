"""Clients of a host: whatever they ask, in whatever bytes, the host and its other VMs go on."""

import contextlib
import json
import random
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.test_run import kernel
from tests.walls.campaigns import Round, part
from tests.walls.campaigns.mutations import mutated, send
from understudy.control import ControlSocket, ask
from understudy.control.sockets import MOST_CLIENTS, MOST_STREAMS
from understudy.fleet.actions import ACTIONS
from understudy.fleet.fleet import Fleet
from understudy.fleet.plan import read

# Echoes what is typed: in al,3fd; test al,1; jz; in al,3f8; out 3f8,al; again.
PROGRAMS = {
    "spin": "ebfe",
    "echo": "66bafd03" + "ec" + "a801" + "74fb" + "66baf803" + "ec" + "ee" + "ebef",
    "talk": "66baf803" + "ee" + "ebfd",
    "bad": "0f0b",
}
FILE = """
[host]
pcpus = 2
ram = "64M"
grace = "100ms"
[pools.fast]
pcpus = 1
"""
LIVES = "spin"  # nobody ends it
VALUES: list[Any] = [
    None, True, 0, -1, 1, 0.5, 8, 1e-308, 1e308, float("nan"), float("inf"), 10**400, 1 << 63,
    "", "fast", "default", "ept", "vtlb", "none", "a\0b", "\ud800", "x" * 70_000, [], {}, [[]],
    {"do": "ps"}, "rip", "0x1000",
]  # fmt: skip
TELLING = ("weight", "weight", "cap", "cap", "pool", "paging", "inspect", "console", "pause")
KEYS = ("to", "address", "type", "file")
ENDING = (b"down", b"stop")
PATIENCE_S = 60


def request(chance: random.Random) -> bytes:
    """Something like a request; half of them are right but for a value."""
    wanted: dict[str, Any] = {"do": chance.choice([*ACTIONS, *ACTIONS, *VALUES])}
    if chance.random() < 0.5:
        wanted = {"do": chance.choice(TELLING), "vm": chance.choice([*PROGRAMS])}
        wanted |= {"to": chance.choice(VALUES), "address": chance.choice(VALUES)}
    elif chance.random() < 0.9:
        wanted["vm"] = chance.choice([*PROGRAMS, *PROGRAMS, *PROGRAMS, *VALUES])
    for key in KEYS:
        if chance.random() < 0.4:
            wanted[key] = chance.choice(VALUES)
    if wanted["do"] == "save":
        wanted["file"] = "/nonexistent/folder/x"
    return json.dumps(wanted).encode() + b"\n"


def harmless(line: bytes) -> bool:
    """Whether it can end none but the VM that is there to be ended."""
    return not any(word in line for word in ENDING) or b'"vm": "bad"' in line


def talk(path: Path, chance: random.Random, lines: list[bytes], *, ends: bool = False) -> None:
    """One client: a line in pieces, and its answer, or a part of it, or none."""
    line = chance.choice(lines)
    if chance.random() < 0.4:
        line = mutated(line, chance, lines)
    if not ends and not harmless(line):
        return
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
        client.settimeout(0.2)
        client.connect(str(path))
        send(client, line, chance, whole=0.95)
        if chance.random() < 0.8:
            answer = client.recv(chance.choice((1, 100, 1 << 16, 1 << 16)))
            assert b'{"error": "a bug' not in answer, answer
            for _ in range(chance.randrange(4)):  # if it is a console, it is typed at and read
                client.sendall(chance.randbytes(chance.choice((1, 100, 5000))))
                client.recv(1 << 16)


def clients(path: Path, chance: random.Random, count: int, *, ends: bool = False) -> None:
    """So many at once, each on a thread."""
    lines = [request(chance) for _ in range(8)]
    problems: list[BaseException] = []

    def one(own: random.Random) -> None:
        try:
            talk(path, own, lines, ends=ends)
        except BaseException as problem:
            problems.append(problem)

    threads = [
        threading.Thread(target=one, args=(random.Random(chance.getrandbits(64)),))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


@contextmanager
def fleet() -> Iterator[tuple[Fleet, Path, threading.Thread, list[Any]]]:
    """A host that runs, its socket, its thread, and how that has ended."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        text = FILE
        for vm, code in PROGRAMS.items():
            (folder / vm).mkdir()
            text += f'[vm.{vm}]\nkernel = "{kernel(folder / vm, code)}"\nmemory = "2M"\n'
        (folder / "hosts.toml").write_text(text)
        made = stack.enter_context(Fleet(read(folder / "hosts.toml"), folder))
        path, ends = folder / "sock", list[Any]()

        def run() -> None:
            try:
                ends.append(made.run())
            except BaseException as problem:
                ends.append(problem)

        stack.enter_context(ControlSocket(made, path, ACTIONS))
        made.start()
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield made, path, thread, ends
        finally:
            with contextlib.suppress(RuntimeError):
                for _ in range(2):
                    made.post(made.down)
            thread.join()


def _files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@part(rounds=25)
def hosts() -> Iterator[Round]:
    """Many clients at once, round after round."""
    with fleet() as (made, path, _, ends):
        first: list[tuple[int, int]] = []

        def one(chance: random.Random) -> None:
            clients(path, chance, chance.randrange(1, MOST_CLIENTS + 4))
            status = ask(path, {"do": "ps"}, timeout_s=PATIENCE_S)
            assert not ends, ends
            states = {vm["name"]: vm["state"] for vm in status["vms"]}
            assert states[LIVES] != "ended", status
            before = made.members[LIVES]
            ask(path, {"do": "resume", "vm": LIVES}, timeout_s=PATIENCE_S)
            for key, value in (("weight", 1), ("cap", None)):
                ask(path, {"do": key, "vm": LIVES, "to": value}, timeout_s=PATIENCE_S)
            done = before.last["instructions"]
            ends_at = time.monotonic() + PATIENCE_S
            while made.members[LIVES].last["instructions"] <= done:
                ask(path, {"do": "ps"}, timeout_s=PATIENCE_S)
                assert time.monotonic() < ends_at, "it stands still"
            first.append((threading.active_count(), _files()))
            most = MOST_CLIENTS + MOST_STREAMS
            assert first[-1][0] <= first[0][0] + most, "threads are left"
            assert first[-1][1] <= first[0][1] + 2 * most, "descriptors are leaked"

        yield one


@part(rounds=8)
def hosts_that_end() -> Iterator[Round]:
    """Clients of a host that is told to end meanwhile."""

    def one(chance: random.Random) -> None:
        before = threading.active_count(), _files()
        with fleet() as (made, path, thread, ends):
            clients(path, chance, chance.randrange(4), ends=True)
            ender = threading.Timer(chance.random() / 20, _end, (made, chance.choice((1, 2))))
            ender.start()
            clients(path, chance, chance.randrange(1, MOST_CLIENTS + 4), ends=True)
            ender.join()
            thread.join(PATIENCE_S)
            assert [type(end) for end in ends] == [bool], ends
        after = threading.active_count(), _files()
        assert after == before, (before, after)

    yield one


def _end(made: Fleet, times: int) -> None:
    with contextlib.suppress(RuntimeError):
        for _ in range(times):
            made.post(made.down)
