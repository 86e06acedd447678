"""A tap of this computer: an interface whose frames a program reads and writes.

Whoever may configure the computer's network makes one (`ip tuntap add NAME mode tap user WHO`),
and gives it an address or puts it on a bridge; here it is only used.

Source: Linux, Documentation/networking/tuntap.rst; linux/if_tun.h.
Invariants: no interface is made or changed; nothing of the VM's thread waits; an interface that is
down loses what is sent, as a pulled cable does.
"""

import errno
import fcntl
import os
import select
import socket
import struct
import threading
from contextlib import suppress
from typing import Any, Final

from understudy.backends.cable import NetworkError
from understudy.backends.frame import HEADER_BYTES, LONGEST, Frame
from understudy.backends.outside import Outside
from understudy.backends.virtio_header import (
    HEADER,
    OFFLOADS,
    Header,
    frame_of,
    header_of,
)

DEVICE: Final = "/dev/net/tun"
SET_INTERFACE, SET_OFFLOADS, SET_HEADER_BYTES = 0x400454CA, 0x400454D0, 0x400454D8  # TUNSET*
TAP, NO_PACKET_INFORMATION, WITH_HEADER = 0x0002, 0x1000, 0x4000  # IFF_*
CHECKSUMS, TSO4, TSO6 = 1, 2, 4  # TUN_F_*
INTERFACE: Final = struct.Struct("16sH22x")  # ifreq


class Tap(Outside):
    """A cable to an interface of kind tap."""

    def __init__(self, name: str) -> None:
        """NetworkError says in one line why there is none."""
        super().__init__()
        self.interface, self.fd = name, _opened(name)
        self._ends = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._read, name=f"tap {name}", daemon=True)
        self._thread.start()

    def send(self, frame: Frame) -> bool:
        try:
            os.write(self.fd, HEADER.pack(*header_of(frame)) + frame.data)
        except BlockingIOError:
            return False
        except OSError:
            return True  # it is down, or refuses the frame
        return True

    def close(self) -> None:
        super().close()
        with self._came:
            self._is_over = True
            self._came.notify_all()
        os.eventfd_write(self._ends, 1)
        self._thread.join()
        os.close(self._ends)
        os.close(self.fd)

    def inspect(self) -> dict[str, Any]:
        return super().inspect() | {"tap": self.interface, "is_gone": self.is_gone}

    # --- in a thread ---

    def _read(self) -> None:
        waits = select.poll()
        waits.register(self.fd, select.POLLIN)
        waits.register(self._ends, select.POLLIN)
        while not self._is_over:
            waits.poll()
            try:
                data = os.read(self.fd, HEADER.size + LONGEST)
            except BlockingIOError:
                continue
            except OSError:
                break  # somebody has removed it
            frame = None
            if len(data) >= HEADER.size + HEADER_BYTES:
                header = Header(*HEADER.unpack_from(data))
                frame = frame_of(header, data[HEADER.size :], OFFLOADS)
            if frame is not None:
                self.arrive_when_there_is_room(frame)
        if not self._is_over:
            self.is_gone = True
            self.notify()


def _opened(name: str) -> int:
    """The interface, open; NetworkError."""
    what = f"net tap={name}"
    try:
        socket.if_nametoindex(name)  # or a new one would be made, where that is allowed
    except OSError:
        raise NetworkError(
            f"{what}: this computer has no such interface: `ip tuntap add {name} mode tap user "
            "NAME` makes one, as root"
        ) from None
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NetworkError(f"{what}: {DEVICE} cannot be opened: {error.strerror}") from None
    try:
        flags = TAP | NO_PACKET_INFORMATION | WITH_HEADER
        fcntl.ioctl(fd, SET_INTERFACE, INTERFACE.pack(name.encode(), flags))
        fcntl.ioctl(fd, SET_HEADER_BYTES, struct.pack("i", HEADER.size))
        fcntl.ioctl(fd, SET_OFFLOADS, CHECKSUMS | TSO4 | TSO6)
    except OSError as error:
        with suppress(OSError):
            os.close(fd)
        raise NetworkError(f"{what}: {_why(error, name)}") from None
    return fd


def _why(error: OSError, name: str) -> str:
    if error.errno == errno.EBUSY:
        return "the interface is in use: another program has it"
    if error.errno == errno.EPERM:
        return f"this user may not use it: `ip tuntap add {name} mode tap user NAME` says who may"
    if error.errno == errno.EINVAL:
        return "the interface is no tap of one queue: `ip tuntap show` lists those that there are"
    return f"the interface cannot be used: {error.strerror}"
