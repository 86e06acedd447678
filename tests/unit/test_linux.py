"""Waiting, typing and running commands, on a machine that plays a script instead of code."""

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from understudy import GuestStopped, GuestTimeout, Linux, LinuxError, linux_session
from understudy import vm as machine
from understudy.clock import ManualClock
from understudy.devices.agent import CONTROL, DATA, ENDED, HELLO, Agent
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

    def __init__(self, *steps: Step) -> None:
        self.clock = _Clock()
        self.console, self.commands = _Port(), list[bytes]()
        self.pc = SimpleNamespace(agent=Agent(Wires(ManualClock())))
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


def scripted(*steps: Step) -> tuple[Linux, Machine]:
    """A session with a machine that plays these steps."""
    vm = Machine(*steps)
    return Linux(cast(machine.VM, vm)), vm


def _prints(data: bytes) -> Callable[[Machine], None]:
    return lambda vm: vm.console.print(data)


def _is_there(vm: Machine) -> None:
    """The guest's agent starts."""
    vm.pc.agent.write(0, CONTROL, HELLO, 4)


def _writes(data: bytes) -> Callable[[Machine], None]:
    return lambda vm: vm.pc.agent.write_string(0, DATA, data)


def _answers(output: bytes, status: int) -> Callable[[Machine], None]:
    """The guest's agent runs the command that was last asked for."""

    def answer(vm: Machine) -> None:
        agent = vm.pc.agent
        length = agent.read(0, CONTROL, 4)
        vm.commands.append(bytes(agent.read(0, DATA, 1) for _ in range(length)))
        agent.write_string(0, DATA, output)
        agent.write(0, CONTROL, ENDED + status, 4)

    return answer


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
    guest, _ = scripted(_is_there, _answers(b"Linux\n\xff", 3))
    chunks: list[bytes] = []
    result = guest.run("uname", on_output=chunks.append)
    assert (result.output, result.status, result.raw) == ("Linux\n\ufffd", 3, b"Linux\n\xff")
    assert b"".join(chunks) == result.raw
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
    guest, _ = scripted(_is_there, _answers(printed, 0))
    taken = 0

    def take(data: bytes) -> None:
        nonlocal taken
        taken += len(data)

    result = guest.run("yes", on_output=take)
    assert taken == len(printed)
    assert printed.endswith(result.raw) and len(result.raw) <= 2 * CONSOLE_KEPT_BYTES


def test_a_command_that_prints_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux_session, "OUTPUT_KEPT_BYTES", 1000)
    guest, _ = scripted(_is_there, _answers(b"y" * 5000, 0), _answers(b"ok", 0))
    with pytest.raises(LinuxError, match=r"printed more than .* with on_output"):
        guest.run("yes")
    assert len(guest.state.output) <= 1000
    assert guest.run("echo ok").output == "ok"


def test_commands_follow_each_other() -> None:
    guest, _ = scripted(_is_there, _answers(b"1\n", 0), _answers(b"2\n", 0))
    assert [guest.run("one").check().output, guest.run("two").check().output] == ["1\n", "2\n"]


def test_a_command_that_takes_too_long_is_given_up_and_the_next_one_runs() -> None:
    guest, _ = scripted(_is_there, _writes(b"noise"), _writes(b"noise"), _answers(b"ok", 0))
    with pytest.raises(GuestTimeout, match="'sleep 9' did not come within 2 s of guest time"):
        guest.run("sleep 9", timeout_guest_s=2)
    assert guest.run("echo ok").output == "ok"


def test_the_window_size_is_sent_when_the_agent_is_there_and_waits_for_nothing() -> None:
    guest, vm = scripted(_is_there, _answers(b"", 0), _answers(b"ok", 0))
    guest.resize_console(50, 120)
    assert not vm.pc.agent.is_busy
    vm.go()
    guest.resize_console(50, 120)
    guest.resize_console(1, 1)  # one at a time
    vm.go()
    assert vm.commands == [b"stty -F /dev/ttyS0 rows 50 cols 120"]
    assert guest.run("echo ok").output == "ok"


def test_power_off() -> None:
    scripted(_is_there, Stop(StopKind.POWEROFF, "", 0))[0].power_off()
    with pytest.raises(GuestStopped, match="reset"):
        scripted(_is_there, Stop(StopKind.RESET, "", 0))[0].power_off()


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
    guest, _ = scripted(_is_there, _answers(b"one", 0), _answers(b"two", 0))

    def fails(_data: bytes) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        guest.run("echo one", on_output=fails)
    assert guest.run("echo two").output == "two"


def test_an_interrupted_command_is_given_up_and_the_next_one_runs() -> None:
    def interrupts(_vm: Machine) -> None:
        raise KeyboardInterrupt

    guest, _ = scripted(_is_there, interrupts, _answers(b"ok", 0))
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
def test_a_callback_cannot_wait(nested: Callable[[Linux], None], words: str) -> None:
    guest, _ = scripted(_is_there, _answers(b"one", 0), _answers(b"two", 0))
    with pytest.raises(LinuxError, match=words) as caught:
        guest.run("echo one", on_output=lambda data: nested(guest))
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
    guest, vm = scripted(_prints(b"booted # "), _is_there, _answers(b"1", 0))
    guest.run("one")
    vm.pc.agent.request(b"under way")  # its caller stays behind
    kept, board = json.loads(json.dumps((vm.sessions.save(), vm.pc.agent.save())))
    other = Machine(_answers(b"2", 0))
    other.pc.agent.load(board)
    other.sessions.load(kept)
    assert other.sessions.save() == kept  # nobody has asked for it yet
    again = Linux(cast(machine.VM, other))
    assert again.console_text == "booted # "
    assert again.run("two").output == "2"
    assert other.commands == [b"two"]


def test_a_kept_session_that_does_not_fit_is_refused() -> None:
    guest, vm = scripted()
    with pytest.raises(ValueError, match="Linux"):
        guest.load({"heard": 7})
    with pytest.raises(ValueError, match="the session linux"):
        vm.sessions.load({"linux": 7})
