"""What a guest made here needs to have an address from the beginning: a part of an initramfs.

Source: busybox's udhcpc, which calls a script with what it was told.
Invariant: a guest that gets no answer starts all the same, a few seconds later.
"""

import stat
from collections.abc import Iterable
from typing import Final

from understudy.guests import initramfs
from understudy.guests.initramfs import Node
from understudy.guests.modules import FIRST, script
from understudy.guests.packages import complete

LEASE: Final = "etc/udhcpc/default.script"
LEASE_SCRIPT: Final = """\
#!/bin/busybox sh
# udhcpc has an answer: the address, the way out, and who knows names.
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
[ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
ip addr flush dev "$interface"
ip addr add "$ip/$mask" dev "$interface"
for one in $router; do ip route add default via "$one" dev "$interface"; done
mkdir -p /etc
for one in $dns; do echo "nameserver $one"; done >/etc/resolv.conf
"""
ASK: Final = """\
/bin/busybox ip link set lo up
/bin/busybox ip link set {0} up
/bin/busybox udhcpc -i {0} -n -q -t 3 -T 1 -s /{1} >/dev/null 2>&1
"""


def asking(interface: str, inserted: Iterable[str]) -> bytes:
    """An archive that goes behind `modules.with_drivers`'s: ask for an address, then go on."""
    first = script(inserted).replace("exec /init", f"{ASK.format(interface, LEASE)}exec /init")
    nodes = {
        LEASE: Node(stat.S_IFREG | 0o755, LEASE_SCRIPT.encode()),
        FIRST: Node(stat.S_IFREG | 0o755, first.encode()),
    }
    return initramfs.cpio(complete(nodes))
