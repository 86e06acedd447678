"""Who owns which frame of host-physical memory.

Frames are numbered by pfn (hpa >> 12).  A frame may have several owners, who only read it: it is
free again when the last one has released it.  A run that is allocated costs the computer nothing
until it is touched, and one that is freed is given back.

Invariants: a frame is in a free run exactly if nobody has a reference to it; frame 0 belongs to
none, so that hpa 0 is never valid; what is refused (ValueError, OutOfFrames) has changed nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from understudy.machine.free_runs import FreeRuns
from understudy.machine.quiet import Quiet
from understudy.machine.references import References

Runs = Sequence[tuple[int, int]]
"""(pfn, count)."""


class OutOfFrames(MemoryError):
    """The host has no run of free frames of that size."""


class Frames:
    """The frame allocator: first fit among the free runs, aligned; and who shares what."""

    def __init__(
        self, first: int, count: int, discard: Callable[[int, int], None] = lambda pfn, count: None
    ) -> None:
        """`discard` is called with each run (pfn, count) before it is free again."""
        if first < 0 or count < 0:
            raise ValueError(f"frames {first:#x}+{count}: expected no negative numbers")
        self._first, self._end = first, first + count
        self._free = FreeRuns()
        if count:
            self._free.add(first, count)
        self._references = References()
        self._discard = discard
        self.quiet = Quiet()
        self.given_up = 0
        """Frames that an owner has given up, ever."""
        self._is_closed = False

    @property
    def count(self) -> int:
        """How many frames there are."""
        return self._end - self._first

    @property
    def free_count(self) -> int:
        """How many frames are free."""
        return self._free.total

    def allocate(self, count: int = 1, align: int = 1) -> int:
        """The pfn of `count` neighboring frames, the first a multiple of `align`."""
        _check_count(count, align)
        with self.quiet:
            found = self._free.find(count, align)
            if found is not None:
                self._own(*found, count)
                return found[1]
        raise OutOfFrames(
            f"no run of {count} free frames aligned to {align}: {self.free_count} frames are "
            "free; give the host more memory, Host(ram=…)"
        )

    def allocate_runs(self, count: int, align: int = 1) -> list[tuple[int, int]]:
        """`count` frames as runs (pfn, count), as few as there are, the first one aligned."""
        _check_count(count, align)
        try:
            return [(self.allocate(count, align), count)]
        except OutOfFrames:
            pass
        with self.quiet:
            if self.free_count < count:
                raise OutOfFrames(f"{count} frames wanted, {self.free_count} are free")
            runs = []
            for start, length in self._free.largest_first():
                part = min(length, count)
                runs.append((start, part))
                count -= part
                if not count:
                    break
            for start, part in runs:
                self._own(start, start, part)
            return runs

    def claim(self, first: int, count: int) -> None:
        """Take exactly these frames (a snapshot returns to where it was)."""
        self._check_all([(first, count)])
        with self.quiet:
            if self._references.any(first, count):
                raise OutOfFrames(f"frames {first:#x}+{count} are not all free")
            self._own(self._free.around(first), first, count)

    def share(self, first: int, count: int, owners: int = 1) -> None:
        """One more owner, or so many, for each of these frames."""
        self.share_all([(first, count)], owners)

    def share_all(self, runs: Runs, owners: int = 1) -> None:
        """The same for each frame of many runs (pfn, count): for all of them, or for none."""
        self._check_all(runs)
        with self.quiet:
            if not all(self._references.all(first, count) for first, count in runs):
                raise ValueError(f"{_named(runs)}: some of the frames are free, not shared")
            for first, count in runs:
                self._references.add(first, count, owners)

    def free(self, first: int, count: int) -> None:
        """An owner gives a run up; what has no other owner is free again."""
        self.free_all([(first, count)])

    def free_all(self, runs: Runs) -> None:
        """The same for many runs (pfn, count): all of them, or none."""
        if self._is_closed:
            return
        self._check_all(runs)
        gone: list[tuple[int, int]] = []
        with self.quiet:
            for n, (first, count) in enumerate(runs):
                if not self._references.all(first, count):
                    for run in runs[:n]:
                        self._references.add(*run)
                    raise ValueError(f"{_named(runs)}: some of the frames are free already")
                gone += self._references.drop(first, count)
                self.given_up += count
            for first, count in _joined(gone):
                self._discard(first, count)
                self._free.add(first, count)

    @contextmanager
    def exchange(self, runs: Runs, count: int) -> Iterator[None]:
        """Nobody else takes frames while an owner gives up these runs and takes `count` frames.

        OutOfFrames if there are not as many: nothing has been given up then.
        """
        with self.quiet:
            room = self.free_count + sum(self._references.sole(*run) for run in runs)
            if room < count:
                raise OutOfFrames(f"{count} frames wanted, {room} are free or its own")
            yield

    def references(self, pfn: int) -> int:
        """How many owners a frame has."""
        return self._references.of(pfn)

    def sole(self, first: int, count: int) -> int:
        """How many of these frames have one owner."""
        return self._references.sole(first, count)

    def close(self) -> None:
        """There is no memory any more: nothing can be allocated, and `free` does nothing."""
        with self.quiet:
            self._free, self._references, self._is_closed = FreeRuns(), References(), True

    def _own(self, run: int, first: int, count: int) -> None:
        self._free.remove(run, first, count)
        self._references.add(first, count)

    def _check_all(self, runs: Runs) -> None:
        low, high = self._first, self._end
        for first, count in runs:
            if count < 1 or first < low or first + count > high:
                raise ValueError(
                    f"frames {first:#x}+{count}: expected at least one, in [{low:#x}, {high:#x})"
                )


def _check_count(count: int, align: int = 1) -> None:
    if count < 1 or align < 1:
        raise ValueError(f"{count} frames aligned to {align}: expected at least 1 of each")


def _named(runs: Runs) -> str:
    """Runs in words, without those that are too many."""
    first, count = runs[0]
    return f"frames {first:#x}+{count}" + (f" and {len(runs) - 1} more runs" if runs[1:] else "")


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint runs in order, neighbors as one."""
    out: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        if out and sum(out[-1]) == first:
            out[-1] = (out[-1][0], out[-1][1] + count)
        else:
            out.append((first, count))
    return out
