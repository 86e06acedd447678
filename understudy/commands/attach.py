"""`understudy console`.

What: lends the terminal to a VM of a host that is up, through its socket.  Source: none.
Invariants: the guest's bytes go to standard output unchanged; however it is left, the terminal is
as it was, and the VM goes on.
"""

import os
import select
import socket
from contextlib import ExitStack, suppress
from typing import Annotated, Any

import typer

from understudy.commands import Refusal
from understudy.terminal import (
    ESCAPE_NAME,
    EscapeKey,
    Output,
    RawMode,
    Wish,
    ending_signals,
    is_interactive,
    note,
)

KEYS = f"""\
{ESCAPE_NAME} q   leave the console; the VM goes on
{ESCAPE_NAME} h   show this help
{ESCAPE_NAME} {ESCAPE_NAME}   send {ESCAPE_NAME} to the guest
"""
CHUNK = 1 << 16


def console(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A VM, or HOST/VM.")],
    watch: Annotated[bool, typer.Option("--watch", help="Only look; type nothing.")] = False,
) -> None:
    """Attach to the console of a VM that understudy up has started; Ctrl-] q leaves it.

    Several may look at the same console; the first types.  Without a terminal, what comes on
    standard input is typed, and the command ends with the VM.

    Examples:

      understudy console web

      understudy console --watch hosts/web
    """
    from understudy.control import ControlError, hosts
    from understudy.control.sockets import attached

    try:
        target = hosts.target(name)
        request = target.request({"do": "console", "type": not watch})
        with attached(target.socket, request) as (first, shown, connection):
            how = _Console(connection, is_typing=not watch).run(first, shown)
    except ControlError as problem:
        raise Refusal(str(problem)) from None
    note(how or _end_in_words(target))


def _end_in_words(target: Any) -> str:
    """Why nothing more comes."""
    from understudy.control import ControlError, hosts

    with suppress(ControlError):
        for vm in hosts.status(target)["vms"]:
            if vm["name"] == target.vm:
                return f"{target.vm} has ended: {vm['ended']}" if vm["ended"] else "cut off"
    return "the host has ended"


class _Console:
    """The terminal, or a pipe, and the connection, until one of them ends."""

    def __init__(self, connection: socket.socket, *, is_typing: bool) -> None:
        self._connection, self._is_typing = connection, is_typing
        self._is_interactive = is_interactive()
        self._escape, self._screen = EscapeKey(), Output(1)
        self._pending = bytearray()
        self._leaves, self._is_open = False, True

    def run(self, first: dict[str, Any], shown: bytes) -> str:
        """Why it was left; nothing if the VM has ended."""
        with ExitStack() as stack:
            stack.enter_context(ending_signals())
            if self._is_interactive:
                note(f"{first['vm']}: {ESCAPE_NAME} q leaves it, {ESCAPE_NAME} h shows the keys")
                stack.enter_context(RawMode(0))
            if self._is_typing and not first["types"]:
                note("somebody else types: only looking")
            self._screen(shown)
            self._talk()
        return "left; the VM goes on" if self._leaves else ""

    def _talk(self) -> None:
        """Never waits for the host to take what is typed: the keys that leave must be heard."""
        poll = select.poll()
        self._connection.setblocking(False)
        while not self._leaves:
            reads = self._is_open and (self._is_interactive or not self._pending)
            poll.register(0, select.POLLIN if reads else 0)
            if not self._is_open:
                poll.unregister(0)
            poll.register(self._connection, select.POLLIN | select.POLLOUT * bool(self._pending))
            found = dict(poll.poll())
            events = found.pop(self._connection.fileno(), 0)
            if found and reads:
                self._take()
            with suppress(BlockingIOError):
                if events & select.POLLOUT and not self._send():
                    self._is_typing = False
                if events & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    if not (data := self._receive()):
                        return
                    self._screen(data)

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(CHUNK)
        except ConnectionError:
            return b""

    def _send(self) -> bool:
        """Whether anybody takes it."""
        try:
            sent = self._connection.send(self._pending)
        except (BrokenPipeError, ConnectionError):  # what was said last is still to be read
            self._pending.clear()
            return False
        del self._pending[:sent]
        return True

    def _take(self) -> None:
        """What was typed."""
        try:
            typed = os.read(0, 4096)
        except OSError:
            typed = b""
        if not typed:
            self._is_open = False
            self._leaves = self._is_interactive
        if not self._is_interactive:
            self._hold(typed)
            return
        for part in self._escape.feed(typed):
            match part:
                case bytes():
                    self._hold(part)
                case Wish.QUIT:
                    self._leaves = True
                    return
                case _:
                    note(KEYS)

    def _hold(self, typed: bytes) -> None:
        """To be sent; of a guest that does not read, a person's typing is forgotten at last."""
        if self._is_typing and len(self._pending) < CHUNK:
            self._pending += typed
