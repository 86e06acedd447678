"""A driver that knows the hypervisor leaves the guest once for a request, not once for a byte.

Claim: at the operation level, where a guest's driver treats a device "as usual", exits grow with
the bytes: a serial port takes at least one for each. At the device-driver level, where the guest's
driver hands whole requests to the hypervisor, they grow with the requests, whatever their size.

Source: lecture, "Virtualizing I/O activity": at the device driver interface ("a guest driver simply
redirects requests to the VMM using traps"), at the operation-level interface ("performance issues
(frequent traps)").

Control: requests of 4 KB instead of 64 KB take as many exits each; a serial port's driver has no
requests, and is not within the bound.

Note: an unmodified Debian kernel writes zeros to a virtio disk, past its page cache, and to a
16550. Counted is the difference between two lengths, so what a command costs by itself is in none
of the numbers.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from understudy.lab import Bar, Experiment, Row, Table, control, every
from understudy.lab.linux_session import APPEND, MEMORY, spend
from understudy.lab.techniques import since
from understudy.linux import VM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIB: Final = 1024
UNITS: Final = {"driver, 64 KB": 64 * KIB, "driver, 4 KB": 4 * KIB, "operation": 1}
"""What is written at once, in bytes."""
COMMANDS: Final = {
    "driver, 64 KB": "dd if=/dev/zero of=/dev/vda bs=64k count=$(({n} / 64)) oflag=direct",
    "driver, 4 KB": "dd if=/dev/zero of=/dev/vda bs=4k count=$(({n} / 4)) oflag=direct",
    "operation": "dd if=/dev/zero of=/dev/ttyS0 bs=1k count={n}",
}
FEW: Final = 64  # KiB
DISK_BYTES: Final = 64 << 20
MOST: Final = 3  # exits for a request: the kick, the interrupt's end, now and then a timer
TIMERS: Final = 2  # that come with time, in one of the two commands and not in the other
TIMER_EXITS: Final = 3  # for each: it is due, its interrupt ends, the next is set


def measure(kernel: str, level: str, kib: int) -> dict[str, Any]:
    """Exits for so many KiB at this level."""
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk.img"
        with disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        with VM.linux(kernel, memory=MEMORY, append=APPEND, disks=[str(disk)]) as vm:
            short, long = (COMMANDS[level].format(n=n) + " 2>/dev/null" for n in (FEW, FEW + kib))
            vm.run(short).check()  # what is done once is done now
            few, many = spend(vm, short), spend(vm, long)
    found = since(many, few)
    kicks = found["exits"].get("EPT_VIOLATION", 0)
    return {"exits": found["all_exits"], "kicks": kicks, "bytes": kib * KIB}


def check(table: Table) -> list[Bar]:
    """Exits by bytes there, by requests here."""
    drivers = [row for row in table.rows if row["level"] != "operation"]
    return [
        every("operation level: at least one exit for each byte", table.where(level="operation"),
              lambda r: r["exits"] >= r["bytes"], lambda r: True, name=name),
        every(f"driver level: one to {MOST} exits for each request, and {TIMERS} timers", drivers,
              lambda r: requests(r) <= r["exits"] <= most(requests(r)), lambda r: True,
              name=name),
        every("driver level: one access to a register for each request, whatever its size",
              drivers, lambda r: r["kicks"], requests, name=name),
        control("a serial port is not at the driver level", every(
              "", table.where(level="operation"),
              lambda r: r["exits"] / (r["bytes"] / UNITS["driver, 64 KB"]) <= MOST,
              lambda r: True, name=name)),
    ]  # fmt: skip


def most(count: float) -> float:
    """Exits for so many requests, and what comes with time meanwhile."""
    return MOST * count + TIMERS * TIMER_EXITS


def requests(row: Row) -> float:
    """How often something was written."""
    return float(row["bytes"] / UNITS[row["level"]])


def name(row: Row) -> str:
    """A point in words."""
    return f"{row['kib']} KiB, {row['level']}"


def draw(table: Table, figure: "Figure") -> None:
    """Exits by level, for each length."""
    from understudy.lab.figure import bars

    lengths, levels = table.values("kib"), table.values("level")

    def exits(kib: int, level: str) -> float | None:
        rows = table.where(kib=kib, level=level)
        return rows[0]["exits"] if rows else None

    series = {level: [exits(kib, level) for kib in lengths] for level in levels}
    bars(figure.add_subplot(), [f"{kib} KiB" for kib in lengths], series, "exits")


EXPERIMENT = Experiment(
    measure=measure,
    guest="an unmodified Debian kernel with Debian's busybox, a virtio disk and a 16550",
    sweep={"kernel": ["cloud-amd64"], "level": list(COMMANDS), "kib": [64, 256, 1024]},
    quick={"kib": [64]},
    columns=["level", "kib", "exits", "kicks"],
    slide=42,
    check=check,
    draw=draw,
)
