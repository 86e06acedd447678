"""A hostile paravirtual guest gets an error and nothing else.

What: page tables that would do harm, calls with any arguments, devices set on page tables.
Source: P. Barham et al., "Xen and the Art of Virtualization", SOSP 2003, for what is checked.
Invariant: after each, an audit of the guest's tables from outside finds no harm.
"""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.matrix.pv_guest import (
    CODE,
    LIST,
    PRESENT,
    SHARED,
    STACK_TOP,
    WRITABLE,
    PvGuest,
    audit,
)
from understudy.arch.address import PAGE
from understudy.execution.pv.interface import Call, Change, Error, Shared
from understudy.guests.entry import GuestError
from understudy.linux import VM as LinuxVM
from understudy.machine.host import Host
from understudy.verdict import StopKind

BITS = (64, 32)
DATA = 0x20_0000  # gpa of pages for anything
RW = PRESENT | WRITABLE
LIFE_NS = 60_000_000_000


@pytest.fixture(params=BITS)
def guest(request: pytest.FixtureRequest) -> Iterator[PvGuest]:
    made = PvGuest(request.param)
    with closing(made.vm):
        made.start()
        yield made


def test_what_is_right_is_done(guest: PvGuest) -> None:
    assert guest.map(DATA, guest.hpa(DATA + PAGE) | RW) == 1
    assert guest.vm.host.memory.read_u64(guest.slot(DATA)) == guest.hpa(DATA + PAGE) | RW
    audit(guest)


def test_the_frame_of_another_vm() -> None:
    host = Host(1 << 30)
    one, other = PvGuest(host=host), PvGuest(host=host)
    with closing(one.vm), closing(other.vm):
        one.start()
        for flags in (PRESENT, RW):
            before = one.vm.host.memory.read_u64(one.slot(DATA))
            assert one.map(DATA, other.hpa(DATA) | flags) == Error.INVALID
            assert "is not the guest's" in one.guest.last_refused
            assert one.vm.host.memory.read_u64(one.slot(DATA)) == before
            audit(one)


def test_a_frame_of_nobody(guest: PvGuest) -> None:
    for frame in (0, 1 << 39, (1 << 40) - 1):
        assert guest.map(DATA, frame << 12 | PRESENT) == Error.INVALID
    audit(guest)


def test_a_page_table_is_not_mapped_writable(guest: PvGuest) -> None:
    for table in (guest.root, guest.direct):
        assert guest.map(DATA, guest.hpa(table) | RW) == Error.INVALID
        assert guest.map(DATA, guest.hpa(table) | PRESENT) == 1
    audit(guest)


def test_what_is_mapped_writable_does_not_become_a_page_table(guest: PvGuest) -> None:
    guest.vm.memory.write(DATA, bytes(PAGE))
    assert guest.change((guest.hpa(DATA) | Change.PIN, 0)) == Error.INVALID
    assert guest.map(DATA, guest.hpa(DATA) | PRESENT) == 1
    assert guest.change((guest.hpa(DATA) | Change.PIN, 0)) == 1
    assert guest.map(DATA, guest.hpa(DATA) | RW) == Error.INVALID
    audit(guest)
    assert guest.change((guest.hpa(DATA) | Change.UNPIN, 0)) == 1
    assert guest.map(DATA, guest.hpa(DATA) | RW) == 1
    audit(guest)


def test_the_shared_page_never_becomes_a_page_table(guest: PvGuest) -> None:
    assert guest.map(SHARED, guest.hpa(SHARED) | PRESENT) == 1
    assert guest.change((guest.hpa(SHARED) | Change.PIN, 0)) == Error.INVALID
    audit(guest)


@pytest.mark.parametrize("content", ["another's frame", "a table, writable", "a large page"])
def test_a_root_is_checked_before_it_is_loaded(guest: PvGuest, content: str) -> None:
    guest.vm.memory.write(DATA, bytes(2 * PAGE))
    bad = {
        "another's frame": (1 << 38) | PRESENT,
        "a table, writable": guest.hpa(guest.direct) | RW,
        "a large page": guest.hpa(DATA + PAGE) | RW | 0x80,
    }[content]
    guest.vm.memory.write(DATA + 8, bad.to_bytes(8, "little"))
    assert guest.map(DATA, guest.hpa(DATA) | PRESENT) == 1
    before = guest.guest.view.root
    assert guest.change((guest.hpa(DATA) | Change.LOAD, 0)) == Error.INVALID
    assert guest.change((guest.hpa(DATA) | Change.PIN, 0)) == Error.INVALID
    assert guest.guest.view.root == before
    audit(guest)


@pytest.mark.parametrize("at", ["data", "the middle of an entry", "nowhere"])
def test_an_entry_has_to_be_one(guest: PvGuest, at: str) -> None:
    where = {
        "data": guest.hpa(DATA), "the middle of an entry": guest.slot(DATA) + 4, "nowhere": 1 << 50,
    }[at]  # fmt: skip
    assert guest.change((where, 0)) == Error.INVALID
    audit(guest)


def test_a_batch_ends_at_what_is_refused(guest: PvGuest) -> None:
    good, bad = guest.hpa(DATA + 9 * PAGE) | RW, 1 << 38 | PRESENT
    slots = [guest.slot(DATA + n * PAGE) for n in range(3)]
    assert guest.change((slots[0], good), (slots[1], bad), (slots[2], good)) == Error.INVALID
    read = guest.vm.host.memory.read_u64
    assert [read(slot) == good for slot in slots] == [True, False, False]
    assert guest.guest.last_refused.startswith("change 1: ")
    audit(guest)


def test_what_is_queued_for_a_return_is_checked_too(guest: PvGuest) -> None:
    """The return does not come about; one of what is right does, and the change is made."""
    write, slot = guest.vm.memory.write, guest.slot(DATA)
    word = 8 if guest.guest.is_code_64 else 4
    frame = (0, 0, 0, guest.base + CODE, 0x1B, 2, guest.base + STACK_TOP, 0x23)
    write(CODE + 0x1800, b"".join(one.to_bytes(word, "little") for one in frame))
    for count, value, result in ((1, 1 << 38 | PRESENT, Error.INVALID), (1 << 40, 0, Error.INVALID),
                                 (1, guest.hpa(DATA + 9 * PAGE) | PRESENT, None)):  # fmt: skip
        write(LIST, slot.to_bytes(8, "little") + value.to_bytes(8, "little"))
        write(SHARED + Shared.QUEUE, (guest.base + LIST).to_bytes(8, "little"))
        write(SHARED + Shared.QUEUED, count.to_bytes(8, "little"))
        guest.guest.set_gpr(4, guest.base + CODE + 0x1800)
        before = guest.vm.host.memory.read_u64(slot)
        if result is None:
            guest.guest.write_gpr(0, Call.RETURN)
            guest.vm.go(budget=1000, until=lambda: guest.guest.calls["return_from_event"] == 3)
            assert guest.guest.cpl() == 3
            assert guest.vm.host.memory.read_u64(slot) == value
        else:
            assert guest.call(Call.RETURN) == result
            assert guest.guest.cpl() == 0
            assert guest.vm.host.memory.read_u64(slot) == before
        audit(guest)


def test_a_guest_that_meets_nothing_but_events_ends_by_its_budget() -> None:
    """Its entry is an undefined instruction, and its stack is long: nothing ever retires."""
    guest = PvGuest(64, bytes.fromhex("cd 82 0f 0b"))
    with closing(guest.vm):
        assert guest.call(Call.START, guest.base + CODE + 2, SHARED, 1) == 0
        guest.guest.set_gpr(4, guest.base + (4 << 20))
        assert guest.vm.go(budget=1000).kind is StopKind.BUDGET


def test_what_the_processor_remembers_is_no_way_to_write_to_a_page_table(guest: PvGuest) -> None:
    """A mapping that was writable is in its TLB; nobody has told it to forget that."""
    is_64 = guest.guest.is_code_64
    store, address = ("48 89 06", guest.base + DATA) if is_64 else ("89 06", guest.base + DATA)
    program = bytes.fromhex(store + "cd 82" + store + "cd 82 eb fc")
    guest.vm.memory.write(CODE + 0x800, program)
    guest.vm.memory.write(DATA, bytes(PAGE))
    guest.guest.rip = guest.base + CODE + 0x800
    guest.guest.write_gpr(6, address)
    assert guest.map(DATA, guest.hpa(DATA) | PRESENT) == 1  # after the first store
    assert guest.vm.memory.read(DATA, 1) != b"\0"
    guest.vm.memory.write(DATA, bytes(PAGE))
    guest.guest.rip = guest.base + CODE
    assert guest.change((guest.hpa(DATA) | Change.PIN, 0)) == 1
    guest.guest.rip = guest.base + CODE + 0x805 - (0 if is_64 else 1)
    guest.guest.write_gpr(0, 1)
    events = guest.guest.bounced[14]
    guest.vm.go(budget=100, until=lambda: guest.guest.bounced[14] > events)
    assert guest.guest.bounced[14] == events + 1
    assert guest.vm.memory.read(DATA, 8) == bytes(8)
    audit(guest)


def test_what_the_processor_remembers_is_no_way_to_a_frame_that_is_given_up() -> None:
    """The guest has unmapped it, and has not had its processor forget; then it is another's."""
    guest = PvGuest()
    with closing(guest.vm):
        guest.start()
        guest.vm.memory.write(CODE + 0x800, bytes.fromhex("48 89 06 cd 82 48 89 06 eb fe"))
        guest.vm.memory.write(DATA, bytes(PAGE))
        guest.guest.rip = guest.base + CODE + 0x800
        guest.guest.write_gpr(6, guest.base + DATA)
        assert guest.map(DATA, 0) == 1  # after the first store
        old, p2m = guest.hpa(DATA), guest.vm.memory.p2m
        assert guest.vm.host.memory.read(old, 1) != bytes(1)
        guest.vm.host.memory.write(old, bytes(8))
        p2m.move(DATA // PAGE, guest.hpa(DATA + PAGE) // PAGE)
        guest.vm.go(budget=100, until=lambda: guest.guest.bounced[14] > 0)
        assert guest.guest.bounced[14] == 1
        assert guest.vm.host.memory.read(old, 8) == bytes(8)
        p2m.move(DATA // PAGE, old // PAGE)


def test_a_sensitive_instruction_ends_the_run(guest: PvGuest) -> None:
    guest.vm.memory.write(CODE + 0x900, bytes.fromhex("9c eb fd"))
    guest.guest.rip = guest.base + CODE + 0x900
    stop = guest.vm.go(budget=1000)
    assert stop.kind is StopKind.ERROR
    assert "sensitive instruction: PUSHF" in stop.detail


@pytest.mark.parametrize("code", ["0f 22 d8", "0f 01 10", "fa", "f4", "0f 30", "0f 21 c0", "6e"])
def test_a_privileged_instruction_is_an_event(guest: PvGuest, code: str) -> None:
    guest.vm.memory.write(CODE + 0x900, bytes.fromhex(code))
    guest.guest.rip = guest.base + CODE + 0x900
    guest.vm.go(budget=1000, until=lambda: guest.guest.bounced[13] > 0)
    assert guest.guest.bounced[13] == 1
    assert not guest.guest.handed_over


def test_a_hang_with_interrupts_off_ends_by_its_budget(guest: PvGuest) -> None:
    guest.vm.memory.write(CODE + 0x900, bytes.fromhex("eb fe"))
    guest.guest.rip = guest.base + CODE + 0x900
    assert guest.vm.go(budget=100_000).kind is StopKind.BUDGET


def test_it_is_reset_and_starts_again(guest: PvGuest) -> None:
    guest.vm.reset()
    guest.guest.set_gpr(4, guest.base + STACK_TOP)
    guest.start()
    audit(guest)


def test_it_is_not_saved(guest: PvGuest) -> None:
    with pytest.raises(ValueError, match="names host frames: it cannot be saved"):
        guest.vm.snapshot()
    assert guest.map(DATA, guest.hpa(DATA + PAGE) | RW) == 1


def test_looking_at_it_follows_its_tables_into_host_memory(guest: PvGuest) -> None:
    guest.guest.rip = guest.base + CODE
    words = str(guest.vm.inspect(guest.base + CODE))
    assert f"hpa {guest.hpa(CODE):#x}" in words
    assert "the hypervisor has no tables" in words
    assert "int 82h" in guest.vm.describe()


def test_a_kernel_that_is_not_paravirtual_is_refused() -> None:
    for name, execution, paging in (("teaching", "pv", "pv"), ("teaching-pv", "vmx", "ept")):
        with pytest.raises(GuestError, match=r"the kernel is (not )?paravirtual: "):
            LinuxVM.linux(name, execution=execution, paging=paging)


def test_programs_do_not_call(guest: PvGuest) -> None:
    assert guest.map(CODE, guest.hpa(CODE) | RW | 4) == 1
    guest.guest.go_to(3)
    before = sum(guest.guest.calls.values())
    guest.vm.go(budget=1000, until=lambda: sum(guest.guest.calls.values()) > before)
    assert guest.guest.bounced == {13: 1}  # whose handler has called
    frame = guest.vm.memory.read(CODE + 0x1F00, 0x100)
    assert (0x82 << 3 | 2).to_bytes(4, "little") in frame


# --- anything ---


class Chance:
    """Arguments that a hostile guest would choose: some right, some nearly, some not at all."""

    def __init__(self, guest: PvGuest, seed: int) -> None:
        self.guest, self.chance = guest, random.Random(seed)
        self.frames = [guest.hpa(gpa) for gpa in range(0, 4 << 20, PAGE)]
        self.tables = [
            guest.hpa(gpa) for gpa in range(guest.root, guest.first_free, PAGE)
        ] + [guest.hpa(DATA + n * PAGE) for n in range(4)]  # fmt: skip
        self.slots = [guest.slot(DATA + n * PAGE) for n in range(8)]

    def word(self) -> int:
        c, base = self.chance, self.guest.base
        return c.choice((
            c.getrandbits(64), c.getrandbits(12), c.getrandbits(32), 0, (1 << 64) - 1,
            base + c.randrange(4 << 20), c.choice(self.frames), c.choice(self.tables),
        ))  # fmt: skip

    def item(self) -> tuple[int, int]:
        c = self.chance
        where = c.choice(
            (c.choice(self.slots), c.choice(self.tables) | c.choice((1, 2, 3, 2, 3, 2, 3, 2, 3, 4)))
        )
        if c.random() < 0.005:  # more often, and it does not live for long
            where = c.choice((c.choice(self.tables) + 8 * c.randrange(512), self.word()))
        flags = c.choice((0, 1, 3, 7, 0x67, 0x1000_0000_0000_0003 & -1, c.getrandbits(12)))
        value = c.choice(
            (c.choice(self.frames) | flags, c.choice(self.tables) | flags, self.word())
        )
        return where, value

    def scribble(self) -> None:
        """Anything in the shared page, often a list of changes for the next return."""
        c, at = self.chance, self.chance.choice(list(Shared))
        self.guest.vm.memory.write(SHARED + at, self.word().to_bytes(8, "little"))
        if c.random() < 0.5:
            where = (self.guest.base + LIST).to_bytes(8, "little")
            count = c.randrange(4).to_bytes(8, "little")
            self.guest.vm.memory.write(SHARED + Shared.QUEUE, where + count)

    def call(self) -> tuple[int, int, int, int]:
        c = self.chance
        if c.random() < 0.05:
            self.scribble()
        if c.random() < 0.7:
            items = [self.item() for _ in range(c.randrange(1, 5))]
            raw = b"".join(n.to_bytes(8, "little") for item in items for n in item)
            self.guest.vm.memory.write(LIST, raw)
            return Call.UPDATE, self.guest.base + LIST, len(items), 0
        number = c.choice((*Call, 16, 99, self.word()))
        if number in (Call.OFF, Call.WAIT) and c.random() < 0.98:  # they end it, or wait for ever
            number = Call.LOOK
        return number, self.word(), self.word(), self.word()


def campaign(bits: int, calls: int, seed: int, every: int) -> Counter[str]:
    """So many calls; a guest that ends is followed by another.  What was refused."""
    refused: Counter[str] = Counter()
    done = 0
    while done < calls:
        seed += 1
        guest = PvGuest(bits)
        with closing(guest.vm):
            guest.start()
            chance, own = Chance(guest, seed), guest.guest
            made, left = [0], calls - done

            def next_call(
                chance: Chance = chance, guest: PvGuest = guest, made: list[int] = made,
                left: int = left,
            ) -> bool:  # fmt: skip
                if guest.guest.cpl() == 0:
                    for register, value in zip((0, 3, 1, 2), chance.call(), strict=True):
                        guest.guest.write_gpr(register, value & (1 << 64) - 1)
                    guest.guest.set_gpr(4, guest.base + STACK_TOP - 0x100)
                    guest.guest.rip = guest.base + CODE
                made[0] += 1
                if made[0] % every == 0:
                    audit(guest)
                return made[0] >= left

            stop = guest.vm.go(  # one that waits for an event that never comes ends there
                budget=calls * 100, until=next_call, deadline_ns=LIFE_NS
            )  # fmt: skip
            assert stop.kind is not StopKind.ERROR or "pv" in stop.detail, stop
            audit(guest)
            assert not own.handed_over
            done += max(made[0], 1)
            refused += own.refused
    return refused


@pytest.mark.parametrize("bits", BITS)
def test_any_calls(bits: int) -> None:
    refused = campaign(bits, 6_000, bits, 500)
    assert refused["update"] > 1000


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("bits", BITS)
def test_half_a_million_calls(bits: int) -> None:
    assert campaign(bits, 500_000, 1000 + bits, 5_000)["update"] > 100_000
