"""Whole boots and all that is counted in them, as a table; `make boots` records it again.

What: each guest under each paging technique, from power-on to its own power-off in one piece, in
virtual time, with a line typed at its prompt (memtest86+, which never ends, for so many
instructions); the table is boots.json beside this file.
Source: none.  Invariants: of a VM only what every VM has is used: `go`, `counts`, the console, the
clock, and memory by gpa.  Nothing recorded depends on where the hypervisor's frames lie, nor on the
engine.  Whatever else a boot depends on (packages, what a guest is shown of this computer's CPU
features, how this computer leaves flags that the SDM leaves open) is recorded too.  Half of the
guests are shown nothing that not every computer has, so that their boots are the same everywhere;
the others are shown what the default model shows.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from understudy.devices.acpi_tables import BASE as RSDP_GPA
from understudy.guests import debian, loader
from understudy.guests.cache import Cache
from understudy.silicon import Native, host_features
from understudy.vcpu.cpu_features import FEATURES
from understudy.vcpu.cpu_model import CpuModel
from understudy.vm import VM

TABLE = Path(__file__).with_name("boots.json")
TECHNIQUES = ("ept", "vtlb", "lazy", "eager")
PROMPT = b"understudy# "
LINE = b"uname -a; ls -lR /etc /proc/self | wc; for i in 1 2 3; do date; done; poweroff\n"
UNCOUNTED = ("engine", "kicks")  # the engine's own, and how often the hypervisor asked
CHUNK = 1 << 24
SEED = bytes(range(1, 33))


class Setting(NamedTuple):
    """How a guest is run."""

    memory: str = "256M"
    cpu: str = "baseline"
    budget: int = 12_000_000_000  # instructions; more than any of them needs
    at_once: bytes = b""  # typed before it starts
    at_prompt: bytes = LINE
    line: str = ""  # the package of its user land


LINUX_64, LINUX_32 = Setting(line="busybox-static"), Setting(line="busybox-static-i386")
DEFAULT = "understudy"  # the CPU model
GUESTS = {
    "hello": Setting("16M"),
    "cloud-amd64": LINUX_64,
    "amd64": LINUX_64._replace(cpu=DEFAULT),
    "cloud-amd64-6.12": LINUX_64._replace(cpu=DEFAULT),
    "686": LINUX_32,
    "686-pae": LINUX_32._replace(cpu=DEFAULT),
    "memtest86+": Setting("16M", budget=2_000_000_000, at_once=b"\r"),
}


def versions(guest: str) -> dict[str, str]:
    """The packages that the guest is made of, and their versions; fetches what is missing."""
    debian.fetch(guest)
    names = [] if guest == "hello" else [guest, GUESTS[guest].line]
    return {name: str(Cache().manifest(name)["version"]) for name in names if name}


def features(guest: str) -> list[str]:
    """What the guest is shown because this computer's processor has it."""
    shown = CpuModel(host_features(), GUESTS[guest].cpu).shown
    return sorted(name for name in shown if FEATURES[name].host)


def flags_left_open() -> dict[str, int]:
    """What this computer leaves in undefined flags; a kernel that saves its flags has them in RAM.

    Makers differ.  Nothing else of a boot does: 686-pae's RAM has one word for another, EFLAGS.
    """
    all_set = 0x8D5
    return {
        "shl": Native("shl", 4)(0x1800_0000, 0, 4, 0)[1],
        "imul": Native("imul", 4)(0x7FFF_FFFF, 5, 0, all_set)[1],
        "div": Native("div", 4)(7, 0, 2, all_set)[1],
    }


def boot(guest: str, paging: str, engine: str = "dbt") -> dict[str, Any]:
    """Run it, and return all that is counted, as JSON would have it."""
    setting, fetched = GUESTS[guest], debian.fetch(guest)
    heard = bytearray()
    options = {"cpu": setting.cpu, "paging": paging, "engine": engine, "clock": "virtual"}
    with VM(setting.memory, **options) as vm:
        entry = loader.load(
            vm.memory,
            fetched.kernel,
            initrd=fetched.initrd,
            append=fetched.append,
            rsdp=RSDP_GPA,
            seed=SEED,
        )
        vm.enter(entry)

        def hear(data: bytes) -> None:
            was_prompted = PROMPT in heard
            heard.extend(data)
            if not was_prompted and PROMPT in heard:
                vm.console.send(setting.at_prompt)

        vm.console.on_output.append(hear)
        if setting.at_once:
            vm.console.send(setting.at_once)
        stop = vm.go(budget=setting.budget)
        counts = {name: n for name, n in vm.counts().items() if name not in UNCOUNTED}
        seen = {
            "end": str(stop.kind),
            "guest_ns": vm.clock.now(),
            "console_bytes": len(heard),
            "console_sha256": hashlib.sha256(heard).hexdigest(),
            "ram_sha256": ram_hash(vm.memory.read, vm.memory.size),
        }
        plain = json.loads(json.dumps(counts | seen))
    assert isinstance(plain, dict)
    return plain


def ram_hash(read: Callable[[int, int], bytes], size: int) -> str:
    """The hash of a guest's RAM in the order of its addresses (all of it lies below 3 GiB)."""
    digest = hashlib.sha256()
    for gpa in range(0, size, CHUNK):
        digest.update(read(gpa, min(CHUNK, size - gpa)))
    return digest.hexdigest()


def differences(expected: Any, got: Any, what: str = "") -> Iterator[str]:
    """A sentence for each count that is not as it was."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for name in [*expected, *(name for name in got if name not in expected)]:
            place = f"{what}[{name}]" if what else str(name)
            yield from differences(expected.get(name, 0), got.get(name, 0), place)
    elif expected != got:
        apart = ""
        if isinstance(expected, int) and isinstance(got, int):
            apart = f" ({got - expected:+d})"
        yield f"{what}: expected {expected}, got {got}{apart}."


def as_text(table: Any, depth: int = 4, indent: str = "") -> str:
    """JSON with a line for each count, so that people can read what a change has changed."""
    if depth == 0 or not isinstance(table, dict) or not table:
        return json.dumps(table, sort_keys=True)
    inside = indent + " "
    rows = [f"{inside}{json.dumps(k)}: {as_text(v, depth - 1, inside)}" for k, v in table.items()]
    return "{\n" + ",\n".join(rows) + "\n" + indent + "}" + ("\n" if not indent else "")


def load() -> dict[str, Any]:
    """The recorded table."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert isinstance(table, dict)
    return table


def reason_to_skip(table: dict[str, Any], guest: str) -> str | None:
    """Why this guest's boots cannot be as recorded; None if they must be."""
    recorded, here = table["packages"][guest], versions(guest)
    again = "record again with `make boots`"
    if here != recorded:
        return f"{guest} was recorded with another version of the package ({recorded}): {again}"
    if apart := sorted(set(table["features"][guest]) ^ set(features(guest))):
        return f"recorded on a processor that differs in {', '.join(apart)}: {again}"
    return None


def _timed(job: tuple[str, str, str]) -> tuple[dict[str, Any], float]:
    started = time.monotonic()
    return boot(*job), time.monotonic() - started


def main() -> None:
    """Record the table, or some of its rows."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--guest", action="append", choices=GUESTS, help="only these")
    parser.add_argument("--paging", action="append", choices=TECHNIQUES, help="only these")
    parser.add_argument("--engine", default="dbt", choices=("dbt", "reference"))
    parser.add_argument("--jobs", type=int, default=2, help="how many boots at once")
    parser.add_argument("--table", type=Path, default=TABLE, help="the file to write")
    chosen = parser.parse_args()
    guests = chosen.guest or list(GUESTS)
    jobs = [(g, p, chosen.engine) for g in guests for p in chosen.paging or TECHNIQUES]
    table: dict[str, Any] = {"flags_left_open": {}, "features": {}, "packages": {}, "boots": {}}
    if chosen.table.exists():
        table |= json.loads(chosen.table.read_text(encoding="utf-8"))
    if guests != list(GUESTS) and table["flags_left_open"] != flags_left_open():
        parser.error("the table is of a computer that leaves undefined flags otherwise: record all")
    table["flags_left_open"] = flags_left_open()
    for guest in guests:
        table["features"][guest] = features(guest)
        table["packages"][guest] = versions(guest)
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for (guest, paging, _), (counts, seconds) in zip(jobs, pool.map(_timed, jobs), strict=True):
            rows = table["boots"].setdefault(guest, {})
            changed = len(list(differences(rows.get(paging, {}), counts)))
            rows[paging] = counts
            instructions = counts["instructions"]
            print(f"{guest:17} {paging:6} {instructions:14,} instructions {seconds:6.1f} s, "
                  f"{changed} counts changed, ended by {counts['end']}", flush=True)  # fmt: skip
            chosen.table.write_text(as_text(table), encoding="utf-8")


if __name__ == "__main__":
    main()
