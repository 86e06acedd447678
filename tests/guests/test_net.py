"""A network card, driven by Debian's own drivers.

Source: what Linux says of a card in sysfs, and the frames that it sends.
"""

import pytest

from tests.guests.fetched import fetched
from understudy.backends.frame import BROADCAST, Frame
from understudy.devices.virtio.net import USUAL_MAC, Net
from understudy.linux import VM

pytestmark = pytest.mark.real_guest


def test_an_arp_request_goes_out() -> None:
    fetched("cloud-amd64")
    with VM.linux("cloud-amd64", devices=[("virtio_net", {})]) as vm:
        sent: list[bytes] = []

        def heard(is_out: bool, frame: Frame) -> None:
            if is_out:
                sent.append(frame.data)

        vm.pc.part("virtio_net", Net).cable.on_frame.append(heard)
        assert vm.run("cat /sys/class/net/eth0/address").output.strip() == USUAL_MAC.hex(":")
        vm.run("ip link set eth0 up; ip addr add 10.0.0.1/24 dev eth0; ping -c1 -W1 10.0.0.2")
        assert vm.run("cat /sys/class/net/eth0/carrier").output.strip() == "1"
    arp = [frame for frame in sent if frame[12:14] == b"\x08\x06"]
    assert arp and {(frame[:6], frame[6:12]) for frame in arp} == {(BROADCAST, USUAL_MAC)}
