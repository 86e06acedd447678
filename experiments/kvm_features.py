"""An unmodified kernel that knows its hypervisor leaves it less often, feature by feature.

Claim: what KVM offers its guests, Debian's kernels use as they are. With the clock, reading the
time exits never; with the end of an interrupt in memory, an interrupt takes one exit less; a vCPU
that is away is not interrupted to flush its TLB; who spins for a lock halts until he is kicked; who
may poll, halts less often; and the time that a vCPU had no processor is told, not guessed.

Source: lecture, "Para-virtualization"; Linux, Documentation/virt/kvm/x86/cpuid.rst, msr.rst,
hypercalls.rst.

Control: with the feature hidden (`--cpu -feature`) its own count is back, and Debian does not use
it; CPUID exits, which no feature is about, stay within a few.

Note: exits of the workload's own kind: port accesses (of the ACPI timer) for 200 readings of
/proc/uptime, with tsc=unstable; writes to MSRs for 40 sleeps; for 400 changes of a page's rights in
a process of two threads, writes to MSRs, which send interrupts to the other vCPU; hypercalls for
2,000 locks of a byte of a file by each of two threads, which take one lock of the kernel's; HLT for
40 short sleeps. Where two vCPUs are there, they share one pCPU, in slices of 0.5 ms, and PAUSE
loops do not exit, which would have the same effect. What a lock costs in all is not among the
counts: Debian's locks are fair queues with the feature, and without it none. Asynchronous page
faults are about memory that is not there: `missed_pages` counts them.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from understudy.host import Host
from understudy.lab import Bar, Experiment, Row, Table, control, every, true
from understudy.lab.bare import assemble
from understudy.lab.spinners import spinning
from understudy.linux import VM
from understudy.sched.share import Share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KERNEL = "cloud-amd64"
BITS = 64
SLICE_NS = 500_000
AT, HEADERS, ROOM = 0x40_0000, 120, 0x4000
PROGRAM = (
    ("48 8b 5c 24 10", "mov rbx,[rsp+10h]"),
    ("0f b6 1b", "movzx ebx,byte [rbx]"),
    ("48 8b 7c 24 08", "mov rdi,[rsp+8]"),
    ("31 f6", "xor esi,esi"),
    ("b8 02 00 00 00", "mov eax,2"),
    ("0f 05", "syscall"),
    ("41 89 c4", "mov r12d,eax"),
    ("c6 04 25 10 21 40 00 01", "mov byte [402110h],1"),
    ("bd f4 01 00 00", "mov ebp,1F4h"),
    ("48 83 04 25 08 21 40 00 02", "add qword [402108h],2"),
    ("e8 b3 00 00 00", "call 00000000000000E7h"),
    ("ff cd", "dec ebp"),
    ("75 ee", "jne -16"),
    ("bf 01 00 00 00", "mov edi,1"),
    ("e8 ba 00 00 00", "call 00000000000000FCh"),
    ("b8 38 00 00 00", "mov eax,38h"),
    ("bf 00 0f 05 00", "mov edi,50F00h"),
    ("be 00 40 40 00", "mov esi,404000h"),
    ("31 d2", "xor edx,edx"),
    ("45 31 d2", "xor r10d,r10d"),
    ("45 31 c0", "xor r8d,r8d"),
    ("0f 05", "syscall"),
    ("85 c0", "test eax,eax"),
    ("74 64", "je +102"),
    ("f3 90", "pause"),
    ("83 3c 25 00 20 40 00 00", "cmp dword [402000h],0"),
    ("74 f4", "je -10"),
    ("80 fb 6c", "cmp bl,6Ch"),
    ("74 3c", "je +62"),
    ("bd c8 00 00 00", "mov ebp,0C8h"),
    ("b8 0a 00 00 00", "mov eax,0Ah"),
    ("bf 00 10 40 00", "mov edi,401000h"),
    ("be 00 10 00 00", "mov esi,1000h"),
    ("ba 01 00 00 00", "mov edx,1"),
    ("0f 05", "syscall"),
    ("b8 0a 00 00 00", "mov eax,0Ah"),
    ("ba 03 00 00 00", "mov edx,3"),
    ("0f 05", "syscall"),
    ("c6 04 25 00 10 40 00 01", "mov byte [401000h],1"),
    ("ff cd", "dec ebp"),
    ("75 d2", "jne -44"),
    ("b8 e7 00 00 00", "mov eax,0E7h"),
    ("31 ff", "xor edi,edi"),
    ("0f 05", "syscall"),
    ("bd d0 07 00 00", "mov ebp,7D0h"),
    ("e8 31 00 00 00", "call 00000000000000E7h"),
    ("ff cd", "dec ebp"),
    ("75 f7", "jne -7"),
    ("b8 3c 00 00 00", "mov eax,3Ch"),
    ("31 ff", "xor edi,edi"),
    ("0f 05", "syscall"),
    ("bf 02 00 00 00", "mov edi,2"),
    ("e8 2f 00 00 00", "call 00000000000000FCh"),
    ("c7 04 25 00 20 40 00 01 00 00 00", "mov dword [402000h],1"),
    ("80 fb 6c", "cmp bl,6Ch"),
    ("74 cf", "je -47"),
    ("80 3c 25 00 10 40 00 00", "cmp byte [401000h],0"),
    ("eb f6", "jmp -8"),
    ("b8 48 00 00 00", "mov eax,48h"),
    ("44 89 e7", "mov edi,r12d"),
    ("be 06 00 00 00", "mov esi,6"),
    ("ba 00 21 40 00", "mov edx,402100h"),
    ("0f 05", "syscall"),
    ("c3", "ret"),
    ("48 89 3c 25 08 20 40 00", "mov [402008h],rdi"),
    ("b8 cb 00 00 00", "mov eax,0CBh"),
    ("31 ff", "xor edi,edi"),
    ("be 08 00 00 00", "mov esi,8"),
    ("ba 08 20 40 00", "mov edx,402008h"),
    ("0f 05", "syscall"),
    ("c3", "ret"),
)  # fmt: skip
FLUSH, LOCK = "/tmp/mates f", "/tmp/mates l"
"""Two threads, a vCPU each; the first changes a page's rights while the other reads the page, or
both lock a byte of a file of which 500 bytes are locked, one by one."""


def mates() -> bytes:
    """The program as an ELF file for x86-64."""
    body = assemble(PROGRAM)
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, AT + HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    whole = HEADERS + len(body)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0, AT, AT, whole, ROOM, 4096)
    return identity + header + segment + body


class Case(NamedTuple):
    """One feature: what Debian does that it is for, and how one sees that Debian uses it."""

    workload: str
    counts: str  # the exits that it is about
    used: Callable[[VM], int]
    with_it: str  # a CPU model
    without: str
    append: str = ""
    cpus: int = 0  # on a pCPU that they share; 0: one of its own
    has_neighbor: bool = False


def _sleeps(us: int) -> str:
    return f"i=0; while [ $i -lt 40 ]; do usleep {us}; i=$((i+1)); done"


def _counted(name: str) -> Callable[[VM], int]:
    return lambda vm: sum(vcpu.kvm.state.counts[name] for vcpu in vm.vcpus)


def _steal(vm: VM) -> int:
    """In ticks of 4 ms, by Debian's own count."""
    return int(vm.run("head -1 /proc/stat").output.split()[8])


SOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
BUSY = "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done"
UPTIME = "i=0; while [ $i -lt 200 ]; do read x < /proc/uptime; i=$((i+1)); done"
CASES = {
    "clocksource": Case(
        UPTIME, "IO_INSTRUCTION", lambda vm: int("kvm-clock" in vm.run(f"cat {SOURCE}").output),
        "understudy", "understudy,-clocksource", append="tsc=unstable",
    ),
    "pv_eoi": Case(_sleeps(3000), "WRMSR", _counted("ended in memory"),
                   "understudy,+pv_eoi", "understudy"),
    "steal_time": Case(BUSY, "WRMSR", _steal, "understudy,+steal_time",
                       "understudy,-steal_time", cpus=1, has_neighbor=True),
    "pv_tlb_flush": Case(FLUSH, "WRMSR", _counted("flushes left"),
                         "understudy,+pv_tlb_flush", "understudy,+steal_time", cpus=2),
    "pv_unhalt": Case(LOCK, "VMCALL", _counted("kicks"),
                      "understudy,+pv_unhalt", "understudy,+steal_time", cpus=2),
    "poll_control": Case(
        _sleeps(50), "HLT", lambda vm: sum(not vcpu.kvm.state.poll for vcpu in vm.vcpus),
        "understudy,+poll_control", "understudy",
    ),
}  # fmt: skip
FORCE = {("poll_control", True): "cpuidle_haltpoll.force=1"}
"""Debian polls where its hypervisor says that a vCPU has a pCPU to itself, or where a user does."""
FEWER = ("clocksource", "pv_eoi", "pv_tlb_flush", "poll_control")
SAME = 8  # CPUID exits that may come of processes, which begin earlier or later


@contextmanager
def _guest(feature: str, is_shown: bool) -> Iterator[VM]:
    """A Debian with this feature or without, at its prompt."""
    case = CASES[feature]
    append = " ".join(filter(None, (case.append, FORCE.get((feature, is_shown), ""))))
    options: dict[str, Any] = {
        "memory": "128M", "append": append, "cpu": case.with_it if is_shown else case.without,
    }  # fmt: skip
    if not case.cpus:
        with VM.linux(KERNEL, **options) as vm:
            yield vm
        return
    policy = Share(slice_ns=SLICE_NS)
    with (
        Host(pcpus=1, ram="1G", policy=policy, yields=False) as host,
        host.linux(KERNEL, cpus=case.cpus, **options) as vm,
    ):
        if case.has_neighbor:
            vm.wait_for_prompt()
            with spinning(host, "neighbor"):
                yield vm
        else:
            yield vm


def measure(feature: str, is_shown: bool) -> dict[str, Any]:
    """The workload's exits, and whether Debian uses the feature."""
    case = CASES[feature]
    with _guest(feature, is_shown) as vm:
        vm.write_file("/tmp/mates", mates(), mode=0o755)
        before, used, began = vm.counts()["exits"], case.used(vm), vm.clock.now()
        vm.run(case.workload)
        after, ended = vm.counts()["exits"], vm.clock.now()
        exits = {name: n - before.get(name, 0) for name, n in after.items()}
        return {
            "counted": case.counts, "exits": exits.get(case.counts, 0),
            "used": case.used(vm) - (0 if feature in ("clocksource", "poll_control") else used),
            "cpuid": exits["CPUID"], "guest_us": (ended - began) // 1000,
        }  # fmt: skip


def check(table: Table) -> list[Bar]:
    """Each beside itself without it."""
    shown, hidden = table.where(is_shown=True), table.where(is_shown=False)

    def other(row: Row) -> Row:
        return table.where(feature=row["feature"], is_shown=not row["is_shown"])[0]

    fewer = [row for row in shown if row["feature"] in FEWER]
    away = [row for row in shown if row["feature"] == "pv_tlb_flush"]
    eoi = [row for row in shown if row["feature"] == "pv_eoi"]
    clock = [row for row in hidden if row["feature"] == "clocksource"]
    return [
        every("Debian uses each feature that is shown", shown,
              lambda r: r["used"] > 0, lambda r: True, name=name),
        every("and none that is hidden", hidden, lambda r: r["used"], lambda r: 0, name=name),
        every("it takes fewer exits with it", fewer,
              lambda r: r["exits"] < other(r)["exits"], lambda r: True, name=name),
        every("an interrupt that is ended in memory takes one exit less", eoi,
              lambda r: abs(other(r)["exits"] - r["exits"] - r["used"]) <= SAME, lambda r: True,
              name=name),
        every("without the clock each reading of the time takes an exit", clock,
              lambda r: r["exits"] - other(r)["exits"] >= 200, lambda r: True, name=name),
        every("a lock's waiter is kicked by a hypercall for each time that it halts",
              [row for row in shown if row["feature"] == "pv_unhalt"],
              lambda r: r["exits"], lambda r: r["used"], name=name),
        every("who need not wait for a vCPU that is away takes less guest time", away,
              lambda r: r["guest_us"] < other(r)["guest_us"], lambda r: True, name=name),
        control("exits that a feature is not about go with it",
                true("CPUID", any(abs(row["cpuid"] - other(row)["cpuid"]) > SAME for row in shown
                                  if row["feature"] not in ("pv_unhalt", "pv_tlb_flush")),
                     "they stay")),
    ]  # fmt: skip


def name(row: Row) -> str:
    """A row in words."""
    return f"{row['feature']} {'shown' if row['is_shown'] else 'hidden'}"


def draw(table: Table, figure: "Figure") -> None:
    """The exits that each feature is about."""
    from understudy.lab.figure import bars

    names = list(table.values("feature"))
    series = {
        word: [table.where(feature=one, is_shown=is_shown)[0]["exits"] for one in names]
        for word, is_shown in (("hidden", False), ("shown", True))
    }
    bars(figure.add_subplot(), names, series, "exits of the workload's own kind")


EXPERIMENT = Experiment(
    measure=measure,
    guest="unmodified Debian (cloud-amd64) with Debian's busybox",
    sweep={"feature": list(CASES), "is_shown": [False, True]},
    columns=["feature", "is_shown", "counted", "exits", "used", "cpuid", "guest_us"],
    slide=50,
    check=check,
    draw=draw,
)
