"""The way to a guest's agent: requests go, and answers come, in their order.

Source: ours; docs/decisions/0059-*.
Invariants: an answer belongs to the request that was sent before it, whoever still waits for it; of
what an agent says that no agent says, nothing is taken, and it is not asked again; what is under
way goes with the VM's snapshots.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from understudy.agent.calls import Request, Shape
from understudy.devices.agent import Agent
from understudy.devices.board import Board
from understudy.devices.virtio.agent import VirtioAgent
from understudy.state import U64


class Part(Protocol):
    """A device by which the agent may be reached."""

    @property
    def is_there(self) -> bool:
        """Whether the guest's side has started."""


@dataclass
class ChannelState:
    """What has been asked and not been answered yet."""

    heard: bytearray = field(default_factory=bytearray)
    waiting: list[Shape] = field(default_factory=list)
    asked: U64 = 0  # requests so far
    is_broken: bool = False  # the agent has said what no agent says


class Channel:
    """Whichever of a board's two devices the agent has come to."""

    def __init__(self, board: Board) -> None:
        self.state = ChannelState()
        self._wanted, self._answer = 0, b""  # the number of the request that somebody waits for
        self._has_answer = False
        self.on_hello: Callable[[], None] | None = None  # the agent is there
        self.on_answer: Callable[[], None] | None = None  # the last request has its answer
        self._need: int | None = None  # bytes of the answer that comes now
        self._parts: list[tuple[Part, Callable[[bytes], None]]] = []
        for part in board.parts.values():
            if isinstance(part, VirtioAgent):
                self._parts.insert(0, (part, part.tell))
                part.on_bytes.append(self._hear)
                part.on_hello.append(self._hello)
            elif isinstance(part, Agent):
                self._parts.append((part, part.send))
                part.on_output.append(self._hear)
                part.on_hello.append(self._hello)

    @property
    def is_there(self) -> bool:
        """Whether there is an agent that can be asked."""
        return not self.state.is_broken and any(part.is_there for part, _ in self._parts)

    @property
    def is_idle(self) -> bool:
        """Whether all that was asked has been answered."""
        return not self.state.waiting

    @property
    def has_answer(self) -> bool:
        """Whether the answer to the request that was sent last has come, and nobody has it yet."""
        return self._has_answer

    def send(self, request: Request) -> None:
        """Ask the agent, which is there; only the answer to the last request is kept."""
        s, data = self.state, bytes(request)
        s.asked += 1
        s.waiting.append(request.shape)
        self._wanted, self._has_answer, self._answer = s.asked, False, b""
        for part, tell in self._parts:
            if part.is_there:
                tell(data)
                return
        raise RuntimeError("there is no agent")

    def take(self) -> bytes:
        """The answer to the last request."""
        answer, self._answer = self._answer, b""
        self._wanted, self._has_answer = 0, False
        return answer

    def restart(self) -> None:
        """The guest has been reset: nothing is left of what was said."""
        self.state, self._need = ChannelState(), None
        self._wanted, self._has_answer = 0, False

    def load(self, state: ChannelState) -> None:
        """Go on where another was; nobody waits for what that had asked."""
        self.restart()
        self.state = state

    def _hello(self) -> None:
        if self.on_hello is not None:
            self.on_hello()

    def _hear(self, data: bytes) -> None:
        s = self.state
        if s.is_broken or not s.waiting:
            return
        s.heard += data
        while s.waiting and not s.is_broken:
            if self._need is None:
                shape = s.waiting[0]
                if len(s.heard) < shape.head:
                    return
                try:
                    self._need = shape.total(s.heard)
                except ValueError:
                    s.is_broken = True
                    return
            if len(s.heard) < self._need:
                return
            is_wanted = s.asked - len(s.waiting) + 1 == self._wanted
            if is_wanted:
                self._answer, self._has_answer = bytes(s.heard[: self._need]), True
            del s.heard[: self._need]
            s.waiting.pop(0)
            self._need = None
            if is_wanted and self.on_answer is not None:
                self.on_answer()
