"""What a hypervisor does to a guest's frames while the guest runs: moves, takes, protects them.

Source: none.  Invariant: the contents stay what they are, wherever they lie.
"""

from tests.frame_owner import FrameOwner
from understudy.vm import VM


class FrameGame:
    """The frames of one VM."""

    def __init__(self, vm: VM) -> None:
        self.vm = vm
        FrameOwner(self.allow, self.give_back).own(vm.memory.p2m)
        self.sealed: dict[int, bytes] = {}  # gfn -> its contents while it is protected
        self.copy_on_write = False
        self.homes: dict[int, int] = {}  # gfn -> pfn of its contents while it is taken away

    def move(self, gfn: int) -> None:
        """Its contents go to another host frame."""
        if gfn in self.homes:
            return
        old = self.vm.memory.p2m.lookup(gfn)
        assert old is not None
        self.sealed.pop(gfn, None)  # a protection goes with the frame
        self.vm.memory.p2m.map(gfn, self._copy(old), 1)
        self.vm.host.release(old)

    def take(self, gfn: int) -> None:
        """The frame is needed elsewhere; its contents are kept."""
        if gfn in self.homes:
            return
        old = self.vm.memory.p2m.lookup(gfn)
        assert old is not None
        self.sealed.pop(gfn, None)
        self.homes[gfn] = self._copy(old)
        self.vm.memory.p2m.take(gfn, 1)
        self.vm.host.release(old)

    def give_back(self, gfn: int) -> None:
        """Somebody misses it."""
        self.vm.memory.p2m.map(gfn, self.homes.pop(gfn), 1)

    def protect(self, gfn: int, copy_on_write: bool) -> None:
        """Nobody may write to it before `allow` was called."""
        if gfn in self.homes:
            return
        self.vm.memory.p2m.protect(gfn)
        self.sealed[gfn] = self.real(gfn)
        self.copy_on_write = copy_on_write

    def allow(self, gfn: int) -> None:
        """Somebody wants to write."""
        self.sealed.pop(gfn, None)
        if self.copy_on_write:
            self.move(gfn)
        else:
            self.vm.memory.p2m.unprotect(gfn)

    def _copy(self, pfn: int) -> int:
        new = self.vm.host.frame()
        self.vm.host.memory.write(new, self.vm.host.memory.read(pfn << 12, 4096))
        return new >> 12

    def real(self, gfn: int) -> bytes:
        """What is in a guest's frame, without anybody noticing."""
        pfn = self.homes.get(gfn) or self.vm.memory.p2m.lookup(gfn)
        assert pfn is not None
        return self.vm.host.memory.read(pfn << 12, 4096)
