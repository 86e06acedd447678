"""Small guests on a host whose processors they share."""

from typing import Any

from tests.matrix import programs as p
from understudy.host import Host
from understudy.linux import VM

SPIN = """
    48 ff c1 | inc rcx
    eb fb    | jmp short -5
"""
NAP = """
    b0 ff                   | mov al, 0ffh
    e6 21                   | out 21h, al: no interrupts of the 8259
    fa                      | cli
    b9 e0 06 00 00          | mov ecx, 6e0h
    0f 31                   | next: rdtsc
    05 00 5a 02 00          | add eax, 154112
    0f 30                   | wrmsr
    fb                      | sti
    f4                      | hlt
    fa                      | cli
    ff c3                   | inc ebx
    eb f0                   | jmp short -16
"""
"""Sleeps 154 us, again and again."""
EOI = """
    50                      | push rax
    52                      | push rdx
    51                      | push rcx
    31 c0                   | xor eax, eax
    31 d2                   | xor edx, edx
    b9 0b 08 00 00          | mov ecx, 80bh
    0f 30                   | wrmsr
    59                      | pop rcx
    5a                      | pop rdx
    58                      | pop rax
    48 cf                   | iretq
"""
RESET = """
    b0 fe | mov al, 0feh
    e6 64 | out 64h, al: the keyboard controller pulses the reset line
    f4    | hlt
"""
CRASH = "0f 0b | ud2, without an IDT: a triple fault"
DEAF = "fa f4 | cli; hlt: nothing can wake it"


def spinning(host: Host, name: str, program: str = SPIN, **options: Any) -> VM:
    """A VM of one program."""
    vm = host.vm("2M", name=name, **options)
    p.start(vm, program)
    return vm


def napping(host: Host, name: str, **options: Any) -> VM:
    """One that sleeps most of the time, woken by its APIC's timer."""
    vm = host.vm("2M", name=name, **options)
    to_nap(vm)
    return vm


def to_nap(vm: VM) -> None:
    """Give it that program."""
    p.start(vm, NAP, **p.handle(vm, 0x40, EOI))
    vcpu = vm.vcpus[0]
    vcpu.msrs.write(0x1B, 0xFEE0_0D00)  # x2APIC mode
    vcpu.msrs.write(0x832, 2 << 17 | 0x40)  # LVT timer: TSC deadline


def running_ns(vm: VM) -> int:
    """How long its vCPUs have had a processor."""
    return sum(one["ns"].get("running", 0) for one in vm.counts()["scheduling"])


def shares(host: Host, vms: list[VM], ns: int) -> list[float]:
    """What part of all that these ran in the next `ns` each of them had."""
    before = [running_ns(vm) for vm in vms]
    host.run(deadline_ns=host.schedule.time.now() + ns)
    ran = [running_ns(vm) - old for vm, old in zip(vms, before, strict=True)]
    return [one / sum(ran) for one in ran]
