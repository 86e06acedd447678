"""INIT and start-up messages: how a processor is stopped, and started at a page in real mode.

Source: SDM 3A, "Processor State After Reset", table "IA-32 and Intel 64 Processor States" (the
column for INIT); "Local APIC State After an INIT Reset"; "Multiple-Processor (MP)
Initialization".

Invariants: INIT leaves x87, SSE, time and most MSRs as they are; a start-up message means nothing
to a processor that does not wait for one.
"""

from typing import Final

from understudy.arch.cr import CR0, RESET_DEBUG
from understudy.arch.msr import Msr
from understudy.vcpu.activity import Activity
from understudy.vcpu.cpu_model import SIGNATURE
from understudy.vcpu.loop import Vcpu

CACHE_CONTROL: Final = int(CR0(CD=1, NW=1))
EXTENSION_TYPE: Final = CR0.ET.mask
KEPT: Final = (
    "star", "lstar", "cstar", "fmask", "kernel_gs_base", "tsc_aux",
    "sysenter_cs", "sysenter_esp", "sysenter_eip", "pat",
)  # fmt: skip
"""Registers that INIT does not change, of those that `registers` names."""


def init(vcpu: Vcpu) -> None:
    """The bootstrap processor begins at the reset vector, any other waits to be started."""
    apic, base = vcpu.apic, vcpu.apic.base
    apic.load(vcpu.power_on_apic)
    if apic.base != base:
        apic.wrmsr(Msr.IA32_APIC_BASE, base, vcpu.clock.now())
    vcpu.msrs.note_apic_base()
    vcpu.events.clear()
    vcpu.kvm.reset()
    if vcpu.is_bootstrap:
        _begin(vcpu)
    else:
        vcpu.state.activity = Activity.WAIT_FOR_SIPI


def start_up(vcpu: Vcpu, vector: int) -> None:
    """Begin at the page with this number, below 1 MByte."""
    if vcpu.state.activity is Activity.WAIT_FOR_SIPI:
        _begin(vcpu, cs=vector << 8, cs_base=vector << 12, rip=0)


def _begin(vcpu: Vcpu, **at: int) -> None:
    """Execute from there in real-address mode, or from the reset vector."""
    old = vcpu.registers()
    kept = {name: old[name] for name in KEPT}
    cr0 = old["cr0"] & CACHE_CONTROL | EXTENSION_TYPE
    vcpu.set_registers({"cr0": cr0, "rdx": SIGNATURE} | RESET_DEBUG | kept | at)
    vcpu.state.activity = Activity.ACTIVE
