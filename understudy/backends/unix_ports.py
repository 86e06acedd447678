"""Unix sockets that are a guest's ports: programs of this computer meet the guest by them.

Who connects to PATH and says "CONNECT 1234\\n" is connected to what listens at port 1234 in the
guest, and is told "OK 1073741824\\n", with the port that he has himself.  What the guest connects
to, port 1234 of its host, is the socket PATH_1234, where a program of this computer listens.

Source: Firecracker's docs/vsock.md.
Invariants: the sockets are this user's alone; a socket of another that still listens is never taken
away; nothing here waits.
"""

import errno
import os
import re
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from understudy.backends import descriptors

LONGEST_PATH: Final = 107  # sockaddr_un
LONGEST_PORT: Final = len("_4294967295")
LONGEST_WISH: Final = 32
WISH: Final = re.compile(rb"CONNECT ([0-9]{1,10})\r?\n")


class VsockError(Exception):
    """There can be no such socket: one line that says what to do."""


class UnixPorts:
    """A path, and who comes by it."""

    def __init__(self, path: Path) -> None:
        """VsockError says why not."""
        self.path = path
        self.listener = _listening(path)
        self._own = path.lstat().st_ino
        self._spare: socket.socket | None = socket.socket(socket.AF_UNIX)

    def accept(self) -> socket.socket | None:
        """Who has come, or None."""
        while True:
            try:
                end, _ = self.listener.accept()
            except OSError as problem:
                if problem.errno not in (errno.EMFILE, errno.ENFILE):
                    return None
                self._turn_away()
                return None
            if not descriptors.are_scarce():
                end.setblocking(False)
                return end
            end.close()

    def _turn_away(self) -> None:
        """Who waits would be heard of for ever: let him in by the one that is kept for it."""
        if self._spare is not None:
            self._spare.close()
            with suppress(OSError):
                self.listener.accept()[0].close()
        with suppress(OSError):
            self._spare = socket.socket(socket.AF_UNIX)

    def connect(self, port: int) -> socket.socket | None:
        """The guest wants a port of its host's; None if nobody listens there, or cannot now."""
        if descriptors.are_scarce():
            return None
        with ExitStack() as given, suppress(OSError):
            # No link is followed: a guest may have made it, in a folder that it shares.
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            there = os.open(f"{self.path}_{port}", flags)
            given.callback(os.close, there)
            end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                end.setblocking(False)
                end.connect(f"/proc/self/fd/{there}")
            except OSError:
                end.close()
                raise
            return end
        return None

    def close(self) -> None:
        """Nobody can come any more."""
        self.listener.close()
        if self._spare is not None:
            self._spare.close()
        with suppress(OSError):
            if self.path.lstat().st_ino == self._own:
                self.path.unlink()


def wish(end: socket.socket, said: bytearray) -> int | None:
    """Which port he wants; None: not said yet.  OSError if that is not what he says, or he is gone.

    said: of it so far; what he says behind it stays in the socket.
    """
    data = end.recv(LONGEST_WISH - len(said), socket.MSG_PEEK)
    line, newline, _ = data.partition(b"\n")
    said += end.recv(len(line + newline)) if data else b""
    if data and not newline and len(said) < LONGEST_WISH:
        return None
    found = WISH.fullmatch(said)
    if found is None or int(found[1]) >> 32:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
    return int(found[1])


def _listening(path: Path) -> socket.socket:
    if len(os.fsencode(path)) + LONGEST_PORT > LONGEST_PATH:
        raise VsockError(
            f"vsock {path}: a socket's name has at most {LONGEST_PATH} bytes, and ports need "
            f"{LONGEST_PORT} of them: choose a shorter one"
        )
    _make_room(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # only for this user, from the first moment on
    try:
        listener.bind(os.fspath(path))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise VsockError(f"vsock {path}: {error.strerror or error}") from None
    finally:
        os.umask(before)
    listener.setblocking(False)
    return listener


def _make_room(path: Path) -> None:
    """Take away a socket that nobody listens to any more."""
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise VsockError(f"vsock {path}: there is something of that name: choose another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise VsockError(f"vsock {path}: {error.strerror}") from None
    raise VsockError(f"vsock {path}: another VM has it: choose another path, or end that VM")
