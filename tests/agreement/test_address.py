"""Both halves have physical addresses of the same width."""

import pytest

from understudy.arch.address import MAXPHYADDR, is_canonical

silicon = pytest.importorskip("understudy.silicon", reason="the compiled half is not built")


def test_the_widest_memory_that_the_machine_takes() -> None:
    with pytest.raises(ValueError, match=rf"expected 1 to {1 << MAXPHYADDR:#x}$"):
        silicon.Memory((1 << MAXPHYADDR) + 1)


@pytest.mark.parametrize("bits", [48, 57])
def test_canonical_addresses(bits: int) -> None:
    half = 1 << bits - 1
    assert all(is_canonical(gva, bits) for gva in (0, half - 1, (1 << 64) - half, (1 << 64) - 1))
    assert not any(is_canonical(gva, bits) for gva in (half, (1 << 64) - half - 1, 1 << 63))
