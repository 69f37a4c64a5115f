"""Copies by the CPU between a chunk's pages in the arena and a flat buffer, with the check of generations around them.

A GPU's copies go through `kvkernels`, which takes the same pieces. A chunk is the concatenation of its pages; rank r's
shard is `shard_bytes` of it from r * shard_bytes on.
"""

import threading
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvcore.live.allocator import PageIds

Piece: TypeAlias = tuple[int, int]
"""Offset in the arena's pages and length, both in bytes."""

Bytes: TypeAlias = NDArray[np.uint8]
Generations: TypeAlias = NDArray[np.uint64]


class StaleChunk(Exception):  # noqa: N818 - what happened to the chunk; the reader did nothing wrong
    """Pages were handed out anew before or during a copy: what was copied must not be used."""


class PagedMemory(Protocol):
    """What copies need of an arena."""

    @property
    def data(self) -> Bytes:
        """The pages."""

    @property
    def generations(self) -> Generations:
        """One a page."""

    @property
    def page_bytes(self) -> int:
        """Size of a page."""


def pieces(pages: PageIds | Sequence[int], page_bytes: int, start: int = 0, length: int | None = None) -> list[Piece]:
    """Locate `length` bytes (all by default) from byte `start` of a chunk; adjacent pages make one piece.

    Raises:
        ValueError: the range is not within the chunk's pages.
    """
    ids = pages.tolist() if isinstance(pages, np.ndarray) else pages
    stop = len(ids) * page_bytes if length is None else start + length
    if not 0 <= start <= stop <= len(ids) * page_bytes:
        raise ValueError(f"bytes {start}..{stop} of a chunk of {len(ids)} pages of {page_bytes} bytes")
    found: list[Piece] = []
    at = start
    while at < stop:
        page, within = divmod(at, page_bytes)
        size = min(page_bytes - within, stop - at)
        offset = ids[page] * page_bytes + within
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((offset, size))
        at += size
    return found


def views(memory: PagedMemory, pages: PageIds, start: int = 0, length: int | None = None) -> list[memoryview]:
    """Return the pieces as writable memory, for a store to send from or receive into. No generation is checked."""
    return [memory.data[at : at + size].data for at, size in pieces(pages, memory.page_bytes, start, length)]


class Reader:
    """Copies chunks' bytes out of the arena."""

    def __init__(self, memory: PagedMemory) -> None:
        self._memory = memory

    def gather(self, pages: PageIds, generations: Generations, into: Bytes, start: int = 0) -> None:
        """Fill `into` (one-dimensional uint8) with the chunk's bytes from `start` on.

        Raises:
            StaleChunk: the pages are not of these generations, or did not stay so; `into` holds rubbish.
            ValueError: the chunk is shorter.
        """
        check_generations(self._memory, pages, generations)
        at = 0
        for offset, size in pieces(pages, self._memory.page_bytes, start, into.size):
            np.copyto(into[at : at + size], self._memory.data[offset : offset + size])
            at += size
        check_generations(self._memory, pages, generations)


class Writer:
    """Copies bytes into pages that were granted for a store."""

    def __init__(self, memory: PagedMemory) -> None:
        self._memory = memory

    def scatter(self, pages: PageIds, generations: Generations, data: Bytes, start: int = 0) -> None:
        """Write `data` (one-dimensional uint8) into the chunk's bytes from `start` on.

        Raises:
            StaleChunk: the pages are not of the grant's generations, or did not stay so: the store must be aborted.
            ValueError: the chunk is shorter.
        """
        check_generations(self._memory, pages, generations)
        at = 0
        for offset, size in pieces(pages, self._memory.page_bytes, start, data.size):
            np.copyto(self._memory.data[offset : offset + size], data[at : at + size])
            at += size
        check_generations(self._memory, pages, generations)


def check_generations(memory: PagedMemory, pages: PageIds, generations: Generations) -> None:
    """Compare pages' generations with those told. Copies before this call are complete when the table is read.

    Raises:
        StaleChunk: they differ.
    """
    _fence()
    now = memory.generations[pages]
    if not np.array_equal(now, generations):
        changed = int(np.count_nonzero(now != generations))
        raise StaleChunk(f"{changed} of {now.size} pages have been handed out anew")


def _fence() -> None:
    """Keep the processor from reading the generations ahead of a copy's bytes (ARM would; x86 does not).

    A release followed by an acquire orders what is before against what is after on every processor CPython runs on.
    """
    lock = threading.Lock()
    with lock:
        pass
    with lock:
        pass
