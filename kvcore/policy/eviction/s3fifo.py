"""S3-FIFO.

Yang, Zhang, Qiu, Yue, Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from kvcore.policy.eviction.lanes import Laned
from kvcore.policy.eviction.queues import Queue, frees_enough, lane_of, pop_eligible, put_back
from kvcore.policy.types import Chunk

FREQUENCY_CAP: Final = 3
PROMOTED_ABOVE: Final = 1
"""A chunk touched more often than this while in small goes on to main (the paper's algorithm 1)."""


class S3Fifo(Laned):
    """Filters chunks through a small FIFO queue, a tenth of the cache, before a main one that gives second chances.

    Deviations. Room is made before a request's chunks are inserted, so that small holds more than its tenth after a
    long request. Going from small to main evicts nothing by itself: the search goes on until a chunk is evicted. Where
    the queue whose turn it is has no eligible chunk the other gives one. The ghosts, of as many pages as main has, are
    a FIFO list and not fingerprints in a table. An unbounded cache keeps none and evicts from small while it can.
    """

    __slots__ = (
        "_frequency",
        "_ghost",
        "_ghost_limit",
        "_ghost_pages",
        "_main",
        "_small",
        "_small_pages",
        "_small_share",
    )
    _LANED = ("_main", "_small")

    def __init__(self, capacity_pages: int | None) -> None:
        capacity = capacity_pages or 0
        self._small_share = capacity // 10
        self._ghost_limit = capacity - self._small_share
        self._small_pages = self._ghost_pages = 0
        # Earliest first.
        self._small: Queue = OrderedDict()
        self._main: Queue = OrderedDict()
        self._ghost: Queue = OrderedDict()
        self._frequency: dict[Chunk, int] = {}

    def insert(self, chunks: Iterable[Chunk], pages: int) -> None:
        """Take in `chunks`: into main where evicted from small not long ago, else into small."""
        for chunk in chunks:
            self._frequency[chunk] = 0
            size = self._ghost.pop(chunk, None)
            if size is None:
                self._small[chunk] = pages
                self._small_pages += pages
            else:
                self._ghost_pages -= size
                self._main[chunk] = pages

    def touch(self, chunks: Iterable[Chunk]) -> None:
        """Raise the frequency of `chunks`, up to 3."""
        frequency = self._frequency
        for chunk in chunks:
            if frequency[chunk] < FREQUENCY_CAP:
                frequency[chunk] += 1

    def forget(self, chunks: Iterable[Chunk]) -> None:
        """Drop `chunks` and their frequencies."""
        for chunk in chunks:
            del self._frequency[chunk]
            size = self._small.pop(chunk, None)
            if size is None:
                del self._main[chunk]
            else:
                self._small_pages -= size

    def victims(self, pages: int, eligible: Callable[[Chunk], bool], tenant: str | None = None) -> list[Chunk] | None:
        """Evict from small while it has its share or more, else from main."""
        if not frees_enough((self._small, self._main), pages, eligible, tenant):
            return None
        taken: list[Chunk] = []
        freed = 0
        lane_small, lane_main = lane_of(self._small, tenant), lane_of(self._main, tenant)
        passed_small: Queue = OrderedDict()
        passed_main: Queue = OrderedDict()
        while freed < pages:
            found = None
            if self._small_pages >= self._small_share:
                found = self._evict_small(lane_small, passed_small, eligible)
            found = (
                found
                or self._evict_main(lane_main, passed_main, eligible)
                or self._evict_small(lane_small, passed_small, eligible)
            )
            if found is not None:  # None: main had nothing, and small sent all it had on to main
                taken.append(found[0])
                freed += found[1]
        put_back(lane_small, passed_small)
        put_back(lane_main, passed_main)
        return taken

    def _evict_small(self, lane: Queue, passed: Queue, eligible: Callable[[Chunk], bool]) -> tuple[Chunk, int] | None:
        """Take small's first chunk that does not go on to main, send on those before it, and remember it."""
        while (found := pop_eligible(self._small, lane, passed, eligible)) is not None:
            chunk, size = found
            self._small_pages -= size
            if self._frequency[chunk] > PROMOTED_ABOVE:
                self._main[chunk] = size
                self._frequency[chunk] = 0  # as section 4.1 says, and algorithm 1 leaves out
                continue
            del self._frequency[chunk]
            self._ghost[chunk] = size
            self._ghost_pages += size
            while self._ghost_pages > self._ghost_limit:
                self._ghost_pages -= self._ghost.popitem(last=False)[1]
            return found
        return None

    def _evict_main(self, lane: Queue, passed: Queue, eligible: Callable[[Chunk], bool]) -> tuple[Chunk, int] | None:
        """Take main's first chunk of frequency 0; those before it are sent to the end with a frequency of 1 less."""
        while (found := pop_eligible(self._main, lane, passed, eligible)) is not None:
            chunk, size = found
            if self._frequency[chunk] > 0:
                self._frequency[chunk] -= 1
                self._main[chunk] = size
                continue
            del self._frequency[chunk]
            return found
        return None
