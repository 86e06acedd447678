"""The file behind swapping: contents of frames, each in a slot.

Source: none.  Cost: one write or read of a page; a set of the slots that are free.
Invariants: it has no name, so it is gone with its process; it is no longer than its last slot in
use; a slot that cannot be written is free again.
"""

import os
import tempfile
from pathlib import Path

from understudy.arch.address import PAGE
from understudy.machine.frames import OutOfFrames


class SwapError(OutOfFrames):
    """The swap file has no room, or cannot be written or read."""


class SwapFile:
    """Pages, by slot."""

    def __init__(self, slots: int, folder: Path | None = None) -> None:
        """Room for so many.  folder: where it is.  OSError if there can be no file."""
        self.slots = slots
        """For so many it has room; it may be given more at any time."""
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (`close`)
        self._end = 0  # of the file, in slots
        self._free: set[int] = set()  # slots before that, never the last one
        self._glance = bytearray(PAGE)

    @property
    def used(self) -> int:
        """Slots with something in them."""
        return self._end - len(self._free)

    def put(self, contents: bytes, gfn: int) -> int:
        """Into which slot a frame's contents went.  SwapError: nowhere."""
        if not self._free:
            if self._end >= self.slots:
                raise SwapError(
                    f"the swap file is full: guest frame {gfn:#x} stays in memory; give it more "
                    "bytes"
                )
            self._free.add(self._end)
            self._end += 1
        slot = self._free.pop()
        try:
            done = 0
            while done < PAGE:
                done += os.pwrite(self._file.fileno(), contents[done:], slot * PAGE + done)
        except OSError as problem:
            self.give_back(slot)
            raise SwapError(
                f"the swap file cannot be written ({problem.strerror}): guest frame {gfn:#x} "
                "stays in memory"
            ) from problem
        return slot

    def get(self, slot: int, gfn: int) -> bytes:
        """What was put there.  SwapError if it cannot be read."""
        try:
            contents = os.pread(self._file.fileno(), PAGE, slot * PAGE)
        except OSError as problem:
            raise SwapError(
                f"the swap file cannot be read ({problem.strerror}): guest frame {gfn:#x} is in it"
            ) from problem
        if len(contents) != PAGE:
            raise SwapError(f"the swap file was cut: guest frame {gfn:#x} is in it")
        return contents

    def is_at_hand(self, slot: int) -> bool:
        """Whether `get` need not wait for a disk; also where that is not known, or would fail."""
        try:
            os.preadv(self._file.fileno(), [self._glance], slot * PAGE, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def fetch(self, slot: int) -> None:
        """Have the computer read it; nobody waits."""
        os.posix_fadvise(self._file.fileno(), slot * PAGE, PAGE, os.POSIX_FADV_WILLNEED)

    def give_back(self, slot: int) -> None:
        """Nothing is there any more; an end of the file in which nothing is goes."""
        self._free.add(slot)
        if slot < self._end - 1 or self._file.closed:
            return
        while self._end - 1 in self._free:
            self._end -= 1
            self._free.remove(self._end)
        if os.fstat(self._file.fileno()).st_size > self._end * PAGE:
            os.ftruncate(self._file.fileno(), self._end * PAGE)

    def close(self) -> None:
        """The file is no more."""
        self._file.close()
