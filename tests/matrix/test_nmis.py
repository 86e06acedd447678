"""NMIs at awkward moments, under each technique: as in VMX operation with EPT.

What: in interrupt shadows; one while another one's handler has met a fault, or is about to return;
from another processor, all the time.  Source: SDM 3A, "Nonmaskable Interrupt (NMI)"; SDM 3C,
"Information for VM Exits Due to Vectored Events".  Invariant: each run comes to an end.
"""

from functools import cache
from typing import Any

import pytest

from tests.matrix import programs as p
from understudy.guests.entry import long_mode
from understudy.vcpu.activity import Activity
from understudy.verdict import StopKind
from understudy.vm import VM

WAYS = [
    ("emulate", "ept"), *((name, shadow) for name in ("vmx", "deprivileged", "bt")
                          for shadow in ("lazy", "eager", "vtlb")),
]  # fmt: skip
SHADOWS = """
    8c d0          | mov eax, ss
    fb             | sti
    ff c3          | inc ebx
    ff c3          | inc ebx
    8e d0          | mov ss, eax
    ff c3          | inc ebx
    ff c3          | inc ebx
    fa             | cli
    89 c8          | mov eax, ecx
    e7 f4          | out 0xf4, eax
"""
NOTE = """
    89 d9          | mov ecx, ebx
    48 8b 14 24    | mov rdx, [rsp]
    ff c6          | inc esi
    48 cf          | iretq
"""
FAULTS = {
    "#PF": "a0 00 00 00 00 00 01 00 00 | mov al, [1 << 40]",
    "#UD": "0f 0b | ud2",
}
ENDS = "90 | nop\n" * 6 + "89 f1 | mov ecx, esi\n e7 f4 | out 0xf4, eax"
RETURNS = """
    ff c6          | inc esi
    0f 20 d8       | mov rax, cr3
    0f 22 d8       | mov cr3, rax  ; the page of the stack is missing in a shadow
    48 cf          | iretq
"""
SENDS = """
    b9 1b 00 00 00 | mov ecx, IA32_APIC_BASE
    0f 32          | rdmsr
    0d 00 0c 00 00 | or eax, 0xc00
    0f 30          | wrmsr
    31 d2          | xor edx, edx
    ff c2          | inc edx             ; to processor 1
    b8 00 04 00 00 | mov eax, 0x400      ; an NMI
    b9 30 08 00 00 | mov ecx, X2APIC_ICR
    0f 30          | next: wrmsr
    bb 01 03 00 00 | mov ebx, 0x301
    ff cb          | dec ebx
    75 fc          | jnz
    eb f3          | jmp next
"""


def made(execution: str, paging: str, program: str, cpus: int = 1, **handlers: str) -> VM:
    vm = VM(
        "16M", execution=execution, paging=paging, cpu="understudy,-pmu,-xsaves", cpus=cpus,
        virtualizable_isa=execution != "bt",
    )  # fmt: skip
    idt: dict[str, int] = {}
    for vector, handler in handlers.items():
        idt |= p.handle(vm, int(vector[1:]), handler)
    p.start(vm, program, **idt)
    return vm


def nmi(vm: VM) -> None:
    vm.vcpus[0].events.nmi()
    vm.vcpus[0].look_now()


def seen(vm: VM, *names: str) -> list[Any]:
    registers = vm.vcpus[0].registers()
    return [vm.instructions, *(registers[name] for name in names)]


@cache
def in_shadows(execution: str, paging: str) -> list[list[Any]]:
    """One NMI after each number of instructions, and another one soon after it."""
    told = []
    for at in range(10):
        for later in (None, 0, 1, 3):
            with made(execution, paging, SHADOWS, v2=NOTE) as vm:
                if at:
                    vm.go(budget=at)
                nmi(vm)
                if later is not None:
                    if later:
                        vm.go(budget=later)
                    nmi(vm)
                told.append([vm.go(budget=60).kind, *seen(vm, "rbx", "rcx", "rdx", "rsi")])
    return told


@pytest.mark.parametrize(("execution", "paging"), WAYS)
def test_in_the_shadow_of_an_instruction(execution: str, paging: str) -> None:
    assert in_shadows(execution, paging) == in_shadows("vmx", "ept")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("execution", "paging"), [("vmx", "ept"), *WAYS])
def test_a_fault_in_the_handler_lets_none_in(execution: str, paging: str, fault: str) -> None:
    handler = f"ff c6 | inc esi\n{FAULTS[fault]}\n48 cf | iretq"
    with made(execution, paging, "eb fe | jmp $", v2=handler, v14=ENDS, v6=ENDS) as vm:
        vm.go(budget=2)
        nmi(vm)
        vm.go(budget=4)
        nmi(vm)
        assert vm.go(budget=30).kind is StopKind.DEBUG_EXIT
        assert seen(vm, "rcx")[1:] == [1], "handlers of NMIs begun, when that of the fault ends"


@pytest.mark.parametrize(("execution", "paging"), [("vmx", "ept"), *WAYS])
def test_a_return_that_misses_its_stack_lets_none_in(execution: str, paging: str) -> None:
    program = "bc 00 00 60 00 | mov esp, 0x600000\n90 | nop\neb fe | jmp $"
    with made(execution, paging, program, v2=RETURNS) as vm:
        vm.go(budget=2)
        nmi(vm)
        vm.go(budget=3)
        nmi(vm)
        assert seen(vm, "rsi", "rsp")[1:] == [1, 0x60_0000 - 40]
        vm.go(budget=1)  # the return
        vm.go(budget=1)  # the second one begins
        assert seen(vm, "rsi", "rsp")[1:] == [2, 0x60_0000 - 40], "not inside of the first"


@pytest.mark.parametrize(("execution", "paging"), WAYS)
def test_another_processor_sends_them_all_the_time(execution: str, paging: str) -> None:
    """To one that is in a shadow half of the time."""
    with made(execution, paging, SENDS, cpus=2, v2="ff c6 | inc esi\n48 cf | iretq") as vm:
        vm.memory.write(0x14_0000, bytes.fromhex("9090 fb fa eb fc"))
        idt = {name: value for name, value in vm.vcpus[0].registers().items() if "idtr" in name}
        other = vm.vcpus[1]
        entry = long_mode(vm.memory, "test", 0x14_0000, **idt)
        other.set_registers(entry.registers | {"rsp": 0x1F_0000})
        other.state.activity = Activity.ACTIVE
        other.look()
        assert vm.go(budget=600_000).kind is StopKind.BUDGET
        assert other.registers()["rsi"] > 2
