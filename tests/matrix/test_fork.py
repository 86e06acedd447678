"""A booted Debian, cloned: what clones share, what they do not, and that all go on.

Source: none.  Counts are asserted (frames shared and copied, answers of commands); times are only
printed.  Invariant: neither an origin nor a clone ever sees what another has written.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.matrix.lockstep import linux
from understudy.image_file import SnapshotError
from understudy.linux import VM
from understudy.paging import Paging

MANY, FEW = 16, 3
FRAMES = 256 << 20 >> 12
IDLE_FRAMES = 1024  # 4 MBytes
SHADOWS = [name for name in Paging.ALL if name != "ept"]


@pytest.fixture(scope="module")
def origin() -> Iterator[VM]:
    """A cloud kernel under EPT that has carried out a command."""
    with linux() as vm:
        vm.run("echo booted > /tmp/state").check()
        yield vm


def used(vm: VM) -> int:
    """Host frames that are somebody's."""
    return (vm.host.memory.size >> 12) - vm.host.frames.free_count


def test_clones_live_beside_their_origin_and_cost_little(origin: VM) -> None:
    with origin.snapshot() as image:
        before, begin = used(origin), time.thread_time()
        clones = image.fork(MANY)
        print(f"a clone in {(time.thread_time() - begin) / MANY * 1e3:.1f} ms")
        assert used(origin) - before <= MANY * IDLE_FRAMES
        for n, clone in enumerate(clones):
            said = clone.run(f"cat /tmp/state; echo {n} > /tmp/state; seq {n + 1} | wc -l").check()
            assert said.output == f"booted\n{n + 1}\n"
        for n, clone in enumerate(clones):
            assert clone.run("cat /tmp/state").output == f"{n}\n"
        assert origin.run("cat /tmp/state").output == "booted\n"
        assert used(origin) - before < MANY * FRAMES // 8
        for clone in clones:
            clone.close()
        assert used(origin) - before <= FRAMES  # what the origin itself has copied
    assert origin.run("echo on").output == "on\n"


def test_a_clone_can_be_cloned_saved_and_restored(origin: VM, tmp_path: Path) -> None:
    with origin.snapshot() as image, image.fork()[0] as clone:
        clone.run("echo clone > /tmp/state").check()
        with clone.snapshot() as second, second.fork()[0] as grandchild:
            assert grandchild.run("cat /tmp/state").output == "clone\n"
            grandchild.run("echo grandchild > /tmp/state").check()
            assert clone.run("cat /tmp/state").output == "clone\n"
            file = tmp_path / "grandchild.usnap"
            grandchild.write(file)
        with VM.restore(file) as again:
            assert again.run("cat /tmp/state").output == "grandchild\n"
        with VM.restore(clone.save(), host=origin.host) as beside:
            assert beside.run("cat /tmp/state").output == "clone\n"


def test_an_image_outlives_its_vm() -> None:
    vm = linux()
    vm.run("true").check()
    with vm.snapshot() as image:
        vm.close()
        with image.restore() as elsewhere, image.fork()[0] as clone:
            assert elsewhere.run("echo a").output == clone.run("echo a").output == "a\n"


@pytest.mark.parametrize("paging", [pytest.param(name, marks=pytest.mark.slow) for name in SHADOWS])
def test_under_every_technique(paging: str) -> None:
    with linux(paging=paging) as vm:
        vm.run("echo booted > /tmp/state").check()
        with vm.snapshot() as image:
            clones = image.fork(FEW)
        for n, clone in enumerate(clones):
            assert clone.run(f"cat /tmp/state; echo {n} > /tmp/state").output == "booted\n"
        assert [c.run("cat /tmp/state").output for c in clones] == [f"{n}\n" for n in range(FEW)]
        assert vm.run("cat /tmp/state").output == "booted\n"
        with clones[0].snapshot() as image, image.fork()[0] as grandchild:
            assert grandchild.run("cat /tmp/state").output == "0\n"
        with VM.restore(clones[1].save()) as again:
            assert again.run("cat /tmp/state").output == "1\n"
        for clone in clones:
            clone.close()


@pytest.mark.parametrize("harm", ["cut", "flipped", "foreign", "longer"])
def test_a_harmed_file_is_refused_and_leaves_nothing(origin: VM, tmp_path: Path, harm: str) -> None:
    data = origin.save()
    where = len(data) // 2
    harmed = {
        "cut": data[:where],
        "flipped": data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :],
        "foreign": b"\x7fELF" + data[4:],
        "longer": data + b"\0",
    }[harm]
    file = tmp_path / "harmed.usnap"
    file.write_bytes(harmed)
    before = used(origin)
    with pytest.raises(SnapshotError) as refused:
        VM.restore(file, host=origin.host)
    assert "\n" not in str(refused.value)
    assert used(origin) == before
