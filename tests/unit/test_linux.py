"""Waiting, typing and running commands, on a machine that plays a script instead of code."""

import base64
import re
from collections.abc import Callable, Iterator

import pytest

from understudy import VM, GuestStopped, GuestTimeout, LinuxError
from understudy.guests.agent import HELLO, MARK
from understudy.linux import CONSOLE_KEPT_BYTES, stop_in_words
from understudy.verdict import Stop, StopKind

Step = Callable[["Scripted"], None] | Stop


class _Clock:
    def __init__(self) -> None:
        self.ns = 0

    def now(self) -> int:
        return self.ns


class _Port:
    """A serial port: what the host sends is kept, what the guest prints is passed on."""

    def __init__(self) -> None:
        self.on_output: list[Callable[[bytes], None]] = []
        self.sent = b""

    def send(self, data: bytes) -> None:
        self.sent += data

    def print(self, data: bytes) -> None:
        for hook in self.on_output:
            hook(data)


class Scripted(VM):
    """`go` takes one step of the script and a second of guest time."""

    def __init__(self, *steps: Step) -> None:
        self.clock = _Clock()  # type: ignore[assignment]
        self.console, self.agent_port = _Port(), _Port()  # type: ignore[assignment]
        self.steps: Iterator[Step] = iter(steps)
        self.closed = False
        self.listen()

    def go(  # type: ignore[override]
        self,
        *,
        budget: int | None = None,
        until: Callable[[], bool] | None = None,
        deadline_ns: int | None = None,
        wall_seconds: float | None = None,
    ) -> Stop:
        step = next(self.steps, None)
        self.clock.ns += 1_000_000_000  # type: ignore[attr-defined]
        if isinstance(step, Stop):
            return step
        if step is not None:
            step(self)
        if until is not None and until():
            return Stop(StopKind.UNTIL, "", 0)
        if deadline_ns is not None and self.clock.now() >= deadline_ns:
            return Stop(StopKind.DEADLINE, "", 0)
        return Stop(StopKind.WALL, "", 0)

    def describe(self) -> str:
        return "RIP=0xDEAD"

    def close(self) -> None:
        self.closed = True


def _prints(data: bytes) -> Callable[[Scripted], None]:
    return lambda vm: vm.console.print(data)  # type: ignore[attr-defined]


def _agent(data: bytes) -> Callable[[Scripted], None]:
    return lambda vm: vm.agent_port.print(data)  # type: ignore[attr-defined]


def _answers(output: bytes, status: int) -> Callable[[Scripted], None]:
    """The guest's agent runs the command that was last asked for."""

    def answer(vm: Scripted) -> None:
        nonce = re.findall(rb"run (\S+) ", vm.agent_port.sent)[-1]  # type: ignore[attr-defined]
        frame = MARK + nonce
        reply = frame + b" begin\n" + output + frame + b" %d\n" % status
        vm.agent_port.print(reply)  # type: ignore[attr-defined]

    return answer


def test_waits_for_a_prompt_at_the_end_of_what_was_printed() -> None:
    vm = Scripted(_prints(b"C# is a language\r\n"), _prints(b"understudy"), _prints(b"# "))
    vm.wait_for_prompt()
    assert vm.console_text == "C# is a language\nunderstudy# "
    assert vm.clock.now() == 3_000_000_000


def test_waits_for_text_and_types() -> None:
    vm = Scripted(_prints(b"login"), _prints(b": "))
    vm.wait_for_text("login: ")
    vm.send("root\n")
    vm.send(b"\x03")
    assert vm.console.sent == b"root\n\x03"  # type: ignore[attr-defined]


def test_a_limit_in_guest_time() -> None:
    vm = Scripted()
    with pytest.raises(GuestTimeout, match="a prompt did not come within 5 s of guest time"):
        vm.wait_for_prompt(timeout_guest_s=5)
    assert vm.clock.now() == 5_000_000_000


def test_a_limit_in_wall_time() -> None:
    with pytest.raises(GuestTimeout, match=r"a prompt did not come within 0\.01 s$"):
        Scripted().wait_for_prompt(timeout_guest_s=1e9, timeout_wall_s=0.01)


def test_a_guest_that_ends_says_how_with_its_last_words_and_its_state() -> None:
    vm = Scripted(_prints(b"one\r\nKernel panic\r\n"), Stop(StopKind.TRIPLE_FAULT, "#GP in #DF", 0))
    with pytest.raises(GuestStopped, match="triple fault") as caught:
        vm.wait_for_prompt()
    assert caught.value.stop.kind == StopKind.TRIPLE_FAULT
    assert "Kernel panic" in caught.value.detail
    assert "RIP=0xDEAD" in caught.value.detail
    assert "\n" not in str(caught.value)


def test_run_boots_first_and_gives_output_and_status() -> None:
    vm = Scripted(_agent(HELLO), _answers(b"Linux\n\xff", 3))
    chunks: list[bytes] = []
    result = vm.run("uname", on_output=chunks.append)
    assert (result.output, result.status, result.raw) == ("Linux\n\ufffd", 3, b"Linux\n\xff")
    assert b"".join(chunks) == result.raw
    with pytest.raises(LinuxError, match="status 3"):
        result.check()


def test_commands_follow_each_other() -> None:
    vm = Scripted(_agent(HELLO), _answers(b"1\n", 0), _answers(b"2\n", 0))
    assert [vm.run("one").check().output, vm.run("two").check().output] == ["1\n", "2\n"]


def test_a_command_that_takes_too_long_is_given_up_and_the_next_one_runs() -> None:
    vm = Scripted(_agent(HELLO), _agent(b"noise"), _agent(b"noise"), _answers(b"ok", 0))
    with pytest.raises(GuestTimeout, match="'sleep 9' did not come within 2 s of guest time"):
        vm.run("sleep 9", timeout_guest_s=2)
    assert vm.run("echo ok").output == "ok"


def test_the_window_size_is_sent_when_the_agent_is_there_and_waits_for_nothing() -> None:
    vm = Scripted(_agent(HELLO), _answers(b"", 0), _answers(b"ok", 0))
    vm.resize_console(50, 120)
    assert vm.agent_port.sent == b""  # type: ignore[attr-defined]
    vm.resize_console(1, 1)  # one at a time
    vm.go()
    (code,) = re.findall(rb"run \S+ (\S+)", vm.agent_port.sent)  # type: ignore[attr-defined]
    assert base64.b64decode(code) == b"stty -F /dev/ttyS0 rows 50 cols 120"
    assert vm.run("echo ok").output == "ok"


def test_power_off() -> None:
    Scripted(_agent(HELLO), Stop(StopKind.POWEROFF, "", 0)).power_off()
    with pytest.raises(GuestStopped, match="reset"):
        Scripted(_agent(HELLO), Stop(StopKind.RESET, "", 0)).power_off()


def test_leaving_closes_also_after_an_error() -> None:
    vm = Scripted()
    with pytest.raises(KeyError), vm:
        raise KeyError
    assert vm.closed


def test_the_console_keeps_only_its_end() -> None:
    vm = Scripted()
    for _ in range(5):
        vm.console.print(b"x" * CONSOLE_KEPT_BYTES)  # type: ignore[attr-defined]
    vm.console.print(b"end")  # type: ignore[attr-defined]
    assert CONSOLE_KEPT_BYTES <= len(vm.console_text) <= 2 * CONSOLE_KEPT_BYTES
    assert vm.console_text.endswith("xend")


def test_every_kind_of_stop_has_words() -> None:
    for kind in set(StopKind) - {StopKind.BUDGET, StopKind.UNTIL, StopKind.DEADLINE, StopKind.WALL}:
        assert stop_in_words(Stop(kind)) != kind
