"""A cable to passt: it is there, says why it is not, carries frames, and ends with the cable."""

import os
import shutil
import socket
import time
from contextlib import closing
from pathlib import Path

import pytest

from understudy.backends import passt
from understudy.backends.cable import MOST_FRAMES, NetworkError
from understudy.backends.frame import Frame
from understudy.backends.passt import Passt
from understudy.nic import Nic, Port

USER = Nic("user")
QUESTION = passt.QUESTION.replace(passt.ASKING, bytes.fromhex("525400000009"))  # a guest's own
needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="no passt here")


def _is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _next(cable: Passt) -> Frame:
    ends = time.monotonic() + 10
    while (frame := cable.take()) is None:
        assert time.monotonic() < ends, "no answer"
        time.sleep(0.01)
    return frame


@needs_passt
def test_frames_both_ways_and_passt_ends_with_the_cable() -> None:
    with closing(Passt(USER, ())) as cable:
        pid = cable.pid
        assert _is_there(pid) and cable.take() is None, "the first answer was not for the card"
        assert cable.send(Frame(QUESTION))
        answer = _next(cable)
        assert answer.data[12:14] == b"\x08\x06" and answer.source.hex(":") == passt.GATEWAY_MAC
    assert not _is_there(pid) and not any(thread.is_alive() for thread in cable._threads)


@needs_passt
def test_what_no_protocol_has_and_a_passt_that_dies_end_the_cable_alone() -> None:
    with closing(Passt(USER, ())) as cable:
        told: list[bool] = []
        cable.notify = lambda: told.append(cable.is_gone)
        os.kill(cable.pid, 9)
        for thread in cable._threads:
            thread.join(10)
        assert told == [True] and cable.send(Frame(QUESTION)) and cable.take() is None
    assert not cable._cut(bytearray(b"\xff" * 8)), "a length that no frame has"


@needs_passt
def test_passt_has_to_wait_for_the_card() -> None:
    """What its socket has no room for meanwhile passt itself may lose; the cable loses nothing."""
    with closing(Passt(USER, ())) as cable:
        for _ in range(3 * MOST_FRAMES):
            while not cable.send(Frame(QUESTION)):
                time.sleep(0.01)
        for _ in range(MOST_FRAMES):
            _next(cable)
        assert cable.send(Frame(QUESTION)), "it goes on"
        _next(cable)
        assert cable.lost == 0


@needs_passt
def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = Port(taken.getsockname()[1], 80)
        with pytest.raises(
            NetworkError, match=f"publish 127.0.0.1:{port.host}: the port is in use"
        ):
            Passt(USER, [port])


def test_without_passt_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NetworkError, match=r"apt-get install passt.*lan=NAME") as error:
        Passt(USER, ())
    assert "\n" not in str(error.value)


def test_a_passt_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "passt"
    program.write_text("#!/bin/sh\necho No route >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(NetworkError, match="passt did not start: No route"):
        Passt(USER, ())


def test_the_hosts_loopback_is_out_of_reach_unless_asked_for() -> None:
    assert "--no-map-gw" in passt._options(USER, (), 3)
    assert "--no-map-gw" not in passt._options(Nic("user", has_host_loopback=True), (), 3)
    ports = (Port(8080, 80), Port(53, 5353, "0.0.0.0", is_udp=True))
    assert passt._options(USER, ports, 3)[-4:] == [
        "-t",
        "127.0.0.1/8080:80",
        "-u",
        "0.0.0.0/53:5353",
    ]
