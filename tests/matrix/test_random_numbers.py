"""RDRAND and RDSEED in a VM: the same numbers in every run, others in every clone, and hidden.

Source: SDM 1, "Random Number Generator Instructions"; docs/decisions/0032.
Invariants: in virtual time a run repeats whatever the engine; a VM that was only saved goes on with
its numbers; what is hidden is #UD.
"""

import pytest

from tests.guests.fetched import fetched
from tests.matrix.programs import DATA, handle, start
from understudy.linux import VM as Linux
from understudy.verdict import StopKind
from understudy.vm import VM

DRAW = """
    bf 00 00 12 00       | mov edi, DATA
    0f c7 f0             | rdrand eax
    89 07                | mov [rdi], eax
    48 0f c7 f8          | rdseed rax
    48 89 47 08          | mov [rdi + 8], rax
    49 0f c7 f7          | rdrand r15
    4c 89 7f 10          | mov [rdi + 16], r15
    b0 00                | mov al, 0
    e6 f4                | out 0xf4, al
"""
REFUSED = """
    b0 06                | mov al, 6
    e6 f4                | out 0xf4, al
"""


def drawn(vm: VM) -> bytes:
    """The next numbers."""
    start(vm, DRAW)
    stop = vm.go()
    assert (stop.kind, stop.status) == (StopKind.DEBUG_EXIT, 0), stop
    return vm.memory.read(DATA, 24)


def first(**options: str) -> bytes:
    """What a new VM draws."""
    with VM("16M", **options) as vm:  # type: ignore[arg-type]
        return drawn(vm)


def test_numbers_are_the_same_in_every_run_under_either_engine() -> None:
    assert first() == first(engine="reference") == first(paging="vtlb")
    assert first(clock="wall") != first(clock="wall")


def test_a_saved_vm_goes_on_and_a_clone_has_numbers_of_its_own() -> None:
    with VM("16M") as vm:
        drawn(vm)
        saved, image = vm.save(), vm.snapshot()
        expected = drawn(vm)
        with VM.restore(saved) as same:
            assert drawn(same) == expected
        one, two = image.fork(2)
        with one, two:
            (nested,) = one.snapshot().fork()
            with nested:
                numbers = [drawn(each) for each in (one, two, nested)]
        assert len({expected, *numbers}) == 4
        with VM.restore(saved, clone=2) as again:
            assert drawn(again) == numbers[1]
        image.close()


@pytest.mark.parametrize("name", ["rdrand", "rdseed"])
@pytest.mark.parametrize("paging", ["ept", "vtlb"])
def test_what_is_hidden_is_not_there(name: str, paging: str) -> None:
    with VM("16M", paging=paging, cpu=f"-{name}") as vm:
        registers = handle(vm, 6, REFUSED)
        start(vm, DRAW, **registers)
        assert vm.go().status == 6
        assert vm.counts()["exits"][name.upper()] == 1


@pytest.mark.real_guest
@pytest.mark.parametrize(("cpu", "differ"), [("understudy", True), ("-rdrand,-rdseed", False)])
def test_a_linux_that_does_not_know_of_clones_draws_new_numbers_in_time(
    cpu: str, differ: bool
) -> None:
    """This kernel has no driver for the VM generation ID; it asks its processor once a minute."""
    fetched("cloud-amd64")
    with Linux.linux("cloud-amd64", memory="128M", cpu=cpu) as vm:
        vm.wait_for_prompt()
        shown = set(vm.run("grep ^flags /proc/cpuinfo").output.split())
        assert ({"rdrand", "rdseed"} <= shown) == differ
        one, two = vm.snapshot().fork(2)
        with one, two:
            commands = "sleep 130; head -c 16 /dev/urandom | od -An -tx1"
            assert (one.run(commands).output != two.run(commands).output) == differ
