"""SIEVE.

Zhang, Yang, Yue, Vigfusson, Rashmi, "SIEVE is simpler than LRU: an efficient turn-key eviction algorithm for web
caches", NSDI 2024.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from kvcore.policy.eviction.lanes import Laned
from kvcore.policy.eviction.queues import Queue, frees_enough
from kvcore.policy.types import Chunk


class Sieve(Laned):
    """Evicts the first unvisited chunk that the hand finds on its way from the oldest chunk to the newest.

    A touch marks a chunk visited; the hand takes the mark off and moves on. Chunks stay where they were inserted.
    Deviation: the hand passes over chunks that are not eligible and leaves their mark.

    The queue is kept in two parts, what the hand has passed and what lies ahead, so the hand needs no pointer.
    """

    __slots__ = ("_ahead", "_passed", "_visited")
    _LANED = ()  # the hand itself goes past those that are not eligible, and their place is behind it then

    def __init__(self) -> None:
        # Oldest first in each. Nothing lies ahead only where the cache is empty: the hand wraps round at once, so
        # that a chunk inserted after the hand met the newest chunk comes last and not first.
        self._ahead: Queue = OrderedDict()
        self._passed: Queue = OrderedDict()
        self._visited: dict[Chunk, int] = {}

    def insert(self, chunks: Iterable[Chunk], pages: int) -> None:
        """Take in `chunks` as the newest, not visited."""
        for chunk in chunks:
            self._ahead[chunk] = pages
            self._visited[chunk] = 0

    def touch(self, chunks: Iterable[Chunk]) -> None:
        """Mark `chunks` visited."""
        self._visited.update(dict.fromkeys(chunks, 1))

    def forget(self, chunks: Iterable[Chunk]) -> None:
        """Drop `chunks` and their marks."""
        for chunk in chunks:
            del self._visited[chunk]
            if chunk in self._ahead:
                del self._ahead[chunk]
                self._wrap()
            else:
                del self._passed[chunk]

    def victims(self, pages: int, eligible: Callable[[Chunk], bool], tenant: str | None = None) -> list[Chunk] | None:
        """Move the hand until it has evicted enough."""
        if not frees_enough((self._ahead, self._passed), pages, eligible, None):
            return None
        taken: list[Chunk] = []
        freed = 0
        while freed < pages:
            chunk, size = self._ahead.popitem(last=False)
            if not eligible(chunk):
                self._passed[chunk] = size
            elif self._visited[chunk]:
                self._visited[chunk] = 0
                self._passed[chunk] = size
            else:
                del self._visited[chunk]
                taken.append(chunk)
                freed += size
            self._wrap()
        return taken

    def _wrap(self) -> None:
        if not self._ahead:
            self._ahead, self._passed = self._passed, self._ahead
