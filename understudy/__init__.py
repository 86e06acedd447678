"""understudy: a hypervisor for x86, written in Python on a machine written in Rust.

from understudy import VM

with VM.linux("cloud-amd64", memory="256M") as vm:
    vm.wait_for_prompt()
    print(vm.run("uname -a").output)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from understudy.host import Host
    from understudy.linux import VM, GuestStopped, GuestTimeout, Linux, LinuxError, Result

__all__ = ["VM", "GuestStopped", "GuestTimeout", "Host", "Linux", "LinuxError", "Result"]


def __getattr__(name: str) -> object:
    """Load the public names when first used: `understudy doctor` must run without the machine."""
    if name in __all__:
        from understudy import host, linux

        return getattr(host if name == "Host" else linux, name)
    raise AttributeError(f"module 'understudy' has no attribute {name!r}")
