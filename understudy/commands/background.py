"""A command that goes on in the background, once it has said that it is ready.

Source: daemon(7); fork(2), setsid(2).
Invariants: until then its words and its status are those of the command, and Ctrl-C ends it; from
then on it has no terminal, and its words are in a log.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

Work = Callable[[Callable[[], None]], int]


def in_background(log: Path, work: Work) -> int | None:
    """Do the work in a process of its own; None when it is ready, else the status it ended with.

    `work` is given what it calls when it is ready.  To be called before there are threads.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return _wait(child, read)
    os.close(read)
    os.setsid()
    _redirect(os.devnull, os.O_RDONLY, 0)
    _redirect(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 1)

    def ready() -> None:
        os.dup2(1, 2)
        os.write(write, b"r")
        os.close(write)

    sys.exit(work(ready))


def _wait(child: int, read: int) -> int | None:
    try:
        is_ready = bool(os.read(read, 1))
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(read)
    if is_ready:
        return None
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _redirect(path: str | Path, flags: int, descriptor: int) -> None:
    opened = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    os.dup2(opened, descriptor)
    os.close(opened)
