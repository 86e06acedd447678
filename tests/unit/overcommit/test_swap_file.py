"""The swap file: how long it is, and that what is gone from it is gone.

Source: none.
"""

import os

from tests.unit.overcommit.test_sharing import FRAMES, guest
from understudy.arch.address import PAGE
from understudy.machine.host import Host
from understudy.overcommit.swap import Swap


def test_the_end_of_the_file_in_which_nothing_is_goes() -> None:
    """What a guest had there is on nobody's disk any more; slots in the middle are used again."""
    host = Host("1M")
    one = guest(host)
    for gfn in range(FRAMES):
        one.write(gfn * PAGE, bytes([gfn + 1]) * PAGE)
    with Swap(host, 1 << 20) as swap:
        swap.join(one.p2m)

        def size() -> int:
            return os.fstat(swap.file._file.fileno()).st_size // PAGE

        assert swap.reclaim(one.p2m, FRAMES) == FRAMES == size()
        at = {slot: gfn for gfn, slot in swap._slots[one.p2m].items()}
        last = FRAMES - 1
        for back, expected in ((2, last + 1), (0, last), (1, last - 2), (4, last - 2)):
            gfn = at[last - back]
            assert one.read(gfn * PAGE, PAGE) == bytes([gfn + 1]) * PAGE
            assert size() == expected
        assert swap.in_file == FRAMES - 4
        assert swap.reclaim(one.p2m, 4) == 4 and swap.in_file == FRAMES == size()
        for gfn in range(FRAMES):
            assert one.read(gfn * PAGE, PAGE) == bytes([gfn + 1]) * PAGE
        assert (swap.in_file, size()) == (0, 0)
