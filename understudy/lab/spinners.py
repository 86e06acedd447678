"""Guests that compute for ever, on a host whose processors they share.

Source: ours, in place of the batch jobs of Barham et al., "Xen and the Art of Virtualization".
"""

from typing import Any, Final

from understudy.guests.entry import CODE_64, long_mode, write_gdt
from understudy.host import Host
from understudy.linux import VM

CODE: Final = 0x10_0000
SPIN: Final = bytes.fromhex("48 ff c1 eb fb")  # inc rcx; jmp short -5


def spinning(host: Host, name: str, **options: Any) -> VM:
    """A VM of this one program; the options are those of `Host.vm`."""
    vm = host.vm("2M", name=name, **options)
    vm.memory.write(CODE, SPIN)
    write_gdt(vm.memory, CODE_64)
    vm.enter(long_mode(vm.memory, "spin", CODE))
    return vm


def ran(vm: VM) -> int:
    """For how many ns of host time its vCPUs have had a processor."""
    return sum(int(one["ns"].get("running", 0)) for one in vm.counts()["scheduling"])


def run_for(host: Host, ns: int) -> None:
    """Let so much host time pass."""
    host.run(deadline_ns=host.schedule.time.now() + ns)


def switches(host: Host) -> int:
    """How often a pCPU went from one vCPU to another."""
    return sum(sum(pcpu.switches.values()) for pcpu in host.schedule.pcpus)
