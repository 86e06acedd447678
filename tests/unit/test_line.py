"""A VM's console for those who watch it, and in a file: what is kept, lost and typed."""

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from understudy.control.line import WATCHED_KEPT, Line, Watcher
from understudy.fleet.console_file import CONSOLE_FILE_KEPT, ConsoleFile


class Bench:
    """A line whose VM's thread is this one."""

    def __init__(self) -> None:
        self.typed, self.unread = bytearray(), 0
        self.posts: deque[Callable[[], None]] = deque()
        self.line = Line(self.typed.extend, lambda: self.unread)

    def attach(self, *, types: bool = True) -> Watcher:
        return self.line.attach({}, b"", self.posts.append, wants_to_type=types)


def test_who_does_not_read_loses_and_is_told() -> None:
    bench = Bench()
    watcher = bench.attach()
    for _ in range(3):
        bench.line.heard(b"x" * (WATCHED_KEPT // 2))
    bench.line.close()
    client, server = socket.socketpair()
    heard = bytearray()
    reader = threading.Thread(
        target=lambda: heard.extend(b"".join(iter(lambda: client.recv(1 << 16), b"")))
    )
    reader.start()
    watcher.carry(server)
    server.close()
    reader.join(30)
    client.close()
    watcher.give_up()
    lost = b"\r\n[understudy: %d bytes were not read in time]\r\n" % (WATCHED_KEPT // 2)
    assert bytes(heard) == b"x" * WATCHED_KEPT + lost


def test_one_types_and_the_next_when_he_has_gone() -> None:
    bench = Bench()
    first, second = bench.attach(), bench.attach()
    assert (first.types, second.types, second.first) == (True, False, {"types": False})
    assert not bench.attach(types=False).types
    first.give_up()
    bench.posts.popleft()()
    assert bench.attach().types


def test_typing_waits_for_a_guest_that_does_not_read() -> None:
    bench = Bench()
    bench.unread = 1 << 20
    watcher = bench.attach()
    client, server = socket.socketpair()
    thread = threading.Thread(target=watcher.carry, args=(server,))
    with client, server:
        thread.start()
        client.sendall(b"ls\n")
        threading.Event().wait(0.1)
        assert not bench.posts
        bench.unread = 0
        while not bench.posts:
            threading.Event().wait(0.01)
        bench.posts.popleft()()
        assert bench.typed == b"ls\n"
        client.close()
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        thread.join(30)
    watcher.give_up()
    bench.line.heard(b"nobody")


def test_a_consoles_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    file = ConsoleFile(path)
    for number in range(5):
        file.heard(b"%d" % number * CONSOLE_FILE_KEPT)
    file.close()
    file.heard(b"late")
    assert path.read_bytes()[:1] == b"4" and path.with_name("a.txt.old").read_bytes()[:1] == b"3"
    assert sum(one.stat().st_size for one in tmp_path.iterdir()) == 2 * CONSOLE_FILE_KEPT


def test_a_file_that_cannot_be_made_disturbs_nobody(tmp_path: Path) -> None:
    file = ConsoleFile(tmp_path / "none" / "a.txt")
    file.heard(b"x")
    file.close()
