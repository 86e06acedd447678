"""Waiting, typing and running commands, on a machine that plays a script instead of code."""

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from tests.fake_agent import FakeAgent, Program
from understudy import GuestStopped, GuestTimeout, Linux, LinuxError, linux_session
from understudy import vm as machine
from understudy.agent.calls import Call
from understudy.clock import ManualClock
from understudy.config import Config
from understudy.devices.agent import DATA, Agent
from understudy.devices.wires import Wires
from understudy.last_words import stop_in_words
from understudy.linux_session import CONSOLE_KEPT_BYTES
from understudy.sessions import Sessions
from understudy.verdict import Stop, StopKind

Step = Callable[["Machine"], None] | Stop


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


class Machine:
    """In place of a VM: `go` takes one step of the script and a second of guest time."""

    is_closed = False
    name = "scripted"
    config = Config()

    def __init__(self, *steps: Step, programs: list[Program] | None = None) -> None:
        self.clock = _Clock()
        self.console = _Port()
        port = Agent(Wires(ManualClock()))
        self.pc = SimpleNamespace(parts={"agent": port})
        self.agent = FakeAgent(port, programs or [])
        self.sessions = Sessions()
        self.on_reset: list[Callable[[], None]] = []
        self.steps: Iterator[Step] = iter(steps)
        self.problem: Exception | None = None
        self.stops: list[Stop] = []

    def go(
        self,
        *,
        budget: int | None = None,
        until: Callable[[], bool] | None = None,
        deadline_ns: int | None = None,
        wall_seconds: float | None = None,
        reboot: bool | None = None,
    ) -> Stop:
        step = next(self.steps, None)
        self.clock.ns += 1_000_000_000
        if isinstance(step, Stop):
            return step
        if step is not None:
            step(self)
        if self.problem is not None:
            problem, self.problem = self.problem, None
            raise problem
        if until is not None and until():
            return Stop(StopKind.UNTIL, "", 0)
        if deadline_ns is not None and self.clock.now() >= deadline_ns:
            return Stop(StopKind.DEADLINE, "", 0)
        return Stop(StopKind.WALL, "", 0)

    def describe(self) -> str:
        return "RIP=0xDEAD"

    def fail(self, problem: Exception) -> None:
        self.problem = problem


def scripted(*steps: Step, programs: list[Program] | None = None) -> tuple[Linux, Machine]:
    """A session with a machine that plays these steps, and whose commands do that."""
    vm = Machine(*steps, programs=programs)
    return Linux(cast(machine.VM, vm)), vm


def _prints(data: bytes) -> Callable[[Machine], None]:
    return lambda vm: vm.console.print(data)


def _is_there(vm: Machine) -> None:
    """The guest's agent starts."""
    vm.agent.start()


def test_waits_for_a_prompt_at_the_end_of_what_was_printed() -> None:
    guest, vm = scripted(_prints(b"C# is a language\r\n"), _prints(b"understudy"), _prints(b"# "))
    guest.wait_for_prompt()
    assert guest.console_text == "C# is a language\nunderstudy# "
    assert vm.clock.now() == 3_000_000_000


def test_waits_for_text_and_types() -> None:
    guest, vm = scripted(_prints(b"login"), _prints(b": "))
    guest.wait_for_text("login: ")
    guest.send("root\n")
    guest.send(b"\x03")
    assert vm.console.sent == b"root\n\x03"


def test_a_limit_in_guest_time() -> None:
    guest, vm = scripted()
    with pytest.raises(GuestTimeout, match="a prompt did not come within 5 s of guest time"):
        guest.wait_for_prompt(timeout_guest_s=5)
    assert vm.clock.now() == 5_000_000_000


def test_a_limit_in_wall_time() -> None:
    with pytest.raises(
        GuestTimeout, match=r"a prompt did not come within 0\.01 s; the guest printed nothing"
    ):
        scripted()[0].wait_for_prompt(timeout_guest_s=1e9, timeout_wall_s=0.01)


def test_a_guest_that_ends_says_how_with_its_last_words_and_its_state() -> None:
    guest, _ = scripted(
        _prints(b"one\r\nKernel panic\r\n"), Stop(StopKind.TRIPLE_FAULT, "#GP in #DF", 0)
    )
    with pytest.raises(GuestStopped, match="triple fault") as caught:
        guest.wait_for_prompt()
    assert caught.value.stop.kind == StopKind.TRIPLE_FAULT
    assert "Kernel panic" in caught.value.detail
    assert "RIP=0xDEAD" in caught.value.detail
    assert "\n" not in str(caught.value)


def test_run_boots_first_and_gives_output_and_status() -> None:
    guest, vm = scripted(_is_there, programs=[Program(b"Linux\n\xff", 3)])
    chunks: list[bytes] = []
    result = guest.run("uname", on_output=chunks.append)
    assert (result.output, result.status, result.raw) == ("Linux\n\ufffd", 3, b"Linux\n\xff")
    assert b"".join(chunks) == result.raw
    assert vm.agent.commands == [b"uname"]
    with pytest.raises(LinuxError, match="status 3"):
        result.check()


def test_what_is_kept_of_a_console_is_bounded() -> None:
    guest, vm = scripted()
    for n in range(5):
        vm.console.print(bytes([n]) * CONSOLE_KEPT_BYTES)
    assert CONSOLE_KEPT_BYTES <= len(guest.state.heard) <= 2 * CONSOLE_KEPT_BYTES
    assert guest.state.heard.endswith(bytes([4]))


def test_of_output_that_is_taken_as_it_comes_the_end_is_kept() -> None:
    printed = b"".join(bytes([n]) * (1 << 20) for n in range(5))
    guest, _ = scripted(_is_there, programs=[Program(printed)])
    taken = 0

    def take(data: bytes) -> None:
        nonlocal taken
        taken += len(data)

    result = guest.run("yes", on_output=take)
    assert taken == len(printed)
    assert printed.endswith(result.raw) and len(result.raw) <= 2 * CONSOLE_KEPT_BYTES


def test_a_command_that_prints_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux_session, "OUTPUT_KEPT_BYTES", 1000)
    guest, vm = scripted(_is_there, programs=[Program(b"y" * 5000, None), Program(b"ok")])
    with pytest.raises(LinuxError, match=r"printed more than .* with on_output"):
        guest.run("yes")
    assert vm.agent.killed and not vm.agent.open_files
    assert guest.run("echo ok").output == "ok"


def test_commands_follow_each_other_and_leave_nothing_open() -> None:
    guest, vm = scripted(_is_there, programs=[Program(b"1\n"), Program(b"2\n")])
    assert [guest.run("one").check().output, guest.run("two").check().output] == ["1\n", "2\n"]
    assert (vm.agent.commands, vm.agent.open_files) == ([b"one", b"two"], set())
    assert guest.state.jobs == []


def test_standard_output_and_standard_error_are_apart() -> None:
    guest, _ = scripted(_is_there, programs=[Program(b"out", 0, b"err"), Program(b"o", 9, b"e")])
    result = guest.run("both")
    assert (result.out, result.error, result.raw) == (b"out", b"err", b"outerr")
    taken: dict[str, list[bytes]] = {"out": [], "error": []}
    guest.run("both", on_output=taken["out"].append, on_error=taken["error"].append)
    assert taken == {"out": [b"o"], "error": [b"e"]}


def test_a_command_that_a_signal_ended() -> None:
    guest, _ = scripted(_is_there, programs=[Program(b"", 128 + 11), Program(b"", 3)])
    assert (guest.run("crash").status, guest.run("exit 3").signal) == (139, None)


def test_a_command_that_takes_too_long_is_ended_and_the_next_one_runs() -> None:
    guest, vm = scripted(_is_there, programs=[Program(b"noise", None), Program(b"ok")])
    with pytest.raises(GuestTimeout, match="'sleep 9' did not come within 2 s of guest time"):
        guest.run("sleep 9", timeout_guest_s=2)
    assert vm.agent.killed and not vm.agent.open_files
    assert guest.run("echo ok").output == "ok"


def test_the_window_size_is_sent_when_the_agent_is_there_and_waits_for_nothing() -> None:
    guest, vm = scripted(_is_there, programs=[Program(b"ok")])
    guest.resize_console(50, 120)
    assert vm.agent.calls == []
    vm.go()
    guest.resize_console(50, 120)
    assert vm.agent.calls == [Call.OPEN, Call.IOCTL, Call.CLOSE]
    assert guest.run("echo ok").output == "ok"


def test_power_off() -> None:
    guest, vm = scripted(_is_there, Stop(StopKind.POWEROFF, "", 0))
    vm.agent.is_deaf_to_reboot = True
    guest.power_off()
    assert vm.agent.calls == [Call.SYNC, Call.REBOOT]
    guest, vm = scripted(_is_there, Stop(StopKind.RESET, "", 0))
    vm.agent.is_deaf_to_reboot = True
    with pytest.raises(GuestStopped, match="reset"):
        guest.power_off()


def test_an_answer_that_no_agent_gives_ends_the_talk() -> None:
    guest, vm = scripted(_is_there, programs=[Program(b"", None)])
    with guest.start("true") as command:
        port = vm.pc.parts["agent"]
        port.ring = lambda: None
        head = bytearray(1 << 12)
        head[0:4] = head[32 * 2 : 32 * 2 + 4] = b"\xff\xff\xff\x7f"  # more than was asked for
        vm.steps = iter([lambda vm: port.write_string(0, DATA, bytes(head))])
        with pytest.raises(LinuxError, match="the guest's agent has gone"):
            command.listen()
    assert not guest.channel.is_there


def test_the_console_keeps_only_its_end() -> None:
    guest, vm = scripted()
    for _ in range(5):
        vm.console.print(b"x" * CONSOLE_KEPT_BYTES)
    vm.console.print(b"end")
    assert CONSOLE_KEPT_BYTES <= len(guest.console_text) <= 2 * CONSOLE_KEPT_BYTES
    assert guest.console_text.endswith("xend")


def test_every_kind_of_stop_has_words() -> None:
    for kind in set(StopKind) - {StopKind.BUDGET, StopKind.UNTIL, StopKind.DEADLINE, StopKind.WALL}:
        assert stop_in_words(Stop(kind)) != kind


# --- every way out leaves a session that works ---


def test_an_exception_of_on_output_is_raised_once_and_the_next_command_runs() -> None:
    guest, _ = scripted(_is_there, programs=[Program(b"one", None), Program(b"two")])

    def fails(_data: bytes) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        guest.run("echo one", on_output=fails)
    assert guest.run("echo two").output == "two"


def test_an_interrupted_command_is_given_up_and_the_next_one_runs() -> None:
    def interrupts(_vm: Machine) -> None:
        raise KeyboardInterrupt

    guest, _ = scripted(_is_there, interrupts, programs=[Program(b"", None), Program(b"ok")])
    with pytest.raises(KeyboardInterrupt):
        guest.run("sleep 9")
    assert guest.run("echo ok").output == "ok"
    guest, _ = scripted(interrupts, _prints(b"# "))
    with pytest.raises(KeyboardInterrupt):
        guest.wait_for_prompt()
    guest.wait_for_prompt()


@pytest.mark.parametrize(
    ("nested", "words"),
    [
        (lambda guest: guest.run("echo nested"), "cannot run 'echo nested' now"),
        (lambda guest: guest.wait_for_prompt(), "cannot wait for a prompt now"),
        (lambda guest: guest.wait_for_text("x"), "cannot wait for 'x' now"),
        (lambda guest: guest.power_off(), "cannot power off now"),
    ],
)
def test_a_callback_of_the_machine_cannot_wait(nested: Callable[[Linux], None], words: str) -> None:
    guest, _ = scripted(_is_there, lambda vm: nested(guest), programs=[Program(b"two")])
    with pytest.raises(LinuxError, match=words) as caught:
        guest.wait_for_text("never")
    assert "\n" not in str(caught.value)
    assert guest.run("echo two").output == "two"


def test_a_session_of_a_closed_machine_says_so() -> None:
    guest, vm = scripted(_prints(b"# "))
    guest.wait_for_prompt()
    vm.is_closed = True
    for use in (guest.wait_for_prompt, guest.wait_for_agent, lambda: guest.run("true")):
        with pytest.raises(RuntimeError, match=r"^scripted is closed$"):
            use()
    assert guest.console_text == "# "


# --- what is kept ---


def test_a_session_goes_on_in_another_machine() -> None:
    guest, vm = scripted(_prints(b"booted # "), _is_there, programs=[Program(b"1", None)])
    guest.wait_for_agent()
    guest.start("under way")  # its caller stays behind
    kept, board = json.loads(json.dumps((vm.sessions.save(), vm.pc.parts["agent"].save())))
    other = Machine(programs=[Program(b"2")])
    other.pc.parts["agent"].load(board)
    other.sessions.load(kept)
    assert other.sessions.save() == kept  # nobody has asked for it yet
    again = Linux(cast(machine.VM, other))
    assert again.console_text == "booted # "
    assert again.run("two").output == "2"
    assert (other.agent.commands, other.agent.killed) == ([b"two"], 2)


def test_a_kept_session_that_does_not_fit_is_refused() -> None:
    guest, vm = scripted()
    with pytest.raises(ValueError, match="Linux"):
        guest.load({"heard": 7})
    with pytest.raises(ValueError, match="the session linux"):
        vm.sessions.load({"linux": 7})
