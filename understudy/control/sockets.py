"""The socket of a running VM or of a host of many, and a client's end of it.

One request a connection: a line of JSON with "do" and what belongs to it, answered by a line of
JSON with "ok" or "error".  An answer that is a `Stream` keeps the connection after that line.  The
server's thread only carries messages; what is asked for is done on the owner's thread
(`VM.post`).

Source: unix(7).
Invariants: only this user (and root) is answered; nothing that is sent makes the owner end or
raise, but "stop" and "down", which are to; no client waits for another that is slow, nor does the
end of the VM for longer than `LAST_WORDS_S`, in which whoever was heard is answered; a socket of
another that still listens is never taken away.
"""

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol, Self, runtime_checkable

from understudy.control.actions import ACTIONS, ControlError, Request
from understudy.machine.frames import OutOfFrames

LONGEST_REQUEST: Final = 1 << 16
LONGEST_ANSWER: Final = 1 << 24
PATIENCE_S: Final = 10.0  # for a whole request, and for a whole answer
LAST_WORDS_S: Final = 1.0  # for the answers that are being given when the owner ends
MOST_CLIENTS: Final = 16
MOST_STREAMS: Final = 64
LONGEST_PATH: Final = 107  # sockaddr_un
CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
ROOT: Final = 0
OURS: Final = (ControlError, ValueError, OutOfFrames)
"""What an action raises if it cannot be done; anything else is a bug."""


class Owner(Protocol):
    """Who is asked: a VM, or a host of many."""

    def post(self, action: Callable[[], None]) -> None:
        """From any thread: do this on the owner's thread, between two exits."""


@runtime_checkable
class Stream(Protocol):
    """An answer that goes on after its first line."""

    first: Any

    def carry(self, connection: socket.socket) -> None:
        """Until one of both ends it; on a thread of its own."""

    def give_up(self) -> None:
        """It will not be carried."""


class ControlSocket:
    """Listens beside its owner as long as it is entered."""

    def __init__(
        self,
        owner: Owner,
        path: Path,
        actions: Mapping[str, Callable[[Any, Request], Any]] = ACTIONS,
    ) -> None:
        """`actions`: what can be asked of the owner, by what a request says in "do"."""
        self.owner, self.path, self.actions = owner, path, actions
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._ends = threading.Event()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._reading: dict[socket.socket, None] = {}  # those that have asked nothing yet, in order
        self._streaming: set[socket.socket] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if len(os.fsencode(self.path)) > LONGEST_PATH:
            raise ControlError(f"{self.path}: a socket's name has at most {LONGEST_PATH} bytes")
        _make_room(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)  # only for this user, from the first moment on
        try:
            listener.bind(os.fspath(self.path))
        except OSError as error:
            listener.close()
            raise ControlError(f"{self.path}: {error.strerror or error}") from None
        finally:
            os.umask(before)
        listener.listen(8)
        listener.settimeout(0.2)
        self._listener = listener
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._ends.set()
        self._thread.join()
        if self._listener is not None:
            self._listener.close()
        with self._lock:
            threads = list(self._clients.values())
            for connection in [*self._reading, *self._streaming]:
                _cut(connection)
        ends_at = time.monotonic() + LAST_WORDS_S
        for thread in threads:
            thread.join(max(0.0, ends_at - time.monotonic()))
        with self._lock:
            for connection in self._clients:
                _cut(connection)
        for thread in threads:
            thread.join()
        with suppress(OSError):
            self.path.unlink()

    def _serve(self) -> None:
        """Each client has a thread, so none waits for another's line."""
        assert self._listener is not None
        while not self._ends.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            if not _is_ours(connection):
                _refuse(connection, "this VM belongs to another user")
                continue
            with self._lock:
                is_full = len(self._clients) - len(self._streaming) >= MOST_CLIENTS
                if is_full and not self._reading:
                    _refuse(connection, f"{MOST_CLIENTS} others are being answered: ask again")
                    continue
                if is_full:
                    slowest = next(iter(self._reading))
                    del self._reading[slowest]
                    _cut(slowest)
                thread = threading.Thread(
                    target=self._talk, args=(connection,), name="control client", daemon=True
                )
                self._clients[connection] = thread
                self._reading[connection] = None
                thread.start()

    def _talk(self, connection: socket.socket) -> None:
        stream: Stream | None = None
        try:
            with suppress(OSError):
                found = self._answer(connection)
                stream = found if isinstance(found, Stream) else None
                answer = found if stream is None else {"ok": stream.first}
                connection.settimeout(PATIENCE_S)  # of all of it
                connection.sendall(_line(answer))
                if stream is not None:
                    stream.carry(connection)
        finally:
            if stream is not None:
                stream.give_up()
            with self._lock:
                self._reading.pop(connection, None)
                self._streaming.discard(connection)
                self._clients.pop(connection, None)
                connection.close()

    def _answer(self, connection: socket.socket) -> dict[str, Any] | Stream:
        try:
            line = _read_line(connection, LONGEST_REQUEST, PATIENCE_S)
            with self._lock:
                self._reading.pop(connection, None)
            found = self._carry_out(_parse(line))
            if not isinstance(found, Stream):
                return {"ok": found}
            with self._lock:
                if len(self._streaming) < MOST_STREAMS:
                    self._streaming.add(connection)
                    return found
            found.give_up()
            return {"error": f"{MOST_STREAMS} others watch already"}
        except ControlError as problem:
            return {"error": str(problem)}

    def _carry_out(self, request: Request) -> Any:
        """Do it on the owner's thread, and wait for it."""
        wanted = request.get("do")
        function = self.actions.get(wanted) if isinstance(wanted, str) else None
        if function is None:
            raise ControlError(f"do {wanted!r}: expected one of {', '.join(self.actions)}")
        done = threading.Event()
        outcome: list[Any] = []
        problem: list[Exception] = []

        def act() -> None:
            try:
                if not self._ends.is_set():
                    outcome.append(function(self.owner, request))
            except Exception as error:  # the VM must not end for what somebody asks
                problem.append(error)
            finally:
                done.set()

        try:
            self.owner.post(act)
        except RuntimeError as closed:
            raise ControlError(str(closed)) from None
        while not done.wait(0.05):
            if self._ends.is_set():
                break
        if problem:
            kind = "" if isinstance(problem[0], OURS) else "a bug: "
            raise ControlError(f"{kind}{problem[0]}") from problem[0]
        if not outcome:
            raise ControlError("the VM has ended")
        return outcome[0]


def _make_room(path: Path) -> None:
    """Take away a socket that nobody listens on; anything else stays and is an error."""
    if not path.is_socket():
        if path.exists():
            raise ControlError(f"{path} exists and is no socket: choose another name")
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            with suppress(FileNotFoundError):
                path.unlink()
            return
    raise ControlError(f"{path} is in use by another VM: choose another name")


def _is_ours(connection: socket.socket) -> bool:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return CREDENTIALS.unpack(raw)[1] in (os.geteuid(), ROOT)


# --- the messages ---


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _read_line(connection: socket.socket, longest: int, patience_s: float | None) -> bytes:
    """One line, all of it within `patience_s`, however it comes, and what comes with its end."""
    data = bytearray()
    ends_at = None if patience_s is None else time.monotonic() + patience_s
    part = b""
    while b"\n" not in part:
        try:
            if ends_at is not None:
                left = ends_at - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                connection.settimeout(left)
            part = connection.recv(65536)
        except TimeoutError:
            raise ControlError(f"no whole line came within {patience_s:g} s") from None
        if not part or len(data) + len(part) > longest:
            raise ControlError(f"expected one line of JSON, at most {longest} bytes")
        data += part
    return bytes(data)


def _refuse(connection: socket.socket, why: str) -> None:
    """Say so, if that takes no time."""
    with connection, suppress(OSError):
        connection.setblocking(False)
        connection.sendall(_line({"error": why}))


def _cut(connection: socket.socket) -> None:
    """Whoever waits for this connection need not wait any longer."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _parse(line: bytes) -> Request:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ControlError("expected a line of JSON") from None
    if not isinstance(value, dict):
        raise ControlError('expected a JSON object like {"do": "status"}')
    return value


# --- the client ---


def ask(path: Path, request: Request, *, timeout_s: float | None = None) -> Any:
    """Send one request to a VM or a host; its answer, or ControlError."""
    with _connected(path) as connection:
        return _asked(connection, path, request, timeout_s)[0]


@contextmanager
def attached(path: Path, request: Request) -> Iterator[tuple[Any, bytes, socket.socket]]:
    """Ask for a stream: its first answer, what came with it already, and the connection."""
    with _connected(path) as connection:
        first, rest = _asked(connection, path, request, PATIENCE_S)
        connection.settimeout(None)
        yield first, rest, connection


def _asked(
    connection: socket.socket, path: Path, request: Request, timeout_s: float | None
) -> tuple[Any, bytes]:
    """The answer, and what has come after its line."""
    connection.settimeout(timeout_s)
    try:
        with suppress(BrokenPipeError):  # refused before it was read: the answer says why
            connection.sendall(_line(request))
        line, _, rest = _read_line(connection, LONGEST_ANSWER, timeout_s).partition(b"\n")
        answer = _parse(line)
    except OSError as error:
        raise ControlError(f"{path}: {error.strerror or error}") from None
    if "error" in answer:
        raise ControlError(str(answer["error"]))
    return answer.get("ok"), rest


@contextmanager
def _connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(os.fspath(path))
        except FileNotFoundError:
            raise ControlError(
                f"{path}: there is no such socket; start a VM with understudy run --control {path}"
            ) from None
        except OSError as error:
            raise ControlError(f"{path}: no VM listens there ({error.strerror or error})") from None
        yield connection
