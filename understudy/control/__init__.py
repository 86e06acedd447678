"""A running VM, asked and told things from outside, through a socket of the file system.

with ControlSocket(vm, Path("vm.sock")):
    vm.go(...)

ask(Path("vm.sock"), {"do": "inspect", "address": "rip"})
"""

from understudy.control.actions import ControlError
from understudy.control.sockets import ControlSocket, ask

__all__ = ["ControlError", "ControlSocket", "ask"]
