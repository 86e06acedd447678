"""From the choices about a network card to its cable.

Source: ours.
"""

from collections.abc import Sequence

from understudy.backends.cable import Cable
from understudy.backends.lan import LanPort
from understudy.backends.passt import Passt
from understudy.backends.tap import Tap
from understudy.nic import Nic, Port


def cable_of(nic: Nic, ports: Sequence[Port]) -> Cable:
    """Its cable, plugged in.  NetworkError says in one line why that cannot be."""
    if nic.kind == "lan":
        return LanPort(nic.lan)
    if nic.kind == "tap":
        return Tap(nic.tap)
    return Passt(nic, ports) if nic.kind == "user" else Cable()
