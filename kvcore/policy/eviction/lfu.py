"""Least frequently used, by the counts of the time in the cache.

Aho, Denning, Ullman, "Principles of optimal page replacement", Journal of the ACM 18(1), 1971.
"""

from collections.abc import Callable, Iterable

from kvcore.policy.eviction.lanes import Laned
from kvcore.policy.eviction.ranks import Ranks, rank_chunk, take_lowest, unrank_chunk
from kvcore.policy.types import Chunk


class Lfu(Laned):
    """Evicts the chunk of the lowest count; between equal counts, the least recently inserted or touched.

    A count is 1 on insertion, grows by 1 a touch, and is forgotten on eviction. Deviations: the paper counts the
    uses of evicted pages too, and leaves the tie open.
    """

    __slots__ = ("_counts", "_ranks")
    _LANED = ("_ranks",)

    def __init__(self) -> None:
        self._counts: dict[Chunk, int] = {}
        self._ranks: Ranks = {}  # the rank is the count

    def insert(self, chunks: Iterable[Chunk], pages: int) -> None:
        """Take in `chunks` with a count of 1."""
        for chunk in chunks:
            self._counts[chunk] = 1
            rank_chunk(self._ranks, 1, chunk, pages)

    def touch(self, chunks: Iterable[Chunk]) -> None:
        """Count one more use of each of `chunks`."""
        counts, ranks = self._counts, self._ranks
        for chunk in chunks:
            count = counts[chunk]
            counts[chunk] = count + 1
            rank_chunk(ranks, count + 1, chunk, unrank_chunk(ranks, count, chunk))

    def forget(self, chunks: Iterable[Chunk]) -> None:
        """Drop `chunks` and their counts."""
        for chunk in chunks:
            unrank_chunk(self._ranks, self._counts.pop(chunk), chunk)

    def victims(self, pages: int, eligible: Callable[[Chunk], bool], tenant: str | None = None) -> list[Chunk] | None:
        """Evict the eligible chunks of the lowest counts."""
        taken = take_lowest(self._ranks, pages, eligible, tenant)
        if taken is None:
            return None
        for _, chunk in taken:
            del self._counts[chunk]
        return [chunk for _, chunk in taken]
