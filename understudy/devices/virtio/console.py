"""Virtio console: streams of bytes between guest and host, one for each port.

Source: Virtual I/O Device (VIRTIO) Version 1.2, "Console Device".  A port without a name is a
console, which Linux calls hvc0; one with a name is a file in the guest, /dev/virtio-ports/NAME.

Not modeled: the size of a console, ports that come and go.

Invariants: bytes arrive in order and none is lost while the driver has buffers; what waits for a
buffer is what the host sent, and at most one of each control message.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from understudy.devices.virtio.pci import NotNow, VirtioPci, VirtioState
from understudy.devices.virtio.queue import Chain, RingError, cut, length
from understudy.devices.wires import Wires

# --- The specification ---

KIND: Final = 3
CLASS: Final = 0x078000  # communication, other: what QEMU's has
MULTIPORT, EMERG_WRITE = 1 << 1, 1 << 2  # VIRTIO_CONSOLE_F_*
CONFIG: Final = struct.Struct("<HHII")  # columns, rows, max_nr_ports, emerg_wr
EMERGENCY: Final = 8  # offset of emerg_wr
CONTROL: Final = struct.Struct("<IHH")  # port, event, value
CONTROL_IN, CONTROL_OUT = 2, 3  # queues; before them port 0's, after them the other ports'


class Event(IntEnum):
    """VIRTIO_CONSOLE_*, control messages."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    PORT_READY = 3
    CONSOLE_PORT = 4
    PORT_OPEN = 6
    PORT_NAME = 7


QUEUE_SIZE: Final = 128
MOST: Final = 1 << 20  # ours: bytes of one buffer


@dataclass
class ConsoleState(VirtioState):
    """What is on its way into the guest, and which ports somebody has open there."""

    inputs: list[bytes] = field(default_factory=list)  # by port
    messages: list[bytes] = field(default_factory=list)
    is_open: list[bool] = field(default_factory=list)


class VirtioConsole(VirtioPci, name="virtio_console"):
    """Ports by their names; the empty one is a console."""

    state: ConsoleState

    def __init__(self, wires: Wires, *, ports: Sequence[str] = ("",)) -> None:
        if not 1 <= len(ports) <= 16:
            raise ValueError(f"virtio_console: {len(ports)} ports, expected 1 to 16")
        self.ports = tuple(ports)
        super().__init__(wires, KIND, CLASS, (QUEUE_SIZE,) * (2 + 2 * len(ports)))
        self.offered |= MULTIPORT | EMERG_WRITE
        self.on_output: list[Callable[[int, bytes], None]] = []
        self.state = self.power_on()

    def power_on(self) -> ConsoleState:
        count = len(self.ports)
        return self.fresh(ConsoleState, inputs=[b""] * count, is_open=[False] * count)

    def config(self) -> bytes:
        return CONFIG.pack(0, 0, len(self.ports), 0)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == EMERGENCY:
            self._out(0, data[:1])

    # --- the host's end ---

    def send(self, port: int, data: bytes) -> None:
        """Bytes for the guest; they wait until it has room for them, and the port open."""
        self.state.inputs[port] += data
        self.kick(self._queues(port)[0])

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        if not len(self.state.inputs) == len(self.state.is_open) == len(self.ports):
            raise ValueError("snapshot: virtio_console was saved with other ports")

    def close(self) -> None:
        self.on_output.clear()
        super().close()

    def _out(self, port: int, data: bytes) -> None:
        for listener in self.on_output:
            listener(port, data)

    # --- queues ---

    @staticmethod
    def _queues(port: int) -> tuple[int, int]:
        """Where a port receives, and where it transmits, as the driver sees it."""
        first = 2 * port + 2 if port else 0
        return first, first + 1

    def serve(self, number: int, chain: Chain) -> int:
        if number == CONTROL_IN:
            return self._next_message(chain)
        if number == CONTROL_OUT:
            self._control(self._bytes_of(chain))
            return 0
        port = number // 2 - 1 if number > CONTROL_OUT else 0
        if number & 1:
            data = self._bytes_of(chain)
            self.moved += len(data)
            self._out(port, data)
            return 0
        return self._input(port, chain)

    def _bytes_of(self, chain: Chain) -> bytes:
        if length(chain.readable) > MOST:
            raise RingError(f"a buffer of more than {MOST} bytes for a console")
        return self.dma.gather(chain.readable)

    def _input(self, port: int, chain: Chain) -> int:
        waiting = self.state.inputs[port]
        if not waiting or not self._is_listened_to(port):
            raise NotNow
        count = self.dma.scatter(cut(chain.writable, 0, MOST), waiting)
        self.state.inputs[port] = waiting[count:]
        return count

    def _is_listened_to(self, port: int) -> bool:
        """Whether the driver keeps what comes.  Linux throws it away while a file is not open."""
        return not self.ports[port] or not self.has(MULTIPORT) or self.state.is_open[port]

    # --- control ---

    def _next_message(self, chain: Chain) -> int:
        messages = self.state.messages
        if not messages:
            raise NotNow
        if length(chain.writable) < len(messages[0]):
            raise RingError("a buffer too small for a control message")
        return self.dma.scatter(chain.writable, messages.pop(0))

    def _tell(self, port: int, event: Event, value: int = 1, more: bytes = b"") -> None:
        message = CONTROL.pack(port, event, value) + more
        if message not in self.state.messages:
            self.state.messages.append(message)

    def _control(self, message: bytes) -> None:
        if len(message) < CONTROL.size:
            raise RingError("a control message that is cut off")
        port, event, value = CONTROL.unpack_from(message)
        if event == Event.DEVICE_READY and value == 1:
            for number in range(len(self.ports)):
                self._tell(number, Event.DEVICE_ADD)
        elif port < len(self.ports):
            if event == Event.PORT_READY and value == 1:
                self._introduce(port)
            elif event == Event.PORT_OPEN:
                self.opened(port, is_open=value == 1)
                self.kick(self._queues(port)[0])
        self.kick(CONTROL_IN)

    def opened(self, port: int, *, is_open: bool) -> None:
        """Somebody in the guest has opened the port, or closed it."""
        self.state.is_open[port] = is_open

    def _introduce(self, port: int) -> None:
        name = self.ports[port]
        if name:
            self._tell(port, Event.PORT_NAME, more=name.encode())
        else:
            self._tell(port, Event.CONSOLE_PORT)
        self._tell(port, Event.PORT_OPEN)
