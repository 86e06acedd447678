"""The features that a CPU model may show, and the text in which a user chooses among them.

    understudy                  what is right for most guests: all but what costs them speed
    max                         all that the machine and this computer can do
    baseline                    the same on every computer
    max,-smap,-pcid             a model, and what to add to it or take from it

Source: SDM 2A, "CPUID - CPU Identification".  A feature is called as its bit is there, in lower
case; the names of Linux's /proc/cpuinfo and others in use are understood as well.

Left out on purpose: AVX-512 (not in the machine), LA57, CET, VMX (nesting comes later).

Invariants: a set of features that `Choice.made` returns is closed: what a feature needs is in it;
nothing is in it that the machine or the computer lacks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from understudy.arch import cpuid
from understudy.arch.bits import Bits
from understudy.arch.cr import CR4

MODELS: Final = ("understudy", "max", "baseline")


@dataclass(frozen=True)
class Feature:
    """One bit of CPUID, and what goes with it."""

    name: str
    word: type[Bits]
    bit: str
    host: tuple[str, ...] = ()
    """What the computer must have, by the names of `host_features`."""
    cr4: CR4 = CR4(0)  # noqa: RUF009 (immutable)
    """The bits of CR4 that a guest may set if it has this."""
    needs: tuple[str, ...] = ()
    models: tuple[str, ...] = MODELS
    """Where it is shown if nothing else is said."""


FEATURES: Final[dict[str, Feature]] = {}

_WIDE = ("understudy", "max")  # by the computer: not the same everywhere
_ASKED = ("max",)  # and not what is best for most


def _add(word: type[Bits], names: str, **more: object) -> None:
    for name in names.split():
        bit = name.upper()
        FEATURES[name] = Feature(name, word, bit, **more)  # type: ignore[arg-type]


_add(cpuid.Leaf1Edx, "tsc", cr4=CR4(TSD=1))
_add(cpuid.Leaf1Edx, "fpu msr cx8 apic cmov clfsh mmx ss")
_add(cpuid.Leaf1Edx, "vme", cr4=CR4(VME=1, PVI=1))
_add(cpuid.Leaf1Edx, "de", cr4=CR4(DE=1))
_add(cpuid.Leaf1Edx, "pse", cr4=CR4(PSE=1))
_add(cpuid.Leaf1Edx, "pae", cr4=CR4(PAE=1))
_add(cpuid.Leaf1Edx, "mce", cr4=CR4(MCE=1))
_add(cpuid.Leaf1Edx, "pge", cr4=CR4(PGE=1))
_add(cpuid.Leaf1Edx, "sep mtrr mca pat", needs=("msr",))
_add(cpuid.Leaf1Edx, "pse36", needs=("pse",))
_add(cpuid.Leaf1Edx, "fxsr", cr4=CR4(OSFXSR=1))
_add(cpuid.Leaf1Edx, "sse", cr4=CR4(OSXMMEXCPT=1), needs=("fxsr",))
_add(cpuid.Leaf1Edx, "sse2", needs=("sse",))
_add(cpuid.Leaf1Ecx, "hypervisor cx16 rdrand")
_add(cpuid.Leaf1Ecx, "tsc_deadline", needs=("apic", "msr", "tsc"))
_add(cpuid.Leaf1Ecx, "x2apic", needs=("apic", "msr"))
FEATURES["pmu"] = Feature("pmu", cpuid.Leaf0AEax, "VERSION", needs=("apic", "msr"))
_add(cpuid.Leaf1Ecx, "pdcm", needs=("pmu",))
_add(cpuid.Leaf1Ecx, "pcid", cr4=CR4(PCIDE=1), needs=("lm",))
_add(cpuid.Leaf1Ecx, "sse3", needs=("sse2",))
_add(cpuid.Leaf1Ecx, "ssse3", host=("ssse3",), needs=("sse3",), models=_WIDE)
_add(cpuid.Leaf1Ecx, "sse4_1", host=("sse41",), needs=("sse3",), models=_WIDE)
_add(cpuid.Leaf1Ecx, "sse4_2", host=("sse42",), needs=("sse3",), models=_WIDE)
_add(cpuid.Leaf1Ecx, "aes", host=("aes",), needs=("sse2",), models=_WIDE)
_add(cpuid.Leaf1Ecx, "pclmulqdq", host=("pclmulqdq",), needs=("sse2",), models=_WIDE)
_add(cpuid.Leaf1Ecx, "popcnt", host=("popcnt",), models=_WIDE)
_add(cpuid.Leaf1Ecx, "movbe", host=("movbe",), models=_WIDE)
_add(cpuid.Leaf7Ebx, "erms")
_add(cpuid.Leaf7Ebx, "tsc_adjust", needs=("msr", "tsc"))
_add(cpuid.Leaf7Ebx, "invpcid rdseed")
_add(cpuid.Leaf7Ebx, "fsgsbase", cr4=CR4(FSGSBASE=1), needs=("lm",))
_add(cpuid.Leaf7Ebx, "smep", cr4=CR4(SMEP=1))
_add(cpuid.Leaf7Ebx, "smap", cr4=CR4(SMAP=1), models=_ASKED)
_add(cpuid.Leaf7Ebx, "bmi1", host=("bmi1",), models=_WIDE)
_add(cpuid.Leaf7Ebx, "bmi2", host=("bmi2",), models=_WIDE)
_add(cpuid.Leaf7Ebx, "adx", host=("adx",), models=_WIDE)
_add(cpuid.Leaf7Ebx, "clflushopt clwb", needs=("clfsh",), models=_ASKED)
_add(cpuid.Leaf7Ebx, "sha", host=("sha",), needs=("sse2",), models=_ASKED)
_add(cpuid.Leaf7Ecx, "umip", cr4=CR4(UMIP=1))
_add(cpuid.Leaf7Ecx, "rdpid", needs=("rdtscp",), models=_ASKED)
_add(cpuid.Leaf7Edx, "arch_capabilities ibrs_ibpb", needs=("msr",))
_add(cpuid.Leaf7Edx, "fsrm")
_add(cpuid.Leaf7Sub2Edx, "bhi_ctrl", needs=("ibrs_ibpb",))
_add(cpuid.Leaf1Ecx, "xsave", cr4=CR4(OSXSAVE=1), needs=("fxsr",))
_add(cpuid.Leaf1Ecx, "avx", host=("avx",), needs=("xsave", "sse2"), models=_WIDE)
_add(cpuid.Leaf1Ecx, "fma", host=("fma",), needs=("avx",), models=_WIDE)
_add(cpuid.Leaf1Ecx, "f16c", host=("f16c",), needs=("avx",), models=_WIDE)
_add(cpuid.Leaf7Ebx, "avx2", host=("avx2",), needs=("avx",), models=_WIDE)
_add(cpuid.LeafDSub1Eax, "xsaveopt xsavec xgetbv1", needs=("xsave",))
_add(cpuid.LeafDSub1Eax, "xsaves", needs=("xsave", "msr"))
_add(cpuid.Leaf7Ecx, "pku", cr4=CR4(PKE=1), needs=("lm", "xsave"))
_add(cpuid.Leaf7Ecx, "pks", cr4=CR4(PKS=1), needs=("lm", "msr"), models=_ASKED)
_add(cpuid.KvmFeatures, "clocksource", needs=("hypervisor", "msr"))
_add(cpuid.KvmFeatures, "clocksource2 clocksource_stable_bit", needs=("clocksource",))
_add(cpuid.KvmFeatures, "nop_io_delay", needs=("hypervisor",))
_add(cpuid.KvmFeatures, "pv_eoi", needs=("hypervisor", "msr", "apic"), models=_ASKED)
_add(cpuid.KvmFeatures, "steal_time poll_control", needs=("hypervisor", "msr"), models=_ASKED)
_add(cpuid.KvmFeatures, "pv_unhalt", needs=("hypervisor",), models=_ASKED)
_add(cpuid.KvmFeatures, "pv_tlb_flush", needs=("steal_time",), models=_ASKED)
_add(cpuid.KvmFeatures, "async_pf", needs=("async_pf_int", "hypervisor"), models=_ASKED)
_add(cpuid.KvmFeatures, "async_pf_int", needs=("async_pf", "msr", "apic"), models=_ASKED)
_add(cpuid.LeafExt1Ecx, "lahf64", needs=("lm",))
_add(cpuid.LeafExt1Ecx, "prefetchw")
_add(cpuid.LeafExt1Ecx, "lzcnt", host=("lzcnt",), needs=("bmi1",), models=_WIDE)
_add(cpuid.LeafExt1Edx, "lm", needs=("pae", "msr"))
_add(cpuid.LeafExt1Edx, "page_1g syscall", needs=("lm",))
_add(cpuid.LeafExt1Edx, "nx", needs=("pae", "msr"))
_add(cpuid.LeafExt1Edx, "rdtscp", needs=("tsc", "msr"))

ALIASES: Final = {
    "pni": "sse3", "abm": "lzcnt", "clflush": "clfsh", "lahf_lm": "lahf64",
    "3dnowprefetch": "prefetchw", "pdpe1gb": "page_1g", "tsc_deadline_timer": "tsc_deadline",
    "ibrs": "ibrs_ibpb", "ibpb": "ibrs_ibpb", "spec_ctrl": "ibrs_ibpb", "sha_ni": "sha",
    "arch_perfmon": "pmu", "pclmul": "pclmulqdq", "cmpxchg16b": "cx16", "cmpxchg8b": "cx8",
    "kvmclock": "clocksource", "kvm_steal_time": "steal_time", "kvm_pv_eoi": "pv_eoi",
    "kvm_pv_unhalt": "pv_unhalt", "kvm_pv_tlb_flush": "pv_tlb_flush",
    "kvm_poll_control": "poll_control", "kvm_nopiodelay": "nop_io_delay",
    "kvm_asyncpf": "async_pf", "kvm_asyncpf_int": "async_pf_int",
}  # fmt: skip
"""Other names in use: of Linux's /proc/cpuinfo, and of other hypervisors."""


@dataclass(frozen=True)
class Choice:
    """A CPU model as a user chose it: a name, what to add and what to take away."""

    model: str = "understudy"
    added: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, text: str) -> "Choice":
        """From `MODEL,+feature,-feature`; ValueError says in one line what was expected."""
        model, *changes = (part.strip() for part in text.split(","))
        if model[:1] in ("+", "-"):  # the model may be left out
            model, changes = MODELS[0], [model, *changes]
        if model not in MODELS:
            raise ValueError(
                f"cpu {model!r}: expected one of {', '.join(MODELS)}, then perhaps +feature "
                "or -feature, as in max,-smap"
            )
        said: dict[str, set[str]] = {"+": set(), "-": set()}
        for change in changes:
            if change[:1] not in said:
                raise ValueError(f"cpu {text!r}: {change!r} must be +feature or -feature")
            said[change[0]].add(feature_name(change[1:]))
        if both := said["+"] & said["-"]:
            raise ValueError(f"cpu {text!r}: {', '.join(sorted(both))} added and taken away")
        return cls(model, frozenset(said["+"]), frozenset(said["-"]))

    def made(self, host: Mapping[str, bool], cr4_available: int) -> frozenset[str]:
        """The features shown, on a computer with these and a machine with these bits of CR4."""
        there = available(host, cr4_available)
        wanted = {name for name, one in FEATURES.items() if self.model in one.models} & there
        for name in sorted(self.added):
            for each in _with_needs(name):
                if each in self.removed:
                    raise ValueError(f"cpu: {name} needs {each}, which is taken away")
                if each not in there:
                    raise ValueError(
                        f"cpu feature {each!r}: not on this computer, which has "
                        f"{', '.join(sorted(there))}"
                    )
                wanted.add(each)
        return frozenset(n for n in wanted if self.removed.isdisjoint(_with_needs(n)))


def feature_name(text: str) -> str:
    """The name of a feature that is called so, or ValueError with all that there are."""
    name = text.strip().lower().replace("-", "_").replace(".", "_")
    name = ALIASES.get(name, name)
    if name not in FEATURES:
        raise ValueError(f"cpu feature {text!r}: expected one of {', '.join(sorted(FEATURES))}")
    return name


def available(host: Mapping[str, bool], cr4_available: int) -> frozenset[str]:
    """The features that can be shown here."""
    own = {
        name
        for name, one in FEATURES.items()
        if all(host.get(each, False) for each in one.host) and not one.cr4 & ~cr4_available
    }
    return frozenset(name for name in own if own.issuperset(_with_needs(name)))


def _with_needs(name: str) -> Iterable[str]:
    """A feature and, step by step, all that it needs."""
    found = [name]
    for each in found:
        found += [need for need in FEATURES[each].needs if need not in found]
    return found
