"""Guests that write disks with fio, killed at any moment: what was flushed is there.

Source: fio(1), "verify"; qemu-img(1), "check".  For power failures of the computer itself see
tests/property/test_power_loss.py.
"""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.guests import fio_rounds
from tests.guests.fetched import fetched
from tests.tree import ROOT
from understudy.backends.qcow2_new import create
from understudy.linux import VM

pytestmark = [
    pytest.mark.real_guest,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img (qemu-utils) here"),
]
KILLS, KILLS_CROWDED = 30, 8
LEAKED = 3  # qemu-img check: clusters that nobody uses, and no error


def snapshot(folder: Path) -> Path:
    """A VM with fio, to which disks may come."""
    fetched("cloud-amd64")
    file = folder / "vm.snapshot"
    with VM.linux("cloud-amd64", packages=["fio"], memory="1G", hotplug=True) as vm:
        vm.run("fio --version").check()
        with vm.snapshot() as image:
            image.write(file)
    return file


@pytest.mark.parametrize(("kills", "host"), [(KILLS, ""), (KILLS_CROWDED, "640M")])
def test_what_fio_has_flushed_survives_kill_9(tmp_path: Path, kills: int, host: str) -> None:
    """On a computer of its own, and on a host that has more memory in use than it has."""
    chance, file = random.Random(1), snapshot(tmp_path)
    raw, base, top = tmp_path / "raw.img", tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    with raw.open("wb") as new:
        new.truncate(fio_rounds.DISK_MB << 20)
    create(base, fio_rounds.DISK_MB << 20)
    create(top, fio_rounds.DISK_MB << 20, base)
    known: dict[int, int] = {}
    next_round, checked, leaks = 1, 0, 0
    for kill in range(kills + 1):
        said = ",".join(f"{region}:{number}" for region, number in known.items())
        command = [sys.executable, "-m", "tests.guests.fio_rounds", str(file), str(next_round),
                   said, str(raw), str(top), *([host] if host else [])]  # fmt: skip
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as guest:
            assert guest.stdout is not None and guest.stderr is not None
            line = guest.stdout.readline()
            if line != f"checked {len(known)}\n":
                guest.kill()
                raise AssertionError(f"after {kill} kills: {line}{guest.stderr.read()}")
            checked += len(known)
            lines, took = [], 1.0
            if kill < kills:
                for _ in range(2 * chance.randint(1, 3)):
                    began = time.monotonic()
                    lines.append(guest.stdout.readline())
                    took = time.monotonic() - began
                lines.append(guest.stdout.readline())  # one more has begun
                time.sleep(chance.random() * took)
            guest.kill()
            lines += guest.stdout.readlines()
        for word, number in (one.split() for one in lines if one.endswith("\n")):
            region, next_round = int(number) % fio_rounds.REGIONS, int(number) + 1
            known.pop(region, None)  # what is under way may be the old and the new
            if word == "flushed":
                known[region] = int(number)
        done = subprocess.run(
            ["qemu-img", "check", str(top)], capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, LEAKED), done.stdout + done.stderr
        leaks += done.returncode == LEAKED
    print(f"{kills} kills, {next_round - 1} rounds, {checked} regions checked, {leaks} with leaks")
    assert checked > kills
