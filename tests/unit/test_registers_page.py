"""docs/reference/registers.md says what the code does.

Source: tools/registers.py, which makes the page.  The facts below are the manual's, and are looked
for in the page, so that a generator that writes nothing would be noticed.
"""

import pytest

from tools.registers import PAGE, page


@pytest.fixture(scope="module")
def text() -> str:
    """The page as the code has it now."""
    return page()


def test_the_page_is_what_the_code_does(text: str) -> None:
    assert PAGE.read_text(encoding="utf-8") == text, "write it again with `make reference`"


@pytest.mark.parametrize(
    "row",
    [
        # SDM 4, "Architectural MSRs"; SDM 3A, "IA32_APIC_BASE", "Page Attribute Table (PAT)".
        "| 10H | IA32_TSC | runs | 63:0 |   |   |",
        "| 1BH | IA32_APIC_BASE | 0xfee00900 | 45:10, 8 |   |   |",
        "| 48H | IA32_SPEC_CTRL | 0x0 | 10, 1:0 |   | ibrs_ibpb |",
        "| 49H | IA32_PRED_CMD | write-only |   | 0 | ibrs_ibpb |",
        "| 80BH | x2APIC 0B0H | write-only | only 0 |   | x2apic |",
        "| C0000082H … C0000083H | IA32_LSTAR … IA32_CSTAR | 0x0 | canonical |   |   |",
        "| 309H … 30BH | IA32_FIXED_CTR0 … IA32_FIXED_CTR2 | 0x0 | 47:0 |   | pmu |",
        "| 38FH | IA32_PERF_GLOBAL_CTRL | 0xf | 34:32, 3:0 |   | pmu |",
        "| IA32_APIC_BASE.EN | CPUID.01H.0:EDX[9] (APIC) |",
        "| IA32_MISC_ENABLE.XD_DISABLE | CPUID.80000001H.0:EDX[20] (NX) |",
        "| CS.L (64-bit code) | CPUID.80000001H.0:EDX[11] (SYSCALL) |",
        # SDM 3A, "Local APIC Status and Location": the BSP flag; SDM 2, CPUID, "Leaf 0BH": the ID.
        "| 1BH IA32_APIC_BASE | 0xfee00900 | 0xfee00800 | 0xfee00800 | 0xfee00800 |",
        "| CPUID.0BH.1:EDX | 0x0 | 0x1 | 0x2 | 0x3 |",
        "| 802H x2APIC 020H | 0x0 | 0x1 | 0x2 | 0x3 |",
        "| smap | 07H.0:EBX[20] | max |   |   | CR4.SMAP |",
    ],
)
def test_the_probe_finds_what_the_manual_says(text: str, row: str) -> None:
    assert row + "\n" in text
