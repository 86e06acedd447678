"""What `test_tap.py` has done in a network namespace of its own: a guest at a tap.

unshare --map-root-user --net python -m tests.guests.tap_in_namespace
"""

import hashlib
import os
import subprocess
import threading
import urllib.request

from tests.guests.web import serving
from understudy.linux import VM

BODY = os.urandom(1 << 21)
ADDRESSES = {"10.5.0.1/24": "10.5.0.2/24", "fd05::1/64": "fd05::2/64"}


def main() -> None:
    """All of it; an AssertionError says what is wrong."""
    subprocess.run(["ip", "tuntap", "add", "t0", "mode", "tap"], check=True)
    for ours in ADDRESSES:
        flags = ["nodad"] if ":" in ours else []
        subprocess.run(["ip", "addr", "add", ours, "dev", "t0", *flags], check=True)
    subprocess.run(["ip", "link", "set", "t0", "up"], check=True)
    with (
        serving(BODY, "10.5.0.1") as port,
        VM.linux("cloud-amd64", net="tap=t0", clock="wall") as vm,
    ):
        vm.run("ip link set eth0 up").check()
        for theirs in ADDRESSES.values():
            vm.run(f"ip addr add {theirs} dev eth0").check()
        for ours in ADDRESSES:
            vm.run(f"ping -c 3 -W 30 {ours.split('/')[0]}").check()
        came = vm.run(f"wget -qO- http://10.5.0.1:{port}/ | md5sum").output.split()[0]
        assert came == hashlib.md5(BODY).hexdigest()
        vm.run("mkdir /tmp/w; head -c 3000000 /dev/urandom >/tmp/w/index.html; httpd -h /tmp/w")
        expected = vm.run("md5sum </tmp/w/index.html").output.split()[0]
        got: list[bytes] = []

        def fetch() -> None:
            with urllib.request.urlopen("http://[fd05::2]/", timeout=120) as answer:
                got.append(answer.read())

        other = threading.Thread(target=fetch, daemon=True)
        other.start()
        vm.run_until(lambda: not other.is_alive(), "the answer", 120, 120)
        assert got and hashlib.md5(got[0]).hexdigest() == expected
        assert vm.counts()["net"][0]["refused"] == 0
    print("all is well")


if __name__ == "__main__":
    main()
