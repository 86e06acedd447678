"""The agent's port: bytes go to the guest's agent, and come from it.

Source: ours.  That a hypervisor takes whole buffers by REP OUTSB is VMware's "high-bandwidth"
backdoor; that it knows a process by the root of its page tables is from Jones et al., "Antfarm:
Tracking Processes in a Virtual Machine Environment" (USENIX 2006).

The guest's side is guests/agent.s; what is said is a matter of agent/.  Two registers of 32 bits:

    offset 0  DATA   written: bytes for the host; read: the next bytes for the guest
    offset 4  HELLO  written: "I am here"

Not modeled: an interrupt of its own; `ring` tells the guest that something has been sent.

Invariants: the first process that says that it is here is the agent until the machine is reset, and
no other reaches the registers, so neither another's access nor a second agent is taken for it;
nothing here is secret, and the same bytes give the same run.
"""

from collections.abc import Callable
from dataclasses import dataclass

from understudy.devices import Device
from understudy.devices.wires import Wires
from understudy.machine.bus import ports
from understudy.state import U64

DATA, HELLO = 0, 4


@dataclass
class AgentState:
    """Who the agent is, and what it has not read yet."""

    agent: U64 | None = None  # the root of its page tables, once it is there
    waiting: bytes = b""
    at: U64 = 0  # how much of that it has read


class Agent(Device, name="agent"):
    """One agent.

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
        self.state = self.power_on()

    def power_on(self) -> AgentState:
        return AgentState()

    # --- the host's end ---

    @property
    def is_there(self) -> bool:
        """Whether the guest's side has started."""
        return self.state.agent is not None

    def send(self, data: bytes) -> None:
        """Bytes for the agent, which is there, and one ring for all of them."""
        s = self.state
        s.waiting, s.at = s.waiting[s.at :] + data, 0
        self.ring()

    # --- the guest's end ---

    def _is_agent(self) -> bool:
        return self.state.agent is not None and self.who() == self.state.agent

    def read(self, region: int, offset: int, size: int) -> int:
        return int.from_bytes(self.read_string(region, offset, size), "little")

    def read_string(self, region: int, offset: int, count: int) -> bytes:
        """A run of bytes from one register; ones if there are none."""
        s, taken = self.state, b""
        if offset == DATA and self._is_agent():
            taken = s.waiting[s.at : s.at + count]
            s.at += len(taken)
        return taken + b"\xff" * (count - len(taken))

    def write(self, region: int, offset: int, value: int, size: int) -> None:
        s = self.state
        if offset == DATA:
            self.write_string(region, offset, value.to_bytes(size, "little"))
        elif offset == HELLO and size == 4 and s.agent is None:
            s.agent = self.who()

    def write_string(self, region: int, offset: int, data: bytes) -> None:
        """A run of bytes for one register."""
        if offset == DATA and self._is_agent():
            for listener in self.on_output:
                listener(data)

    def close(self) -> None:
        self.on_output.clear()
        super().close()
