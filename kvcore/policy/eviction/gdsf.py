"""Greedy dual size frequency.

Cherkasova, "Improving WWW proxies performance with greedy-dual-size-frequency caching policy", HP Laboratories
report HPL-98-69R1, 1998.
"""

from collections.abc import Callable, Iterable
from typing import Final

from kvcore.policy.eviction.lanes import Laned
from kvcore.policy.eviction.ranks import Ranks, rank_chunk, take_lowest, unrank_chunk
from kvcore.policy.types import Chunk

SCALE: Final = 1 << 20
"""One use of a one-page chunk, in units of priority: leaves 2^20 steps for the division by a chunk's pages."""


class Gdsf(Laned):
    """Evicts the chunk of the lowest priority: age + uses / pages.

    The age is the highest priority evicted so far, and a chunk takes it in anew at every use, so chunks that were
    popular once sink under those that are used now.

    Deviations: priorities are integers, `age + uses * SCALE // pages`; between equal priorities the least recently
    inserted or touched goes first. The paper's cost of fetching an object is 1 for every chunk: what a miss costs
    depends on how much of the chain before the chunk is resident when the miss comes, which no order of single chunks
    knows, and a hit on any chunk of a size saves the same number of tokens. Where pinned chunks are passed over, a
    victim may have a lower priority than an earlier one; the age then stays, so that it never falls.
    """

    __slots__ = ("_age", "_priorities", "_ranks", "_uses")
    _LANED = ("_ranks",)

    def __init__(self) -> None:
        self._age = 0
        self._uses: dict[Chunk, int] = {}
        self._priorities: dict[Chunk, int] = {}
        self._ranks: Ranks = {}  # the rank is the priority

    def insert(self, chunks: Iterable[Chunk], pages: int) -> None:
        """Take in `chunks` with one use."""
        priority = self._age + SCALE // pages
        for chunk in chunks:
            self._uses[chunk] = 1
            self._priorities[chunk] = priority
            rank_chunk(self._ranks, priority, chunk, pages)

    def touch(self, chunks: Iterable[Chunk]) -> None:
        """Count one more use of each of `chunks` and raise it to the present age."""
        for chunk in chunks:
            uses = self._uses[chunk] = self._uses[chunk] + 1
            pages = unrank_chunk(self._ranks, self._priorities[chunk], chunk)
            priority = self._priorities[chunk] = self._age + uses * SCALE // pages
            rank_chunk(self._ranks, priority, chunk, pages)

    def forget(self, chunks: Iterable[Chunk]) -> None:
        """Drop `chunks` and their uses."""
        for chunk in chunks:
            unrank_chunk(self._ranks, self._priorities.pop(chunk), chunk)
            del self._uses[chunk]

    def victims(self, pages: int, eligible: Callable[[Chunk], bool], tenant: str | None = None) -> list[Chunk] | None:
        """Evict the eligible chunks of the lowest priorities."""
        taken = take_lowest(self._ranks, pages, eligible, tenant)
        if taken is None:
            return None
        for priority, chunk in taken:
            self._age = max(self._age, priority)
            del self._priorities[chunk], self._uses[chunk]
        return [chunk for _, chunk in taken]
