"""The agent's port: a command goes into the guest, its output and its end come out.

Source: ours.  That a hypervisor takes whole buffers by REP OUTSB is VMware's "high-bandwidth"
backdoor; that it knows a process by the root of its page tables is from Jones et al., "Antfarm:
Tracking Processes in a Virtual Machine Environment" (USENIX 2006).

The guest's side is guests/agent.s.  Two registers of 32 bits:

    offset 0  DATA     written: bytes of output; read: the next byte of the command
    offset 4  CONTROL  read: take the command that waits; its bytes, or all ones if there is none
                       written: 0 "I am here", 0x100 + status "the command has ended"

Not modeled: an interrupt of its own; `ring` tells the guest that a command waits.

Invariants: output is never taken for anything else, whatever its bytes are; the first process that
says that it is here is the agent until the machine is reset, and no other reaches the registers, so
neither another's access nor a second agent can end a command; what comes before a command is
taken, or after it was given up, is dropped; nothing here is secret, and the same commands give the
same run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.machine.bus import ports
from understudy.state import U64

DATA, CONTROL = 0, 4
HELLO: Final = 0
ENDED: Final = 0x100
NOTHING: Final = 0xFFFF_FFFF


@dataclass
class AgentState:
    """Who the agent is, and how far the command has come."""

    agent: U64 | None = None  # the root of its page tables, once it is there
    command: bytes | None = None  # not taken yet
    taken: bytes = b""
    at: U64 = 0  # how much of that has been read
    is_running: bool = False  # taken, and not given up


class Agent(Device, name="agent"):
    """One agent, one command at a time.

    who: the root of the page tables of the process whose access this is.  ring: tell the guest.
    """

    spans = (ports(8, width=4),)
    state: AgentState

    def __init__(
        self,
        wires: Wires,
        *,
        who: Callable[[], int] = lambda: 0,
        ring: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(wires)
        self.who, self.ring = who, ring
        self.on_output: list[Callable[[bytes], None]] = []
        self.on_exit: list[Callable[[int], None]] = []  # with 128 + n if signal n has ended it
        self.state = self.power_on()

    def power_on(self) -> AgentState:
        return AgentState()

    # --- the host's end ---

    @property
    def is_there(self) -> bool:
        """Whether the guest's side has started."""
        return self.state.agent is not None

    @property
    def is_busy(self) -> bool:
        """Whether a command is under way."""
        return self.state.is_running or self.state.command is not None

    def request(self, command: bytes) -> None:
        """Start a command, now or when the agent is there.  RuntimeError while one is under way."""
        if self.is_busy:
            raise RuntimeError("the agent is busy: wait for the end, or give the command up")
        self.state.command = command
        if self.is_there:
            self.ring()

    def give_up(self) -> None:
        """Forget the command under way; it goes on in the guest until the next is taken."""
        self.state.command, self.state.is_running = None, False

    # --- the guest's end ---

    def _is_agent(self) -> bool:
        return self.state.agent is not None and self.who() == self.state.agent

    def read(self, region: int, offset: int, size: int) -> int:
        s = self.state
        if not self._is_agent():
            return (1 << 8 * size) - 1
        if offset == CONTROL and size == 4:
            if s.command is None:
                return NOTHING
            s.taken, s.at, s.is_running = s.command, 0, True
            s.command = None
            return len(s.taken)
        if offset == DATA and s.at + size <= len(s.taken):
            s.at += size
            return int.from_bytes(s.taken[s.at - size : s.at], "little")
        return (1 << 8 * size) - 1

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        s = self.state
        if offset == DATA:
            self.write_string(region, offset, value.to_bytes(size, "little"))
        elif offset == CONTROL and size == 4:
            if value == HELLO and s.agent is None:
                s.agent = self.who()
                if s.command is not None:
                    self.ring()
            elif value & ~0xFF == ENDED and s.is_running and self._is_agent():
                s.is_running = False
                for listener in self.on_exit:
                    listener(value & 0xFF)

    def write_string(self, region: int, offset: int, data: bytes) -> None:
        """A run of bytes for one register."""
        if offset == DATA and self.state.is_running and self._is_agent():
            for listener in self.on_output:
                listener(data)

    def close(self) -> None:
        self.on_output.clear()
        self.on_exit.clear()
        super().close()
