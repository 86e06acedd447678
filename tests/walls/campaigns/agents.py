"""The agent's protocol from a hostile guest: only the agent says what came out and how it ended."""

import json
import random
from collections.abc import Iterator

from tests.walls.campaigns import Round, part
from understudy.clock import ManualClock
from understudy.devices.agent import CONTROL, DATA, ENDED, HELLO, NOTHING, Agent
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
        process, said = AGENT, list[object]()

        def made() -> Agent:
            agent = Agent(Wires(ManualClock()), who=lambda: process)
            agent.on_output.append(lambda data: said.append(data))
            agent.on_exit.append(lambda status: said.append(status))
            return agent

        agent, known, command, runs = made(), False, None, False
        expected: list[object] = []
        for _ in range(chance.randrange(60)):
            process = AGENT if chance.random() < 0.5 else chance.choice(OTHERS)
            is_agent = known and process == AGENT
            match chance.randrange(8):
                case 0:
                    if command is None and not runs:
                        command = chance.randbytes(chance.randrange(9))
                        agent.request(command)
                case 1:
                    agent.give_up()
                    command, runs = None, False
                case 2 if process == AGENT:  # the first is, as in init
                    agent.write(0, CONTROL, HELLO, 4)
                    known = True
                case 2 if known:
                    agent.write(0, CONTROL, HELLO, 4)
                case 3:
                    length = agent.read(0, CONTROL, 4)
                    assert length == (len(command) if is_agent and command is not None else NOTHING)
                    if length != NOTHING:
                        command, runs = None, True
                case 4:
                    data = chance.randbytes(chance.randrange(1, 9))
                    agent.write_string(0, chance.choice((DATA, DATA, CONTROL)), b"")
                    agent.write_string(0, DATA, data)
                    expected += [data] * (is_agent and runs)
                case 5:
                    value = chance.choice((ENDED, ENDED + 7, 0x200, 0xFFFF_FFFF, 5))
                    agent.write(0, CONTROL, value, 4)
                    if is_agent and runs and value & ~0xFF == ENDED:
                        runs = False
                        expected.append(value & 0xFF)
                case 6:
                    kept = json.loads(json.dumps(agent.save()))
                    agent = made()
                    agent.load(kept)
                case 7:
                    offset, size = chance.randrange(8), chance.choice((1, 2, 4))
                    if (offset, size) != (CONTROL, 4):
                        assert 0 <= agent.read(0, offset, size) < 1 << 8 * size
            said[:] = [item for item in said if item != b""]
            assert said == expected

    yield one


@part(rounds=40)
def agent_ports() -> Iterator[Round]:
    """Random programs at its ports, with every kind of port instruction and any registers."""
    with VM("2M") as vm:

        def one(chance: random.Random) -> None:
            vm.pc.agent.reset()
            vm.pc.agent.request(chance.randbytes(chance.randrange(5000)))
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
            vm.pc.agent.give_up()

        yield one


def _word(chance: random.Random, usual: int) -> bytes:
    """Mostly as usual, sometimes anything."""
    return (usual if chance.random() < 0.9 else chance.randrange(1 << 32)).to_bytes(4, "little")
