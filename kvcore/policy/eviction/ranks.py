"""Chunks in ranks: the lowest rank is evicted first, within a rank the least recently ranked."""

from collections import OrderedDict
from collections.abc import Callable

from kvcore.policy.eviction.lanes import LanedRanks, Ranks, lane_of
from kvcore.policy.types import Chunk

__all__ = ["Ranks", "rank_chunk", "take_lowest", "unrank_chunk"]


def rank_chunk(ranks: Ranks, rank: int, chunk: Chunk, pages: int) -> None:
    """Put `chunk`, which has no rank, last in `rank`."""
    members = ranks.get(rank)
    if members is None:
        members = ranks[rank] = ranks.queue() if isinstance(ranks, LanedRanks) else OrderedDict()
    members[chunk] = pages


def unrank_chunk(ranks: Ranks, rank: int, chunk: Chunk) -> int:
    """Take `chunk` out of `rank` and return its pages."""
    members = ranks[rank]
    pages = members.pop(chunk)
    if not members:
        del ranks[rank]
    return pages


def take_lowest(
    ranks: Ranks, pages: int, eligible: Callable[[Chunk], bool], tenant: str | None
) -> list[tuple[int, Chunk]] | None:
    """Remove the lowest eligible chunks that free `pages` pages and return them with their ranks, lowest first.

    Returns None, with no change, where the eligible chunks do not free enough.
    """
    taken: list[tuple[int, Chunk]] = []
    freed = 0
    if freed < pages:
        # The distinct ranks are few beside the chunks, so sorting them costs less than keeping them in order.
        for rank in sorted(ranks):
            for chunk, size in lane_of(ranks[rank], tenant).items():
                if eligible(chunk):
                    taken.append((rank, chunk))
                    freed += size
                    if freed >= pages:
                        break
            if freed >= pages:
                break
        else:
            return None
    for rank, chunk in taken:
        unrank_chunk(ranks, rank, chunk)
    return taken
