"""A hostile guest and a hostile program on both sides of the device: neither harms the hypervisor.

Source: none; whatever comes from either side, a request ends with an answer that FUSE knows.
"""

import errno
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.devices.virtio.test_fs_daemon import DaemonDriver
from understudy.devices.virtio import fs_messages as fuse
from understudy.devices.virtio.fs_daemon import KNOWN
from understudy.devices.virtio.fs_messages import Op

OPCODES = st.sampled_from(sorted(KNOWN)) | st.integers(0, 60)
ERRNOS = st.sampled_from([0, 0, -2, -4095, -4096, 1, -(1 << 31)])
SAID = st.none() | st.tuples(ERRNOS, st.binary(max_size=120), st.integers(-1, 1)) | st.binary()
REQUESTS = st.lists(
    st.tuples(OPCODES, st.binary(max_size=100), st.integers(0, 300), st.integers(0, 1), SAID),
    max_size=20,
)


Said = bytes | tuple[int, bytes, int] | None


class Hostile:
    """Says what it is told to say next."""

    problem = ""

    def __init__(self) -> None:
        self.said: Said = None
        self.asked: list[bytes] = []

    def ask(self, queue: int, request: bytes, room: int) -> bytes:
        self.asked.append(request)
        if self.said is None:
            raise OSError(errno.EIO, "gone")
        if isinstance(self.said, bytes):
            return self.said[:room]
        error, body, more = self.said
        unique = fuse.IN_HEADER.unpack_from(request)[2]
        size = fuse.OUT_HEADER.size + len(body) + more
        return (fuse.OUT_HEADER.pack(size, error, unique) + body)[:room]

    def close(self) -> None:
        """Nothing is open."""


@settings(deadline=None)
@example([(Op.INIT, fuse.INIT_IN.pack(7, 31, 0, 0), 40, 1, (0, bytes(24), 0))])
@given(REQUESTS)
def test_every_request_ends_as_fuse_knows_it(
    requests: list[tuple[int, bytes, int, int, Said]],
) -> None:
    program = Hostile()
    driver = DaemonDriver(Path("/nowhere"), program)
    try:
        for unique, (opcode, body, room, queue, said) in enumerate(requests, 1):
            program.said, program.asked = said, []
            header = fuse.IN_HEADER.pack(7, opcode, unique, 1, 5, 6, 7, 8, 9)
            answer = driver.request(queue, header + body, room)
            assert driver.status == 15
            for asked in program.asked:
                size, told, *_, uid, gid, _, more, _ = fuse.IN_HEADER.unpack_from(asked)
                assert (size, told, uid, gid, more) == (len(asked), opcode, 0, 0, 0)
                assert opcode in KNOWN
            if not answer:
                assert room < fuse.OUT_HEADER.size or opcode in fuse.SILENT
                continue
            size, error, about = fuse.OUT_HEADER.unpack_from(answer)
            assert (size, about) == (len(answer), unique) and -4095 <= error <= 0
            assert error == 0 or size == fuse.OUT_HEADER.size
            assert size <= room
            if opcode == Op.INIT and size > fuse.OUT_HEADER.size:
                assert size == fuse.OUT_HEADER.size + fuse.INIT_OUT.size
    finally:
        driver.close()
