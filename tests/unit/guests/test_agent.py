"""The agent's host side against a guest side simulated line by line, cut at every place."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.guests.agent import HELLO, LINE, Agent, Event, Exited, Output, Ready, Send


class Guest:
    """What rootfs/agent does, for commands that are known to it."""

    def __init__(self, answers: dict[bytes, tuple[bytes, int]]) -> None:
        self.answers = answers
        self.text = b""
        self.last = b""
        self.received = b""

    def take(self, data: bytes) -> bytes:
        """Bytes from the host; returns what the guest sends."""
        self.received += data
        sent = b""
        while b"\n" in self.received:
            line, _, self.received = self.received.partition(b"\n")
            verb, nonce, *rest = line.split(b" ")
            assert len(line) <= LINE + 64
            self.text = (self.text if nonce == self.last else b"") + b"".join(rest)
            self.last = nonce
            if verb == b"part":
                sent += b"\x1e%s more\n" % nonce
            else:
                output, status = self.answers[base64.b64decode(self.text)]
                self.text = b""
                sent += b"\x1e%s begin\n%s\x1e%s %d\n" % (nonce, output, nonce, status)
        return sent


def converse(agent: Agent, guest: Guest, first: bytes, step: int) -> list[Event]:
    """Let both talk until neither has anything to say; the guest's bytes come `step` at a time."""
    events: list[Event] = []
    waiting = guest.take(first)
    while waiting:
        piece, waiting = waiting[:step], waiting[step:]
        for event in agent.feed(piece):
            events.append(event)
            if isinstance(event, Send):
                waiting += guest.take(event.data)
    return events


def result(events: list[Event]) -> tuple[bytes, int | None]:
    output = b"".join(event.data for event in events if isinstance(event, Output))
    statuses = [event.status for event in events if isinstance(event, Exited)]
    assert len(statuses) <= 1
    return output, statuses[0] if statuses else None


@given(
    st.binary(max_size=300) | st.sampled_from([b"\x1e", b"\x1e" * 70, b"\x1eunderstudy-agent 1\n"]),
    st.integers(0, 255),
    st.integers(1, 80),
    st.integers(0, 5000),
)
def test_output_is_exact(output: bytes, status: int, step: int, length: int) -> None:
    command = b"x" * length
    agent, guest = Agent(ready=True), Guest({command: (output, status)})
    for _ in range(2):
        events = converse(agent, guest, agent.request(command), step)
        assert result(events) == (output, status)
        assert not agent.busy and not agent.buffer


@given(st.integers(1, 40))
def test_a_command_may_be_given_before_the_agent_is_there(step: int) -> None:
    agent, guest = Agent(), Guest({b"true": (b"yes", 0)})
    assert agent.request("true") == b""
    events: list[Event] = []
    waiting = b"\x1eunder boot noise \x1e\x1e" + HELLO
    while waiting:
        piece, waiting = waiting[:step], waiting[step:]
        for event in agent.feed(piece):
            events.append(event)
            if isinstance(event, Send):
                waiting += guest.take(event.data)
    assert events[0] == Ready()
    assert result(events) == (b"yes", 0)


def test_output_comes_as_it_is_written() -> None:
    agent = Agent(ready=True)
    nonce = agent.request("slow").split()[1]
    assert agent.feed(b"\x1e%s begin\nfirst" % nonce) == [Output(b"first")]
    assert agent.feed(b" line\n") == [Output(b" line\n")]
    assert agent.feed(b"\x1e" + nonce[:5]) == []  # may be the end: held back
    assert agent.feed(b"!") == [Output(b"\x1e" + nonce[:5] + b"!")]
    assert agent.feed(b"\x1e%s 7\n" % nonce) == [Exited(7)]


def test_a_command_given_up_does_not_disturb_the_next() -> None:
    agent = Agent(ready=True)
    first = agent.request("hangs").split()[1]
    agent.feed(b"\x1e%s begin\nhalf" % first)
    agent.give_up()
    assert not agent.busy
    second = agent.request("next").split()[1]
    assert first != second
    events = agent.feed(
        b"late\x1e%s 0\nnoise\x1e%s begin\ngood\x1e%s 1\n" % (first, second, second)
    )
    assert events == [Output(b"good"), Exited(1)]


def test_half_sent_command_is_forgotten_by_the_guest() -> None:
    agent, guest = Agent(ready=True), Guest({b"true": (b"", 0)})
    guest.take(agent.request(b"x" * 9999))
    agent.give_up()
    assert result(converse(agent, guest, agent.request(b"true"), 9)) == (b"", 0)


def test_one_command_at_a_time() -> None:
    agent = Agent(ready=True)
    agent.request("one")
    with pytest.raises(RuntimeError, match="busy"):
        agent.request("two")


def test_same_commands_give_same_bytes() -> None:
    assert Agent(ready=True).request("uname") == Agent(ready=True).request("uname")
