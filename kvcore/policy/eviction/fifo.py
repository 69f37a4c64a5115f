"""First in, first out.

Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

from kvcore.policy.eviction.lanes import Laned
from kvcore.policy.eviction.queues import Queue, take_first
from kvcore.policy.types import Chunk


class Fifo(Laned):
    """Evicts the chunk that was inserted earliest. No deviation."""

    __slots__ = ("_pages",)
    _LANED = ("_pages",)

    def __init__(self) -> None:
        self._pages: Queue = OrderedDict()  # earliest first

    def insert(self, chunks: Iterable[Chunk], pages: int) -> None:
        """Take in `chunks` as the latest."""
        resident = self._pages
        for chunk in chunks:
            resident[chunk] = pages

    def touch(self, chunks: Iterable[Chunk]) -> None:
        """Change nothing: uses do not count."""

    def forget(self, chunks: Iterable[Chunk]) -> None:
        """Drop `chunks`."""
        for chunk in chunks:
            del self._pages[chunk]

    def victims(self, pages: int, eligible: Callable[[Chunk], bool], tenant: str | None = None) -> list[Chunk] | None:
        """Evict the earliest eligible chunks."""
        return take_first(self._pages, pages, eligible, tenant)
