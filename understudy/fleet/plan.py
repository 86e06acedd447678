"""A file of a host: what it says, checked.

    [host]
    pcpus = 2

    [pools.fast]
    pcpus = 1
    policy = "partition"

    [vm.web]
    guest = "cloud-amd64"
    pool = "fast"

Source: ours; docs/reference/hosts.md.
Invariants: a `HostPlan` can be carried out, as far as can be known without doing so; what cannot is
one line with the file, the key and what was expected.  Paths are relative to the file's folder.
"""

import contextlib
import difflib
import inspect
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from understudy import plain_file
from understudy.assembly import ROOM, check_names, check_shared, overhead_of
from understudy.config import Config
from understudy.fleet import keys
from understudy.fleet.keys import Key
from understudy.guests import debian
from understudy.guests.release import RELEASES
from understudy.overcommit.terms import SCAN, Terms
from understudy.quantities import bytes_of
from understudy.sched.house import DEFAULT
from understudy.sched.partition import Partition
from understudy.sched.policy import Policy, policy_of

GRACE_S: Final = 10.0
MOST_VMS: Final = 1024
MEGABYTE: Final = 1 << 20


class PlanError(ValueError):
    """The file is not as it should be; one line."""


@dataclass(frozen=True)
class VmPlan:
    """What one VM is to be."""

    name: str
    path: str
    """Its table, as one would write it."""
    config: Config
    guest: str | Path
    initrd: Path | None = None
    append: str = ""
    packages: tuple[str, ...] = ()
    command: str | None = None
    weight: float = 1
    cap: float | None = None
    pool: str = DEFAULT

    @property
    def has_agent(self) -> bool:
        """Whether it will take commands once it is up."""
        package = debian.PACKAGES.get(str(self.guest))
        is_linux = package is not None and package.linux
        return (is_linux or self.guest in RELEASES) and self.initrd is None


@dataclass(frozen=True)
class HostPlan:
    """What a host and its VMs are to be."""

    file: Path
    name: str
    pcpus: int
    ram: int
    engine: str
    clock: str
    policy: Policy
    pools: dict[str, dict[str, Any]]
    grace_s: float
    overcommit: Terms
    vms: tuple[VmPlan, ...]


def read(file: Path) -> HostPlan:
    """What the file says.  PlanError if it cannot be; OSError if there is no such file."""
    data = plain_file.read(file)
    try:
        told = tomllib.loads(data.decode())
        with contextlib.chdir(file.absolute().parent):
            return _host(file, told)
    except UnicodeDecodeError as problem:
        line = data[: problem.start].count(b"\n") + 1
        raise PlanError(f"{file}: line {line}: expected UTF-8") from None
    except tomllib.TOMLDecodeError as problem:
        words, _, place = str(problem).rpartition(" (at ")
        where = place.removesuffix(")") if words else "the file"
        raise PlanError(f"{file}: {where}: {words or problem}") from None
    except RecursionError:
        raise PlanError(f"{file}: too deep; expected tables of a host, pools and VMs") from None
    except ValueError as problem:
        raise PlanError(f"{file}: {problem}") from None


# --- tables ---


def _known(path: str, name: str, known: Iterable[str]) -> None:
    """ValueError with a name that is near, if this is none."""
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1)
    expected = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
    place = f"{path}: " if path else ""
    raise ValueError(f"{place}there is no key {name!r}; {expected}")


def _table(path: str, value: Any, known: dict[str, Key]) -> dict[str, Any]:
    """A table's values, as they are read, by the names of the keys."""
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a table, got {value!r}")
    found = {}
    for name, one in value.items():
        _known(path, name, known)
        try:
            found[name] = known[name].read(one)
        except (ValueError, OSError) as problem:
            raise ValueError(f"{path}.{name}: {problem}") from None
    return found


def _by_config(said: dict[str, Any], known: dict[str, Key]) -> dict[str, Any]:
    """The values that belong to fields of `Config`, by the names of those."""
    return {known[name].field: one for name, one in said.items() if known[name].field}


# --- the host ---


def _host(file: Path, told: dict[str, Any]) -> HostPlan:
    for name in told:
        _known("", name, ("host", "pools", "vm"))
    said = _table("host", told.get("host", {}), keys.HOST)
    common = {"clock": "wall"} | _by_config(said, keys.HOST)
    pcpus = said.get("pcpus", 1)
    pools = _pools(told.get("pools", {}), pcpus)
    left = pcpus - sum(pool["pcpus"] for pool in pools.values())
    policy = _scheduling("host", said)
    rooms = {DEFAULT: (left, policy)} | {
        name: (pool["pcpus"], pool["policy"]) for name, pool in pools.items()
    }
    vms = _vms(told.get("vm", {}), common)
    _check_pools(vms, rooms)
    beside = sum(overhead_of(vm.config) for vm in vms)
    wanted = sum(bytes_of(vm.config.memory) + vm.config.rom for vm in vms)
    needed = sum(bytes_of(vm.config.min_memory) for vm in vms) + beside
    ram = bytes_of(said["ram"]) if "ram" in said else wanted + beside + ROOM
    if needed > ram:
        raise ValueError(
            f"host.ram: expected at least {-(-needed // MEGABYTE)}M, which its VMs must have in "
            f"all, got {said['ram']}"
        )
    name = said.get("name") or _name_of(file)
    grace_s = said.get("grace", GRACE_S)
    terms = Terms(
        scan=said.get("scan", SCAN), swap=said.get("swap"), victims=said.get("victims", "random")
    )
    return HostPlan(
        file, name, pcpus, ram, common.get("engine", "dbt"), common["clock"], policy, pools,
        grace_s, terms, vms,
    )  # fmt: skip


def _name_of(file: Path) -> str:
    try:
        return keys.named(file.stem)
    except ValueError:
        raise ValueError("host.name: the file's name can be none, so say one") from None


def _pools(told: Any, pcpus: int) -> dict[str, dict[str, Any]]:
    if not isinstance(told, dict):
        raise ValueError(f"pools: expected tables like [pools.fast], got {told!r}")
    pools = {}
    for name, one in told.items():
        path = f"pools.{name}"
        try:
            keys.named(name)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None
        if name == DEFAULT:
            raise ValueError(f"{path}: this pool has what the others leave; say host.policy")
        said = _table(path, one, keys.POOL)
        if "pcpus" not in said:
            raise ValueError(f"{path}.pcpus: expected a number of pCPUs, and there is none")
        pools[name] = {"pcpus": said["pcpus"], "policy": _scheduling(path, said)}
    if (total := sum(pool["pcpus"] for pool in pools.values())) > pcpus:
        counts = ", ".join(f"pools.{name}.pcpus {one['pcpus']}" for name, one in pools.items())
        raise ValueError(f"{counts}: expected at most {pcpus} in all, as host.pcpus, got {total}")
    return pools


def _scheduling(path: str, said: dict[str, Any]) -> Policy:
    wish = said.get("policy", "share")
    try:
        policy = policy_of(wish)
        if "slice" not in said:
            return policy
        kind = type(policy)
        if "slice_ns" not in inspect.signature(kind).parameters:
            raise ValueError(f"{path}.slice: policy {wish} has none; leave it out")
        return kind(slice_ns=max(1, round(said["slice"] * 1e9)))  # type: ignore[call-arg]
    except ValueError as problem:
        words = str(problem)
        raise ValueError(words if words.startswith(path) else f"{path}.policy: {words}") from None
    except Exception as problem:  # somebody's file with a policy
        line = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise ValueError(f"{path}.policy: {wish} cannot be used: {line}") from None


# --- the VMs ---


def _vms(told: Any, common: dict[str, Any]) -> tuple[VmPlan, ...]:
    rows: list[tuple[str, Any, str | None]]
    if isinstance(told, dict):
        rows = [(f"vm.{name}", one, name) for name, one in told.items()]
    elif isinstance(told, list):
        rows = [(f"vm[{number}]", one, None) for number, one in enumerate(told, 1)]
    else:
        raise ValueError(f"vm: expected tables like [vm.web] or [[vm]], got {told!r}")
    if not 1 <= len(rows) <= MOST_VMS:
        raise ValueError(f"vm: expected 1 to {MOST_VMS} VMs, got {len(rows)}")
    vms = tuple(_vm(path, one, name, common) for path, one, name in rows)
    for name, count in Counter(vm.name for vm in vms).items():
        if count > 1:
            paths = " and ".join(f"{vm.path}.name" for vm in vms if vm.name == name)
            raise ValueError(f"{paths}: {name!r} is there {count} times; expected different names")
    return vms


def _vm(path: str, told: Any, name: str | None, common: dict[str, Any]) -> VmPlan:
    said = _table(path, told, keys.VM)
    name = said.get("name", name)
    if name is None:
        raise ValueError(f"{path}.name: expected a name, and there is none")
    try:
        keys.named(name)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None
    starts = [said[key] for key in ("guest", "kernel") if key in said]
    if len(starts) != 1:
        raise ValueError(f"{path}: expected one of guest and kernel, got {len(starts)}")
    if "guest" in said and "initrd" in said:
        raise ValueError(f"{path}.initrd: goes with kernel; a named guest brings its own")
    if "kernel" in said and "with" in said:
        raise ValueError(f"{path}.with: goes with guest; with kernel bring an initrd")
    config = _config(path, common | _by_config(said, keys.VM) | {"name": name})
    vm = VmPlan(
        name, path, config, starts[0], said.get("initrd"), said.get("append", ""),
        said.get("with", ()), said.get("exec"), said.get("weight", 1), said.get("cap"),
        said.get("pool", DEFAULT),
    )  # fmt: skip
    if vm.command is not None and not vm.has_agent:
        kernels = (name for name, one in debian.PACKAGES.items() if one.linux)
        linux = ", ".join([*kernels, *RELEASES])
        raise ValueError(f"{path}.exec: expected a guest that takes commands: {linux}")
    return vm


def _config(path: str, options: dict[str, Any]) -> Config:
    try:
        config = Config.of(**options)
        check_names(config)
        check_shared(config)
    except ValueError as problem:
        key, _, rest = str(problem).partition(" ")
        place = f"{path}.{key}: {rest}" if key in keys.VM else f"{path}: {problem}"
        raise ValueError(place) from None
    return config


def _check_pools(vms: Iterable[VmPlan], rooms: dict[str, tuple[int, Policy]]) -> None:
    used: Counter[str] = Counter()
    for vm in vms:
        place = f"{vm.path}.pool"
        if vm.pool not in rooms:
            near = difflib.get_close_matches(vm.pool, rooms, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(rooms)}"
            raise ValueError(f"{place}: there is no pool {vm.pool!r}; {hint}")
        pcpus, policy = rooms[vm.pool]
        if not pcpus:
            raise ValueError(
                f"{place}: pool {vm.pool!r} has no pCPU, the others have them all; "
                f"expected one of {', '.join(name for name, (n, _) in rooms.items() if n)}"
            )
        used[vm.pool] += vm.config.topology.count
        if isinstance(policy, Partition) and used[vm.pool] > pcpus:
            raise ValueError(
                f"{place}: policy partition gives each vCPU a pCPU of its own; pool {vm.pool!r} "
                f"has {pcpus}, expected at least {used[vm.pool]}"
            )
