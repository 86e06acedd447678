"""Connections to programs in the guest, as a method of a session.

Source: ours, on the socket device of virtio.
Invariant: a connection that does not come about leaves nothing behind.
"""

import errno
import os
import socket
from abc import abstractmethod
from collections.abc import Callable
from typing import Final

from understudy import vm as machine
from understudy.agent.result import LinuxError
from understudy.devices.virtio.vsock import Vsock
from understudy.devices.virtio.vsock_stream import Phase

CONNECT_GUEST_S: Final = 60.0
CONNECT_WALL_S: Final = 60.0


class Connecting:
    """Ports of the guest."""

    vm: machine.VM

    @abstractmethod
    def run_until(
        self, done: Callable[[], bool], awaited: str, timeout_guest_s: float, timeout_wall_s: float
    ) -> None:
        """Run the guest until `done()`."""

    def vsock(
        self, /, port: int, *, timeout_guest_s: float = CONNECT_GUEST_S,
        timeout_wall_s: float = CONNECT_WALL_S,
    ) -> socket.socket:  # fmt: skip
        """A socket that is connected with what listens at this port of the guest, by its vsock.

        The VM has to run for what is sent to arrive.  ConnectionRefusedError if nobody listens
        there, LinuxError if the VM has no vsock, or its guest no driver.
        """
        if not 0 <= port < 1 << 32:
            raise ValueError(f"port {port}: expected a number of 32 bits")
        part = next((one for one in self.vm.pc.parts.values() if isinstance(one, Vsock)), None)
        if part is None:
            raise LinuxError(f"{self.vm.name} has no vsock: say vsock=PATH, or --vsock PATH")
        ours, theirs = socket.socketpair()
        stream = part.open(port, theirs)
        try:
            if stream is None:
                raise LinuxError(f"{self.vm.name} has no driver of its vsock that answers")
            self.run_until(
                lambda: stream.phase is not Phase.ASKED, f"the answer of port {port}",
                timeout_guest_s, timeout_wall_s,
            )  # fmt: skip
            if stream.phase is not Phase.OPEN:
                raise ConnectionRefusedError(
                    errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED), f"port {port}"
                )
        except BaseException:
            ours.close()
            raise
        return ours
