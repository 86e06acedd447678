"""Two Linux guests of one host on a network of their own, driven by Debian's own drivers.

Source: busybox's ip, ping and nc, and what the switch and the cards count.
"""

from typing import Any

import pytest

from tests.guests.fetched import fetched
from understudy.devices.virtio.net import Net
from understudy.host import Host
from understudy.image_file import SnapshotError
from understudy.linux import VM
from understudy.nic import Nic

pytestmark = pytest.mark.real_guest

SIZE = 1 << 20
GUESTS = ("cloud-amd64", "686-pae")


def _number(vm: VM, number: int) -> None:
    assert vm.run(f"ip addr add 10.0.0.{number}/24 dev eth0; ip link set eth0 up").status == 0


def _talk(guest: str) -> list[dict[str, Any]]:
    with Host(pcpus=2) as host:
        one, two = (host.linux(guest, name=name, net="lan=talk", memory="128M") for name in "ab")
        _number(one, 1)
        _number(two, 2)
        said = one.run("ping -c3 -W2 10.0.0.2").output
        assert "3 packets transmitted, 3 packets received" in said
        two.run("sleep 9 | nc -l -p 5000 >/tmp/came & sleep 0.1")
        sent = one.run(
            f"head -c {SIZE} /dev/urandom >/tmp/sent; md5sum </tmp/sent; "
            "nc 10.0.0.2 5000 </tmp/sent"
        )
        came = two.run("sleep 0.1; wc -c </tmp/came; md5sum </tmp/came").output.split()
        assert came == [str(SIZE), *sent.output.split()]
        vms = (one, two)
        assert [vm.counts()["net"][0]["lost"] for vm in vms] == [0, 0]
        assert len({vm.run("cat /sys/class/net/eth0/address").output for vm in vms}) == 2
        cable = one.pc.inspect()["net0"]["cable"]
        assert cable["ports"] == 2 and len(cable["addresses"]) == 1 < cable["forwarded"]
        return [vm.counts() for vm in vms]


@pytest.mark.parametrize("guest", GUESTS)
def test_two_guests_of_a_host_talk_and_do_so_again(guest: str) -> None:
    fetched(guest)
    first = _talk(guest)
    assert first[0]["net"][0]["sent_bytes"] > SIZE
    if guest == GUESTS[0]:
        second = _talk(guest)
        for counts in (*first, *second):
            del counts["kicks"], counts["engine"]
        assert first == second, "in virtual time every run is the same"


def test_a_clone_has_a_card_of_its_own_and_a_file_leads_nowhere_by_itself() -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", net="lan=forks", memory="128M") as origin:
        _number(origin, 1)
        card = origin.pc.part("net0", Net)
        with origin.snapshot() as image:
            (clone,) = image.fork()
            data = image.to_bytes()
        with clone:
            other = clone.pc.part("net0", Net)
            assert other.own != card.own and other.state.former == card.own
            assert _carrier(clone) == "0" and _carrier(clone, after="sleep 1") == "1"
            assert clone.run("ping -c1 -W1 10.0.0.9").status != 0
            assert origin.run("true").status == 0 and card.counts()["received"] > 0
            rebind = "cd /sys/bus/virtio/drivers/virtio_net; n=$(echo virtio*)"
            clone.run(f"{rebind}; n=${{n%% *}}; echo $n >unbind; echo $n >bind")
            assert clone.run("cat /sys/class/net/*/address").output.split()[0] == other.own.hex(":")
        with VM.restore(data) as loose:
            assert _carrier(loose) == "0" and loose.pc.part("net0", Net).own == card.own
        with VM.restore(data, net="lan=forks") as again:
            assert _carrier(again) == "1" and again.config.net == (Nic("lan", "forks"),)
        with pytest.raises(SnapshotError, match="1 network cards, and net= names 2"):
            VM.restore(data, net=["lan=a", "lan=b"])


def _carrier(vm: VM, after: str = "true") -> str:
    return vm.run(f"{after}; cat /sys/class/net/eth0/carrier").output.strip()
