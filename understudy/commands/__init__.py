"""The commands of `understudy`, one file each.

What: what a command and its caller agree on.  Source: none.
Invariant: a command raises `Refusal` for whatever the user can put right; anything else that
escapes is a bug of ours, and cli.py files a report.
"""


class Refusal(Exception):
    """One clear line for the user, and the status to end with (2: used wrongly, 1: anything else).

    `detail` may hold more (a guest's decoded state); it is printed below the line.
    """

    def __init__(self, line: str, *, status: int = 1, detail: str = "") -> None:
        super().__init__(line)
        self.status = status
        self.detail = detail
