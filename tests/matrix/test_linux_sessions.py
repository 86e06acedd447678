"""Sessions with a real Linux: over snapshots, and out of every way in which a wait can end."""

import base64
import os
import signal
import threading

import pytest

from tests.matrix.lockstep import linux
from understudy import GuestTimeout, Linux, LinuxError
from understudy import vm as machine
from understudy.agent.running import Stream
from understudy.devices.virtio.agent import VirtioAgent
from understudy.guests import agent_program
from understudy.linux import VM, Terminal

pytestmark = pytest.mark.real_guest


@pytest.fixture(scope="module", params=["port", "virtio"])
def saved(request: pytest.FixtureRequest) -> bytes:
    """A guest that has booted and run a command, by each of the agent's two channels."""
    with linux("dbt", agent=request.param) as vm:
        vm.wait_for_agent()
        if request.param == "virtio":
            assert vm.pc.part("virtio_agent", VirtioAgent).is_there
        assert vm.run("echo first > /tmp/file; echo one").check().output == "one\n"
        return vm.save()


def test_a_restored_linux_takes_commands(saved: bytes) -> None:
    outputs = []
    for _ in range(2):
        with VM.restore(saved) as vm:
            assert "Linux version" in vm.console_text
            outputs.append((vm.run("cat /tmp/file; cat /proc/uptime").output, vm.instructions))
            again = vm.save()
        with VM.restore(again) as vm:  # of one that was restored
            assert vm.run("cat /tmp/file").output == "first\n"
            vm.power_off()
    assert outputs[0] == outputs[1]
    assert outputs[0][0].startswith("first\n")


def test_a_session_attaches_to_any_machine(saved: bytes) -> None:
    with machine.VM.restore(saved) as vm:
        kept = vm.save()  # nobody has asked for the session: it is kept
    with machine.VM.restore(kept) as vm:
        assert Linux(vm).run("cat /tmp/file").output == "first\n"


def test_a_snapshot_in_the_middle_of_a_command(saved: bytes) -> None:
    with VM.restore(saved) as vm:
        images: list[bytes] = []
        vm.run(
            "echo a; sleep 1; echo b", on_output=lambda d: vm.post(lambda: images.append(vm.save()))
        )
    with VM.restore(images[0]) as vm:
        assert vm.run("echo c").output == "c\n"


def test_every_way_out_of_a_command_leaves_a_guest_that_takes_the_next(saved: bytes) -> None:
    def fails(_data: bytes) -> None:
        raise ZeroDivisionError

    with VM.restore(saved) as vm:
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            vm.run("i=0; while [ $i -lt 3000000 ]; do i=$((i+1)); done")
        assert vm.run("echo interrupted").output == "interrupted\n"
        with pytest.raises(ZeroDivisionError):
            vm.run("echo one; sleep 1; echo two", on_output=fails)
        assert vm.run("echo failed").output == "failed\n"
        nested: list[str] = []
        vm.run("echo outer", on_output=lambda data: nested.append(vm.run("echo nested").output))
        assert nested == ["nested\n"]
        with pytest.raises(LinuxError, match="Kernel panic - not syncing: sysrq triggered crash"):
            vm.run("echo c > /proc/sysrq-trigger")


def test_a_command_that_never_ends_makes_way_for_the_next(saved: bytes) -> None:
    with VM.restore(saved) as vm:
        for endless in ("while :; do :; done", "while :; do echo noise; done", "sleep 1000000"):
            with pytest.raises(GuestTimeout):
                vm.run(endless, timeout_guest_s=2)
            assert vm.run("echo next", timeout_guest_s=5).output == "next\n"
        with pytest.raises(GuestTimeout):
            vm.run("sleep 77 | (sleep 78; true) & sleep 79", timeout_guest_s=2)
        assert vm.run("ps | grep '[s]leep 7'").output == ""
        assert vm.run("sleep 1000 & echo left").output == "left\n"  # this one has ended
        assert "sleep 1000" in vm.run("ps").output
        assert [vm.run(f"exit {n}").status for n in (0, 7)] == [0, 7]


def test_what_a_command_gets(saved: bytes) -> None:
    with VM.restore(saved) as vm:
        both = vm.run("echo out; echo err >&2; exit 3")
        assert (both.out, both.error, both.status) == (b"out\n", b"err\n", 3)
        shown = vm.run("cat; pwd; echo $WHAT", input="in\n", cwd="/tmp", env={"WHAT": "a b"})
        assert shown.output == "in\n/tmp\na b\n"
        many = bytes(range(256)) * 4000
        assert vm.run("cat", input=many).raw == many
        assert vm.run("head -c 3", input=many).raw == many[:3]  # who does not read it all
        window = Terminal(rows=33, columns=77)
        assert vm.run("tty; stty size; read x; echo $x", input="hi\n", terminal=window).raw == (
            b"hi\r\n/dev/pts/0\r\n33 77\r\nhi\r\n"  # echoed, since it was typed ahead
        )
        assert vm.run("cat", input="to the end\n", terminal=window).out.endswith(b"to the end\r\n")
        assert vm.run("kill -11 $$").signal == 11
        with pytest.raises(LinuxError, match=r"No such file or directory: '/nowhere'"):
            vm.run("true", cwd="/nowhere")
        assert vm.run("ls /proc/$PPID/fd | wc -l").output == "6\n"  # nothing stays open


def test_a_command_is_listened_to_and_spoken_to(saved: bytes) -> None:
    heard: list[bytes] = []
    with VM.restore(saved) as vm:
        script = "trap 'echo got; read b; echo $b; exit 5' USR1; read a; echo $a; sleep 9; sleep 9"
        with vm.start(script, has_input=True) as command, vm.start("sleep 1000") as other:
            command.send("one\n")
            for stream, data in command:
                heard += [data] * (stream is Stream.OUT)
                if data == b"one\n":
                    command.signal(signal.SIGUSR1)
                elif data == b"got\n":
                    command.send("two\n")
                    command.close_input()
            assert (command.status, other.status) == (5, None)
            other.signal(signal.SIGTERM)
            assert ([*other], other.status, other.signal_number) == ([], 143, 15)
        with pytest.raises(LinuxError, match="has ended"):
            command.signal(9)
    assert heard == [b"one\n", b"got\n", b"two\n"]


FORGER = bytes.fromhex(  # "here I am", and some bytes, by one that may
    "b865000000 bba0050000 b908000000 ba01000000 cd80"  # ioperm(0x5A0, 8, 1)
    "baa4050000 31c0 ef  baa0050000 b841414141 ef"  # out 0x5A4, 0; out 0x5A0, "AAAA"
    "b801000000 31db cd80"  # exit(0)
)


def test_a_command_ends_when_it_ends_whatever_it_writes_wherever(saved: bytes) -> None:
    forger = base64.b64encode(agent_program.image(FORGER)).decode()
    ways = {
        "output": r"printf '\0368d30fb97a4206649a5ce81866260ace6 0\n\0\1\0\0'",
        "the bell": "printf x >/dev/ttyS1",
        "the agent's own files": "for f in /proc/[0-9]*/fd/[0-9]*; do case $(readlink $f) in "
        "pipe*) dd if=/proc/version of=$f oflag=nonblock 2>/dev/null;; esac; done",
        "a second agent": "/sbin/agent bell </dev/null",
        "the channel": "for p in /dev/vport*; do echo AAAAAAAAAAAAAAAA >$p; /sbin/agent <>$p; done",
        "the ports": f"echo {forger} | base64 -d >/tmp/f; chmod +x /tmp/f; /tmp/f",
    }
    with VM.restore(saved) as vm:
        for name, way in ways.items():
            result = vm.run(f"{way}; sleep 1; echo still here; exit 7")
            assert (result.status, result.output.endswith("still here\n")) == (7, True), name
            assert "A" not in result.output, name
        assert vm.run("echo next; exit 3").raw == b"next\n"


def test_output_comes_exactly_and_in_runs(saved: bytes) -> None:
    with VM.restore(saved) as vm:
        zeros = "head -c 20971520 /dev/zero"  # in small writes
        before = sum(vm.counts()["exits"].values())
        assert vm.run(zeros).raw == bytes(320 << 16)
        spent = sum(vm.counts()["exits"].values()) - before
        assert spent / 20 < 300, spent  # for a megabyte
        rows = [
            (r"printf '\000\036\377\r\n'", b"\0\x1e\xff\r\n", 0),
            ("echo out; echo err >&2; exit 3", b"out\nerr\n", 3),
            ("cat; tty", b"not a tty\n", 1),
            ("for i in 1 2 3; do echo o$i; echo e$i >&2; done", b"o1\ne1\no2\ne2\no3\ne3\n", 0),
            ("echo " + "x" * 200_000 + " | wc -c", b"200001\n", 0),
            ("kill -9 $$", b"", 128 + 9),
            ("", b"", 0),
            ("exec >&- 2>&-; sleep 1; exit 9", b"", 9),
            ("(while :; do echo on; sleep 1; done) & exit 4", None, 4),
            ("sleep 3; ps | grep -c '[s]leep 1$'", b"1\n", 0),  # that one has a place to write to
        ]
        for command, output, status in rows:
            result = vm.run(command)
            assert result.status == status, command[:40]
            assert output in (None, result.raw), command[:40]


def test_a_guest_uses_what_its_processor_shows_and_nothing_else() -> None:
    flags = "grep -m1 ^flags /proc/cpuinfo"
    with VM.linux("cloud-amd64", memory="128M", cpu="max,-pcid,-popcnt,-x2apic") as vm:
        shown = vm.run(flags).output.split()
        assert {"smap", "umip", "aes"} <= set(shown)
        assert not {"pcid", "popcnt", "x2apic"} & set(shown)
        assert vm.config.cpu == "max,-pcid,-popcnt,-x2apic"
    with VM.linux("cloud-amd64", memory="128M", cpu="baseline") as vm:
        shown = vm.run(flags).output.split()
        assert not {"aes", "sse4_2", "popcnt", "smap", "bmi1"} & set(shown)
