"""The agent's channel as a virtio console's port: bytes go to the guest's agent, and come from it.

Source: ours, on "Console Device" of Virtual I/O Device (VIRTIO) Version 1.2.  The guest's side is
guests/agent.s; what is said is a matter of agent/.  Linux opens such a port for one process at a
time.

Invariants: the first who opens the port is the agent; when it has been closed nobody is, until the
driver starts anew, so that no other is taken for it; nothing here is secret, and the same bytes
give the same run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from understudy.devices.virtio.console import ConsoleState, VirtioConsole
from understudy.devices.wires import Wires

PORT_NAME: Final = "understudy.agent"


@dataclass
class AgentState(ConsoleState):
    """Whether the agent has been here, too."""

    is_over: bool = False


class VirtioAgent(VirtioConsole, name="virtio_agent"):
    """One port, for one agent."""

    state: AgentState

    def __init__(self, wires: Wires) -> None:
        self.on_bytes: list[Callable[[bytes], None]] = []
        super().__init__(wires, ports=(PORT_NAME,))
        self.on_output.append(self._hear)

    def power_on(self) -> AgentState:
        return self.fresh(AgentState, inputs=[b""], is_open=[False])

    @property
    def is_there(self) -> bool:
        """Whether the guest's side has started."""
        return self.state.is_open[0] and not self.state.is_over

    def tell(self, data: bytes) -> None:
        """Bytes for the agent, which is there."""
        self.send(0, data)

    def opened(self, port: int, *, is_open: bool) -> None:
        self.state.is_over |= self.state.is_open[port] and not is_open
        super().opened(port, is_open=is_open)

    def _hear(self, port: int, data: bytes) -> None:
        if self.is_there:
            for listener in self.on_bytes:
                listener(data)

    def close(self) -> None:
        self.on_bytes.clear()
        super().close()
