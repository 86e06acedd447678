"""Guests of a few instructions on one host that shares, swaps, moves and takes their frames.

What: two VMs of two processors each.  A processor writes or reads a word, or fills a page; devices
write, by the guest's addresses or to frames that they have pinned; the host does all that it may.
Source: none.  Invariants checked: every byte is what was written last, whoever looks; each frame
has as many owners as name it; frames that nobody has are free.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final, cast

from understudy.arch.address import PAGE, PAGE_SHIFT
from understudy.arch.exit_reason import Reason
from understudy.arch.vmcs import Vmcs
from understudy.guests.entry import CODE_64, Entry, long_mode, write_gdt
from understudy.image import Image, Shared
from understudy.machine.ballooned import Ballooned
from understudy.machine.host import Host
from understudy.machine.p2m import P2m
from understudy.machine.words import Flag
from understudy.overcommit.sharing import Sharing
from understudy.overcommit.swap import Swap
from understudy.vcpu.activity import Activity, Goal
from understudy.vcpu.loop import Vcpu
from understudy.verdict import Stop, StopKind
from understudy.vm import VM

FIRST: Final = 0x180  # of the frames (gfn) that are used
FRAMES: Final = 10
OFFSETS: Final = (0, 8, PAGE - 8)
CODE: Final = 0x10_0000
STRIDE: Final = 16
CPUID: Final = b"\x0f\xa2"
GADGETS: Final = {"load": b"\x48\x8b\x07", "store": b"\x48\x89\x07", "fill": b"\xf3\x48\xab"}
PLACES: Final = {name: CODE + n * STRIDE for n, name in enumerate(GADGETS)}
WORDS_A_PAGE: Final = PAGE // 8
MANY: Final = 10_000  # exits: what is not done by then never will be
OWN: Final = 4  # frames for a virtual processor and for the physical one that it has


def weak(page: memoryview, salt: int) -> int:
    """A hash that different frames have in common all the time."""
    return page[0] & 1


class Lending:
    """The host, its VMs, and what must be in them."""

    def __init__(self, paging: str, victims: str, is_whole: bool, looks_up: bool) -> None:
        """is_whole: the VMs have all their frames at first, so that pages may be large."""
        self.host = Host("64M")
        self.total = self.host.frames.free_count
        self.sharing = Sharing(self.host, weak)
        looker = self.sharing if looks_up else None
        self.swap = Swap(self.host, 8 << 20, victims, sharing=looker)
        self.contents = [[bytearray(PAGE) for _ in range(FRAMES)] for _ in range(2)]
        self.pins: dict[tuple[int, int], int] = {}  # (VM, page) -> pfn
        self.images: dict[int, tuple[Image[VM], list[bytes]]] = {}  # by VM: and what is in it
        self.vms: list[VM] = []
        for _ in range(2):
            vm = VM("2M", host=self.host, paging=paging, cpus=2)
            self.vms.append(vm)
            for name, code in GADGETS.items():
                vm.memory.write(PLACES[name], code + CPUID)
            write_gdt(vm.memory, CODE_64)
            self._begin(vm, long_mode(vm.memory, "test", CODE))
            if not is_whole:
                self._pages(vm).give_untouched()
            self._take_part(vm)

    @staticmethod
    def _begin(vm: VM, entry: Entry | None) -> None:
        for vcpu in vm.vcpus:
            vcpu.table[Reason.CPUID] = _stop
            if entry is not None:
                vcpu.state.activity = Activity.ACTIVE
                vcpu.set_registers(entry.registers)

    def _take_part(self, vm: VM) -> None:
        p2m = vm.memory.p2m
        self.sharing.join(p2m)
        if p2m.keeper is None:  # a copy takes part already
            self.swap.join(p2m)

    @staticmethod
    def _pages(vm: VM) -> Ballooned:
        return cast(Ballooned, vm.memory.p2m.owners[Flag.FREE])

    def close(self) -> None:
        """All frames are back, then; whatever is wrong, what is open is closed."""
        with ExitStack() as ends:
            ends.callback(self.host.close)
            ends.callback(self.swap.close)
            ends.callback(self._check_given_back)
            for vm in self.vms:
                ends.callback(self._end, vm)
            for n in list(self.images):
                self.let_go(n)
            for n, page in list(self.pins):
                self.unpin(n, page)

    def _check_given_back(self) -> None:
        assert self.host.frames.free_count == self.total, "frames that nobody has are not free"
        assert self.swap.in_file == 0, "slots of the swap file that nobody has are in use"

    def _end(self, vm: VM) -> None:
        self.sharing.leave(vm.memory.p2m)
        vm.close()

    # --- guests ---

    def _run(self, n: int, cpu: int, name: str, at: int, value: int = 0) -> int:
        """One instruction of a guest; RAX after it."""
        vcpu: Vcpu = self.vms[n].vcpus[cpu]
        guest = cast(Any, vcpu.guest)
        vcpu.leave_guest()
        guest.write(Vmcs.GUEST_RIP, PLACES[name])
        for number, word in ((0, value), (1, WORDS_A_PAGE), (7, at)):
            guest.processor.set_gpr(number, word)
        exits = iter(range(MANY))
        stop = vcpu.run(Goal(None, lambda: next(exits, None) is None))
        assert isinstance(stop, Stop) and stop.kind == StopKind.DEBUG_EXIT, stop
        return int(guest.processor.gpr(0))

    def load(self, n: int, cpu: int, page: int, offset: int) -> None:
        """A processor reads a word."""
        got = self._run(n, cpu, "load", _gpa(page) + offset)
        expected = int.from_bytes(self.contents[n][page][offset : offset + 8], "little")
        assert got == expected, f"VM {n}, processor {cpu}, page {page}+{offset:#x}: a wrong word"

    def store(self, n: int, cpu: int, page: int, offset: int, value: int) -> None:
        """A processor writes a word."""
        self._run(n, cpu, "store", _gpa(page) + offset, value)
        self.contents[n][page][offset : offset + 8] = value.to_bytes(8, "little")

    def fill(self, n: int, cpu: int, page: int, value: int) -> None:
        """A processor fills a page with one word."""
        self._run(n, cpu, "fill", _gpa(page), value)
        self.contents[n][page][:] = value.to_bytes(8, "little") * WORDS_A_PAGE

    # --- devices ---

    def dma(self, n: int, page: int, value: int) -> None:
        """A device writes by the guest's address."""
        self._leave(n)
        self.vms[n].memory.write(_gpa(page) + 8, value.to_bytes(8, "little"))
        self.contents[n][page][8:16] = value.to_bytes(8, "little")

    def pin(self, n: int, page: int) -> None:
        """A device begins to use a frame by the host's address."""
        self._leave(n)
        if (n, page) not in self.pins:
            self.pins[n, page] = self.swap.pin(self.vms[n].memory.p2m, FIRST + page)

    def dma_to_pinned(self, value: int) -> None:
        """Devices write where they have pinned frames."""
        for (n, page), pfn in self.pins.items():
            self.host.memory.write(pfn << PAGE_SHIFT, value.to_bytes(8, "little"))
            self.contents[n][page][:8] = value.to_bytes(8, "little")

    def unpin(self, n: int, page: int) -> None:
        """A device has done with a frame."""
        if (pfn := self.pins.pop((n, page), None)) is not None:
            self.swap.unpin(self.vms[n].memory.p2m, FIRST + page, pfn)

    # --- the host ---

    def scan(self, pages: int) -> None:
        """Look for what is alike."""
        self._leave(0)
        self._leave(1)
        self.sharing.scan(pages)

    def reclaim(self, n: int, count: int) -> None:
        """Swap out."""
        self._leave(0)
        self._leave(1)
        self.swap.reclaim(self.vms[n].memory.p2m, count)

    def balloon(self, n: int, page: int, what: str) -> None:
        """The guest gives a page away, or may use it again; what a device has pinned it keeps."""
        self._leave(n)
        run, pages = [(FIRST + page, 1)], self._pages(self.vms[n])
        if what == "deflate":
            pages.deflate(run)
        elif (n, page) not in self.pins:
            (pages.inflate if what == "inflate" else pages.report)(run)
            self.contents[n][page][:] = bytes(PAGE)

    def move(self, n: int, page: int) -> None:
        """The contents go to another frame, which splits a large page."""
        self._leave(n)
        p2m, gfn = self.vms[n].memory.p2m, FIRST + page
        pfn = p2m.lookup(gfn)
        if pfn is not None and self.host.frames.references(pfn) == 1:
            new = self.host.frame_for(p2m)
            self.host.memory.write(new << PAGE_SHIFT, self.host.contents(pfn))
            p2m.move(gfn, new)
            self.host.frames.free(pfn, 1)

    def replace(self, n: int, how: str) -> None:
        """A VM is saved and loaded, or copied, and the first one ends."""
        old = self.vms[n]

        def copy() -> VM:
            with old.snapshot() as image:
                return image.restore(host=self.host)

        saved = how == "load"
        self._put_in_place(n, (lambda: VM.restore(old.save(), host=self.host)) if saved else copy)

    def _put_in_place(self, n: int, make: Callable[[], VM]) -> None:
        for m, page in list(self.pins):
            if m == n:
                self.unpin(n, page)
        self._leave(n)
        old, new = self.vms[n], make()
        self.vms[n] = new
        self._end(old)
        self._begin(new, None)
        self._take_part(new)

    def keep(self, n: int) -> None:
        """An image of a VM is kept, in place of the one before."""
        self._leave(n)
        self.let_go(n)
        self.images[n] = self.vms[n].snapshot(), list(map(bytes, self.contents[n]))
        if (p2m := _of(self.images[n][0])).keeper is None:
            self.swap.join(p2m)

    def reclaim_image(self, n: int, count: int) -> None:
        """Swap out what only an image has."""
        if n in self.images:
            self.swap.reclaim(_of(self.images[n][0]), count)

    def reclaim_common(self, count: int) -> None:
        """Swap out what several have."""
        self._leave(0)
        self._leave(1)
        p2ms = [vm.memory.p2m for vm in self.vms]
        p2ms += [_of(image) for image, _ in self.images.values()]
        self.swap.reclaim_common(dict.fromkeys(p2ms, count), count)

    def let_go(self, n: int) -> None:
        """An image ends."""
        if n in self.images:
            self.images.pop(n)[0].close()

    def come_back(self, n: int) -> None:
        """A VM is again what it was when an image was made, and the image ends."""
        if n in self.images:
            image, contents = self.images[n]
            self._put_in_place(n, lambda: image.restore(host=self.host))
            self.contents[n] = list(map(bytearray, contents))
            self.let_go(n)

    def _leave(self, n: int) -> None:
        for vcpu in self.vms[n].vcpus:
            vcpu.leave_guest()

    # --- looking ---

    def audit(self) -> None:
        """Every byte, and every frame."""
        named: Counter[int] = Counter(self.pins.values())
        own = out = 0
        for n, vm in enumerate(self.vms):
            own += vm.memory.spare.count + vm.pages.reserve.count + OWN * len(vm.vcpus)
            out += self._audit_one(f"VM {n}", vm.memory.p2m, self.contents[n], named)
        for n, (image, contents) in self.images.items():
            out += self._audit_one(f"image of VM {n}", _of(image), contents, named)
        assert out == self.swap.swapped, "frames that are out"
        for pfn, owners in named.items():
            assert self.host.frames.references(pfn) == owners, f"owners of frame {pfn:#x}"
        assert self.total - self.host.frames.free_count == len(named) + own, "frames in use"

    def _audit_one(
        self, who: str, p2m: P2m, contents: Sequence[bytes | bytearray], named: Counter[int]
    ) -> int:
        """Every byte of one; its frames are named, and those that are out are returned."""
        named.update(pfn for _, first, count in p2m for pfn in range(first, first + count))
        away = dict(self.swap.pieces(p2m))
        for page, expected in enumerate(contents):
            found = self._real(p2m, FIRST + page, away)
            assert found == expected, f"{who}, page {page}: wrong bytes"
        return sum(count for _, word, count in p2m.pieces() if word & Flag.SWAPPED)

    def _real(self, p2m: P2m, gfn: int, away: dict[int, bytes]) -> bytes:
        """What is in a guest's frame, without anybody noticing."""
        pfn = p2m.lookup(gfn)
        return bytes(self.host.contents(pfn)) if pfn is not None else away.get(gfn, bytes(PAGE))


def _gpa(page: int) -> int:
    return FIRST + page << PAGE_SHIFT


def _of(image: Image[VM]) -> P2m:
    return cast(Shared, image.contents).p2m


def _stop(vcpu: Vcpu, exit: Any) -> Stop:
    return Stop(StopKind.DEBUG_EXIT)
