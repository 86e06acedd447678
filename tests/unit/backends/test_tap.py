"""A tap, in a network namespace of the test's own."""

import os
import subprocess
import sys

import pytest

from tests.tree import ROOT
from understudy.nic import Nic
from understudy.vm import VM


def in_namespace(module: str, *arguments: str) -> str:
    """What a module of the tests says where it may make a tap; skipped where nobody may."""
    try:
        able = subprocess.run(
            ["unshare", "--map-root-user", "--net", "sh", "-c",
             "ip tuntap add t mode tap && exec 3<>/dev/net/tun"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no unshare (util-linux) here")
    if able.returncode:
        pytest.skip(f"no tap can be made in a namespace here: {able.stderr.strip()}")
    done = subprocess.run(
        ["unshare", "--map-root-user", "--net", sys.executable, "-m", module, *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_tap_carries_frames_and_says_why_it_is_none() -> None:
    assert in_namespace("tests.unit.backends.tap_in_namespace") == "all is well\n"


def test_a_clone_has_none() -> None:
    with VM("16M", net=[Nic("none", name="a")]) as origin, origin.snapshot() as image:
        image.state["config"]["net"][0] |= {"kind": "tap", "tap": "t0"}
        (clone,) = image.fork()
        with clone:
            assert clone.config.net == (Nic("none", name="a"),)
