"""The translator does exactly what the reference engine does.

What: the same guest under both; after every so many instructions a hash of registers, flags,
x87 and SSE state, system state, time and counters, and now and then of all memory, is the same.
Source: none.  Invariant: a difference is reported with the first instruction that makes it.
"""

import pytest

from tests.matrix import programs as p
from tests.matrix.lockstep import assert_agreement, linux, type_at_prompt
from understudy.guests.debian import user_land
from understudy.guests.entry import GuestError
from understudy.verdict import StopKind
from understudy.vm import VM

STEP = 10_000
CI_INSTRUCTIONS = 20_000_000


def interrupts(engine: str) -> VM:
    """A small guest with interrupts of the 8254."""
    vm = VM("16M", engine=engine)
    p.start(vm, p.PIT, **p.handle(vm, 0x20, p.PIT_HANDLER))
    return vm


@pytest.mark.parametrize("step", [1, 3])
def test_a_small_guest(step: int) -> None:
    assert assert_agreement(interrupts, step=step, memory_every=10) == StopKind.DEBUG_EXIT


COUNT_AND_READ = """
    b9 05 00 00 00       | mov ecx, 5
    ff c9                | next: dec ecx
    75 fc                | jnz next
    e5 80                | in eax, 0x80
    eb fe                | jmp $
"""


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail, and says where: one guest's port reads something else."""

    def different(engine: str) -> VM:
        vm = VM("16M", engine=engine)
        p.start(vm, COUNT_AND_READ)
        if engine == "dbt":
            monkeypatch.setattr(vm.vcpus[0], "port_read", lambda port, size: 7)
        return vm

    with pytest.raises(pytest.fail.Exception) as failure:
        assert_agreement(different, step=50, memory_every=100)
    report = str(failure.value)
    assert "rax: dbt 0x7, reference 0xffffffff" in report
    before = report.partition("first difference after instruction 11, before:")[2]
    assert "in eax,80h" in before.partition("after 1 more")[0]


@pytest.mark.real_guest
@pytest.mark.parametrize("guest", ["cloud-amd64", "686", "686-pae"])
def test_the_beginning_of_linux(guest: str) -> None:
    assert_agreement(
        lambda engine: linux(engine, guest),
        step=STEP,
        memory_every=CI_INSTRUCTIONS // STEP // 4,
        done=lambda pair: pair.reference.instructions >= CI_INSTRUCTIONS,
    )


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("guest", ["cloud-amd64", "686", "686-pae"])
def test_a_whole_boot_of_linux(guest: str) -> None:
    """To the prompt, and from there to the power-off."""

    def typed(engine: str) -> VM:
        vm = linux(engine, guest)
        type_at_prompt(vm, "poweroff\n")
        return vm

    assert assert_agreement(typed, step=STEP, memory_every=5_000) == StopKind.POWEROFF


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.timeout(3600)
def test_programs_of_32_bits_on_a_kernel_of_64() -> None:
    """Compatibility mode: the whole user land is that of an i386, system calls through INT 80h."""
    try:
        programs = user_land(architecture="i386")
    except GuestError as problem:
        pytest.skip(f"no busybox of 32 bits: {problem}")

    def typed(engine: str) -> VM:
        vm = linux(engine, initrd=programs)
        type_at_prompt(vm, "md5sum /bin/busybox; poweroff\n")
        return vm

    assert assert_agreement(typed, step=STEP, memory_every=5_000) == StopKind.POWEROFF
