"""Requests as the agent takes them, and answers as a guest may give them."""

import struct

import pytest

from understudy.agent.calls import CALLS_GVA, RECORD, Answer, Call, Request
from understudy.agent.files import ENTRY, _entries
from understudy.agent.result import LinuxError
from understudy.guests.agent_program import REQUEST_BYTES, SCRATCH_GVA


def test_an_argument_may_be_the_result_of_a_call_before() -> None:
    request = Request()
    file = request.call(Call.OPEN, request.text("/x"), 0)
    pipe = request.words(-1, -1)
    request.call(Call.DUP2, pipe.word(1), file)
    request.answer(request.call(Call.READ, file, SCRATCH_GVA, 7), 7)
    blob = bytes(request)
    assert int.from_bytes(blob[:4], "little") == len(blob) - 4
    calls, head, spans, _ = struct.unpack_from("<4I", blob, 4)
    base = CALLS_GVA + 3 * RECORD.size + 8
    assert (calls, head, spans) == (3, 3 * RECORD.size + 8 + 8, 1)
    records = [RECORD.unpack_from(blob, 20 + RECORD.size * n) for n in range(3)]
    assert records[0][:3] == (Call.OPEN, 0, base + 8)
    assert records[1][:4] == (Call.DUP2, 0b11, base + 4, CALLS_GVA)
    assert records[2][:3] == (Call.READ, 1, CALLS_GVA)
    assert struct.unpack_from("<II", blob, 20 + 3 * RECORD.size) == (
        SCRATCH_GVA, CALLS_GVA + 2 * RECORD.size,
    )  # fmt: skip
    assert blob.endswith(b"/x\0\0")


def test_a_child_has_its_own_part_of_the_list() -> None:
    request = Request()
    forked = request.fork([(Call.SETSID,), (Call.EXIT, 0)])
    request.call(Call.WAIT4, forked, 0, 0, 0)
    numbers = [RECORD.unpack_from(bytes(request), 20 + RECORD.size * n)[:3] for n in range(4)]
    assert numbers == [(2, 0, 2), (66, 0, 0), (1, 0, 0), (114, 1, CALLS_GVA)]


def test_the_answer_has_what_calls_gave_and_filled() -> None:
    request = Request()
    kept = request.words(1, 2)
    read = request.call(Call.READ, 3, SCRATCH_GVA, 9)
    none = request.call(Call.READ, 4, SCRATCH_GVA, 9)
    request.answer(read, 9)
    request.answer(none, 9)
    head = RECORD.pack(3, 0, *[0] * 6) + RECORD.pack(-11, 0, *[0] * 6) + bytes(16)
    data = head + struct.pack("<ii", 7, -8) + b"abc"
    assert request.shape.total(data) == len(data)
    answer: Answer = request.read(data)
    assert (answer[read], answer.spans, answer.words(kept, 2)) == (3, [b"abc", b""], (7, -8))
    with pytest.raises(BlockingIOError):
        answer.checked(none, "it")
    with pytest.raises(ValueError, match="the agent has read 10 bytes, where 9 were asked for"):
        request.shape.total(RECORD.pack(10, 0, *[0] * 6) + data[32:])


def test_what_no_request_can_be() -> None:
    with pytest.raises(ValueError, match="has a zero in it"):
        Request().text("a\0b")
    request = Request()
    request.data(bytes(REQUEST_BYTES))
    with pytest.raises(ValueError, match="a request of"):
        bytes(request)


@pytest.mark.parametrize("name", [b"a/b", b"/etc", b"", b"../x"])
def test_names_that_lead_out_of_a_folder_are_refused(name: bytes) -> None:
    raw = ENTRY.pack(1, 0, ENTRY.size + len(name) + 1, 8) + name + b"\0"
    with pytest.raises(LinuxError, match="names that cannot be"):
        list(_entries(raw))


def test_a_folder_that_is_cut_off_is_refused() -> None:
    good = ENTRY.pack(1, 0, ENTRY.size + 5, 8) + b"name\0"
    assert list(_entries(good * 2)) == ["name", "name"]
    for bad in (good + b"x", ENTRY.pack(1, 0, 0, 8) + b"name\0"):
        with pytest.raises(LinuxError, match="names that cannot be"):
            list(_entries(bad))
