"""ARC.

Megiddo, Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from kvcore.policy.eviction.lanes import Laned
from kvcore.policy.eviction.queues import Queue, frees_enough, lane_of, pop_eligible, put_back
from kvcore.policy.types import Chunk


class Arc(Laned):
    """Keeps chunks used once (T1) and more often (T2) in two LRU lists, and learns from evicted ones how long T1 is.

    Deviations. Room is made before a request's chunks are inserted, so REPLACE takes the target length of T1 as it
    stands; the target moves at insertion, when a chunk is found in a ghost list (B1, B2), and the ghosts are trimmed
    then. A victim of T1 always goes to B1 first; where the paper drops it without a trace (T1 fills the cache) the
    trimming does so. Where the list whose turn it is has no eligible chunk the other gives one. Lengths are in pages,
    the steps of the target are whole multiples of the inserted chunk's pages. An unbounded cache keeps no ghosts.
    """

    __slots__ = (
        "_b1",
        "_b1_pages",
        "_b2",
        "_b2_pages",
        "_capacity",
        "_t1",
        "_t1_pages",
        "_t1_target",
        "_t2",
        "_t2_pages",
    )
    _LANED = ("_t1", "_t2")

    def __init__(self, capacity_pages: int | None) -> None:
        self._capacity = capacity_pages or 0  # of an unbounded cache: no ghost is ever within it
        self._t1_target = 0
        # Pages of each chunk, least recent first.
        self._t1: Queue = OrderedDict()
        self._t2: Queue = OrderedDict()
        self._b1: Queue = OrderedDict()
        self._b2: Queue = OrderedDict()
        self._t1_pages = self._t2_pages = self._b1_pages = self._b2_pages = 0

    def insert(self, chunks: Iterable[Chunk], pages: int) -> None:
        """Take in `chunks`: into T2 where evicted not long ago, else into T1."""
        for chunk in chunks:
            if chunk in self._b1 or chunk in self._b2:
                self._learn(chunk, pages)
                self._t2[chunk] = pages
                self._t2_pages += pages
            else:
                self._t1[chunk] = pages
                self._t1_pages += pages
            self._trim_ghosts()

    def touch(self, chunks: Iterable[Chunk]) -> None:
        """Make `chunks` the most recent of T2."""
        for chunk in chunks:
            size = self._t1.pop(chunk, None)
            if size is None:
                self._t2.move_to_end(chunk)
            else:
                self._t1_pages -= size
                self._t2[chunk] = size
                self._t2_pages += size

    def forget(self, chunks: Iterable[Chunk]) -> None:
        """Drop `chunks`."""
        for chunk in chunks:
            size = self._t1.pop(chunk, None)
            if size is None:
                self._t2_pages -= self._t2.pop(chunk)
            else:
                self._t1_pages -= size

    def victims(self, pages: int, eligible: Callable[[Chunk], bool], tenant: str | None = None) -> list[Chunk] | None:
        """Evict from T1 while it is longer than its target, else from T2."""
        if not frees_enough((self._t1, self._t2), pages, eligible, tenant):
            return None
        taken: list[Chunk] = []
        freed = 0
        lane_t1, lane_t2 = lane_of(self._t1, tenant), lane_of(self._t2, tenant)
        passed_t1: Queue = OrderedDict()
        passed_t2: Queue = OrderedDict()
        while freed < pages:
            found = None
            if self._t1_pages <= self._t1_target:
                found = self._evict_t2(lane_t2, passed_t2, eligible)
            found = (
                found or self._evict_t1(lane_t1, passed_t1, eligible) or self._evict_t2(lane_t2, passed_t2, eligible)
            )
            if found is None:
                raise AssertionError("frees_enough found eligible chunks that are in no list")
            taken.append(found[0])
            freed += found[1]
        put_back(lane_t1, passed_t1)
        put_back(lane_t2, passed_t2)
        self._trim_ghosts()
        return taken

    def _evict_t1(self, lane: Queue, passed: Queue, eligible: Callable[[Chunk], bool]) -> tuple[Chunk, int] | None:
        found = pop_eligible(self._t1, lane, passed, eligible)
        if found is not None:
            chunk, size = found
            self._t1_pages -= size
            self._b1[chunk] = size
            self._b1_pages += size
        return found

    def _evict_t2(self, lane: Queue, passed: Queue, eligible: Callable[[Chunk], bool]) -> tuple[Chunk, int] | None:
        found = pop_eligible(self._t2, lane, passed, eligible)
        if found is not None:
            chunk, size = found
            self._t2_pages -= size
            self._b2[chunk] = size
            self._b2_pages += size
        return found

    def _learn(self, chunk: Chunk, pages: int) -> None:
        """Move the target towards the list whose ghost `chunk` is, and take it out of there."""
        if chunk in self._b1:
            step = pages * max(1, self._b2_pages // self._b1_pages)
            self._t1_target = min(self._capacity, self._t1_target + step)
            self._b1_pages -= self._b1.pop(chunk)
        else:
            step = pages * max(1, self._b1_pages // self._b2_pages)
            self._t1_target = max(0, self._t1_target - step)
            self._b2_pages -= self._b2.pop(chunk)

    def _trim_ghosts(self) -> None:
        """Hold T1 and B1 to the capacity, and all four lists to twice the capacity."""
        while self._b1 and self._t1_pages + self._b1_pages > self._capacity:
            self._b1_pages -= self._b1.popitem(last=False)[1]
        while self._b2 and self._t1_pages + self._t2_pages + self._b1_pages + self._b2_pages > 2 * self._capacity:
            self._b2_pages -= self._b2.popitem(last=False)[1]
