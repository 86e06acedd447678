"""A guest that is nothing but registers, for tests of what is carried out on them.

What: general registers, RIP, RFLAGS, bases of segments, and the code that lies at RIP; all else is
refused.  Source: `understudy/guest.py`.  Invariant: registers hold 64 bits.
"""

from types import SimpleNamespace
from typing import Any

from understudy.guest import Guest


class _Refusing(Guest):
    """Every method of the port, refused."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this guest has no {name}")


_Refusing.__abstractmethods__ = frozenset()


class FakeGuest(_Refusing):
    """Registers."""

    rip = 0
    rflags = 2

    def __init__(self, bits: int = 64, code: bytes = b"", **gprs: int) -> None:
        super().__init__()
        names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
        self.gprs = [gprs.get(name, 0) for name in names] + [0] * 8
        self.bits, self.code, self.bases, self.cr0 = bits, code, [0] * 6, 0
        self.read_gpr, self.write_gpr = self.gpr, self.set_gpr

    def gpr(self, n: int) -> int:
        return self.gprs[n]

    def set_gpr(self, n: int, value: int) -> None:
        assert 0 <= value < 1 << 64
        self.gprs[n] = value

    def code_bits(self) -> int:
        return self.bits

    def segment_base(self, n: int) -> int:
        return self.bases[n]

    def code_at(self, gva: int, length: int) -> bytes:
        """The code lies at RIP."""
        return self.code[:length]

    def control(self) -> Any:
        return SimpleNamespace(cr0=self.cr0, cr4=1 << 18)
