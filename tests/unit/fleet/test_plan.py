"""A file of a host: what it may say, and the one line that says what is wrong."""

from pathlib import Path

import pytest

from tests.tree import ROOT
from understudy.cli import main
from understudy.config import Config, fields, option_of
from understudy.execution import Execution
from understudy.fleet import keys, plan
from understudy.fleet.plan import HostPlan, PlanError
from understudy.guests import hello
from understudy.host import Host
from understudy.overcommit.terms import Terms

GOOD = """
[host]
name = "house"
pcpus = 4
ram = "1G"
grace = "3s"
scan = 100
swap = "2G"
victims = "clock"
slice = "1ms"

[pools.fast]
pcpus = 2
policy = "partition"

[vm.web]
guest = "hello"
memory = "64M"
cpus = 2
pool = "fast"
device = "testdev"
no-reboot = true

[vm.job]
kernel = "k.elf"
weight = 3
min = "8M"
shares = 2
cap = 0.5
paging = "vtlb"
disk = ["a.img,ro", "b.img"]
"""
VM = '[vm.a]\nguest = "hello"\n'


def read(folder: Path, text: str | bytes) -> HostPlan:
    (folder / "k.elf").write_bytes(hello.image())
    file = folder / "hosts.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return plan.read(file)


def read_or_not(folder: Path, text: str) -> str:
    """Why not."""
    try:
        read(folder, text)
    except PlanError as problem:
        return str(problem)
    return ""


def test_what_a_file_says(tmp_path: Path) -> None:
    found = read(tmp_path, GOOD)
    assert (found.name, found.pcpus, found.ram, found.grace_s) == ("house", 4, 1 << 30, 3.0)
    assert found.overcommit == Terms(scan=100, swap="2G", victims="clock")
    assert (found.vms[1].config.min_memory, found.vms[1].config.shares) == (8 << 20, 2)
    assert found.policy.slice_ns == 1_000_000  # type: ignore[attr-defined]
    assert found.pools["fast"]["pcpus"] == 2
    assert found.pools["fast"]["policy"].name == "partition"
    web, job = found.vms
    assert web.config == Config(
        memory="64M", cpus=2, clock="wall", devices=(("testdev", {}),), reboot=False, name="web"
    )
    assert (web.guest, web.pool, web.weight, web.cap) == ("hello", "fast", 1, None)
    assert (job.guest, job.weight, job.cap) == (tmp_path / "k.elf", 3.0, 0.5)
    assert [disk.file for disk in job.config.disks] == [
        str(tmp_path / "a.img"), str(tmp_path / "b.img")
    ]  # fmt: skip
    assert Path.cwd() != tmp_path


def test_a_list_of_vms_and_all_by_default(tmp_path: Path) -> None:
    found = read(
        tmp_path, '[[vm]]\nname = "a"\nguest = "hello"\n[[vm]]\nname = "b"\nkernel = "k.elf"'
    )
    assert [vm.name for vm in found.vms] == ["a", "b"]
    assert (found.name, found.pcpus, found.clock) == ("hosts", 1, "wall")
    assert found.ram > 2 * (256 << 20)


def test_the_keys_of_a_vm_are_the_options_of_the_command_line() -> None:
    """There is no second list."""
    names = {
        max(option_of(one).names, key=len)[2:] for one in fields(Config) if option_of(one).names
    }
    assert names <= set(keys.VM) | set(keys.HOST)
    assert not {"clock", "engine"} & set(keys.VM)


WRONG = {
    "unknown table": ("[hots]\n" + VM, "there is no key 'hots'; did you mean host?"),
    "unknown key": (VM + 'memroy = "1G"', "vm.a: there is no key 'memroy'; did you mean memory?"),
    "nothing near": (VM + "zzz = 1", "vm.a: there is no key 'zzz'; expected one of name, guest"),
    "of the host": (VM + 'clock = "wall"', "vm.a: there is no key 'clock'; "),
    "type": (VM + "memory = 64", "vm.a.memory: expected a text, got 64"),
    "unit": (VM + 'memory = "64"', "vm.a.memory: expected a size like 256M or 1G, got '64'"),
    "size": (VM + 'memory = "1K"', "vm.a.memory: '1K': expected 1M to 256G, whole pages"),
    "cpus": (VM + "cpus = 1000", "vm.a.cpus: "),
    "switch": (VM + "snapshot = 1", "vm.a.snapshot: expected true or false, got 1"),
    "choice": (VM + 'paging = "lazzy"', "vm.a.paging: 'lazzy': expected one of eager, ept"),
    "paravirtual": ('[vm.a]\nguest = "teaching-pv"', "vm.a.guest: teaching-pv is paravirtual, "),
    "cpu": (VM + 'cpu = "z80"', "vm.a"),
    "disk": (VM + 'disk = "a.img,rw"', "vm.a.disk: disk 'a.img,rw': expected FILE"),
    "device": (VM + "device = []", "vm.a.device: expected a text, got []"),
    "weight": (VM + "weight = 0", "vm.a.weight: expected a number from 0.001 to 1,000,000, got 0"),
    "infinite": (VM + "weight = inf", "vm.a.weight: expected a number from 0.001 to 1,000,000, "
                 "got inf"),
    "cap": (VM + 'cap = "1"', "vm.a.cap: expected a number from 0.001 to 1,000,000, got '1'"),
    "bool": (VM + "cap = true", "vm.a.cap: expected a number from 0.001 to 1,000,000, got True"),
    "no pool": (VM + 'pool = "fats"\n[host]\npcpus = 2\n[pools.fast]\npcpus = 1',
                "vm.a.pool: there is no pool 'fats'; did you mean fast?"),
    "empty pool": (VM + "[pools.fast]\npcpus = 1",
                   "vm.a.pool: pool 'default' has no pCPU, the others have them all; "
                   "expected one of fast"),
    "partition": (VM + 'cpus = 2\n[host]\npolicy = "partition"',
                  "vm.a.pool: policy partition gives each vCPU a pCPU of its own; "
                  "pool 'default' has 1, expected at least 2"),
    "too many pCPUs": (VM + "[host]\npcpus = 2\n[pools.x]\npcpus = 2\n[pools.y]\npcpus = 1",
                       "pools.x.pcpus 2, pools.y.pcpus 1: expected at most 2 in all, "
                       "as host.pcpus, got 3"),
    "default": (VM + "[pools.default]\npcpus = 1", "pools.default: this pool has what the others"),
    "no count": (VM + "[pools.x]\n", "pools.x.pcpus: expected a number of pCPUs"),
    "pcpus": (VM + "[host]\npcpus = 0", "host.pcpus: expected a number of pCPUs, 1 to 256, got 0"),
    "ram": (VM + 'min = "256M"\n[host]\nram = "128M"',
            "host.ram: expected at least 258M, which its VMs must have in"),
    "tables": (VM + 'paging = "vtlb"\n[host]\nram = "32M"', "host.ram: expected at least 65M"),
    "min": (VM + 'min = "512M"', "vm.a: min_memory 536870912: expected at most its memory"),
    "shares": (VM + "shares = 0", "vm.a.shares: expected a number of shares, got 0"),
    "scan": (VM + "[host]\nscan = -1", "host.scan: expected a number of pages, got -1"),
    "victims": (VM + '[host]\nvictims = "x"',
                "host.victims: expected one of clock, oldest, random, or the path of a file"),
    "policy": (VM + '[host]\npolicy = "fair"', "host.policy: expected one of partition, share"),
    "slice": (VM + '[host]\npolicy = "partition"\nslice = "1ms"',
              "host.slice: policy partition has none; leave it out"),
    "span": (VM + '[host]\nslice = "0s"', "host.slice: expected a time like 90s or 2m, got '0s'"),
    "clock": (VM + '[host]\nclock = "real"', "host.clock: 'real': expected one of virtual, wall"),
    "two": ('[[vm]]\nname = "a"\nguest = "hello"\n[[vm]]\nname = "a"\nguest = "hello"',
            "vm[1].name and vm[2].name: 'a' is there 2 times; expected different names"),
    "no name": ('[[vm]]\nguest = "hello"', "vm[1].name: expected a name, and there is none"),
    "bad name": ('[vm."../a"]\nguest = "hello"', "vm.../a: expected a name of at most 40 letters"),
    "no guest": ("[vm.a]\n", "vm.a: expected one of guest and kernel, got 0"),
    "two guests": (VM + 'kernel = "k.elf"', "vm.a: expected one of guest and kernel, got 2"),
    "no file": ('[vm.a]\nkernel = "none"', "vm.a.kernel: expected a file, and 'none' is none"),
    "guest": ('[vm.a]\nguest = "beos"', "vm.a.guest: expected one of hello, teaching, "),
    "type of guest": ("[vm.a]\nguest = []", "vm.a.guest: expected one of hello, teaching, "),
    "exec": (VM + 'exec = "true"', "vm.a.exec: expected a guest that takes commands: cloud-amd64"),
    "no VM": ("[host]\n", "vm: expected 1 to 1024 VMs, got 0"),
    "vm": ("vm = 3", "vm: expected tables like [vm.web] or [[vm]], got 3"),
    "a table": ("vm = [3]", "vm[1]: expected a table, got 3"),
    "pools": (VM + "[[pools]]", "pools: expected tables like [pools.fast]"),
    "syntax": ("[host]\npcpus 2", "line 2, column 7: Expected '=' after a key"),
    "end": ("[host", "end of document: Expected "),
    "bytes": (b"[host]\n\xff", "line 2: expected UTF-8"),
    "deep": ("a = " + "[" * 5000, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, line = WRONG[name]
    with pytest.raises(PlanError) as refused:
        read(tmp_path, text)
    found, file = str(refused.value), tmp_path / "hosts.toml"
    assert found.startswith(f"{file}: {line}")
    assert "\n" not in found
    assert main(["up", "--check", str(file)]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"understudy: {found}\n")


@pytest.mark.parametrize("name", Execution.ALL)
def test_what_needs_processors_of_its_own_is_refused_where_they_are_shared(
    name: str, tmp_path: Path
) -> None:
    """By the file as by the host itself, so that no VM starts beside one that cannot."""
    technique = Execution.ALL[name]
    paging = technique.goes_with()[-1]
    options = f'execution = "{name}"\npaging = "{paging}"'
    told = read_or_not(tmp_path, f'{VM}memory = "4M"\n{options}')
    with Host() as host:
        try:
            host.vm("4M", execution=name, paging=paging)
            made = ""
        except ValueError as problem:
            made = str(problem)
    if technique.needs_own_processor:
        words = f"'{name}': it needs a processor for each vCPU, and this host's are shared; "
        assert made == f"execution {words}expected one of emulate, vmx"
        assert told == f"{tmp_path}/hosts.toml: vm.a.execution: {words}expected one of emulate, vmx"
    else:
        assert told == made == ""


def test_a_guest_that_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(PlanError, match=r"vm\.a\.guest: 686 is not fetched: understudy fetch 686$"):
        read(tmp_path, '[vm.a]\nguest = "686"')


def test_a_policy_of_ones_own_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("1 / 0")
    with pytest.raises(
        PlanError, match=r"host\.policy: .*mine\.py cannot be used: ZeroDivisionErr"
    ):
        read(tmp_path, VM + '[host]\npolicy = "mine.py"')


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--check", str(tmp_path / "none.toml")]) == 1
    assert (
        capsys.readouterr().err == f"understudy: {tmp_path}/none.toml: No such file or directory\n"
    )


def test_check_only_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(tmp_path, GOOD)
    assert main(["up", "--check", str(tmp_path / "hosts.toml")]) == 0
    assert capsys.readouterr().out.endswith("hosts.toml: host house with 4 pCPUs, 2 VMs\n")


def test_the_page_has_every_key_and_the_example_is_right() -> None:
    page = (ROOT / "docs/reference/hosts.md").read_text()
    for table in (keys.HOST, keys.POOL, keys.VM):
        for key in table.values():
            form = key.form.replace("|", "\\|")
            assert f"| `{key.name}` | `{form}` | {key.words} |" in page
    assert [vm.name for vm in plan.read(ROOT / "examples/hosts.toml").vms] == ["web", "job", "rest"]
