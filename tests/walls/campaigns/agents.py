"""The agent's protocol from a hostile guest: only the agent is heard, whatever it says."""

import json
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

from tests.walls.campaigns import Round, part
from understudy.agent.calls import Call, Request
from understudy.agent.channel import Channel
from understudy.clock import ManualClock
from understudy.devices.agent import DATA, HELLO, Agent
from understudy.devices.board import Board
from understudy.devices.pc import AGENT_PORT
from understudy.devices.wires import Wires
from understudy.guests.entry import protected_mode
from understudy.verdict import StopKind
from understudy.vm import VM

AGENT, OTHERS = 0x1000, (0x2000, 0x1001, 0)
ENDS = (
    StopKind.BUDGET, StopKind.DEADLINE, StopKind.TRIPLE_FAULT, StopKind.DEBUG_EXIT, StopKind.RESET,
    StopKind.POWEROFF, StopKind.STUCK,
)  # fmt: skip
"""What a guest may come to that jumps into the middle of its instructions."""
CODE, DATA_GPA = 0x1000, 0x8000


@part(rounds=300)
def agents() -> Iterator[Round]:
    """Random accesses, against a model of what may come out."""

    def one(chance: random.Random) -> None:
        process, said = AGENT, bytearray()

        def made() -> Agent:
            agent = Agent(Wires(ManualClock()), who=lambda: process)
            agent.on_output.append(lambda data: said.extend(data))
            return agent

        agent, known, sent, expected = made(), False, b"", b""
        for _ in range(chance.randrange(60)):
            process = AGENT if chance.random() < 0.5 else chance.choice(OTHERS)
            is_agent = known and process == AGENT
            match chance.randrange(6):
                case 0:
                    data = chance.randbytes(chance.randrange(9))
                    agent.send(data)
                    sent += data
                case 1 if known or process == AGENT:  # the first is, as in init
                    agent.write(0, HELLO, chance.randrange(1 << 32), 4)
                    known = True
                case 2:
                    count = chance.randrange(9)
                    due = sent[:count] if is_agent else b""
                    assert agent.read_string(0, DATA, count) == due.ljust(count, b"\xff")
                    sent = sent[len(due) :]
                case 3:
                    data = chance.randbytes(chance.randrange(1, 9))
                    agent.write_string(0, HELLO, data)
                    agent.write_string(0, DATA, data)
                    expected += data if is_agent else b""
                case 4:
                    kept = json.loads(json.dumps(agent.save()))
                    agent = made()
                    agent.load(kept)
                case 5:
                    assert 0 <= agent.read(0, HELLO, chance.choice((1, 2, 4))) < 1 << 32
            assert said == expected

    yield one


@part(rounds=300)
def agent_answers() -> Iterator[Round]:
    """Answers of any bytes, in any pieces, to requests with and without spans."""

    def one(chance: random.Random) -> None:
        board = SimpleNamespace(parts={"agent": Agent(Wires(ManualClock()))})
        agent, channel = board.parts["agent"], Channel(cast(Board, board))
        agent.write(0, HELLO, 0, 4)
        for _ in range(chance.randrange(1, 20)):
            request = Request()
            for _ in range(chance.randrange(1, 4)):
                read = request.call(Call.READ, 3, 0, 100)
                if chance.random() < 0.5:
                    request.answer(read, chance.randrange(200))
            if not channel.is_there:
                return
            channel.send(request)
            for _ in range(chance.randrange(9)):
                size = chance.choice((4, 40, 32 * 3, 500))
                data = chance.choice((chance.randbytes(size), bytes(size), b"\x05\0\0\0" * size))
                agent.write_string(0, DATA, data)
            if channel.has_answer:
                answer = request.read(channel.take())
                most = [most for _, most in request.shape.spans]
                assert all(len(s) <= m for s, m in zip(answer.spans, most, strict=True))
            assert len(channel.state.heard) <= 9 * 2000

    yield one


@part(rounds=40)
def agent_ports() -> Iterator[Round]:
    """Random programs at its ports, with every kind of port instruction and any registers."""
    with VM("2M") as vm:

        def one(chance: random.Random) -> None:
            vm.pc.agent.reset()
            vm.pc.agent.send(chance.randbytes(chance.randrange(5000)))
            code = b""
            for _ in range(chance.randrange(1, 30)):
                code += b"\xba" + _word(chance, AGENT_PORT + chance.randrange(8))
                code += b"\xb8" + _word(chance, chance.choice((0, 0x100, 0x1FF, 0x12345678)))
                code += b"\xb9" + _word(chance, chance.choice((0, 1, 7, 0x1000, 0x20000)))
                code += b"\xbe" + _word(chance, DATA_GPA) + b"\xbf" + _word(chance, DATA_GPA)
                code += chance.choice((b"\xfc", b"\xfd"))
                code += chance.choice((b"", b"\xf3", b"\x66", b"\xf3\x67", b"\xf3\x66"))
                code += chance.choice((b"\x6c", b"\x6d", b"\x6e", b"\x6f", b"\xec", b"\xed",
                                       b"\xee", b"\xef", b"\x6e", b"\x6e"))  # fmt: skip
            vm.memory.write(CODE, code + b"\xeb\xfe")
            vm.enter(protected_mode("walls", CODE))
            stop = vm.go(budget=5000, deadline_ns=vm.clock.now() + 3_000_000)
            assert stop.kind in ENDS, stop

        yield one


def _word(chance: random.Random, usual: int) -> bytes:
    """Mostly as usual, sometimes anything."""
    return (usual if chance.random() < 0.9 else chance.randrange(1 << 32)).to_bytes(4, "little")
