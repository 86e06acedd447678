"""A command of a guest that somebody else runs: it starts when the agent is there.

Source: ours.
"""

from collections.abc import Callable

from understudy.agent import command
from understudy.agent.calls import Answer, Request
from understudy.agent.command import Wanted
from understudy.agent.running import Command
from understudy.agent.setup import settle
from understudy.agent.steps import Steps


def whole(raw: bytes, heard: Callable[[bytes], None], ended: Callable[[int], None]) -> Steps[None]:
    """The steps of a command from its start to its end; `ended` is told its status."""
    environment = yield from settle()
    job = yield from command.start(Wanted(raw, environment))
    running = Command(job, _nobody, _nobody, lambda is_gone: None)
    while not running.is_over:
        for chunk in (yield from running.listening()):
            heard(chunk.data)
    assert running.status is not None
    ended(running.status)


def _nobody(_request: Request) -> Answer:
    raise RuntimeError("nobody waits for this command")
