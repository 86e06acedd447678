"""What a sweep found: one record for each point, and the rows that a check may look at.

Source: none.  Invariant: `Table.rows` holds only points that ran to their end; a point that was
skipped or broke is in `records` alone, with its reason.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

DONE: Final = "done"
SKIPPED: Final = "skipped"
BROKEN: Final = "broken"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """One point of a sweep and what became of it: `DONE`, `SKIPPED` or `BROKEN`."""

    params: Row
    status: str
    values: Row = field(default_factory=dict)
    reason: str = ""  # why it was skipped, or how it broke
    wall_s: float = 0.0
    is_old: bool = False  # measured by an earlier call

    @property
    def row(self) -> dict[str, Any]:
        """Parameters and values together."""
        return {**self.params, **self.values}


class Table:
    """The records of one experiment, in the order of its sweep."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The points that ran, as dictionaries of parameters and values."""
        return [record.row for record in self.records if record.status == DONE]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def where(self, **wanted: object) -> list[dict[str, Any]]:
        """The rows with these values; a tuple or set offers several."""
        return [row for row in self.rows if _fits(row, wanted)]

    def values(self, column: str) -> list[Any]:
        """The different values of a column, in the order in which they occur."""
        return list(dict.fromkeys(row[column] for row in self.rows if column in row))

    def with_status(self, status: str) -> list[Record]:
        """The records of one status."""
        return [record for record in self.records if record.status == status]

    def columns(self) -> list[str]:
        """Names of all parameters and values, in the order in which they occur."""
        return list(dict.fromkeys(name for record in self.records for name in record.row))


def _fits(row: Row, wanted: Mapping[str, object]) -> bool:
    for name, value in wanted.items():
        options = value if isinstance(value, tuple | set | frozenset | list) else (value,)
        if row.get(name) not in options:
            return False
    return True
