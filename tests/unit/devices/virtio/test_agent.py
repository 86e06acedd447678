"""The agent's channel over a virtio console: whoever opened it first, and nobody after."""

import json
from typing import Any

from tests.unit.devices.virtio.driver import VERSION_1, Driver
from tests.unit.devices.virtio.test_console import (
    MULTIPORT,
    NAME,
    OPEN,
    PORT_READY,
    filled,
    give,
    tell,
)


def channel() -> tuple[Driver, Any, list[bytes]]:
    d = Driver("virtio_agent")
    d.start(VERSION_1 | MULTIPORT)
    part: Any = d.device
    said: list[bytes] = []
    part.on_bytes.append(said.append)
    return d, part, said


def test_it_introduces_itself_by_its_name() -> None:
    d, _, _ = channel()
    for n in range(2):
        give(d, 2, n, 64)
    tell(d, 0, PORT_READY)
    assert filled(d, 2)[0] == bytes([0, 0, 0, 0, NAME, 0, 1, 0]) + b"understudy.agent"


def test_bytes_go_both_ways_once_it_is_open() -> None:
    d, part, said = channel()
    d.request(1, b"early", 0)
    assert (said, part.is_there) == ([], False)
    tell(d, 0, OPEN)
    part.tell(b"ask")
    give(d, 0, 0, 64)
    d.request(1, b"answer", 0)
    assert (filled(d, 0), said, part.is_there) == ([b"ask"], [b"answer"], True)


def test_who_opens_it_after_it_was_closed_is_not_the_agent() -> None:
    d, part, said = channel()
    tell(d, 0, OPEN)
    tell(d, 0, OPEN, 0)
    tell(d, 0, OPEN)
    d.request(1, b"forged", 0)
    assert (said, part.is_there) == ([], False)
    saved = json.loads(json.dumps(part.save()))
    part.reset()
    assert not part.state.is_over  # the next boot has an agent of its own
    part.load(saved)
    assert part.state.is_over
