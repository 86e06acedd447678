"""A VM's memory for loader tests: bytes, with the hole of a PC below 1 MiB."""

MIB = 1 << 20


class FlatMemory:
    """`GuestMemory` on a bytearray; writes outside it fail the test."""

    def __init__(self, size: int = 256 * MIB) -> None:
        self.content = bytearray(size)

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, gpa: int, length: int, /) -> bytes:
        assert gpa >= 0 and gpa + length <= self.size
        return bytes(self.content[gpa : gpa + length])

    def write(self, gpa: int, data: bytes, /) -> None:
        assert gpa >= 0 and gpa + len(data) <= self.size
        self.content[gpa : gpa + len(data)] = data

    def ranges(self) -> list[tuple[int, int]]:
        low = (0, min(self.size, 0x9_FC00))
        return [low, (MIB, self.size - MIB)] if self.size > MIB else [low]
