"""What `test_user_network.py` has done in a network namespace of its own, whose only way out has
IPv6: a guest through passt.

    unshare --map-root-user --net python -m tests.guests.ipv6_in_namespace
"""

import hashlib
import os
import subprocess

from tests.guests.web import serving
from understudy.backends.tap import Tap
from understudy.linux import VM

BODY = os.urandom(1 << 21)
OWN, GATEWAY = "fd06::1", "fe80::99"
ADDRESSED = (
    "for n in $(seq 300); do ip -6 addr show dev eth0 | grep -v tentative | grep -q 'fd06::' && "
    "break; sleep 0.2; done; ip -6 addr show dev eth0"
)


def ip(*words: str) -> None:
    """The command of that name."""
    subprocess.run(["ip", *words], check=True)


def main() -> None:
    """All of it; an AssertionError says what is wrong."""
    ip("tuntap", "add", "t0", "mode", "tap")
    ip("link", "set", "lo", "up")
    ip("link", "set", "t0", "up")
    way = Tap("t0")  # an interface has a carrier as long as somebody has the tap
    ip("addr", "add", f"{OWN}/64", "dev", "t0", "nodad")
    ip("-6", "route", "add", "default", "via", GATEWAY, "dev", "t0")
    fetch = "timeout 60 wget -qO- 'http://[{}]:{}/' | md5sum"
    digest = hashlib.md5(BODY).hexdigest()
    with serving(BODY, OWN) as port, serving(BODY, "::1") as inner:
        for net, is_reached in (("user", False), ("user,host-loopback", True)):
            with VM.linux("cloud-amd64", net=net, clock="wall") as vm:
                said = vm.run(ADDRESSED).output
                assert " fd06::" in said, said
                came = vm.run(fetch.format(OWN, port)).output.split()[0]
                assert came == digest, "from this computer's own address"
                line = fetch.replace("60", "5").format(f"{GATEWAY}%eth0", inner)
                came = vm.run(line).output.split()[0]
                assert (came == digest) == is_reached, "from its loopback"
    way.close()
    print("all is well")


if __name__ == "__main__":
    main()
