"""A network in user mode: passt makes a guest's connections as this computer's own.

No root and no change of this computer is needed.  Source: passt(1); the protocol is that of QEMU's
`-netdev stream`: before each frame its length, 4 bytes, the highest first.

Invariants: nothing of the VM's thread waits for passt, nor passt's frames for the VM but in the
cable, beyond which passt itself has to wait; passt ends with the cable, and if this process ends
in whatever way; what it says that no protocol has ends the cable, not the VM.
"""

import ipaddress
import re
import shutil
import socket
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from understudy.backends.cable import MOST_BYTES, NetworkError
from understudy.backends.frame import HEADER_BYTES, LONGEST, Frame
from understudy.backends.outside import Outside
from understudy.nic import Nic, Port

ADDRESS, GATEWAY, PREFIX_BITS = "10.0.2.15", "10.0.2.2", 24  # what the guest gets by DHCP
GATEWAY_MAC: Final = "52:55:0a:00:02:02"
PROGRAM: Final = "passt"
MISSING: Final = (
    "net user: there is no passt on this computer: install it (apt-get install passt), or use "
    "--net lan=NAME, which needs nothing"
)
LENGTH: Final = 4  # bytes before each frame
AT_ONCE: Final = 1 << 18
SOCKET_BYTES: Final = 1 << 20  # asked for; the computer gives what it allows
PATIENCE_S: Final = 10.0  # until it has begun, or ended
ASKING: Final = b"\x52\x54\0\0\0\0"
QUESTION: Final = (  # RFC 826: who has the gateway's address?
    b"\xff" * 6 + ASKING + b"\x08\x06" + b"\0\1\x08\0\6\4\0\1" + ASKING + bytes(4) + bytes(6)
    + ipaddress.IPv4Address(GATEWAY).packed
)  # fmt: skip


def _question_of_ipv6() -> bytes:
    """RFC 4861, "Neighbor Solicitation Message Format": who has an address?  passt has any."""
    own, asked, all_of_it = (
        ipaddress.IPv6Address(one).packed for one in ("fe80::1", "fe80::2", "ff02::1:ff00:2")
    )
    message = b"\x87\0\0\0" + bytes(4) + asked + b"\1\1" + ASKING
    length = len(message).to_bytes(2, "big")
    pseudo = int.from_bytes(own + all_of_it + length + b"\0\x3a", "big") % 0xFFFF  # RFC 8200
    message = message[:2] + pseudo.to_bytes(2, "big") + message[4:]
    packet = b"\x60\0\0\0" + length + b"\x3a\xff" + own + all_of_it + message
    frame = b"\x33\x33\xff\0\0\2" + ASKING + b"\x86\xdd" + packet
    return Frame(frame, start=HEADER_BYTES + 40, offset=2).whole().data


QUESTIONS: Final = (QUESTION, _question_of_ipv6())
"""A computer may have one of the two protocols alone; whatever is answered, passt is ready."""
NOISE: Final = re.compile(r"Failed to send \d+ bytes to syslog|Don't run as root.*")


class Passt(Outside):
    """A cable to a passt of its own."""

    def __init__(self, nic: Nic, ports: Sequence[Port]) -> None:
        """NetworkError says in one line why there is none."""
        super().__init__()
        self._socket, theirs = socket.socketpair()
        try:
            for one in (self._socket, theirs):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
            self._process = _started(self._socket, theirs, nic, ports)
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._out: deque[bytes] = deque()  # that the socket had no room for
        self._out_bytes = 0
        self._more = threading.Condition()
        self._threads = [
            threading.Thread(target=one, name=f"passt {one.__name__}", daemon=True)
            for one in (self._read, self._write)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    # --- on the VM's thread ---

    def send(self, frame: Frame) -> bool:
        data = frame.whole().data  # it takes long ones as they are
        data = len(data).to_bytes(LENGTH, "big") + data
        with self._more:
            if self._out_bytes + len(data) > MOST_BYTES:
                return False
            if not self._out:
                try:
                    data = data[self._socket.send(data, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    pass
                except OSError:
                    return True  # who reads has seen it
            if data:
                self._out.append(data)
                self._out_bytes += len(data)
                self._more.notify()
        return True

    def close(self) -> None:
        super().close()
        self._end()
        for thread in self._threads:
            thread.join()
        self._socket.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def inspect(self) -> dict[str, Any]:
        return super().inspect() | {"passt": self.pid, "is_gone": self.is_gone}

    # --- in threads ---

    def _end(self) -> None:
        with self._came, self._more:
            self._is_over = True
            self._came.notify_all()
            self._more.notify_all()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        data = bytearray()
        while not self._is_over:
            try:
                part = self._socket.recv(AT_ONCE)
            except OSError:
                part = b""
            if not part:
                break
            data += part
            if not self._cut(data):
                break
        self._end()
        self.is_gone = True
        self.notify()

    def _cut(self, data: bytearray) -> bool:
        """Take frames from the beginning of what came; False if these are none."""
        at = 0
        while len(data) >= at + LENGTH:
            size = int.from_bytes(data[at : at + LENGTH], "big")
            if not HEADER_BYTES <= size <= LONGEST:
                return False
            end = at + LENGTH + size
            if len(data) < end:
                break
            frame = Frame(bytes(data[at + LENGTH : end]))
            if frame.to != ASKING:  # the answer to the other question
                self.arrive_when_there_is_room(frame)
            at = end
        del data[:at]
        return True

    def _write(self) -> None:
        while True:
            with self._more:
                while not (self._out or self._is_over):
                    self._more.wait()
                if self._is_over:
                    return
                data = self._out[0]
            try:
                self._socket.sendall(data)
            except OSError:
                return
            with self._more:
                self._out.popleft()
                self._out_bytes -= len(data)


def _started(
    ours: socket.socket, theirs: socket.socket, nic: Nic, ports: Sequence[Port]
) -> "subprocess.Popen[bytes]":
    """The process, when it has bound its ports: then it answers."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise NetworkError(MISSING)
    with tempfile.TemporaryFile() as words:
        try:
            process = subprocess.Popen(
                [program, *_options(nic, ports, theirs.fileno())], pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL, stdout=words, stderr=words, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise NetworkError(f"net user: {program}: {error.strerror}") from None
        finally:
            theirs.close()
        try:
            ours.settimeout(PATIENCE_S)
            for question in QUESTIONS:
                ours.sendall(len(question).to_bytes(LENGTH, "big") + question)
            size = int.from_bytes(_exactly(ours, LENGTH), "big")
            is_ready = len(_exactly(ours, size)) >= HEADER_BYTES
        except OSError:
            is_ready = False
        ours.settimeout(None)
        if not is_ready:
            process.kill()
            process.wait()
            words.seek(0)
            raise NetworkError(_why(words.read().decode(errors="replace"), ports))
    return process


def _exactly(ours: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < min(count, LONGEST):
        part = ours.recv(count - len(data))
        if not part:
            break
        data += part
    return data


def _options(nic: Nic, ports: Sequence[Port], fd: int) -> list[str]:
    options = [
        "--foreground", "--quiet", "--fd", str(fd), "--address", ADDRESS,
        "--netmask", str(PREFIX_BITS), "--gateway", GATEWAY, "--mac-addr", GATEWAY_MAC,
    ]  # fmt: skip
    if not nic.has_host_loopback:
        options.append("--no-map-gw")
    for port in ports:
        options += ["-u" if port.is_udp else "-t", _spelled(port)]
    return options


def _spelled(port: Port) -> str:
    return f"{port.address}/{port.host}:{port.guest}"


def _why(words: str, ports: Sequence[Port]) -> str:
    for port in ports:
        if _spelled(port) in words:
            return (
                f"publish {port}: the port is in use, or may not be bound by this user: choose "
                "another, or end who has it"
            )
    lines = [line.strip() for line in words.splitlines()]
    said = [line for line in lines if line and not NOISE.fullmatch(line)]
    return f"net user: passt did not start: {said[-1] if said else 'it said nothing'}"
