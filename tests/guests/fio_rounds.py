"""What `test_fio_and_kill_9.py` starts and kills: a guest whose fio checks and writes two disks.

    python -m tests.guests.fio_rounds SNAPSHOT FIRST KNOWN RAW QCOW2 [RAM]

SNAPSHOT is of a VM with fio and without a disk.  KNOWN says which round wrote each region last, as
REGION:ROUND,…; they are checked before anything else.  Then come rounds from FIRST on, each of
which writes a region of both disks anew, and says so before it begins and when it was flushed.
RAM: of a host on which there is a neighbor that needs all its memory all the time, so that the
guest's is swapped out and in meanwhile.
"""

import sys
from contextlib import ExitStack
from pathlib import Path

from tests.matrix import programs as p
from tests.matrix.test_overcommit import WALK
from understudy.disk import Disk
from understudy.host import Host
from understudy.linux import VM

REGIONS = 8
REGION_MB = 1
DISK_MB = 16
NEIGHBOR = 384 << 20
SWAPPED = 1000  # frames, before anything is written
NAMES = ("vda", "vdb")
DISK = "--direct=1 --ioengine=libaio --iodepth=8 --bs=4k"
PLUGGED = "for n in $(seq 300); do [ -b /dev/vda ] && [ -b /dev/vdb ] && break; sleep 0.1; done"


def section(name: str, region: int, number: int, way: str) -> str:
    """One job of fio: a region with the pattern of a round, which says where it lies, too."""
    return (
        f"--name={name}-{region} --filename=/dev/{name} --size={REGION_MB}m "
        f"--offset={2 * region * REGION_MB}m --verify=pattern "
        f"--verify_pattern=0x{number:08x}%o --verify_fatal=1 {way}"
    )


def writing(number: int) -> str:
    """A round: all of a region in random order, with flushes on the way and at the end."""
    way = f"--rw=randwrite --randseed={number} --do_verify=0 --fdatasync=32 --end_fsync=1"
    jobs = [section(name, number % REGIONS, number, f"{way} {DISK}") for name in NAMES]
    return f"fio --output=/tmp/said {' '.join(jobs)} || {{ tail -5 /tmp/said; false; }}"


def checking(known: dict[int, int]) -> str:
    """fio reads all regions that are known, and looks for what was written there."""
    jobs = [
        section(name, region, number, f"--rw=read --stonewall {DISK}")
        for name in NAMES for region, number in known.items()
    ]  # fmt: skip
    return f"fio --output=/tmp/said {' '.join(jobs)} || {{ tail -5 /tmp/said; false; }}"


def crowded(snapshot: Path, host: Host) -> VM:
    """Beside a neighbor, and with frames swapped out."""
    vm = VM.restore(snapshot, host=host)
    neighbor = host.vm(NEIGHBOR, name="neighbor")
    p.start(neighbor, WALK, rsi=NEIGHBOR, rdx=1 << 40)
    host.run(until=lambda: host.stock.swap is not None and host.stock.swap.written > SWAPPED)
    return vm


def main(snapshot: str, first: str, said: str, raw: str, qcow2: str, ram: str = "") -> None:
    """Until it is killed."""
    known = dict(map(int, one.split(":")) for one in said.split(",") if one)
    with ExitStack() as stack:
        if ram:
            vm = crowded(Path(snapshot), stack.enter_context(Host(pcpus=1, ram=ram)))
        else:
            vm = stack.enter_context(VM.restore(Path(snapshot)))
        for file, kind in ((raw, "raw"), (qcow2, "qcow2")):
            vm.plug(Disk(file, format=kind))
        vm.run(PLUGGED).check()
        if known:
            vm.run(checking(known)).check()
        print("checked", len(known), flush=True)
        for number in range(int(first), 1 << 31):
            print("begins", number, flush=True)
            vm.run(writing(number)).check()
            print("flushed", number, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
