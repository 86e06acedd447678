"""`understudy run --control`, `control` and `inspect`, in processes of their own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_run import kernel
from tests.tree import ROOT
from understudy.commands.control import _request
from understudy.control.actions import ACTIONS, ControlError, Request
from understudy.vm import VM

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "understudy"]


def understudy(*arguments: str | Path) -> tuple[int, str, str]:
    """Status, standard output, standard error."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False,
        timeout=120, env=ENVIRONMENT,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A guest that jumps to itself, and its socket."""
    path = tmp_path / "vm.sock"
    process = subprocess.Popen(
        [*COMMAND, "run", "--kernel", kernel(tmp_path, "ebfe"), "--control", str(path)],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    with process:
        ends_at = time.monotonic() + 60
        while not path.exists() and time.monotonic() < ends_at and process.poll() is None:
            time.sleep(0.01)
        yield process, path
        process.kill()


def test_a_vm_is_asked_inspected_saved_and_stopped(
    running: tuple[subprocess.Popen[bytes], Path], tmp_path: Path
) -> None:
    process, path = running
    status, out, _ = understudy("control", path)
    assert status == 0 and "instructions, execution vmx, paging ept" in out
    status, out, _ = understudy("control", path, "counts")
    assert status == 0 and json.loads(out)["instructions"] > 0
    status, out, _ = understudy("inspect", "rip", "--control", path)
    assert status == 0 and "the guest's walk" in out and "EPT's walk of gpa" in out
    file = tmp_path / "snapshot"
    status, out, _ = understudy("control", path, "save", file)
    assert (status, out) == (0, f"{file}: {file.stat().st_size:,} bytes\n")
    image = tmp_path / "data.img"
    image.write_bytes(bytes(4096))
    asked = understudy("control", path, "plug", f"disk={image}")
    assert asked[0] == 1 and "was made without hot plug" in asked[2]
    of_running = json.loads(understudy("inspect", "rip", "--control", path, "--json")[1])
    of_saved = json.loads(understudy("inspect", "rip", "--snapshot", file, "--json")[1])
    assert of_running["guest"] == of_saved["guest"]
    assert understudy("control", path, "stop") == (0, "stopping\n", "")
    assert process.wait(60) == 1
    assert process.stderr is not None
    assert b"the guest ended: somebody stopped it" in process.stderr.read()
    assert not path.exists()


def test_a_disk_is_plugged_in_by_the_name_that_it_has_here(tmp_path: Path) -> None:
    image = tmp_path / "data.img"
    image.write_bytes(bytes(4096))
    with VM("16M", hotplug=True) as vm:

        def done(request: Request) -> str:
            return str(ACTIONS[str(request["do"])](vm, json.loads(json.dumps(request))))

        told = done(_request("plug", f"disk={image},ro,name=data"))
        assert told == "data is plugged in" and vm.config.disks[0].file == str(image)
        assert done(_request("plug", "net=none")) == "net0 is plugged in"
        told = done(_request("unplug", "data"))
        assert told == "the guest was asked to give up data" and "data" in vm.plugged
        for request, words in (
            ({"do": "plug", "disk": {"file": 7}}, "disk"),
            ({"do": "plug"}, "net"),
            (_request("plug", "net=none,name=data"), "plugged in already"),
            (_request("plug", "disk=/none"), "/none"),
            (_request("unplug", "none"), "no disk, network card or folder 'none': data, net0"),
        ):
            with pytest.raises(ControlError, match=words):
                done(request)


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (("control", "none.sock"), 1, "there is no such socket; start a VM with understudy run"),
        (("control", "none.sock", "dance"), 2, "'dance': expected one of status, counts"),
        (("control", "none.sock", "save"), 2, "save needs a FILE"),
        (
            ("control", "none.sock", "plug", "floppy=a"),
            2,
            "plug: 'floppy=a': expected disk=FILE, net=KIND, share=FOLDER or",
        ),
        (("control", "none.sock", "plug", "disk=a,rw"), 2, "not 'rw'"),
        (("control", "none.sock", "stop", "now"), 2, "stop takes nothing more, got 'now'"),
        (("inspect", "rip"), 2, "say either --control SOCKET or --snapshot FILE"),
        (("inspect", "rip", "--snapshot", "/dev/null"), 1, "/dev/null: no plain file"),
        (("inspect", "rip", "--snapshot", "/none"), 1, "/none: No such file"),
        (("run", "--guest", "hello", "--control", "/none/x"), 1, "there is no folder /none"),
        (("run", "--guest", "hello", "--control", "/dev/null"), 1, "is no socket: choose another"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], status: int, line: str) -> None:
    found, out, err = understudy(*arguments)
    assert (found, out) == (status, "")
    assert line in err and err.count("\n") == 1
