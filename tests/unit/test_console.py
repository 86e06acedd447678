"""A guest and its user, with a machine that only waits: what is typed, wished for, and shown."""

import os
import pty
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from understudy.commands import Refusal, console
from understudy.commands.console import DONE_NS, SETTLE_NS
from understudy.commands.progress import StatusLine
from understudy.linux import VM
from understudy.terminal import Input, Output
from understudy.verdict import Stop, StopKind


class Waiting:
    """A VM whose guest does nothing; what other threads post is done while it `go`es."""

    def __init__(self) -> None:
        self.console, self.clock = self, self
        self.on_output: list[Callable[[bytes], None]] = []
        self.typed = b""
        self.console_text = "Linux version 6\n"
        self.instructions = 0
        self.time_passes = True
        self.ns = 1_500_000_000
        self.due: list[Callable[[], None]] = []
        self._posts: list[Callable[[], None]] = []
        self._changed = threading.Condition()
        self._stop: Stop | None = None

    def now(self) -> int:
        return self.ns

    def receive(self, data: bytes) -> None:
        self.typed += data
        for listener in self.on_output:
            listener(data)
        if self.typed.endswith(b"off\n"):
            self._stop = Stop(StopKind.POWEROFF)

    def counts(self) -> dict[str, Any]:
        return {"instructions": 1234567, "exits": {"HLT": 5, "CPUID": 70}}

    def state_in_words(self, _stop: Stop) -> str:
        return "RIP=0xDEAD"

    def at(self, _ns: int, callback: Callable[[], None]) -> None:
        self.due.append(callback)
        if self.time_passes:
            self.post(callback)

    def post(self, action: Callable[[], None]) -> None:
        with self._changed:
            self._posts.append(action)
            self._changed.notify()

    def stop(self, reason: str) -> None:
        self._stop = Stop(StopKind.STOPPED, reason)

    def go(self, *, wall_seconds: float | None = None) -> Stop:
        while self._stop is None:
            with self._changed:
                if not self._posts and not self._changed.wait(wall_seconds):
                    return Stop(StopKind.WALL)
                posts, self._posts = self._posts, []
            for action in posts:
                action()
        stop, self._stop = self._stop, None
        return stop


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe: what is written to the second comes out of the first."""
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def _session(
    typed: list[bytes], out: int, *, interactive: bool, timeout_s: float | None = 30.0
) -> tuple[Stop | None, Waiting]:
    """Type one chunk after the other into a session; how it ended, and the machine."""
    vm = Waiting()
    session = console._Session(cast(VM, vm), StatusLine("test"), timeout_s, interactive)
    outer, inner = pty.openpty() if interactive else os.pipe()[::-1]
    if interactive:
        import tty

        tty.setraw(inner)
    with Input(inner, session.arrived) as keyboard:
        session.listen(keyboard)
        for chunk in typed:
            os.write(outer, chunk)
        if not interactive:
            os.close(outer)  # the end of input is not the end of the guest
        ended = session.run(Output(out))
    os.close(inner)
    if interactive:
        os.close(outer)
    return ended, vm


def test_what_is_typed_arrives_and_what_is_printed_is_shown(pipe: tuple[int, int]) -> None:
    ended, vm = _session([b"ls\n", b"poweroff\n"], pipe[1], interactive=True)
    assert ended == Stop(StopKind.POWEROFF)
    assert vm.typed == os.read(pipe[0], 100) == b"ls\npoweroff\n"


def test_the_user_quits(pipe: tuple[int, int]) -> None:
    ended, vm = _session([b"a\x1dqb"], pipe[1], interactive=True)
    assert ended is None
    assert vm.typed.startswith(b"a")


def test_wishes_are_answered_on_standard_error(
    pipe: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    _session([b"\x1dh\x1dcoff\n"], pipe[1], interactive=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Ctrl-] q   end the guest now" in err
    assert "guest time 1.50 s, 1,234,567 instructions, 75 exits" in err
    assert err.index("CPUID") < err.index("HLT")


def test_in_a_pipe_the_escape_key_is_a_byte_like_any_other(pipe: tuple[int, int]) -> None:
    ended, vm = _session([b"\x1dq poweroff\n"], pipe[1], interactive=False)
    assert ended == Stop(StopKind.POWEROFF)
    assert vm.typed == b"\x1dq poweroff\n"


def test_what_is_piped_in_waits_for_a_prompt() -> None:
    """A kernel that starts its serial driver would lose it."""
    vm = Waiting()
    vm.time_passes, vm.ns = False, 0
    session = console._Session(cast(VM, vm), StatusLine("test"), 30.0, interactive=False)
    session.type_later(b"power")
    shown: list[bytes] = []

    def boot() -> None:
        vm.on_output[0](b"[ 0.1] a kernel: ")
        vm.on_output[0](b"5\n")
        vm.due.pop()()  # it looked like a prompt for a moment
        assert vm.typed == b""
        vm.on_output[0](b"login: ")
        vm.ns += 1_000_000
        vm.on_output[0](b"root\nunderstudy# ")
        vm.ns = SETTLE_NS
        vm.due.pop()()  # not silent for long enough
        assert vm.typed == b""
        vm.ns += 1_000_000
        vm.due.pop()()
        session.type_later(b"off\n")

    vm.post(boot)
    ended = session.run(cast(Output, _Recorder(shown)))
    assert ended == Stop(StopKind.POWEROFF)
    assert vm.typed == b"poweroff\n"


def _at_a_prompt(
    pipe: tuple[int, int], typed: list[bytes], *, stays: bool = False
) -> tuple[Stop | None, console._Session, bytes]:
    """A guest that shows its prompt at once, and again after each line that is typed."""
    vm = Waiting()
    answered = vm.receive

    def receive(data: bytes) -> None:
        answered(data)
        vm.ns += DONE_NS
        for listener in vm.on_output:
            listener(b"result\n# ")
        vm.ns += DONE_NS

    vm.receive = receive  # type: ignore[method-assign]
    session = console._Session(
        cast(VM, vm), StatusLine("test"), 0.5, interactive=False, stays=stays
    )

    def shows_a_prompt() -> None:
        for listener in vm.on_output:
            listener(b"# ")
        vm.ns += DONE_NS

    vm.post(shows_a_prompt)
    inner, outer = os.pipe()
    with Input(inner, session.arrived) as keyboard:
        session.listen(keyboard)
        for chunk in typed:
            os.write(outer, chunk)
        os.close(outer)
        try:
            ended = session.run(Output(pipe[1]))
        finally:
            os.close(inner)
    return ended, session, vm.typed


@pytest.mark.parametrize("typed", [[b"uname\n"], []])
def test_when_the_input_is_over_and_the_guest_at_its_prompt_the_run_ends(
    pipe: tuple[int, int], typed: list[bytes]
) -> None:
    ended, session, got = _at_a_prompt(pipe, typed)
    assert ended is None and session.is_done
    assert got == b"".join(typed)


def test_a_run_that_others_reach_by_a_socket_stays(pipe: tuple[int, int]) -> None:
    with pytest.raises(Refusal, match="the time that --timeout gave is over"):
        _at_a_prompt(pipe, [b"uname\n"], stays=True)


def test_a_guest_that_prints_nothing_gets_a_hint(
    capsys: pytest.CaptureFixture[str], pipe: tuple[int, int]
) -> None:
    vm = Waiting()
    vm.console_text = ""
    with pytest.raises(Refusal, match="console=ttyS0"):
        console._status(cast(VM, vm), Stop(StopKind.RESET))
    assert console._status(cast(VM, vm), Stop(StopKind.POWEROFF)) == 0
    assert "console=ttyS0" in capsys.readouterr().err
    session = console._Session(cast(VM, vm), StatusLine("test"), 0.05, interactive=True)
    with pytest.raises(Refusal, match=r"still running; the guest printed nothing.*console=ttyS0"):
        session.run(Output(pipe[1]))


def test_the_reason_of_a_panic_is_told_first() -> None:
    vm = Waiting()
    vm.console_text = "[ 1.0] Kernel panic - not syncing: no init\n[ 1.1] more\n"
    with pytest.raises(Refusal, match=r"^the guest ended: Kernel panic - not syncing: no init; it"):
        console._status(cast(VM, vm), Stop(StopKind.RESET))


class _Recorder:
    """In place of the screen."""

    wrote = True

    def __init__(self, shown: list[bytes]) -> None:
        self.shown = shown

    def __call__(self, data: bytes) -> None:
        self.shown.append(data)


def test_the_end_of_input_is_not_the_end_of_the_guest(pipe: tuple[int, int]) -> None:
    with pytest.raises(Refusal, match="the time that --timeout gave is over"):
        _session([b"x"], pipe[1], interactive=False, timeout_s=0.1)


@pytest.mark.parametrize(
    ("stop", "status"), [(Stop(StopKind.POWEROFF), 0), (Stop(StopKind.DEBUG_EXIT, "code 7", 7), 7)]
)
def test_a_guest_that_ends_by_itself(stop: Stop, status: int) -> None:
    assert console._status(cast(VM, Waiting()), stop) == status


@pytest.mark.parametrize(
    "kind", [StopKind.RESET, StopKind.TRIPLE_FAULT, StopKind.STUCK, StopKind.ERROR]
)
def test_a_guest_that_dies_is_one_line_and_its_state(kind: StopKind) -> None:
    with pytest.raises(Refusal, match=r"^the guest ended: .+: what happened$") as caught:
        console._status(cast(VM, Waiting()), Stop(kind, "what happened\nrip 0"))
    assert caught.value.status == 1
    assert caught.value.detail == "RIP=0xDEAD"
