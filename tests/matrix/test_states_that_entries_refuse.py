"""States that a guest can bring about and that a VM entry refuses: the VM goes on all the same.

Source: SDM 3C, "Checks on the Guest State Area"; SDM 2, "SYSCALL"; SDM 3A, "Initializing IA-32e
Mode" (a 16-bit TSS is #GP).
"""

import pytest

from tests.matrix import programs as p
from understudy.arch.msr import Msr
from understudy.guests.entry import CODE_32, Entry, protected_mode, write_gdt
from understudy.paging import Paging
from understudy.verdict import StopKind
from understudy.vm import VM

# SYSCALL, and then something that exits, with IA32_STAR[33:32] = 3: SS has that RPL at level 0.
SYSCALL = """
    b9 81 00 00 c0       | mov ecx, IA32_STAR
    31 c0                | xor eax, eax
    ba 13 00 00 00       | mov edx, 0x13
    0f 30                | wrmsr
    ff c1                | inc ecx                ; IA32_LSTAR
    48 8d 05 0b 00 00 00 | lea rax, [rel next]
    48 89 c2             | mov rdx, rax
    48 c1 ea 20          | shr rdx, 32
    0f 30                | wrmsr
    0f 05                | syscall
    0f a2                | next: cpuid
    b0 07                | mov al, 7
    e6 f4                | out 0xf4, al
"""
LONG_MODE = """
    b9 80 00 00 c0       | mov ecx, IA32_EFER
    b8 00 01 00 00       | mov eax, LME
    31 d2                | xor edx, edx
    0f 30                | wrmsr
    0f 20 e0             | mov eax, cr4
    83 c8 20             | or eax, PAE
    0f 22 e0             | mov cr4, eax
    0f 20 c0             | mov eax, cr0
    0d 00 00 00 80       | or eax, PG
    0f 22 c0             | mov cr0, eax
    f4                   | hlt
"""
CODE, IDT, HANDLER = 0x8000, 0x9000, 0xA000


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_syscall_with_privilege_bits_in_star(paging: str) -> None:
    with VM("16M", paging=paging) as vm:
        p.start(vm, SYSCALL, efer=0xD01)
        stop = vm.go(budget=100)
        assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, 7), str(stop)


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_long_mode_with_a_16_bit_tss_is_gp(paging: str) -> None:
    with VM("16M", paging=paging) as vm:
        write_gdt(vm.memory, CODE_32)
        vm.memory.write(CODE, p.assemble(LONG_MODE))
        vm.memory.write(HANDLER, p.assemble("b0 0d | mov al, 13\n e6 f4 | out 0xf4, al"))
        vm.memory.write(IDT + 8 * 13, (HANDLER | 0x10 << 16 | 0x8E00 << 32).to_bytes(8, "little"))
        state = protected_mode("test", CODE).registers
        state |= {"idtr_base": IDT, "idtr_limit": 0xFF, "tr_attr": 0x83, "rsp": 0x7000}
        vm.enter(Entry(state | {"gdtr_base": 0x1000, "gdtr_limit": 0x1F}, "test"))
        stop = vm.go(budget=100)
        assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, 13), str(stop)


@pytest.mark.parametrize("misc", [1 << 22, 1 << 34])
def test_cpuid_follows_the_registers(misc: int) -> None:
    with VM("16M") as vm:
        vcpu = vm.vcpus[0]
        limit, nx = vcpu.answer(0, 0)[0], vcpu.answer(0x8000_0001, 0)[3] & 1 << 20
        vcpu.msrs.write(Msr.IA32_MISC_ENABLE, vcpu.msrs.read(Msr.IA32_MISC_ENABLE) | misc)
        shown = vcpu.answer(0, 0)[0], vcpu.answer(0x8000_0001, 0)[3] & 1 << 20
        assert shown == ((2, nx) if misc == 1 << 22 else (limit, 0))
        vcpu.msrs.write(Msr.IA32_APIC_BASE, 0xFEE0_0100)
        assert not vcpu.answer(1, 0)[3] & 1 << 9
        vcpu.msrs.write(Msr.IA32_APIC_BASE, 0xFEE0_0900)
        assert vcpu.answer(1, 0)[3] & 1 << 9
        vcpu.reset()
        assert (vcpu.answer(0, 0)[0], vcpu.answer(0x8000_0001, 0)[3] & 1 << 20) == (limit, nx)


@pytest.mark.parametrize("bit", [0, 3, 7, 11, 12, 16, 18, 22, 23, 34, 38])
def test_misc_enable_takes_the_bits_of_the_manual(bit: int) -> None:
    with VM("16M") as vm:
        msrs = vm.vcpus[0].msrs
        before = msrs.read(Msr.IA32_MISC_ENABLE)
        msrs.write(Msr.IA32_MISC_ENABLE, before ^ 1 << bit)
        fixed = bit in (7, 11, 12)
        assert msrs.read(Msr.IA32_MISC_ENABLE) == (before if fixed else before ^ 1 << bit)


NXE = """
    b9 80 00 00 c0 | mov ecx, IA32_EFER
    0f 32          | rdmsr
    80 cc 08       | or ah, NXE
    0f 30          | wrmsr
"""
XD_DISABLE = """
    b9 a0 01 00 00 | mov ecx, IA32_MISC_ENABLE
    0f 32          | rdmsr
    83 ca 04       | or edx, XD_DISABLE
    0f 30          | wrmsr
    b9 80 00 00 c0 | mov ecx, IA32_EFER
    0f 32          | rdmsr
    88 e0          | mov al, ah
    24 08          | and al, NXE
    75 0c          | jnz fail
"""
FAIL = "e6 f4 | fail: out 0xf4, al"
SETS_NXE = NXE + FAIL  # the handler of #GP says 13, this one something else


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
@pytest.mark.parametrize(
    ("cpu", "listing"), [("max,-nx", SETS_NXE), ("max", NXE + XD_DISABLE + SETS_NXE)]
)
def test_nxe_is_reserved_without_the_feature(paging: str, cpu: str, listing: str) -> None:
    with VM("16M", paging=paging, cpu=cpu) as vm:
        write_gdt(vm.memory, CODE_32)
        vm.memory.write(CODE, p.assemble(listing))
        vm.memory.write(HANDLER, p.assemble("b0 0d | mov al, 13\n e6 f4 | out 0xf4, al"))
        vm.memory.write(IDT + 8 * 13, (HANDLER | 0x10 << 16 | 0x8E00 << 32).to_bytes(8, "little"))
        state = protected_mode("test", CODE).registers
        state |= {"idtr_base": IDT, "idtr_limit": 0xFF, "rsp": 0x7000}
        vm.enter(Entry(state | {"gdtr_base": 0x1000, "gdtr_limit": 0x1F}, "test"))
        stop = vm.go(budget=100)
        assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, 13), str(stop)
        assert not vm.vcpus[0].guest.control().efer & 1 << 11
