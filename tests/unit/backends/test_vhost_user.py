"""vhost-user's front end before a program that does what it should, and ones that do not."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.backends.vhost_program import CALL, ENABLE, FEATURES, KICK, MEMORY, Program, Ring
from understudy.backends.vhost_user import VhostError, VhostUser

LONGEST = 5000, 9000
SOON_S = 0.05  # the patience with who never answers


@contextmanager
def talking(patience_s: float = 60.0, **program: Any) -> Iterator[tuple[VhostUser, Program]]:
    """The two ends, which have agreed."""
    other = Program(**program)
    try:
        vhost = VhostUser(other.ours, queues=2, longest=LONGEST, patience_s=patience_s)
        try:
            yield vhost, other
        finally:
            vhost.close()
    finally:
        other.close()


def test_requests_of_all_sizes_on_both_queues() -> None:
    with talking(answer=lambda request, room: request[::-1][:room]) as (vhost, other):
        for size in (1, 40, 4096, LONGEST[0]):
            for queue in (0, 1):
                request = os.urandom(size)
                assert vhost.ask(queue, request, LONGEST[1]) == request[::-1]
                assert vhost.ask(queue, request, 3) == request[::-1][:3]
                assert vhost.ask(queue, request, 0) == b""
        assert [ring.base for ring in other.rings.values()] == [12, 12]
        assert not vhost.problem


def test_indices_begin_again_after_2_to_the_16() -> None:
    with talking() as (vhost, other):
        for number in range((1 << 16) + 3):
            request = number.to_bytes(4, "little")
            assert vhost.ask(1, request, 4) == request
        assert other.rings[1].base == 3


def test_what_is_said_and_in_which_order() -> None:
    """Memory before rings, a ring's places before its kick; all is confirmed that can be."""
    with talking() as (_, other):
        kinds = [kind for kind, _ in other.heard]
        assert kinds[:6] == [1, 3, 15, 16, 2, MEMORY]
        assert kinds[6:] == [8, 10, 9, CALL, KICK, ENABLE] * 2
        assert [wants for _, wants in other.heard] == [0, 0, 0, 0] + [1] * 14
        assert other.bytes >= sum(LONGEST) + 2 * 4096


def test_a_program_that_confirms_nothing() -> None:
    with talking(numbers={15: 0}) as (vhost, other):
        assert vhost.ask(1, b"x", 1) == b"x"
        assert not any(wants for _, wants in other.heard)


def test_the_memory_keeps_its_size_whoever_has_it() -> None:
    with talking() as (_, other):
        seals = fcntl.fcntl(other.fds[0], fcntl.F_GET_SEALS)
        assert seals & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL) == seals
        for size in (0, 4096, other.bytes * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(other.fds[0], size)


# --- programs that do not agree ---


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ({"numbers": {1: FEATURES & ~(1 << 30)}}, "it has the features 0x100000000 and not all"),
        ({"numbers": {1: 0}}, "it has the features 0x0"),
        ({"numbers": {MEMORY: 1}}, r"it refused SET_MEM_TABLE \(0x1\)"),
        ({"numbers": {9: 0xFFFF_FFFF_FFFF_FFFF}}, "it refused SET_VRING_ADDR"),
        ({"message": lambda kind, reply: reply[:4] + b"\1" + reply[5:]}, "its answer to GET_FEAT"),
        ({"message": lambda kind, reply: b"\x02" + reply[1:]}, "is one of 8 bytes to 2"),
        ({"message": lambda kind, reply: reply[:8] + b"\xff" * 4}, "4294967295 bytes to 1"),
        ({"ends_at": 1}, "it has ended"),
        ({"ends_at": MEMORY}, "it has ended"),
        ({"ends_at": ENABLE}, "it has ended"),
    ],
)
def test_no_agreement_is_told(program: dict[str, Any], words: str) -> None:
    with pytest.raises(VhostError, match=words), talking(**program):
        pass


@pytest.mark.parametrize("count", [0, 11, 19])
def test_an_answer_that_does_not_come_whole(count: int) -> None:
    with (
        pytest.raises(VhostError, match=r"it did not answer within 0\.05 s"),
        talking(SOON_S, message=lambda kind, reply: reply[:count]),
    ):
        pass


# --- programs that fail afterwards ---


def _says_too_much(program: Program, ring: Ring, answer: bytes, head: int) -> None:
    program.give_back(ring, head, len(answer) + 1)


def _gives_what_is_not_there(program: Program, ring: Ring, answer: bytes, head: int) -> None:
    program.give_back(ring, 7, len(answer))


def _gives_too_many(program: Program, ring: Ring, answer: bytes, head: int) -> None:
    program.give_back(ring, head, len(answer), count=0x8000)


def _calls_for_nothing(program: Program, ring: Ring, answer: bytes, head: int) -> None:
    os.eventfd_write(ring.call, 1)


def _talks(program: Program, ring: Ring, answer: bytes, head: int) -> None:
    program.theirs.sendall(b"what nobody has asked")


def _ends(program: Program, ring: Ring, answer: bytes, head: int) -> None:
    os.eventfd_write(program.quit, 1)


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (_says_too_much, "it gave back buffer 0 with 5 bytes, of 4"),
        (_gives_what_is_not_there, "it gave back buffer 7"),
        (_gives_too_many, "it has used 32768 buffers, and 1 were there"),
        (_calls_for_nothing, "it did not answer within"),
        (lambda *_: None, "it did not answer within"),
        (_talks, "it has ended"),
        (_ends, "it has ended"),
    ],
)
def test_a_program_that_fails_is_waited_for_once(give: Any, words: str) -> None:
    asked: list[bytes] = []

    def answer(request: bytes, room: int) -> bytes:
        asked.append(request)
        return request

    is_late = "did not answer" in words
    with talking(SOON_S if is_late else 60.0, give=give, answer=answer) as (vhost, _):
        for _ in range(3):
            with pytest.raises(VhostError, match=words):
                vhost.ask(1, b"abcd", 4)
        assert asked == [b"abcd"], "the second one asks nobody"
        assert vhost.problem


def test_a_call_too_many_is_no_answer() -> None:
    """A program may call when there is nothing; what it was asked comes all the same."""

    def give(program: Program, ring: Ring, answer: bytes, head: int) -> None:
        os.eventfd_write(ring.call, 5)
        program.give_back(ring, head, len(answer))
        os.eventfd_write(ring.call, 3)

    with talking(give=give) as (vhost, _):
        for number in range(100):
            assert vhost.ask(number % 2, bytes([number]), 1) == bytes([number])


def test_nothing_is_left_open() -> None:
    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    with talking() as (vhost, _):
        vhost.ask(0, b"x", 1)
        vhost.close()
        with pytest.raises(VhostError, match="closed"):
            vhost.ask(0, b"x", 1)
    with pytest.raises(VhostError), talking(ends_at=MEMORY):
        pass
    assert count() == before
