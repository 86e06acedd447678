"""What an experiment's check says about its table.

Source: none.  Invariants: a broken point or a check that itself breaks is a failure; an experiment
whose bars were all decided, with points skipped, is `PARTIAL`, never `PASSED`; one with nothing
decided is `SKIPPED`.
"""

from dataclasses import dataclass
from enum import Enum

from understudy.lab.bars import Bar
from understudy.lab.discover import Loaded
from understudy.lab.table import BROKEN, SKIPPED, Table


class Status(Enum):
    """How an experiment ended."""

    PASSED = "passed"
    PARTIAL = "passed in part"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
    """An experiment, what was found, and what that means."""

    loaded: Loaded
    table: Table
    bars: list[Bar]

    @property
    def status(self) -> Status:
        """The worst thing that happened."""
        if any(bar.holds is False for bar in self.bars) or self.table.with_status(BROKEN):
            return Status.FAILED
        if not any(bar.holds for bar in self.bars):
            return Status.SKIPPED
        is_whole = all(bar.holds for bar in self.bars) and not self.table.with_status(SKIPPED)
        return Status.PASSED if is_whole else Status.PARTIAL


def judge(loaded: Loaded, table: Table) -> Verdict:
    """Let the experiment's own check decide."""
    bars: list[Bar] = []
    try:
        bars.extend(loaded.experiment.check(table))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        bars.append(Bar("the check itself runs to its end", False, text))
    if not bars:
        bars.append(Bar("the check states a bar", False, "it stated none"))
    return Verdict(loaded, table, bars)
