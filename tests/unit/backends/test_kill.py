"""A process that writes an image is killed at any moment: what was flushed is there.

Source: signal(7): SIGKILL.  The computer's page cache outlives the process, so this is about what
the process still held itself; for power failures see tests/property/test_power_loss.py.
"""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.backends.qcow2_file import CLUSTER, make
from understudy.backends.opening import open_disk
from understudy.disk import Disk

SECTORS = 64
STEP = 3 * CLUSTER // 512 // 4  # so that sectors lie in 48 clusters
KILLS = 6
WRITER = f"""
import sys
from understudy.backends.opening import open_disk
from understudy.disk import Disk
disk = open_disk(Disk(sys.argv[1]))
for n in range(int(sys.argv[2]), 1_000_000):
    disk.write(n % {SECTORS} * {STEP} * 512, n.to_bytes(8, "little") * 64)
    disk.flush()
    print(n, flush=True)
"""


def images(folder: Path) -> dict[str, Path]:
    size = SECTORS * STEP * 512
    raw, base, top = folder / "disk.img", folder / "base.img", folder / "top.qcow2"
    for path in (raw, base):
        path.write_bytes(bytes(size))
    make(top, size, {}, backing="base.img", backing_format="raw")
    return {"raw": raw, "qcow2": top}


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_what_was_flushed_survives_kill_9(kind: str, tmp_path: Path) -> None:
    if kind == "qcow2" and importlib.util.find_spec("understudy._images") is None:
        pytest.skip("the binding of imago is not compiled")
    image, chance = images(tmp_path)[kind], random.Random(1)
    first, flushed = 1, dict[int, int]()
    for _ in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(image), str(first)],
            stdout=subprocess.PIPE, text=True,
        ) as writer:  # fmt: skip
            assert writer.stdout is not None
            for _ in range(chance.randint(1, 60)):
                flushed[int(writer.stdout.readline()) % SECTORS] = first
                first += 1
            writer.kill()
            for line in writer.stdout.readlines():  # what it did until it died
                flushed[int(line) % SECTORS] = first
                first += 1
        disk = open_disk(Disk(str(image)))  # which checks the tables
        for sector, n in flushed.items():
            data = disk.read(sector * STEP * 512, 512)
            # One more may have been written, and not flushed.
            assert data in [
                m.to_bytes(8, "little") * 64 for m in (n, first) if m % SECTORS == sector
            ]
        disk.close()
