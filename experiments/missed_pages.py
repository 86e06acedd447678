"""A Debian that is told of a page that it misses runs another program meanwhile.

Claim: of two programs in one Debian on one vCPU, one reads pages that the host has swapped out, the
other computes. If KVM's asynchronous page faults are shown, Debian is told of the misses of its
programs, runs the other program until the page has come, and both are done sooner, by more than
half of the time that the pages take. If they are hidden, the vCPU waits for each page, and both
programs with it.

Source: Linux, Documentation/virt/kvm/x86/msr.rst (MSR_KVM_ASYNC_PF_EN); lecture, "Efficient
management of overcommitted guest-physical memory (3/4): memory reclamation".

Control: while nothing is swapped out, nothing is told, and both take the same time.

Note: a page takes 100 µs of virtual time. What Debian's kernel misses itself it waits for in either
case.
"""

import struct
from typing import TYPE_CHECKING, Any, Final

from understudy.guests.elf import MAGIC
from understudy.host import Host
from understudy.lab import Bar, Experiment, Row, Table, absent, every, true
from understudy.lab.bare import assemble
from understudy.linux import VM
from understudy.overcommit.terms import READ_NS, Terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AT, HEADERS, BITS = 0x40_0000, 120, 64
PAGES: Final = 512
SUM: Final = PAGES * (PAGES + 1) // 2
MEMORY: Final = 96 << 20
PROGRAM = (
    ("b8 09 00 00 00", "mov eax,9; mmap"),
    ("31 ff", "xor edi,edi"),
    ("be 00 00 20 00", "mov esi,200000h"),
    ("ba 03 00 00 00", "mov edx,3"),
    ("41 ba 22 00 00 00", "mov r10d,22h"),
    ("49 83 c8 ff", "or r8,0FFFFFFFFFFFFFFFFh"),
    ("45 31 c9", "xor r9d,r9d"),
    ("0f 05", "syscall"),
    ("49 89 c4", "mov r12,rax"),
    ("b9 01 00 00 00", "mov ecx,1"),
    ("48 89 08", "mov [rax],rcx; fill"),
    ("ff c1", "inc ecx"),
    ("48 05 00 10 00 00", "add rax,1000h"),
    ("81 f9 00 02 00 00", "cmp ecx,200h"),
    ("76 ed", "jbe -17; to fill"),
    ("b8 27 00 00 00", "mov eax,27h; getpid"),
    ("0f 05", "syscall"),
    ("89 c7", "mov edi,eax"),
    ("be 13 00 00 00", "mov esi,13h; SIGSTOP"),
    ("b8 3e 00 00 00", "mov eax,3Eh; kill"),
    ("0f 05", "syscall"),
    ("b8 39 00 00 00", "mov eax,39h; fork"),
    ("0f 05", "syscall"),
    ("85 c0", "test eax,eax"),
    ("75 0b", "jne +13; to parent"),
    ("b9 80 f0 fa 02", "mov ecx,2FAF080h"),
    ("ff c9", "dec ecx; spin"),
    ("75 fc", "jne -2; to spin"),
    ("eb 39", "jmp +59; to quit"),
    ("31 db", "xor ebx,ebx; parent"),
    ("b9 00 02 00 00", "mov ecx,200h"),
    ("49 03 1c 24", "add rbx,[r12]; sum"),
    ("49 81 c4 00 10 00 00", "add r12,1000h"),
    ("ff c9", "dec ecx"),
    ("75 f1", "jne -13; to sum"),
    ("53", "push rbx"),
    ("b8 3d 00 00 00", "mov eax,3Dh; wait4"),
    ("83 cf ff", "or edi,0FFFFFFFFh"),
    ("31 f6", "xor esi,esi"),
    ("31 d2", "xor edx,edx"),
    ("45 31 d2", "xor r10d,r10d"),
    ("0f 05", "syscall"),
    ("b8 01 00 00 00", "mov eax,1; write"),
    ("89 c7", "mov edi,eax"),
    ("48 89 e6", "mov rsi,rsp"),
    ("ba 08 00 00 00", "mov edx,8"),
    ("0f 05", "syscall"),
    ("b8 3c 00 00 00", "mov eax,3Ch; quit, exit"),
    ("31 ff", "xor edi,edi"),
    ("0f 05", "syscall"),
)  # fmt: skip
"""Fills 2 MBytes and stops itself; then one process adds them up, and another one computes."""


def program() -> bytes:
    """It as an ELF file for x86-64."""
    body = assemble(PROGRAM)
    header = struct.pack(
        "<4s12sHHIQQQIHHHHHH",
        MAGIC,
        b"\2\1\1",
        2,
        62,
        1,
        AT + HEADERS,
        64,
        0,
        0,
        64,
        56,
        1,
        0,
        0,
        0,
    )
    whole = HEADERS + len(body)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, AT, AT, whole, whole, 4096) + body


def told(vm: VM) -> int:
    """How often Debian says that it was interrupted because a page had come.

    It is asked until that is no more than the last time: to answer may take pages itself.
    """
    last, seen = -1, 0
    while seen != last:
        line = vm.run("cat /proc/interrupts | grep HYP:").output.split()
        last, seen = seen, int(line[1]) if line else 0
    return seen


def measure(kernel: str, is_shown: bool, is_out: bool) -> dict[str, Any]:
    """Both programs, from the moment at which the pages are out."""
    cpu = "understudy,+async_pf" if is_shown else "understudy"
    terms = Terms(is_always=True, scan=0, looks_up=False, balloons=False)
    with Host(pcpus=1, ram="256M", overcommit=terms) as host:
        vm = host.linux(kernel, memory=MEMORY, cpu=cpu, name="vm")
        vm.write_file("/tmp/both", program(), mode=0o755)
        pid = vm.run("/tmp/both > /tmp/sum 2>&1 < /dev/null & sleep 0.1; echo $!").output.strip()
        swap = host.stock.swap
        assert swap is not None
        if is_out:
            swap.reclaim(vm.memory.p2m, vm.memory.pages)
        vm.run(f"sleep 0.1; kill -0 {pid}; cat /tmp/sum").check()  # what that needs is back
        counts = vm.vcpus[0].kvm.async_pf.state.counts
        reads, before, began = swap.read, counts.copy(), vm.clock.now()
        vm.run(f"kill -CONT {pid}; while [ ! -s /tmp/sum ]; do usleep 1000; done").check()
        ended, reads, now = vm.clock.now(), swap.read - reads, counts - before
        return {
            "sum": int.from_bytes(vm.read_file("/tmp/sum"), "little"), "reads": reads,
            "told": now["not present told"], "waited": now["waited instead"],
            "seen": told(vm), "ready": counts["ready told"],
            "guest_us": (ended - began) // 1000,
        }  # fmt: skip


def name(row: Row) -> str:
    """Which point it is."""
    shown = "shown" if row["is_shown"] else "hidden"
    return f"{row['kernel']}, {shown}, {'swapped out' if row['is_out'] else 'all there'}"


def check(table: Table) -> list[Bar]:
    """What was told, and what it is good for."""

    def hidden(row: Row) -> Row:
        return table.where(kernel=row["kernel"], is_shown=False, is_out=row["is_out"])[0]

    out, there = table.where(is_shown=True, is_out=True), table.where(is_shown=True, is_out=False)
    spared = [(hidden(row)["guest_us"] - row["guest_us"], row["reads"]) for row in out]
    took = ", ".join(f"{us} µs for {reads} pages" for us, reads in spared)
    return [
        every("the sum is right", table, lambda r: r["sum"], lambda r: SUM, name=name),
        every("more than three quarters of what is read are told", out,
              lambda r: 4 * r["told"] > 3 * r["reads"] > 2 * PAGES, lambda r: True, name=name),
        every("each is told as ready once, and Debian counts as many interrupts", out,
              lambda r: r["seen"] if r["ready"] >= r["told"] else None, lambda r: r["ready"],
              name=name),
        true("both are done sooner, by more than half of what the pages take",
             all(us > reads * READ_NS // 2000 for us, reads in spared) if spared else None, took),
        every("hidden, nothing is told", table.where(is_shown=False),
              lambda r: (r["told"], r["waited"], r["seen"]), lambda r: (0, 0, 0), name=name),
        absent(every("with all pages there nothing is told, and it takes as long", there,
                     lambda r: (r["told"], abs(r["guest_us"] - hidden(r)["guest_us"]) < 5000),
                     lambda r: (0, True), name=name)),
    ]  # fmt: skip


def draw(table: Table, figure: "Figure") -> None:
    """How long both take."""
    from understudy.lab.figure import bars

    rows = [row for row in table if row["is_out"]]
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    series = {
        word: [row["guest_us"] for row in rows if row["is_shown"] == is_shown]
        for word, is_shown in (("hidden", False), ("shown", True))
    }
    bars(figure.add_subplot(), kernels, series, "µs until both programs are done")


EXPERIMENT = Experiment(
    measure=measure,
    guest="unmodified Debian with two programs on one vCPU",
    sweep={
        "kernel": ["cloud-amd64", "cloud-amd64-6.12"], "is_shown": [False, True],
        "is_out": [True, False],
    },
    quick={"kernel": ["cloud-amd64"]},
    slide=37,
    check=check,
    draw=draw,
    columns=["kernel", "is_shown", "is_out", "reads", "told", "waited", "seen", "guest_us"],
)  # fmt: skip
