"""Packages, cores and threads: what is said, and the APIC IDs that follow."""

import pytest

from understudy.arch.topology import Topology


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, Topology()),
        (4, Topology(cores=4)),
        ("4,cores=2,threads=2", Topology(cores=2, threads=2)),
        ("8,threads=2", Topology(cores=4, threads=2)),
        ("8,cores=2", Topology(sockets=4, cores=2)),
        ("6,sockets=2", Topology(sockets=2, cores=3)),
    ],
)
def test_what_is_not_said_follows(given: int | str, expected: Topology) -> None:
    assert Topology.of(given) == expected


@pytest.mark.parametrize(
    "given",
    [0, 65, -1, "x", "", "4,cores=3", "4,cores=0", "4,cores=-2", "4,rooms=2", "4,cores",
     "4,cores=2,cores=2",
     "2,sockets=1,cores=1"],
)  # fmt: skip
def test_what_cannot_be_says_what_was_expected(given: int | str) -> None:
    with pytest.raises(ValueError, match="expected 1 to 64, and sockets="):
        Topology.of(given)


def test_each_number_has_a_field_of_its_own_width() -> None:
    three = Topology(sockets=2, cores=3, threads=2)
    assert (three.thread_bits, three.package_bits) == (1, 3)
    assert three.apic_ids == (0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13)


def test_no_apic_id_is_the_broadcast() -> None:
    for count in range(1, 65):
        for cores in range(1, count + 1):
            if count % cores == 0:
                for threads in range(1, cores + 1):
                    if cores % threads == 0:
                        ids = Topology(count // cores, cores // threads, threads).apic_ids
                        assert len(set(ids)) == count
                        assert max(ids) < 255
