"""`python -m tests.walls.campaigns [--minutes N] [--seed N] [--round N] [PART ...]`."""

import argparse
import signal
import time
from types import FrameType

from tests.walls.campaigns import PARTS, chance

LONGEST_ROUND_S = 60  # of this process; another may have the processor meanwhile
LONGEST_WAIT_S = 600


class Hang(BaseException):
    """A round has not ended."""


def main() -> None:
    """Run the parts, each for its share of the time; the first failure ends it, with its seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.walls.campaigns")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=60.0, help="for all parts together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--round", type=int, help="only this round, to see a failure again")
    options = parser.parse_args()
    names = options.parts or list(PARTS)
    if unknown := set(names) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _hang)
    for name in names:
        _campaign(name, options.seed, options.minutes * 60 / len(names), options.round)


def _campaign(name: str, seed: int, seconds: float, only: int | None) -> None:
    ends_at, number = time.monotonic() + seconds, only or 0
    with PARTS[name].setting() as one_round:
        while number == 0 or number == only or (only is None and time.monotonic() < ends_at):
            signal.alarm(LONGEST_WAIT_S)
            signal.setitimer(signal.ITIMER_PROF, LONGEST_ROUND_S)
            try:
                one_round(chance(name, seed, number))
            except BaseException:
                print(f"{name}: seed {seed}, round {number} failed", flush=True)
                raise
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
            number += 1
    print(f"{name}: seed {seed}, {number - (only or 0)} rounds held", flush=True)


def _hang(number: int, _frame: FrameType | None) -> None:
    if number == signal.SIGALRM:
        raise Hang(f"a round took more than {LONGEST_WAIT_S} s")
    raise Hang(f"a round took more than {LONGEST_ROUND_S} s of the processor")


if __name__ == "__main__":
    main()
