"""The laboratory: claims about virtualisation, decided by counting.

An experiment is one file in `experiments/`: a claim with its source, a guest, a sweep, a check in
counts, a figure.  The lab runs sweeps in parallel processes, keeps each finished point on disk,
and writes one report.  `docs/adding-an-experiment.md` is the recipe.

Invariants: what a point measured depends on its parameters and the code alone, never on the lab;
a claim that does not hold is shown as such; a point that could not be run never counts for a
claim.
"""

from understudy.lab.bars import Bar, absent, control, equal, every, true
from understudy.lab.experiment import Experiment, Skip
from understudy.lab.table import Row, Table

__all__ = [
    "Bar",
    "Experiment",
    "Row",
    "Skip",
    "Table",
    "absent",
    "control",
    "equal",
    "every",
    "true",
]
