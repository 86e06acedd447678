"""A clone knows that it is one: its kernel makes its random numbers anew.

What: clones of a booted Linux read /dev/urandom by the same command right after the fork.
Source: Microsoft, "Virtual Machine Generation ID"; Linux, drivers/virt/vmgenid.c, which Debian's
kernels have but cloud-amd64 of Debian 12.
Invariants: clones differ from each other and from their origin; in virtual time each is the same
in every run; a VM that was only saved notices nothing, but in real time.
"""

import functools

import pytest

from tests.guests.fetched import fetched
from understudy.guests import hello, loader
from understudy.linux import VM
from understudy.vm import VM as Machine

COMMAND = "head -c 16 /dev/urandom | od -An -tx1"
RESEEDED = "random: crng reseeded due to virtual machine fork"


@functools.cache
def booted(guest: str) -> bytes:
    """The guest at its prompt, with its agent, saved."""
    fetched(guest)
    with VM.linux(guest, memory="128M") as vm:
        vm.wait_for_prompt()
        vm.wait_for_agent()
        return vm.save()


def numbers(guest: str) -> list[tuple[str, int]]:
    """What the origin and two clones read, and after how many instructions."""
    with VM.restore(booted(guest)) as origin:
        first, second = origin.snapshot().fork(2)
        with first, second:
            assert [RESEEDED in vm.run("dmesg").output for vm in (origin, second)] == [False, True]
        (first,) = origin.snapshot().fork(1)
        (second,) = origin.snapshot().fork(1)
        with first, second:
            return [(vm.run(COMMAND).output, vm.instructions) for vm in (origin, first, second)]


@pytest.mark.real_guest
def test_clones_have_random_numbers_of_their_own_the_same_in_every_run() -> None:
    got = numbers("cloud-amd64-6.12")
    assert len({text for text, _ in got}) == 3
    assert numbers("cloud-amd64-6.12") == got


@pytest.mark.slow
@pytest.mark.real_guest
@pytest.mark.parametrize("guest", ["amd64", "686", "686-pae"])
def test_older_kernels_too(guest: str) -> None:
    assert len({text for text, _ in numbers(guest)}) == 3


def generation(vm: Machine) -> bytes:
    """As the guest finds it."""
    return vm.memory.read(vm.pc.layout.generation_gpa, 16)


def machine(clock: str) -> Machine:
    vm = Machine("16M", clock=clock)
    vm.enter(loader.load(vm.memory, hello.image()))
    return vm


def test_in_virtual_time_only_a_clone_is_another_vm() -> None:
    with machine("virtual") as vm, Machine.restore(vm.save()) as same:
        assert generation(same) == generation(vm)
        first, second = vm.snapshot().fork(2)
        (third,) = vm.snapshot().fork()
        with Machine.restore(vm.save(), clone=2) as by_number, first, second, third:
            assert generation(by_number) == generation(second)
            assert len({generation(one) for one in (vm, first, second, third)}) == 4
            (nested,) = first.snapshot().fork()
            with nested:
                assert generation(nested) not in map(generation, (vm, first, second, third))


def test_in_real_time_whatever_was_restored_is_another_vm() -> None:
    with machine("wall") as vm, machine("wall") as other, Machine.restore(vm.save()) as restored:
        assert len({generation(one) for one in (vm, other, restored)}) == 3


def test_a_reset_does_not_make_another_vm() -> None:
    with Machine("16M", clock="wall") as vm:
        vm.boot(lambda at: loader.load(at.memory, hello.image()))
        before = generation(vm)
        vm.reset()
        assert generation(vm) == before
