"""VMs that have more memory than their host: what each writes it reads again, and none ends.

Source: Waldspurger, "Memory Resource Management in VMware ESX Server".  Counts are asserted.
"""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest

from tests.matrix import programs as p
from understudy.arch.address import PAGE
from understudy.host import Host
from understudy.linux import VM
from understudy.machine.words import Flag
from understudy.overcommit.accounts import Kind, accounts
from understudy.overcommit.plan import PlanError, State
from understudy.overcommit.stock import CLUSTER
from understudy.overcommit.terms import Terms
from understudy.overcommit.victims import Victims
from understudy.paging import Paging
from understudy.sched.share import Share

US = 1000
VMCS, ROOT = 2, 2  # frames for a virtual processor, and for a physical one
MEMORY = 16 << 20
FIRST = 2 << 20
WALK = """
    48 c7 c7 00 00 20 00 | again: mov rdi, 200000h
    48 89 f8             | next: mov rax, rdi
    48 31 d0             | xor rax, rdx
    48 01 d8             | add rax, rbx
    48 85 db             | test rbx, rbx
    74 05                | jz write
    48 39 07             | cmp [rdi], rax
    75 17                | jne bad
    48 ff c0             | write: inc rax
    48 89 07             | mov [rdi], rax
    48 81 c7 00 10 00 00 | add rdi, 4096
    48 39 f7             | cmp rdi, rsi
    72 db                | jb next
    48 ff c3             | inc rbx
    eb cf                | jmp again
    0f 0b                | bad: ud2
"""
"""Writes a word to each page from 2 MBytes up to RSI, no two the same, and looks at it in the next
round; RBX counts the rounds."""


def made(ram: str, **terms: Any) -> Host:
    """A host whose VMs take turns often, and wait for no page, if nothing else is said."""
    overcommit = Terms(**{"read_ns": 0} | terms)
    return Host(pcpus=1, ram=ram, policy=Share(slice_ns=50 * US), overcommit=overcommit)


def walking(host: Host, number: int, **options: Any) -> VM:
    """One that needs all its memory, all the time."""
    vm = host.vm(MEMORY, name=f"v{number}", table_memory="2M", **options)
    p.start(vm, WALK, rsi=MEMORY, rdx=number << 40)
    return vm


def rounds(vm: VM) -> int:
    """How often it has been through its memory."""
    return vm.vcpus[0].registers()["rbx"]


def audit(host: Host) -> None:
    """Each frame belongs to whom it should, and the sums are what there is."""
    swap = host.stock.swap
    assert swap is not None
    told = accounts(host.stock)
    own = 0
    named: Counter[int] = Counter()
    for vm, account in zip(host.vms, told.vms, strict=True):
        p2m, kinds = vm.memory.p2m, account.kinds
        named.update(pfn for _, first, n in p2m for pfn in range(first, first + n))
        out = sum(n for _, word, n in p2m.pieces() if word & Flag.SWAPPED)
        assert swap.swapped_of(p2m) == out == kinds[Kind.SWAPPED]
        assert sum(kinds.values()) == account.size == vm.memory.pages
        assert account.consumed + account.saved == account.size - p2m.absent + kinds[Kind.SAMPLED]
        own += vm.memory.spare.count + vm.pages.reserve.count + VMCS
    assert all(host.frames.references(pfn) == owners for pfn, owners in named.items())
    sampled = sum(account.kinds[Kind.SAMPLED] for account in told.vms)
    assert sum(account.consumed for account in told.vms) == len(named) + sampled
    assert told.own == own + ROOT * len(host.entered), "what the hypervisor has itself"


def run_until(host: Host, vms: list[VM], count: int) -> None:
    """Until each has been through its memory so often."""
    for _ in range(200):
        host.run(deadline_ns=host.schedule.time.now() + 100 * US)
        assert all(vm.ended is None for vm in vms), [vm.ended for vm in vms]
        if all(rounds(vm) >= count for vm in vms):
            return
    raise AssertionError([rounds(vm) for vm in vms])


@pytest.mark.parametrize("paging", Paging.ALL)
def test_each_finds_what_it_wrote(paging: str) -> None:
    """Three VMs of 16 MBytes on a host of 32; the technique is another one in the middle."""
    with made("32M") as host:
        vms = [walking(host, n, paging=paging) for n in range(3)]
        assert host.stock.is_on
        run_until(host, vms, 2)
        audit(host)
        others = [name for name in Paging.ALL if name != paging]
        for vm, other in zip(vms, others, strict=False):
            vm.paging = other
        run_until(host, vms, 4)
        assert [vm.paging for vm in vms] == others[: len(vms)]
        audit(host)
        swap = host.stock.swap
        assert swap is not None and swap.read > 1000
        for vm in vms:
            vm.close()
        assert swap.swapped == swap.in_file == 0


def test_two_runs_are_the_same() -> None:
    told = []
    for _ in range(2):
        with made("24M") as host:
            vms = [walking(host, n) for n in range(2)]
            host.run(deadline_ns=500 * US)
            swap, stock = host.stock.swap, host.stock
            assert swap is not None
            told.append(
                [vm.counts() for vm in vms]
                + [swap.written, swap.read, stock.looks, stock.reliefs, host.frames.free_count]
            )
    assert told[0] == told[1]


def test_while_all_fit_nothing_is_different() -> None:
    with made("64M") as host:
        vms = [walking(host, n) for n in range(2)]
        assert not host.stock.is_on
        assert all(not vm.memory.p2m.absent for vm in vms)
        host.run(deadline_ns=100 * US)
        assert host.stock.looks == 0
        assert "fit" in host.stock.why
        one = vms[0].memory
        held = one.pages - sum(
            not any(host.contents(pfn))
            for _, first, n in one.p2m
            for pfn in range(first, first + n)
        )
        walking(host, 2)
        walking(host, 3)
        assert host.stock.is_on
        assert one.pages - one.p2m.absent == held, "what nobody has written is the host's again"
        run_until(host, vms, 2)


@pytest.mark.parametrize("paging", Paging.ALL)
def test_while_all_fit_nothing_of_it_is_called(paging: str) -> None:
    """By guests that write to all their memory, and take turns."""
    called: Counter[str] = Counter()

    def count(frame: FrameType, event: str, what: object) -> None:
        where = frame.f_code.co_filename
        if event == "call":
            called["overcommit" if "/understudy/overcommit/" in where else "others"] += 1
            called["waits"] += where.endswith("page_wait.py")

    with made("64M") as host:
        vms = [walking(host, n, paging=paging) for n in range(2)]
        host.run(deadline_ns=50 * US)
        sys.setprofile(count)
        try:
            host.run(deadline_ns=500 * US)
        finally:
            sys.setprofile(None)
        assert all(vm.ended is None for vm in vms) and called["others"] > 100
        assert called["overcommit"] == called["waits"] == 0, called
    with made("24M") as host:  # a control: where it is on it is called
        for n in range(2):
            walking(host, n, paging=paging)
        called.clear()
        sys.setprofile(count)
        try:
            host.run(deadline_ns=500 * US)
        finally:
            sys.setprofile(None)
        assert called["overcommit"] > 100


def test_frames_are_taken_when_they_are_needed() -> None:
    with made("32M", is_always=True) as host:
        before = host.frames.free_count
        vm = walking(host, 1)
        assert before - host.frames.free_count < 1024
        assert vm.memory.p2m.absent == vm.memory.pages - 512, "the first 2 MBytes came at once"
        run_until(host, [vm], 1)
        assert vm.memory.p2m.absent == 0


@pytest.mark.parametrize("victims", Victims.ALL)
def test_any_policy_will_do(victims: str) -> None:
    with made("24M", victims=victims) as host:
        vms = [walking(host, n) for n in range(2)]
        run_until(host, vms, 3)
        audit(host)


def test_a_single_vm_may_be_larger_than_its_host() -> None:
    with made("12M") as host:
        vm = walking(host, 1)
        run_until(host, [vm], 3)
        audit(host)


def test_who_may_not_start() -> None:
    with made("24M", swap="16M") as host:
        walking(host, 0, min_memory="8M")
        with pytest.raises(PlanError, match="a minimum of 4096 pages"):
            walking(host, 1, min_memory=MEMORY)
        with pytest.raises(PlanError, match="more swap"):
            walking(host, 1)
        assert len(host.vms) == 1 and len(host.stock.holdings) == 1
        walking(host, 1, min_memory="8M")


def test_a_minimum_is_kept_and_shares_count() -> None:
    with made("32M") as host:
        vms = [walking(host, 0, min_memory="12M"), walking(host, 1, shares=3), walking(host, 2)]
        run_until(host, vms, 3)
        stock = host.stock
        stock.look()
        targets = [one.target for one in stock.holdings.values()]
        assert targets[0] >= (12 << 20) // PAGE
        assert targets[1] > 2 * targets[2]


def test_states_say_what_is_slow_and_why() -> None:
    with made("24M") as host:
        vms = [walking(host, n) for n in range(2)]
        run_until(host, vms, 2)
        stock = host.stock
        assert stock.reliefs > 0
        assert all("swapped out" in one.why for one in stock.holdings.values())
        assert stock.shortage.state in State
        assert stock.why.startswith(stock.shortage.at(host.frames.free_count).name.lower())
        swap = stock.swap
        assert swap is not None
        assert "full" not in stock.why
        swap.file.slots = 0
        swap.file._free.clear()
        stock.expect(1000)
        assert "the swap file is full" in stock.why


@pytest.mark.parametrize("how", ["fork", "save", "elsewhere"])
def test_a_copy_of_a_vm_has_what_is_swapped_out(how: str) -> None:
    """Without bringing it back; and each goes on for itself."""
    with made("32M") as host, Host(pcpus=1, ram="64M") as other:
        vms = [walking(host, n) for n in range(3)]
        run_until(host, vms, 2)
        swap = host.stock.swap
        assert swap is not None
        first = vms[0]
        before, read = first.memory.p2m.absent, swap.read
        assert swap.swapped_of(first.memory.p2m) > 1000
        if how == "fork":
            with first.snapshot() as image:
                again = image.fork()[0]
        else:
            again = VM.restore(first.save(), host=other if how == "elsewhere" else host)
        if how == "fork":
            assert first.memory.p2m.absent == before
            assert before - 4 <= again.memory.p2m.absent <= before, "it was told that it is a copy"
        assert swap.read - read <= 4, "nothing was brought back but for that"
        vms[2].close()
        there = [first, vms[1]] + ([again] if how != "elsewhere" else [])
        run_until(host, there, rounds(first) + 2)
        if how == "elsewhere":
            run_until(other, [again], rounds(again) + 2)
        else:
            audit(host)
        for vm in (first, vms[1], again):
            vm.close()
        assert swap.swapped == swap.in_file == 0
        assert host.frames.free_count > 8000


def test_a_reset_forgets_what_was_swapped_out() -> None:
    with made("24M") as host:
        vms = [walking(host, n) for n in range(2)]
        for vm in vms:
            vm._load = lambda machine: None  # type: ignore[assignment, return-value]
        run_until(host, vms, 2)
        swap = host.stock.swap
        assert swap is not None and swap.swapped_of(vms[0].memory.p2m)
        vms[0].enter = lambda entry: None  # type: ignore[method-assign]
        vms[0].reset()
        assert swap.swapped_of(vms[0].memory.p2m) == 0
        assert vms[0].memory.p2m.absent > 3000
        audit(host)


def test_in_the_middle_of_an_exit_only_others_give() -> None:
    """Whoever answers it may have looked at the guest's frames already."""
    with made("24M") as host:
        vms = [walking(host, n) for n in range(2)]
        run_until(host, vms, 2)
        stock, swap, (one, two) = host.stock, host.stock.swap, vms
        assert swap is not None
        host.frames.allocate_runs(host.frames.free_count)  # somebody has them all
        p2m = one.memory.p2m
        missed = next(gfn for gfn, word, _ in p2m.pieces() if word & Flag.SWAPPED)
        there = {gfn: p2m.word(gfn) for gfn in range(one.memory.pages) if p2m.lookup(gfn)}
        out, looked = swap.swapped_of(two.memory.p2m), swap.looked_up
        one.vcpus[0].is_running = True
        assert p2m.touch(missed)
        one.vcpus[0].is_running = False
        assert swap.swapped_of(two.memory.p2m) == out + CLUSTER
        assert all(p2m.word(gfn) == word for gfn, word in there.items()), "not even their rights"
        assert swap.looked_up == looked
        reliefs = stock.reliefs
        host.run(deadline_ns=host.schedule.time.now() + 50 * US)
        assert stock.reliefs > reliefs, "before the guest goes on everybody may have to"
        assert all(vm.ended is None for vm in vms)
