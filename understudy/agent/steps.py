"""What is done with an agent, request by request: for those who wait, and for those who do not.

    def exists(path: str) -> Steps[bool]:
        request = Request()
        file = request.call(Call.OPEN, request.text(path), O_PATH)
        return (yield request)[file] >= 0

Source: ours.  Invariant: steps are the same, whoever carries them out.
"""

from collections.abc import Callable, Generator
from typing import Any, TypeAlias, TypeVar

from understudy.agent.calls import Answer, Request
from understudy.agent.channel import Channel

T = TypeVar("T")
Steps: TypeAlias = Generator[Request, Answer, T]
Ask = Callable[[Request], Answer]
"""Run the guest until the agent has answered."""


def carried_out(steps: Steps[T], ask: Ask) -> T:
    """Wait for each answer, and for what comes of them all."""
    try:
        request = next(steps)
        while True:
            try:
                answer = ask(request)
            except BaseException as problem:
                request = steps.throw(problem)
            else:
                request = steps.send(answer)
    except StopIteration as end:
        result: T = end.value
        return result


class Unattended:
    """Steps that go on whenever the guest runs, from when its agent is there.

    failed: told of an error; nothing is done then.
    """

    def __init__(
        self, channel: Channel, steps: Steps[Any], failed: Callable[[Exception], None]
    ) -> None:
        self._channel, self._steps, self._failed = channel, steps, failed
        channel.on_hello = channel.on_answer = None
        if channel.is_there:
            self._begin()
        else:
            channel.on_hello = self._begin

    def _begin(self) -> None:
        self._channel.on_hello, self._channel.on_answer = None, self._go_on
        self._advance(lambda: next(self._steps))

    def _go_on(self) -> None:
        self._advance(lambda: self._steps.send(self._request.read(self._channel.take())))

    def _advance(self, step: Callable[[], Request]) -> None:
        try:
            self._request = step()
            self._channel.send(self._request)
        except StopIteration:
            self._let_go()
        except Exception as problem:
            self._let_go()
            self._failed(problem)

    def _let_go(self) -> None:
        """Hear of the channel no more; the last step may have begun others, which do."""
        if self._channel.on_answer == self._go_on:
            self._channel.on_answer = None
