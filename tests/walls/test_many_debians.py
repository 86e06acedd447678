"""Debians share a host: each answers in time, whatever the others do.  See `many_debians`."""

import os
import subprocess
import sys

import pytest

from tests.tree import ROOT
from tests.walls.many_debians import ManyDebians
from understudy.guests.entry import GuestError
from understudy.host import Host

MINUTES = os.environ.get("UNDERSTUDY_DEBIANS_MINUTES", "10")


@pytest.mark.real_guest
def test_eight_answer_while_two_compute_and_two_crash() -> None:
    with Host(pcpus=2, ram="1300M", clock="virtual") as host:
        try:
            many = ManyDebians(host, 8, 2, copies=True)
        except GuestError as problem:
            pytest.skip(f"no guest: {problem}")
        free = host.frames.free_count
        for _ in range(2):
            many.minute(periods=2, seconds=0.5)
        assert not many.report.late
        assert (len(many.report.waits), many.report.crashes) == (2 * 2 * 8, 2)
        assert host.frames.free_count == free
        many.close()


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.timeout(60 * float(MINUTES) + 1800)
@pytest.mark.parametrize("clock", ["wall", "virtual"])
def test_thirty_two_answer_for_ten_minutes(clock: str) -> None:
    command = [sys.executable, "-m", "tests.walls.many_debians", "--clock", clock]
    subprocess.run([*command, "--minutes", MINUTES], cwd=ROOT, check=True)
