"""Snapshots that somebody has tampered with: of a small guest, and of a booted Linux."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, closing

from tests.walls.campaigns import Round, part
from tests.walls.snapshots import GUESTS, Campaign
from understudy.paging import Paging

ENOUGH = 100  # rounds after which some must have been refused, and some not


def _of(guest: str) -> Iterator[Round]:
    """Under each technique in turn; a snapshot is made when it is first needed."""
    campaigns: dict[str, Campaign] = {}
    with ExitStack() as stack:

        def one(chance: random.Random) -> None:
            paging = chance.choice(sorted(Paging.ALL))
            if paging not in campaigns:
                campaigns[paging] = stack.enter_context(closing(Campaign(GUESTS[guest](paging))))
            campaigns[paging].run(chance)

        yield one
    restored = sum(campaign.restored for campaign in campaigns.values())
    refused = sum(campaign.refused for campaign in campaigns.values())
    assert restored + refused < ENOUGH or min(restored, refused) > (restored + refused) // 10


@part(rounds=200)
def snapshots() -> Iterator[Round]:
    """Of a VM that has printed half of what it prints."""
    yield from _of("hello")


@part(rounds=8, boots=True)
def linux_snapshots() -> Iterator[Round]:
    """Of a Linux that has run a command."""
    yield from _of("linux")
