"""W-TinyLFU.

Einziger, Friedman, Manes, "TinyLFU: a highly efficient cache admission policy", ACM Transactions on Storage 13(4),
2017; its segmented LRU is that of Karedla, Love, Wherry, "Caching strategies to improve disk system performance",
Computer 27(3), 1994.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from kvcore.policy.eviction.lanes import Laned
from kvcore.policy.eviction.queues import Queue, frees_enough, lane_of, peek_eligible, put_back
from kvcore.policy.types import Chunk

COUNT_BITS: Final = 4
COUNT_CAP: Final = (1 << COUNT_BITS) - 1
SAMPLE_FACTOR: Final = 10
"""Counts are halved whenever this many times the capacity has been inserted and touched."""


class WTinyLfu(Laned):
    """Holds new chunks in a small LRU window and lets into main those used more often than what they would displace.

    The window is a hundredth of the cache; main is a segmented LRU, four fifths of it protected.

    Deviations. Room is made before a request's chunks are inserted, so the paper's contest between the chunk that
    leaves the window and main's victim is held when the next room is made: while the window is over its hundredth, its
    least recent chunk contests main's victim; the one with fewer uses is evicted, the window's on a tie, and a winner
    from the window enters main on probation. Once the window is within its hundredth main's victim goes. What is
    still over when the next chunks are inserted has found room and enters main without contest. Uses are counted
    exactly, to 15, in place of a sketch with a doorkeeper; counts are halved a few at a time, or when they are read,
    rather than all at once, and those that come to 0 are dropped. Where a segment has no eligible chunk the next one
    gives one: in main protected after probation, at last the window. An unbounded cache halves nothing and forgets the
    counts of what it evicts.
    """

    __slots__ = (
        "_counts",
        "_epoch",
        "_probation",
        "_protected",
        "_protected_pages",
        "_protected_share",
        "_room_made",
        "_sample_pages",
        "_sampled_pages",
        "_window",
        "_window_pages",
        "_window_share",
    )
    _LANED = ("_probation", "_protected", "_window")

    def __init__(self, capacity_pages: int | None) -> None:
        capacity = capacity_pages or 0
        self._window_share = capacity // 100
        self._protected_share = (capacity - self._window_share) * 4 // 5
        self._sample_pages = capacity * SAMPLE_FACTOR  # 0: without end
        self._sampled_pages = 0
        self._epoch = 0  # how often all counts have been halved
        self._room_made = 0  # 1 from an eviction to the next insertion
        self._window_pages = self._protected_pages = 0
        # Least recent first.
        self._window: Queue = OrderedDict()
        self._probation: Queue = OrderedDict()
        self._protected: Queue = OrderedDict()
        # epoch << COUNT_BITS | count as of that epoch, the oldest epoch first; evicted chunks keep theirs.
        self._counts: Queue = OrderedDict()

    def insert(self, chunks: Iterable[Chunk], pages: int) -> None:
        """Take in `chunks` as the most recent of the window, and count one use of each."""
        for chunk in chunks:
            if self._room_made:
                self._room_made = 0
                while self._window_pages > self._window_share:
                    self._admit(next(iter(self._window)))
            self._window[chunk] = pages
            self._window_pages += pages
            self._count(chunk, pages)

    def touch(self, chunks: Iterable[Chunk]) -> None:
        """Count one more use of each of `chunks`; those in main become the most recent protected ones."""
        for chunk in chunks:
            if chunk in self._window:
                self._window.move_to_end(chunk)
                size = self._window[chunk]
            elif chunk in self._protected:
                self._protected.move_to_end(chunk)
                size = self._protected[chunk]
            else:
                size = self._protected[chunk] = self._probation.pop(chunk)
                self._protected_pages += size
                while self._protected_pages > self._protected_share:
                    demoted, demoted_size = self._protected.popitem(last=False)
                    self._protected_pages -= demoted_size
                    self._probation[demoted] = demoted_size
            self._count(chunk, size)

    def forget(self, chunks: Iterable[Chunk]) -> None:
        """Drop `chunks` and their counts."""
        for chunk in chunks:
            self._counts.pop(chunk, None)
            self._remove(chunk)

    def victims(self, pages: int, eligible: Callable[[Chunk], bool], tenant: str | None = None) -> list[Chunk] | None:
        """Evict the losers of contests while the window is over its share, then main's victims."""
        segments = (self._window, self._probation, self._protected)
        if not frees_enough(segments, pages, eligible, tenant):
            return None
        taken: list[Chunk] = []
        freed = 0
        lanes = [lane_of(segment, tenant) for segment in segments]
        passed: list[Queue] = [OrderedDict(), OrderedDict(), OrderedDict()]
        while freed < pages:
            loser = self._loser(lanes, passed, eligible)
            taken.append(loser)
            freed += self._remove(loser)
            if not self._sample_pages:
                self._counts.pop(loser, None)
            self._room_made = 1
        for lane, aside in zip(lanes, passed, strict=True):
            put_back(lane, aside)
        return taken

    def _loser(self, lanes: list[Queue], passed: list[Queue], eligible: Callable[[Chunk], bool]) -> Chunk:
        window, probation, protected = lanes
        rival = peek_eligible(probation, passed[1], eligible)
        if rival is None:
            rival = peek_eligible(protected, passed[2], eligible)
        if rival is not None and self._window_pages <= self._window_share:
            return rival
        candidate = peek_eligible(window, passed[0], eligible)
        if candidate is not None and (rival is None or self._uses(candidate) <= self._uses(rival)):
            return candidate
        if rival is None:
            raise AssertionError("frees_enough found eligible chunks that are in no segment")
        if candidate is not None:
            self._admit(candidate)
        return rival

    def _admit(self, chunk: Chunk) -> None:
        """Move `chunk` from the window to probation."""
        size = self._window.pop(chunk)
        self._window_pages -= size
        self._probation[chunk] = size

    def _remove(self, chunk: Chunk) -> int:
        size = self._probation.pop(chunk, None)
        if size is not None:
            return size
        size = self._window.pop(chunk, None)
        if size is not None:
            self._window_pages -= size
            return size
        size = self._protected.pop(chunk)
        self._protected_pages -= size
        return size

    def _uses(self, chunk: Chunk) -> int:
        """Return the count of `chunk`, halved once an epoch since it was last counted."""
        entry = self._counts.get(chunk, 0)
        return (entry & COUNT_CAP) >> (self._epoch - (entry >> COUNT_BITS))

    def _count(self, chunk: Chunk, pages: int) -> None:
        """Count a use of `chunk`, and bring up to two counts of earlier epochs up to date.

        Two at each use are all of them long before an epoch ends, which has as many uses as there were new counts.
        """
        counts = self._counts
        counts[chunk] = self._epoch << COUNT_BITS | min(COUNT_CAP, self._uses(chunk) + 1)
        counts.move_to_end(chunk)
        self._sampled_pages += pages
        if 0 < self._sample_pages <= self._sampled_pages:
            self._sampled_pages -= self._sample_pages
            self._epoch += 1
        for oldest in [*islice(counts, 2)]:
            if counts[oldest] >> COUNT_BITS == self._epoch:
                break
            if uses := self._uses(oldest):
                counts[oldest] = self._epoch << COUNT_BITS | uses
                counts.move_to_end(oldest)
            else:
                del counts[oldest]
