"""Least recently used.

Mattson, Gecsei, Slutz, Traiger, "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from kvcore.policy.eviction.lanes import Laned
from kvcore.policy.eviction.queues import Queue, take_first
from kvcore.policy.types import Chunk


class Lru(Laned):
    """Evicts the chunk that was inserted or touched least recently. No deviation."""

    __slots__ = ("_pages",)
    _LANED = ("_pages",)

    def __init__(self) -> None:
        self._pages: Queue = OrderedDict()  # least recent first

    def insert(self, chunks: Iterable[Chunk], pages: int) -> None:
        """Take in `chunks` as the most recent."""
        resident = self._pages
        for chunk in chunks:
            resident[chunk] = pages

    def touch(self, chunks: Iterable[Chunk]) -> None:
        """Make `chunks` the most recent."""
        move_to_end = self._pages.move_to_end
        for chunk in chunks:
            move_to_end(chunk)

    def forget(self, chunks: Iterable[Chunk]) -> None:
        """Drop `chunks`."""
        for chunk in chunks:
            del self._pages[chunk]

    def victims(self, pages: int, eligible: Callable[[Chunk], bool], tenant: str | None = None) -> list[Chunk] | None:
        """Evict the least recent eligible chunks."""
        return take_first(self._pages, pages, eligible, tenant)
