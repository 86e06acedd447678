"""Guests with AVX: the engines agree, and nothing but the guest changes its YMM registers.

What: programs made at random (`avx_programs`) instruction by instruction under both engines, under
every technique of execution, beside other guests on one processor, over snapshots, clones and
changes of technique.
Source: SDM 1, "Programming with AVX, FMA, and AVX2"; SDM 3A, "Control Registers".
Invariant: registers and memory are as in a run that nothing disturbs.
"""

import random

import pytest

from tests.matrix import programs as p
from tests.matrix.avx_programs import CPU, left, load, upper
from tests.matrix.beside_vmx import together
from tests.matrix.lockstep import assert_agreement
from understudy.execution.emulate import Emulate
from understudy.host import Host
from understudy.sched.share import Share
from understudy.silicon import host_features
from understudy.verdict import StopKind
from understudy.vm import VM

pytestmark = pytest.mark.skipif(
    not all(host_features().get(name) for name in ("avx", "avx2", "fma", "f16c")),
    reason="this computer has no AVX2, FMA and F16C to give",
)
PAGING = {"vmx": "ept", "bt": "lazy", "deprivileged": "lazy", "emulate": "ept"}
TECHNIQUES = tuple(PAGING)
SEEDS = range(4)


def of(seed: int, **options: object) -> VM:
    """A VM about to run the program of a seed."""
    options = {"cpu": CPU, "virtualizable_isa": True} | options
    return load(VM("16M", **options), seed)


def undisturbed(seed: int) -> tuple[str, str, int]:
    """What a run leaves, in registers and memory, and how many instructions it had."""
    with of(seed) as vm:
        assert vm.go().status == 0
        return upper(vm), left(vm), vm.instructions


def ended(vm: VM) -> tuple[str, str, int]:
    """The same of this VM, once it is at its end."""
    assert vm.go().status == 0
    return upper(vm), left(vm), vm.instructions


def test_programs_use_the_upper_halves() -> None:
    """What is compared here is not zero, and differs from seed to seed."""
    halves = {undisturbed(seed)[0] for seed in SEEDS}
    assert len(halves) == len(SEEDS)
    for text in halves:
        used = sum(text[64 * n + 32 : 64 * n + 64] != "0" * 32 for n in range(16))
        assert used >= 1, text


@pytest.mark.parametrize("step", [1, 7, 100])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_engines_agree(seed: int, step: int) -> None:
    def make(engine: str) -> VM:
        return of(seed, engine=engine)

    assert assert_agreement(make, step=step, memory_every=10) == StopKind.DEBUG_EXIT


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize("execution", TECHNIQUES[1:])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_technique_is_as_vmx(seed: int, execution: str, engine: str) -> None:
    one = of(seed, execution=execution, engine=engine, paging=PAGING[execution])
    with one, of(seed, engine=engine) as other:
        assert together(one, other, 3, 100_000) == StopKind.DEBUG_EXIT
        assert (upper(one), left(one)) == (upper(other), left(other))
        guest = one.vcpus[0].guest
        if isinstance(guest, Emulate):  # the processor does it, an instruction at a time
            assert guest.handed_over["VPADDD"] + guest.handed_over["VMULPD"] > 0
            assert guest.interpreted > 0


@pytest.mark.parametrize("engine", ["dbt", "reference"])
def test_guests_on_one_processor_keep_theirs(engine: str) -> None:
    policy = Share(slice_ns=1_000_000)
    with Host(pcpus=1, ram="64M", policy=policy, engine=engine) as host:
        vms = [load(host.vm("2M", name=f"{n}", cpu=CPU), n, turns=50_000) for n in range(2)]
        host.run()
        assert host.schedule.pcpus[0].switches["slice"] >= 4
        for seed, vm in enumerate(vms):
            with VM("2M", cpu=CPU) as alone:
                load(alone, seed, turns=50_000)
                assert alone.go().status == 0
                assert (upper(vm), left(vm)) == (upper(alone), left(alone))
            vm.close()


@pytest.mark.parametrize("execution", TECHNIQUES)
@pytest.mark.parametrize("seed", SEEDS)
def test_snapshots_and_clones_have_them(seed: int, execution: str) -> None:
    expected, chance = undisturbed(seed), random.Random(seed)
    with of(seed, execution=execution, paging=PAGING[execution]) as vm:
        vm.go(budget=chance.randrange(30, expected[2] - 1))
        before = upper(vm)
        with VM.restore(vm.save()) as again:
            assert upper(again) == before
            assert ended(again) == expected
        with vm.snapshot() as image:
            for clone in image.fork(2):
                with clone:
                    assert upper(clone) == before
                    assert ended(clone) == expected
        assert upper(vm) == before
        assert ended(vm) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_changes_of_technique_leave_them_alone(seed: int) -> None:
    expected, chance = undisturbed(seed), random.Random(seed)
    with of(seed) as vm:
        changes = 0
        while vm.go(budget=chance.randrange(1, 15)).kind == StopKind.BUDGET:
            before = upper(vm)
            name = chance.choice([one for one in TECHNIQUES if one != vm.config.execution])
            vm.change_execution(name)
            assert upper(vm) == before
            changes += 1
        assert changes > 20
        assert (upper(vm), left(vm), vm.instructions) == expected


@pytest.mark.parametrize("execution", TECHNIQUES)
def test_a_reset_clears_them(execution: str) -> None:
    with of(0, execution=execution, paging=PAGING[execution]) as vm:
        vm.go(budget=60)
        assert set(upper(vm)) != {"0"}
        vm.vcpus[0].reset()
        assert set(upper(vm)) == {"0"}


SET = """
    0f 20 e0             | mov rax, cr4
    0d 00 06 04 00       | or eax, OSXSAVE | OSXMMEXCPT | OSFXSR
    0f 22 e0             | mov cr4, rax
    b9 {index} 00 00 00       | mov ecx, the register
    31 d2                | xor edx, edx
    b8 {xcr0}            | mov eax, the value
    0f 01 d1             | xsetbv
"""
VZEROUPPER = "c5 f8 77       | vzeroupper"
VPXOR = "c5 f5 ef c9    | vpxor ymm1, ymm1, ymm1"
GATHER = "c4 e2 6d 90 0c 9f | vpgatherdd ymm1, [rdi + ymm3 * 4], ymm2"
TS = "0f 20 c0 83 c8 08 0f 22 c0 | mov rax, cr0; or eax, TS; mov cr0, rax"
NO_OSXSAVE = "0f 20 e0 25 ff ff fb ff 0f 22 e0 | mov rax, cr4; and eax, ~OSXSAVE; mov cr4, rax"
DONE = "\n b0 00 | mov al, 0\n e6 f4 | out 0xf4, al\n"
FAULTED = "\n b0 {vector:02x} | mov al, vector\n e6 f4 | out 0xf4, al\n"


def end_of(program: str, execution: str, engine: str) -> int | None:
    """How it ends: 0, or by which fault."""
    with VM(
        "16M", execution=execution, engine=engine, paging=PAGING[execution], cpu=CPU,
        virtualizable_isa=True,
    ) as vm:  # fmt: skip
        registers: dict[str, int] = {}
        for vector in (6, 7, 13):
            registers |= p.handle(vm, vector, FAULTED.format(vector=vector))
        p.start(vm, program + DONE, rdi=p.DATA, **registers)
        return vm.go().status


def enabled(xcr0: int, index: int = 0) -> str:
    return SET.format(index=f"{index:02x}", xcr0=xcr0.to_bytes(4, "little").hex(" "))


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize("execution", TECHNIQUES)
@pytest.mark.parametrize(
    ("xcr0", "index", "status"),
    [(1, 0, 0), (3, 0, 0), (7, 0, 0), (0x207, 0, 0), (5, 0, 13), (6, 0, 13), (4, 0, 13),
     (0, 0, 13), (0xF, 0, 13), (0xE7, 0, 13), (7, 1, 13)],
)  # fmt: skip
def test_xcr0_takes_avx_with_sse(
    xcr0: int, index: int, status: int, execution: str, engine: str
) -> None:
    assert end_of(enabled(xcr0, index), execution, engine) == status


@pytest.mark.parametrize("engine", ["dbt", "reference"])
@pytest.mark.parametrize("execution", TECHNIQUES)
@pytest.mark.parametrize("code", [VZEROUPPER, VPXOR, GATHER])
@pytest.mark.parametrize(
    ("xcr0", "change", "status"),
    [(7, "", 0), (3, "", 6), (7, TS, 7), (3, TS, 6), (7, NO_OSXSAVE, 6)],
)
def test_avx_is_there_when_the_system_says_so(
    code: str, xcr0: int, change: str, status: int, execution: str, engine: str
) -> None:
    program = "\n".join([enabled(xcr0), change, code])
    assert end_of(program, execution, engine) == status


def test_a_description_has_them() -> None:
    with of(0) as vm:
        vm.go(budget=40)
        value = int.from_bytes(vm.vcpus[0].guest.ymm(15), "little")
        assert value and f"ymm15={value:064x}" in vm.describe()
        vm.vcpus[0].guest.xcr0 = 3
        assert "ymm15=" not in vm.describe()
