"""What is run in the guests: fixed work each, so that the time is the host's alone.

Source: sysbench(1), stress-ng(1), fio(1), iperf3(1), apt-get(8).
Invariants: a row does the same work in each place; what comes before and after it is not timed.
"""

from dataclasses import dataclass
from typing import Final

PACKAGES: Final = ("sysbench", "stress-ng", "fio", "iperf3")
"""Of Debian, which the image has beside what a whole Debian has."""
INSTALLED: Final = "hello"  # by the row for apt
SCRATCH: Final = "/dev/vdb"
SCRATCH_MB: Final = 256
GATEWAY, PEER = "10.0.2.2", "10.9.0.2"
PEER_PORT: Final = 5201
FIO: Final = (
    f"fio --name=row --filename={SCRATCH} --size={SCRATCH_MB}m --direct=1 --ioengine=libaio "
    "--randrepeat=1 --group_reporting --io_size={size}m"
)
IPERF: Final = "iperf3 --forceflush -n {size}M -c"
SERVER: Final = f"iperf3 --server --one-off --daemon --port {PEER_PORT}; sleep 1"


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    group: str
    size: int
    """How much, in `unit`."""
    unit: str
    line: str = ""
    """What the guest's shell is given; {size} and {port} are filled in.  Empty: the boot itself."""
    after: str = ""
    peer: str = ""
    """What a second guest is given first; empty: there is none."""

    @property
    def is_warmed(self) -> bool:
        """Whether a little of it is run first, so that no program is read from the disk later."""
        return self.group != "system"

    def scaled(self, scale: float) -> int:
        """The size, times so much; at least one."""
        return max(1, round(self.size * scale))

    def command(self, scale: float, port: int) -> str:
        """The line for the shell; `port` is that of the server on this computer."""
        return self.line.format(size=self.scaled(scale), port=port)


ROWS: Final = (
    Row("boot", "system", 1, "login prompt"),
    Row("sysbench-cpu", "compute", 2000, "events",
        "sysbench cpu --cpu-max-prime=10000 --events={size} --time=0 run"),
    Row("sysbench-memory", "compute", 4000, "MB",
        "sysbench memory --memory-block-size=1K --memory-total-size={size}M --time=0 run"),
    Row("stress-cpu", "compute", 300, "bogo ops", "stress-ng --cpu 1 --cpu-ops {size}"),
    Row("stress-switch", "compute", 40_000, "switches",
        "stress-ng --switch 1 --switch-ops {size}"),
    Row("fio-randread", "disk", 64, "MB in 4 KB",
        FIO + " --rw=randread --bs=4k --iodepth=32"),
    Row("fio-randwrite", "disk", 64, "MB in 4 KB",
        FIO + " --rw=randwrite --bs=4k --iodepth=32"),
    Row("fio-randread-1", "disk", 32, "MB in 4 KB, one at a time",
        FIO + " --rw=randread --bs=4k --iodepth=1"),
    Row("fio-read", "disk", 1024, "MB in 1 MB", FIO + " --rw=read --bs=1m --iodepth=8"),
    Row("fio-write", "disk", 1024, "MB in 1 MB", FIO + " --rw=write --bs=1m --iodepth=8"),
    Row("iperf-out", "network", 256, "MB by passt", f"{IPERF} {GATEWAY} -p {{port}}"),
    Row("iperf-in", "network", 256, "MB by passt", f"{IPERF} {GATEWAY} -p {{port}} --reverse"),
    Row("apt-install", "system", 1, "package",
        f"apt-get --yes install {INSTALLED}",
        after=f"apt-get --yes purge {INSTALLED} && apt-get clean"),
    Row("iperf-vms", "network", 256, "MB between two guests",
        f"{IPERF} {PEER} -p {PEER_PORT}", peer=SERVER),
    Row("iperf-vms-back", "network", 256, "MB between two guests",
        f"{IPERF} {PEER} -p {PEER_PORT} --reverse", peer=SERVER),
)  # fmt: skip


def select(only: str) -> list[Row]:
    """The rows of these names and groups, separated by commas; all if none is said."""
    if not only:
        return list(ROWS)
    words = only.split(",")
    known = {row.name for row in ROWS} | {row.group for row in ROWS}
    for word in words:
        if word not in known:
            raise ValueError(f"no row is called {word!r}; there are {', '.join(sorted(known))}")
    return [row for row in ROWS if row.name in words or row.group in words]
