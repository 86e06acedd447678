"""Linux on processors that it shares, with several of its own and fewer real ones.

Invariant: in virtual time two runs are one, on any number of pCPUs.
"""

from typing import Any

import pytest

from tests.matrix.shared import spinning
from understudy.guests.entry import GuestError
from understudy.host import Host
from understudy.linux import VM
from understudy.verdict import StopKind

MS = 1_000_000
PIECE = 45_678_901


def booted(host: Host, **options: Any) -> VM:
    """A Linux on this host."""
    try:
        return host.linux(memory="128M", **options)
    except GuestError as problem:
        pytest.skip(f"no guest: {problem}")


def outcome(pcpus: int, cpus: int, moves: int = 0) -> dict[str, Any]:
    """A boot and a command; `moves`: so often a snapshot takes it to another host first."""
    host = Host(pcpus=pcpus, ram="1G")
    vm = booted(host, cpus=cpus)
    heard = bytearray()
    vm.console.on_output.append(heard.extend)
    for _ in range(moves):
        assert vm.go(budget=PIECE).kind == StopKind.BUDGET
        data = vm.save()
        vm.close()
        host.close()
        host = Host(pcpus=pcpus, ram="1G")
        vm = VM.restore(data, host=host)
        vm.console.on_output.append(heard.extend)
    vm.wait_for_prompt()
    assert vm.run("nproc").output == f"{cpus}\n"
    assert "warp" not in vm.run("dmesg").output
    found = {f"exits{n}": vcpu.counts.named_exits() for n, vcpu in enumerate(vm.vcpus)}
    found |= {"retired": [vcpu.retired for vcpu in vm.vcpus], "now": vm.clock.now()}
    found |= {"heard": bytes(heard), "scheduling": vm.counts()["scheduling"]}
    vm.close()
    host.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pcpus", [1, 2, 4])
def test_four_vcpus_give_one_run(pcpus: int) -> None:
    assert outcome(pcpus, 4) == outcome(pcpus, 4)


def test_a_boot_goes_on_on_another_host() -> None:
    straight, moved = outcome(2, 2), outcome(2, 2, moves=3)
    assert moved == straight


def test_engines_agree_on_its_first_instructions() -> None:
    found = []
    for engine in ("dbt", "reference"):
        with Host(pcpus=2, ram="512M", engine=engine) as host, booted(host, cpus=2) as vm:
            other = spinning(host, "other")
            assert vm.go(budget=3_000_000).kind == StopKind.BUDGET
            exits = [vcpu.counts.named_exits() for vcpu in (*vm.vcpus, *other.vcpus)]
            counted = vm.counts()
            found.append((exits, other.instructions, vm.clock.now(), counted["scheduling"]))
            other.close()
    assert found[0] == found[1]


def test_commands_are_answered_while_others_compute() -> None:
    with Host(pcpus=1, ram="1G") as host, booted(host, weight=4) as vm:
        others = [spinning(host, f"spin{n}") for n in range(2)]
        assert vm.run("echo $((6 * 7))").output == "42\n"
        assert all(one.instructions > 10_000_000 for one in others)
        stolen = vm.run("head -1 /proc/stat").output.split()[8]  # in hundredths of a second
        told = vm.counts()["scheduling"][0]["steal_ns"]
        assert told > 20 * MS and abs(int(stolen) * 10 * MS - told) < 30 * MS, (stolen, told)
        shares = [one["ns"]["running"] for one in vm.counts()["scheduling"]]
        assert shares[0] > host.schedule.time.now() / 2
        for one in others:
            one.close()
