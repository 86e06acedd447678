"""More Debians than there is memory: every checksum is right.  See `more_memory`."""

import os
import subprocess
import sys

import pytest

from tests.tree import ROOT
from tests.walls.more_memory import MoreMemory
from understudy.guests.entry import GuestError
from understudy.host import Host
from understudy.paging import Paging

MINUTES = os.environ.get("UNDERSTUDY_MEMORY_MINUTES", "10")


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("paging", Paging.ALL)
def test_three_on_a_host_for_one_and_a_half(paging: str) -> None:
    """The technique is another one in the middle."""
    with Host(pcpus=2, ram="208M") as host:
        try:
            many = MoreMemory(
                host, 3, "128M", 8, 70, paging=paging, table_memory="8M", balloon=True
            )
        except GuestError as problem:
            pytest.skip(f"no guest: {problem}")
        many.work(1, step_s=0.5)
        names = list(Paging.ALL)
        many.change(names[names.index(paging) - 1])
        many.work(1, step_s=0.5)
        assert host.stock.swap is not None and host.stock.swap.read
        print(many.report.row())


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.timeout(60 * float(MINUTES) * 16 + 3600)
@pytest.mark.parametrize("paging", Paging.ALL)
def test_eight_on_a_host_for_four_for_ten_minutes(paging: str) -> None:
    command = [sys.executable, "-m", "tests.walls.more_memory", "--paging", paging]
    for then in ("", next(name for name in Paging.ALL if name != paging)):
        subprocess.run([*command, "--minutes", MINUTES, "--then", then], cwd=ROOT, check=True)
