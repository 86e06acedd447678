"""A folder that virtiofsd serves: which program, how it is started, what it said if it ended.

The one that is meant is written in Rust.  That of QEMU, which Debian 12 has, needs root.

Source: virtiofsd's README; `vhost_user.py` for what is spoken.
Invariants: the program sees the folder as its root and no other file; it cannot give rights to
whoever runs a file (no CAP_FSETID, no CAP_SETFCAP) nor make devices; it ends with this object, and
with this process in whatever way that ends.  A request that it does not answer is an OSError.
"""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from understudy.backends.folder import ShareError
from understudy.backends.vhost_user import VhostError, VhostUser

PROGRAM: Final = "virtiofsd"
PLACES: Final = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
"""Where it may be beside $PATH."""
VERSION: Final = re.compile(r"virtiofsd (\d[\w.+-]*)\s*")
"""What `--version` prints; that of QEMU says `virtiofsd version 7.2.22 (…)`."""
NEEDED: Final = ("--fd", "--readonly", "--translate-uid", "--uid-map", "--modcaps")
HOW: Final = "install one of 1.13 or later, or say server=python"
LOST_RIGHTS: Final = "-fsetid:-setfcap:-mknod"
NOBODY: Final = 65534
MOST_IDS: Final = (1 << 32) - 1
PATIENCE_S: Final = 30.0
"""For one answer, once: a disk may be slow, and meanwhile the VM stands still."""
SHORT_PATIENCE_S: Final = 10.0
"""For the program to say its version, and to end when it is to."""


class Virtiofsd:
    """One program for one folder."""

    def __init__(
        self, path: Path, *, is_writable: bool, queues: int, longest: tuple[int, int],
        patience_s: float = PATIENCE_S,
    ) -> None:  # fmt: skip
        """ShareError says in one line why there is none.

        `queues`, `longest`, `patience_s`: as for `VhostUser`.
        """
        self._said = f"share {path}: "
        program = found(path)
        with tempfile.TemporaryFile() as words, tempfile.TemporaryDirectory() as private:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    listening.bind(f"{private}/socket")  # nobody else may enter the folder
                    listening.listen(1)
                    connection.connect(f"{private}/socket")
                    options = _options(path, listening.fileno(), is_writable=is_writable)
                    self._process = subprocess.Popen(
                        [program, *options], pass_fds=[listening.fileno()], cwd="/",
                        stdin=subprocess.DEVNULL, stdout=words, stderr=words,
                        start_new_session=True,
                    )  # fmt: skip
                except OSError as problem:
                    connection.close()
                    why = problem.strerror or problem  # a path that is too long has no errno
                    raise ShareError(f"{self._said}{program}: {why}") from None
            # From here on only the program has the other end: if it ends, we are told.
            try:
                self._vhost = VhostUser(
                    connection, queues=queues, longest=longest, patience_s=patience_s
                )
            except VhostError as problem:
                self._end()
                words.seek(0)
                said = _last(words.read().decode(errors="replace")) or str(problem)
                raise ShareError(
                    f"{self._said}{program} did not start: {said}; or say server=python"
                ) from None
            except BaseException:
                self._end()
                raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def problem(self) -> str:
        """Why it answers nothing any more; empty while it does."""
        return self._vhost.problem

    def ask(self, queue: int, request: bytes, room: int) -> bytes:
        """What it answers to a FUSE request; EIO if it does not."""
        try:
            return self._vhost.ask(queue, request, room)
        except VhostError as problem:
            if self._process.returncode is None:
                self._end()
            raise OSError(errno.EIO, f"{self._said}virtiofsd: {problem}") from None

    def close(self) -> None:
        """It ends."""
        self._vhost.close()
        if self._process.returncode is None:
            with suppress(subprocess.TimeoutExpired):  # what was asked is carried out
                self._process.wait(SHORT_PATIENCE_S)
            self._end()

    def _end(self) -> None:
        """At once, with the process that it has made for its sandbox."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def found(path: Path) -> str:
    """The program, for a folder; ShareError if there is none that can be used."""
    unfit = ""
    for place in dict.fromkeys((shutil.which(PROGRAM), *PLACES)):
        if place is not None and os.access(place, os.X_OK):
            lack = _lack(place)
            if not lack:
                return place
            unfit = unfit or f"{place} {lack}"
    why = unfit or "there is no virtiofsd on this computer, neither in $PATH nor in /usr/libexec"
    raise ShareError(f"share {path}: {why}: {HOW}")


def _lack(program: str) -> str:
    """What is missing in a program to be used; empty if nothing is."""
    try:
        version, usage = (
            subprocess.run(
                [program, option], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, timeout=SHORT_PATIENCE_S, check=False,
            ).stdout.decode(errors="replace")
            for option in ("--version", "--help")
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "cannot be run"
    named = VERSION.fullmatch(version)
    if named is None:
        line = version.partition("\n")[0][:60]
        return f"is not the virtiofsd that can do without root ({line!r})"
    lacking = [option for option in NEEDED if option not in usage]
    return f"{named[1]} is too old, it has no {lacking[0]}" if lacking else ""


def _options(path: Path, listening: int, *, is_writable: bool) -> list[str]:
    """Who runs this process is the guest's root, and everybody else nobody, as in `Folder`."""
    uid, gid = os.geteuid(), os.getegid()
    options = [
        f"--fd={listening}", f"--shared-dir={path}", "--sandbox=namespace", "--seccomp=kill",
        "--cache=auto", "--inode-file-handles=never", "--no-announce-submounts",
        "--thread-pool-size=0", "--log-level=error", f"--modcaps={LOST_RIGHTS}",
    ]  # fmt: skip
    if uid:
        options += [f"--uid-map=:0:{uid}:1:", f"--gid-map=:0:{gid}:1:"]
    else:
        options += [f"--translate-uid={one}" for one in _translation(uid)]
        options += [f"--translate-gid={one}" for one in _translation(gid)]
    return options if is_writable else [*options, "--readonly"]


def _translation(own: int) -> Sequence[str]:
    rules = [f"map:0:{own}:1", f"forbid-guest:1:{MOST_IDS - 1}"]
    if own:
        rules.append(f"squash-host:0:{NOBODY}:{own}")
    return [*rules, f"squash-host:{own + 1}:{NOBODY}:{MOST_IDS - own - 1}"]


def _last(words: str) -> str:
    """The last line that a program has said, without its time and module."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return re.sub(r"^\[[^]]*\]\s*", "", lines[-1])[:200] if lines else ""
