"""A page for steal time that the host has no frame for any more ends nobody's run.

Source: ours.  The page has two owners, as after a fork or sharing, so that a write needs a frame.
"""

from tests.matrix.shared import spinning
from understudy.arch.msr import Msr
from understudy.host import Host
from understudy.machine.copy_on_write import CopyOnWrite
from understudy.machine.words import Flag
from understudy.sched.seat import State
from understudy.sched.share import Share
from understudy.turns import TURN_NS
from understudy.verdict import StopKind

PAGE_AT = 0x18_0000


def test_the_other_vm_goes_on() -> None:
    with Host(pcpus=1, ram="64M", policy=Share(slice_ns=TURN_NS)) as host:
        told, other = (spinning(host, name, cpu="max") for name in ("told", "other"))
        host.run(deadline_ns=30 * TURN_NS)  # all tables are there
        told.memory.write(PAGE_AT, bytes(range(1, 65)))
        told.vcpus[0].msrs.write(Msr.KVM_STEAL_TIME, PAGE_AT | 1)
        p2m, gfn = told.memory.p2m, PAGE_AT >> 12
        host.frames.share(p2m.lookup(gfn), 1)
        p2m.owners[Flag.SHARED] = CopyOnWrite(host)
        p2m.protect(gfn, 1, Flag.SHARED)
        taken = []
        while host.frames.free_count:
            taken.append(host.frames.allocate(1))
        before = other.instructions
        for turns in (60, 90):
            stop = host.run(deadline_ns=turns * TURN_NS)
            assert stop.kind is StopKind.DEADLINE, stop
        assert other.ended is None and other.instructions > before
        assert told.ended is None or told.claim.seats[0].state is State.AWAY
        assert p2m.is_protected(gfn), "nothing was written"
        for frame in taken:
            host.frames.free(frame, 1)
