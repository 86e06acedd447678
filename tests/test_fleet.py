"""`understudy up`, `ps`, `top`, `console`, `control` and `down`, in processes and a terminal."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.test_run import kernel
from tests.tree import ROOT
from understudy.guests import hello

COMMAND = [sys.executable, "-m", "understudy"]
# Echoes what is typed: in al,3fd; test al,1; jz; in al,3f8; out 3f8,al; again.
ECHO = "66bafd03" + "ec" + "a801" + "74fb" + "66baf803" + "ec" + "ee" + "ebef"
# PWRBTN_EN in PM1's enable register, then it hangs: told, it does not end.
DEAF = "66ba0206" + "66b80001" + "66ef" + "ebfe"


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for sockets, and the end of all that was started."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield folder / "understudy"
    for name in [host["host"] for host in json.loads(understudy("ps", "--json")[1])]:
        os.kill(name["pid"], signal.SIGKILL)


def understudy(*arguments: str | Path) -> tuple[int, str, str]:
    """Status, standard output, standard error."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def hosts_file(folder: Path, name: str = "house", grace: str = "30s", **codes: str) -> Path:
    """A host whose VMs have these programs."""
    text = f'[host]\npcpus = 2\ngrace = "{grace}"\n'
    for vm, code in codes.items():
        own = folder / f"{name}-{vm}"
        own.mkdir()
        text += f'[vm.{vm}]\nkernel = "{kernel(own, code)}"\nmemory = "16M"\n'
    file = folder / f"{name}.toml"
    file.write_text(text)
    return file


def vms() -> dict[str, Any]:
    """What ps says, by the names of the VMs."""
    return {
        vm["name"]: vm for host in json.loads(understudy("ps", "--json")[1]) for vm in host["vms"]
    }


def until(name: str, state: str) -> dict[str, Any]:
    """Wait until a VM is so."""
    ends_at = time.monotonic() + 30
    while (vm := vms()[name])["state"] != state and time.monotonic() < ends_at:
        time.sleep(0.05)
    assert vm["state"] == state
    found: dict[str, Any] = vm
    return found


def spawn(*arguments: str | Path) -> "pexpect.spawn[bytes]":
    return pexpect.spawn(
        COMMAND[0], [*COMMAND[1:], *map(str, arguments)], timeout=30, dimensions=(24, 140)
    )


def test_the_example_in_the_foreground(runtime: Path) -> None:
    status, out, err = understudy("up", ROOT / "examples/hosts.toml")
    assert (status, err) == (0, "")
    for name in ("web", "job", "rest"):
        assert f"{name}: ended: it powered itself off\n" in out
        assert (runtime / "hosts.consoles" / f"{name}.txt").read_bytes() == hello.MESSAGE
    assert not (runtime / "hosts.sock").exists()
    assert understudy("ps")[1].splitlines()[1:] == []


def test_one_crashes_and_the_other_goes_on_and_is_asked_and_told(tmp_path: Path) -> None:
    file = hosts_file(tmp_path, good="ebfe", bad="0f0b")
    status, out, err = understudy("up", "--detach", file)
    assert (status, err) == (0, "") and out.startswith("house is up: understudy ps")
    assert until("bad", "ended")["ended"].startswith("a triple fault")
    assert understudy("up", file)[1:] == (
        "", "understudy: a host 'house' is up already: understudy down house\n"
    )  # fmt: skip
    before = vms()["good"]
    assert before["state"] in ("running", "runnable") and before["resident"] < 16 << 20
    assert "guest time" in understudy("control", "good")[1]
    assert understudy("control", "good", "weight=3")[1] == "3.0\n"
    assert understudy("control", "house/good", "cap", "0.5")[1] == "0.5\n"
    assert understudy("control", "good", "pool=none")[2].startswith("understudy: pool: pool 'none'")
    assert understudy("control", "goo")[2] == (
        "understudy: there is no VM 'goo'; did you mean good?\n"
    )
    assert "bad has ended: a triple fault" in understudy("control", "bad")[2]
    assert understudy("control", "good", "pause")[1] == "paused\n"
    first = vms()["good"]
    second = vms()["good"]
    assert first["state"] == "paused" and first["instructions"] == second["instructions"]
    assert understudy("control", "good", "resume")[1] == "going on\n"
    assert (second["weight"], second["cap"]) == (3.0, 0.5)
    once = understudy("top", "--once", "--every", "200ms")[1]
    assert re.search(r"^good +(running|runnable|blocked) +default +3 +[\d.]+ %", once, re.MULTILINE)
    assert re.search(r"^bad +ended", once, re.MULTILINE)
    drawn = understudy("memory")[1]
    assert re.search(r"^good +[\d.]+ MB", drawn, re.MULTILINE) and "all VMs fit" in drawn
    assert json.loads(understudy("memory", "house", "--json")[1])["house"]["vms"][0]["name"]
    assert understudy("memory", "horse")[2].startswith("understudy: there is no host 'horse'; hou")
    assert understudy("down") == (0, "", "")
    assert understudy("ps")[1].splitlines()[1:] == []


def test_a_terminal_on_a_console_and_two_who_watch(tmp_path: Path) -> None:
    understudy("up", "-d", hosts_file(tmp_path, echo=ECHO))
    first = spawn("console", "echo")
    first.expect("leaves it")
    first.send("abc")
    first.expect("abc")
    second = spawn("console", "echo")
    second.expect("somebody else types: only looking")
    second.expect("abc")  # what was there before
    first.send("x\x1d\x1dyz")
    second.expect_exact("x\x1dyz")
    second.kill(signal.SIGKILL)
    first.send("\x1dq")
    first.expect("left; the VM goes on")
    first.expect(pexpect.EOF)
    third = spawn("console", "echo")
    third.expect("leaves it")
    third.send("mine")
    third.expect("mine")
    assert understudy("down", "echo") == (0, "", "")
    third.expect("has ended")
    third.expect(pexpect.EOF)
    for child in (first, second, third):
        child.close()


def test_top_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    understudy("up", "-d", hosts_file(tmp_path, one="ebfe", two="ebfe"))
    child = spawn("top", "--every", "100ms")
    child.expect("EXITS/S")
    child.expect("two")
    child.send("q")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    monkeypatch.setenv("TERM", "dumb")  # which cannot be drawn again: one table
    child = spawn("top", "--every", "100ms")
    child.expect("EXITS/S")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_guest_that_is_told_and_does_not_end(tmp_path: Path) -> None:
    child = spawn("up", hosts_file(tmp_path, grace="300ms", deaf=DEAF))
    child.expect("deaf: started")
    time.sleep(0.5)
    child.sendintr()
    child.expect(r"deaf: told to power itself off; ended in 0.3 s if it does not")
    child.expect(r"deaf: ended badly: .*did not power itself off within 0.3 s")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 1


def test_those_who_wait_for_the_end_see_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    understudy("up", "-d", hosts_file(tmp_path, grace="2s", deaf=DEAF, good="ebfe"))
    time.sleep(0.5)
    child = spawn("down")
    child.expect(r"deaf \([0-2] s left\)")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_two_hosts_and_what_a_dead_one_left(tmp_path: Path, runtime: Path) -> None:
    one, two = (hosts_file(tmp_path, name, spin="ebfe") for name in ("one", "two"))
    for file in (one, two):
        assert understudy("up", "-d", file)[0] == 0
    assert understudy("control", "spin")[2] == (
        "understudy: several VMs are called spin: say one of one/spin, two/spin\n"
    )
    pids = {
        host["host"]["name"]: host["host"]["pid"]
        for host in json.loads(understudy("ps", "--json")[1])
    }
    os.kill(pids["one"], signal.SIGKILL)
    ends_at = time.monotonic() + 30
    while "one" in understudy("ps")[1] and time.monotonic() < ends_at:
        time.sleep(0.05)
    assert not (runtime / "one.sock").exists()  # nobody's any more, and taken away
    assert "guest time" in understudy("control", "spin")[1]
    assert understudy("up", "-d", one)[0] == 0
    assert understudy("down", "one", "two") == (0, "", "")


def test_a_folder_that_others_may_enter_is_not_used(runtime: Path) -> None:
    runtime.mkdir()
    runtime.chmod(0o755)
    assert "that no other user may enter (mode 0700)" in understudy("ps")[2]
    runtime.chmod(0o700)


def test_a_host_in_the_background_that_cannot_start(tmp_path: Path) -> None:
    file = hosts_file(tmp_path, spin="ebfe")
    with file.open("a") as more:
        more.write('disk = "none.img"\n')
    status, out, err = understudy("up", "-d", file)
    assert (status, out) == (1, "")
    assert f"understudy: {file}: vm.spin.disk: " in err and "none.img" in err


@pytest.mark.real_guest
def test_a_command_on_the_console_of_a_debian(tmp_path: Path) -> None:
    file = tmp_path / "hosts.toml"
    file.write_text(
        '[vm.web]\nguest = "cloud-amd64"\n[vm.job]\nguest = "cloud-amd64"\nexec = "exit 3"'
    )
    assert understudy("up", "-d", file)[0] == 0
    child = spawn("console", "web")
    child.timeout = 120
    child.expect("[#$] ")
    child.send("echo $((6*7))-is-it\r")
    child.expect("42-is-it")
    child.send("\x1dq")
    child.expect(pexpect.EOF)
    child.close()
    assert until("job", "ended")["ended"] == "exec ended with 3"
    assert understudy("down")[0] == 0


TIDY = "trap 'echo tidied up >/dev/ttyS0; exit' TERM; echo is ready >/dev/ttyS0; sleep 1d & wait"
STUBBORN = "trap '' TERM; echo is ready >/dev/ttyS0; while :; do sleep 1; done"
STUCK = "echo is ready >/dev/ttyS0; kill -STOP $(pidof agent)"


@pytest.mark.real_guest
def test_debians_are_shut_down_in_order_or_else_ended(tmp_path: Path, runtime: Path) -> None:
    commands = {"tidy": TIDY, "stubborn": STUBBORN, "stuck": STUCK}
    file = tmp_path / "hosts.toml"
    file.write_text('[host]\npcpus = 2\ngrace = "20s"\n' + "".join(
        f'[vm.{name}]\nguest = "cloud-amd64"\nmemory = "128M"\nexec = """{command}"""\n'
        for name, command in commands.items()
    ))  # fmt: skip
    child = spawn("up", file)
    child.timeout = 120
    consoles = {name: runtime / "hosts.consoles" / f"{name}.txt" for name in commands}
    ends_at = time.monotonic() + 120
    while not all(one.exists() and b"is ready" in one.read_bytes() for one in consoles.values()):
        assert time.monotonic() < ends_at and child.isalive()
        time.sleep(0.1)
    assert understudy("down")[0] == 0
    child.expect(pexpect.EOF)
    said = child.before.decode()
    child.close()
    assert child.exitstatus == 1  # for the one that is stuck
    for name in ("tidy", "stubborn"):
        assert f"{name}: ended: it powered itself off" in said
    assert re.search(r"stuck: ended badly: .*did not power itself off within 20 s", said)
    heard = {name: console.read_bytes() for name, console in consoles.items()}
    assert [name for name in heard if b"tidied up" in heard[name]] == ["tidy"]
    assert [name for name in heard if b"reboot: Power down" in heard[name]] == ["tidy", "stubborn"]
