"""Protection keys under every way to virtualise memory, as a Linux uses them.

What: a program takes a key that refuses writes, gives it to a page, reads, and writes; with an
argument it lifts the refusal before.  Source: SDM 3A, "Protection Keys"; Linux,
Documentation/core-api/protection-keys.rst.  (Entry by entry: `tests/property/test_paging.py`.)
Invariants: a write that a key refuses is a SIGSEGV of the program; a read is none.
"""

import base64

import pytest

from tests.guests.fetched import fetched
from tests.matrix.programs import assemble, executable, handle, start
from understudy.guests.entry import PAGE_TABLES_GPA
from understudy.linux import VM as Linux
from understudy.paging import Paging
from understudy.vm import VM

BEGIN = """
    b8 09 00 00 00       | mov eax, 9: mmap
    31 ff                | xor edi, edi
    be 00 10 00 00       | mov esi, 4096
    ba 03 00 00 00       | mov edx, PROT_READ | PROT_WRITE
    41 ba 22 00 00 00    | mov r10d, MAP_PRIVATE | MAP_ANONYMOUS
    49 c7 c0 ff ff ff ff | mov r8, -1
    45 31 c9             | xor r9d, r9d
    0f 05                | syscall
    48 89 c3             | mov rbx, rax
    c6 03 01             | mov byte [rbx], 1
    b8 4a 01 00 00       | mov eax, 330: pkey_alloc
    31 ff                | xor edi, edi
    be 02 00 00 00       | mov esi, PKEY_DISABLE_WRITE
    0f 05                | syscall
    89 c5                | mov ebp, eax
    b8 49 01 00 00       | mov eax, 329: pkey_mprotect
    48 89 df             | mov rdi, rbx
    be 00 10 00 00       | mov esi, 4096
    ba 03 00 00 00       | mov edx, PROT_READ | PROT_WRITE
    41 89 ea             | mov r10d, ebp
    0f 05                | syscall
    bf 09 00 00 00       | mov edi, 9
    85 c0                | test eax, eax
    78 19                | js done
    8a 03                | mov al, [rbx]
    83 3c 24 01          | cmp dword [rsp], 1
    74 09                | je write
    31 c0                | xor eax, eax
    31 d2                | xor edx, edx
    31 c9                | xor ecx, ecx
    0f 01 ef             | wrpkru
    c6 03 02             | write: mov byte [rbx], 2
    bf 07 00 00 00       | mov edi, 7
    b8 3c 00 00 00       | done: mov eax, 60: exit
    0f 05                | syscall
"""
SEGV = 128 + 11


@pytest.mark.real_guest
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
def test_a_program_keeps_itself_from_writing(paging: str) -> None:
    fetched("cloud-amd64")
    text = base64.b64encode(executable(assemble(BEGIN))).decode()
    with Linux.linux("cloud-amd64", memory="128M", paging=paging) as vm:
        vm.wait_for_prompt()
        shown = set(vm.run("grep -m1 ^flags /proc/cpuinfo").output.split())
        assert {"pku", "ospke", "xsave", "xsavec", "xsaves", "xsaveopt", "umip"} <= shown
        assert vm.run(f"echo {text} | base64 -d >/tmp/k; chmod +x /tmp/k; /tmp/k").status == SEGV
        assert vm.run("/tmp/k x").status == 7


@pytest.mark.real_guest
def test_a_linux_without_keys_has_none_to_give() -> None:
    fetched("cloud-amd64")
    text = base64.b64encode(executable(assemble(BEGIN))).decode()
    with Linux.linux("cloud-amd64", memory="128M", cpu="-pku,-xsave,-umip") as vm:
        shown = set(vm.run("grep -m1 ^flags /proc/cpuinfo").output.split())
        assert not {"pku", "ospke", "xsave", "xsaves", "umip"} & shown
        assert vm.run(f"echo {text} | base64 -d >/tmp/k; chmod +x /tmp/k; /tmp/k").status == 9


READ_GDTR = """
    0f 01 44 24 f0       | sgdt [rsp - 16]
    bf 07 00 00 00       | mov edi, 7
    b8 3c 00 00 00       | mov eax, 60: exit
    0f 05                | syscall
"""


@pytest.mark.real_guest
@pytest.mark.parametrize("cpu", ["understudy", "understudy,-umip"])
def test_a_linux_hears_of_programs_that_look_at_its_tables(cpu: str) -> None:
    """With UMIP the instruction faults, and Linux answers it with a value of its own."""
    fetched("cloud-amd64")
    text = base64.b64encode(executable(assemble(READ_GDTR))).decode()
    with Linux.linux("cloud-amd64", memory="128M", cpu=cpu) as vm:
        assert vm.run(f"echo {text} | base64 -d >/tmp/k; chmod +x /tmp/k; /tmp/k").status == 7
        told = "SGDT instruction cannot be used by applications" in vm.run("dmesg").output
        assert told == (cpu == "understudy")


PKRS = """
    b9 e1 06 00 00       | mov ecx, IA32_PKRS
    b8 08 00 00 00       | mov eax, 8
    31 d2                | xor edx, edx
    0f 30                | wrmsr
    0f 32                | rdmsr
    e6 f4                | out 0xf4, al
"""
SET_CR4 = """
    0f 20 e0             | mov rax, cr4
    0f ba e8 {bit:02x}   | bts eax, bit
    0f 22 e0             | mov cr4, rax
    b0 00                | mov al, 0
    e6 f4                | out 0xf4, al
"""
FAULTED = """
    b0 0d                | mov al, 13
    e6 f4                | out 0xf4, al
"""


@pytest.mark.parametrize("paging", sorted(Paging.ALL))
@pytest.mark.parametrize(
    ("cpu", "program", "status"),
    [
        ("max", PKRS, 8),
        ("max,-pks", PKRS, 13),
        ("max", SET_CR4.format(bit=24), 0),
        ("max,-pks", SET_CR4.format(bit=24), 13),
        ("max", SET_CR4.format(bit=22), 0),
        ("max,-pku", SET_CR4.format(bit=22), 13),
        ("max", SET_CR4.format(bit=11), 0),
        ("max,-umip", SET_CR4.format(bit=11), 13),
    ],
)
def test_what_is_hidden_is_not_there(paging: str, cpu: str, program: str, status: int) -> None:
    with VM("16M", paging=paging, cpu=cpu) as vm:
        start(vm, program, **handle(vm, 13, FAULTED))
        assert vm.go().status == status


WRITE_TWICE = """
    0f 20 e0             | mov rax, cr4
    0f ba e8 {bit:02x}   | bts eax, bit
    0f 22 e0             | mov cr4, rax
    b8 {rights}          | mov eax, rights
    31 d2                | xor edx, edx
    b9 {msr}             | mov ecx, IA32_PKRS or 0
    {load}               | wrmsr or wrpkru
    bf 00 00 60 00       | mov edi, 0x600000
    c6 07 06             | mov byte [rdi], 6
    fe 07                | inc byte [rdi]
    0f 20 c0             | mov rax, cr0
    0f ba e8 10          | bts eax, 16: WP
    0f 22 c0             | mov cr0, rax
    c6 07 08             | mov byte [rdi], 8
    e6 f4                | out 0xf4, al
"""
REFUSED = """
    58                   | pop rax: the error code
    02 07                | add al, [rdi]
    e6 f4                | out 0xf4, al
"""
FIVE_READS = "00 08 00 00"  # key 5 refuses writes
ALL_READ = "aa aa aa aa"  # every key does


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize("paging", sorted(Paging.ALL))
@pytest.mark.parametrize(
    ("user", "rights"), [(True, FIVE_READS), (True, ALL_READ), (False, FIVE_READS)]
)
@pytest.mark.parametrize("is_writable", [True, False])
def test_keys_that_refuse_writes_heed_wp(
    paging: str, engine: str, user: bool, rights: str, is_writable: bool
) -> None:
    """CR0.WP=0 lets a supervisor write; when it is set again, the same write is refused."""
    pku = {"bit": 22, "msr": "00 00 00 00", "load": "0f 01 ef"}
    pks = {"bit": 24, "msr": "e1 06 00 00", "load": "0f 30"}
    program = WRITE_TWICE.format(rights=rights, **pku if user else pks)
    with VM("16M", paging=paging, engine=engine, cpu="max") as vm:
        start(vm, program, **handle(vm, 14, REFUSED))
        for at in (PAGE_TABLES_GPA, PAGE_TABLES_GPA + 0x1000, PAGE_TABLES_GPA + 0x2018):
            entry = vm.memory.read(at, 1)[0]
            vm.memory.write(at, bytes([entry | 4 * user]))
        large = 0x60_0000 | 5 << 59 | 0x81 | 4 * user | 2 * is_writable
        vm.memory.write(PAGE_TABLES_GPA + 0x2018, large.to_bytes(8, "little"))
        assert vm.go().status == 0x23 + 7
