"""The control socket of a running VM: what it answers, and what it must not let through."""

import contextlib
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from understudy.control import ControlError, ControlSocket, ask, sockets
from understudy.control.actions import ACTIONS
from understudy.guests.entry import Entry, protected_mode
from understudy.inspection import Inspection
from understudy.paging import Paging
from understudy.verdict import Stop, StopKind
from understudy.vm import VM

CODE = 0x1000


@pytest.fixture
def vm() -> Iterator[VM]:
    """A guest that jumps to itself."""
    with VM("16M") as vm:
        vm.memory.write(CODE, b"\xeb\xfe")
        vm.enter(protected_mode("test", CODE))
        yield vm


@pytest.fixture
def running(vm: VM, tmp_path: Path) -> Iterator[tuple[VM, Path, list[Stop]]]:
    """The VM on a thread of its own, its socket, and how it ended."""
    path, ends = tmp_path / "vm.sock", list[Stop]()
    thread = threading.Thread(target=lambda: ends.append(vm.go(wall_seconds=60)))
    with ControlSocket(vm, path):
        thread.start()
        while not ask(path, {"do": "status"})["instructions"]:
            pass  # until the guest has had its turn
        yield vm, path, ends
        vm.stop()
        thread.join()
    assert not path.exists()


Running = tuple[VM, Path, list[Stop]]


def test_status_and_counts(running: Running) -> None:
    _, path, _ = running
    first = ask(path, {"do": "status"})
    assert first["name"] == "vm" and first["paging"] == "ept"
    while ask(path, {"do": "status"})["instructions"] == first["instructions"]:
        pass  # until the guest has had its turn
    assert ask(path, {"do": "counts"})["instructions"] > 0
    assert "cr0=CR0(" in ask(path, {"do": "describe"})


def test_inspect_by_number_and_by_register(running: Running) -> None:
    _, path, _ = running
    found = Inspection.of(ask(path, {"do": "inspect", "address": "rip"}))
    assert (found.gva, found.guest.address) == (CODE, CODE)
    assert found.guest.title.endswith("paging is off")
    assert found.ours.address is not None
    for wanted in (CODE, hex(CODE), str(CODE)):
        assert ask(path, {"do": "inspect", "address": wanted}) == found.inspect()


def test_paging_is_told_and_kept(running: Running) -> None:
    _, path, _ = running
    assert ask(path, {"do": "paging"}) == "ept"
    assert ask(path, {"do": "paging", "to": "ept"}) == "ept"


@pytest.mark.parametrize("name", sorted(Paging.ALL.keys() - {"ept"}))
def test_paging_changes_while_the_guest_runs(running: Running, name: str) -> None:
    vm, path, ends = running
    for wanted, title in ((name, "the shadow's walk: PAE paging"), ("ept", "EPT's walk of gpa")):
        assert ask(path, {"do": "paging", "to": wanted}) == wanted
        before = ask(path, {"do": "status"})
        assert before["paging"] == wanted
        while ask(path, {"do": "status"})["instructions"] == before["instructions"]:
            assert not ends
        found = Inspection.of(ask(path, {"do": "inspect", "address": "rip"}))
        assert found.ours.title.startswith(title)
        assert found.ours.address == vm.memory.hpa(CODE)


def test_paging_changes_also_if_the_guest_is_in_real_address_mode(vm: VM, tmp_path: Path) -> None:
    vm.enter(Entry({"cr0": 0x10, "cs": 0, "rip": CODE, "rflags": 2}, "test"))
    thread = threading.Thread(target=lambda: vm.go(wall_seconds=60))
    with ControlSocket(vm, tmp_path / "vm.sock"):
        thread.start()
        assert ask(tmp_path / "vm.sock", {"do": "paging", "to": "vtlb"}) == "vtlb"
        assert ask(tmp_path / "vm.sock", {"do": "paging"}) == "vtlb"
        vm.stop()
        thread.join()


def test_a_snapshot_is_written_whole_and_for_its_owner_alone(
    running: Running, tmp_path: Path
) -> None:
    _, path, _ = running
    file = tmp_path / "snapshot"
    assert ask(path, {"do": "save", "file": str(file)})["bytes"] == file.stat().st_size
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with VM.restore(file.read_bytes()) as again:
        assert again.vcpus[0].guest.registers()["rip"] == CODE
    assert {f.name for f in tmp_path.iterdir()} == {"snapshot", "vm.sock"}


def test_stop_ends_the_run(running: Running) -> None:
    vm, path, ends = running
    assert ask(path, {"do": "stop"}) == "stopping"
    while not ends:
        threading.Event().wait(0.01)
    assert ends[0].kind == StopKind.STOPPED
    assert vm.go(budget=10).kind == StopKind.BUDGET  # it could go on


def test_whoever_was_heard_is_answered_though_the_vm_ends(tmp_path: Path) -> None:
    """The answer is longer than what the socket holds, and read when the VM has begun to end."""

    class AtOnce:
        def post(self, action: Callable[[], None]) -> None:
            action()

    long = "x" * (4 << 20)
    server = ControlSocket(AtOnce(), tmp_path / "vm.sock", {"tell": lambda _owner, _request: long})
    with server, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(server.path))
        client.sendall(b'{"do": "tell"}\n')
        assert client.recv(1, socket.MSG_PEEK), "the answer has begun"
        ending = threading.Thread(target=server.__exit__)
        ending.start()
        while server._thread.is_alive():
            pass
        with client.makefile() as answer:
            assert json.loads(answer.readline()) == {"ok": long}
        ending.join()


def test_stop_counts_more_than_the_end_of_a_slice(vm: VM) -> None:
    vm.vcpus[0].request(Stop(StopKind.WALL, "0.25 s"))
    ACTIONS["stop"](vm, {})
    assert vm.go(budget=10).kind == StopKind.STOPPED
    vm.vcpus[0].request(Stop(StopKind.POWEROFF))
    ACTIONS["stop"](vm, {})
    assert vm.go(budget=10).kind == StopKind.POWEROFF


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        ({"do": "dance"}, "do 'dance': expected one of status, counts"),
        ({"do": ["status"]}, "expected one of"),
        ({}, "do None: expected one of"),
        ({"do": "inspect"}, 'expected "address"'),
        ({"do": "inspect", "address": True}, 'expected "address"'),
        ({"do": "inspect", "address": "rxx"}, "expected a number like 0xc0100000"),
        ({"do": "inspect", "address": -1}, "expected 0 to 0xffffffffffffffff"),
        ({"do": "inspect", "address": 1 << 64}, "expected 0 to 0xffffffffffffffff"),
        ({"do": "paging", "to": "none"}, "paging 'none': expected one of"),
        ({"do": "paging", "to": 7}, "paging 7: expected one of"),
        ({"do": "save"}, 'expected "file"'),
        ({"do": "save", "file": "/nonexistent/x"}, "No such file or directory"),
    ],
)
def test_what_is_refused(running: Running, request_: dict[str, Any], problem: str) -> None:
    _, path, _ = running
    with pytest.raises(ControlError) as refused:
        ask(path, request_)
    assert problem in str(refused.value) and "\n" not in str(refused.value)
    assert ask(path, {"do": "paging"}) == "ept"  # and the VM goes on


@pytest.mark.parametrize(
    "sent", [b"", b"\n", b"{", b"[]\n", b"\xff\n", b"[" * 5000 + b"\n", b"x" * 100_000]
)
def test_what_is_no_request(running: Running, sent: bytes) -> None:
    _, path, _ = running
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(path))
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        try:
            answer = json.loads(raw.recv(65536))
        except ConnectionResetError:  # it did not read all of a line that is too long
            answer = {"error": "expected a line"}
    assert "expected" in answer["error"]
    assert ask(path, {"do": "paging"}) == "ept"


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much that a test which waits for it does not end."""
    monkeypatch.setattr(sockets, "PATIENCE_S", 3600.0)


@pytest.mark.usefixtures("patient")
def test_a_slow_client_delays_nobody(vm: VM, tmp_path: Path) -> None:
    path = tmp_path / "vm.sock"
    thread = threading.Thread(target=lambda: vm.go(wall_seconds=60))
    with ControlSocket(vm, path), contextlib.ExitStack() as stack:
        thread.start()
        for sent in (b"", b"{", b'{"do": "status"'):
            stack.enter_context(connected(path)).sendall(sent)
        deaf = stack.enter_context(connected(path))
        deaf.sendall(b'{"do": "status"}\n')  # and never reads the answer
        assert ask(path, {"do": "paging"}) == "ept"
        vm.stop()
        thread.join()
    assert not path.exists()  # the end has waited for none of them


@pytest.mark.usefixtures("patient")
def test_of_too_many_clients_those_that_ask_nothing_go(running: Running) -> None:
    _, path, _ = running
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(path)) for _ in range(sockets.MOST_CLIENTS + 2)]
        assert ask(path, {"do": "paging"}) == "ept"
        assert silent[0].recv(10) in (b"", b'{"error": ')


def test_a_request_has_a_limit_however_it_comes(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "PATIENCE_S", 0.5)
    _, path, _ = running
    with connected(path) as client:
        client.settimeout(0.05)
        answer = b""
        while not answer:  # each byte comes well within the limit
            with contextlib.suppress(TimeoutError):
                client.sendall(b" ")
                answer = client.recv(65536)
    assert b"no whole line came within 0.5 s" in answer


@pytest.mark.usefixtures("patient")
def test_another_user_is_refused_before_he_has_said_anything(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path, _ = running
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(sockets, "ROOT", 54321)
    with connected(path) as client:
        assert b"belongs to another user" in client.recv(65536)


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        yield client


def test_a_bug_in_an_action_does_not_end_the_vm(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(vm: VM, request: dict[str, Any]) -> None:
        raise KeyError("oops")

    monkeypatch.setitem(ACTIONS, "broken", broken)
    _, path, ends = running
    with pytest.raises(ControlError, match="a bug: 'oops'"):
        ask(path, {"do": "broken"})
    assert ask(path, {"do": "paging"}) == "ept" and not ends


def test_other_users_are_not_answered(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path, _ = running
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(sockets, "ROOT", 54321)
    with pytest.raises(ControlError, match="belongs to another user"):
        ask(path, {"do": "status"})


def test_a_request_that_the_vm_does_not_live_to_see(vm: VM, tmp_path: Path) -> None:
    path, problems = tmp_path / "vm.sock", list[str]()

    def late() -> None:
        try:
            ask(path, {"do": "status"})
        except ControlError as problem:
            problems.append(str(problem))

    with ControlSocket(vm, path):  # nobody lets the VM go
        thread = threading.Thread(target=late)
        thread.start()
        while not vm.vcpus[0].posts:
            threading.Event().wait(0.01)
    thread.join()
    assert problems == ["the VM has ended"]


def test_where_a_socket_can_be(vm: VM, tmp_path: Path) -> None:
    path = tmp_path / "vm.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with ControlSocket(vm, path):  # nobody listened on it
        with pytest.raises(ControlError, match="in use by another VM"), ControlSocket(vm, path):
            pass
        assert path.is_socket()
    plain = tmp_path / "plain"
    plain.write_text("mine")
    with pytest.raises(ControlError, match="exists and is no socket"), ControlSocket(vm, plain):
        pass
    assert plain.read_text() == "mine"
    long = tmp_path / ("x" * 120)
    with pytest.raises(ControlError, match="at most 107 bytes"), ControlSocket(vm, long):
        pass
    with pytest.raises(ControlError, match="No such file"), ControlSocket(vm, tmp_path / "a/b"):
        pass
    with pytest.raises(ControlError, match="there is no such socket; start a VM with understudy"):
        ask(tmp_path / "none", {"do": "status"})
    with pytest.raises(ControlError, match="no VM listens there"):
        ask(plain, {"do": "status"})
