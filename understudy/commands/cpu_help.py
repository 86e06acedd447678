"""What `understudy run --cpu help` says: the CPU models and features that there are here.

Source: `understudy.vcpu.cpu_features`.  Invariant: what is said to be there can be chosen.
"""

import textwrap
from collections.abc import Iterable

from understudy.config import Config
from understudy.execution import Execution
from understudy.silicon import Memory, Processor, host_features
from understudy.vcpu.cpu_features import FEATURES, MODELS, Choice, available

WORDS = {
    "understudy": "what suits most guests (the default)",
    "max": "all that the machine and this computer can do",
    "baseline": "the same on every computer",
}
SMALLEST_MEMORY = 1 << 20


def cpu_help() -> str:
    """The models, each with what it shows, and what this computer lacks."""
    host = host_features()
    processor = Processor(Memory(SMALLEST_MEMORY), "reference", "virtual", 0)
    cr4 = Execution.ALL[Config().execution].cr4_available(processor)
    shown = {model: Choice(model).made(host, cr4) for model in MODELS}
    parts = ["--cpu MODEL, and then perhaps +FEATURE or -FEATURE, as in max,-smap"]
    before: frozenset[str] = frozenset()
    for model in sorted(MODELS, key=lambda model: len(shown[model])):
        and_also = "the features before, and " if before else ""
        parts += [f"{model}: {WORDS[model]}", _rows(and_also, shown[model] - before)]
        before = shown[model]
    if missing := FEATURES.keys() - available(host, cr4):
        parts += ["not on this computer:", _rows("", missing)]
    return "\n".join(parts)


def _rows(first: str, names: Iterable[str]) -> str:
    text = first + " ".join(sorted(names))
    return textwrap.fill(text, 78, initial_indent="  ", subsequent_indent="  ",
                         break_on_hyphens=False)  # fmt: skip
