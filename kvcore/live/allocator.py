"""Hands out an arena's pages: adjacent ones where possible, each with a new generation."""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from kvcore.live.writers import NO_WRITER

PageIds = NDArray[np.uint32]


class OutOfPages(Exception):  # noqa: N818 - named for what happened, as BlockingIOError is
    """More pages were asked for than are free. Quarantined pages are not free."""


class PageAllocator:
    """Which pages of an arena are free, in use, or quarantined.

    `generations` (uint64) and `page_writers` (uint32) hold one element a page and live in the arena; the allocator is
    their only writer. `in_use` are the pages known to hold committed chunks. Every other page that still carries a
    writer's mark, from an earlier epoch, is quarantined until `reap`.

    Free pages are kept as maximal runs. A run of n pages is in class n.bit_length() - 1, and a class hands out its
    oldest run first. `take` and `give` cost time in the pages they move, not in the pages that there are.
    """

    def __init__(
        self, generations: NDArray[np.uint64], page_writers: NDArray[np.uint32], in_use: Iterable[int] | PageIds = ()
    ) -> None:
        self._generations = generations
        self._writers = page_writers
        used = np.fromiter(in_use, np.uint32) if not isinstance(in_use, np.ndarray) else in_use
        self._writers[used] = NO_WRITER  # a committed chunk: every rank has said that it is done
        self._is_free = np.ones(generations.size, np.bool_)
        self._is_free[used] = False
        quarantined = self._writers != NO_WRITER
        self._is_free[quarantined] = False
        self._quarantined = np.flatnonzero(quarantined).astype(np.uint32)
        self._runs = _Runs()
        for start, length in _runs_of(np.flatnonzero(self._is_free)):
            self._runs.add(start, length)
        self._free = int(self._is_free.sum())

    @property
    def pages(self) -> int:
        """Pages in all."""
        return self._is_free.size

    @property
    def free(self) -> int:
        """Pages that `take` can hand out."""
        return self._free

    @property
    def quarantined(self) -> int:
        """Pages that a worker of an earlier epoch may still be writing."""
        return self._quarantined.size

    @property
    def used(self) -> int:
        """Pages handed out."""
        return self.pages - self.free - self.quarantined

    def take(self, count: int, writer: int = NO_WRITER) -> PageIds:
        """Hand out `count` pages, in the order in which a chunk's bytes fill them, marked as written by `writer`.

        Their generations are raised before this returns, hence before anyone can be told of the pages: whoever still
        reads them by an older generation will see that.

        Raises:
            OutOfPages: fewer are free; nothing has changed.
        """
        if count > self._free:
            raise OutOfPages(
                f"{count} pages asked for, {self._free} free of {self.pages} ({self.quarantined} quarantined)"
            )
        parts = [np.arange(start, start + length, dtype=np.uint32) for start, length in self._runs.remove(count)]
        ids = np.concatenate(parts) if len(parts) != 1 else parts[0]
        self._is_free[ids] = False
        self._free -= count
        self._generations[ids] += np.uint64(1)
        self._writers[ids] = writer
        return ids

    def settle(self, ids: PageIds) -> None:
        """Clear the writer's mark: every rank has written these pages or will not any more."""
        self._writers[ids] = NO_WRITER

    def give(self, ids: PageIds) -> None:
        """Take pages back, in any order.

        Raises:
            ValueError: one of them is not in use, or is named twice; nothing has changed.
        """
        ordered = np.sort(ids)
        if ordered.size and int(ordered[-1]) >= self.pages:
            raise ValueError(f"page {ordered[-1]} given back, but there are {self.pages}")
        if (ordered[1:] == ordered[:-1]).any() or self._is_free[ordered].any() or self._holds_quarantined(ordered):
            raise ValueError(f"pages given back that are not in use: {ordered.tolist()}")
        self._return(ordered)

    def reap(self, alive: Callable[[int], bool]) -> int:
        """Return to use the quarantined pages whose writer is not `alive`. Returns how many they are."""
        if self._quarantined.size == 0:
            return 0
        marks = self._writers[self._quarantined]
        gone = [writer for writer in np.unique(marks).tolist() if not alive(writer)]
        is_gone = np.isin(marks, gone)
        ids = self._quarantined[is_gone]
        self._quarantined = self._quarantined[~is_gone]
        self._return(ids)
        return ids.size

    def _holds_quarantined(self, ordered: PageIds) -> bool:
        return self._quarantined.size > 0 and bool(np.isin(ordered, self._quarantined).any())

    def _return(self, ordered: PageIds) -> None:
        self._generations[ordered] += np.uint64(1)  # whoever was told of them and has not begun to write does not
        self._writers[ordered] = NO_WRITER
        self._is_free[ordered] = True
        self._free += ordered.size
        for start, length in _runs_of(ordered):
            self._runs.add(start, length)


class _Runs:
    """Maximal runs of free pages, found by either end and by size class."""

    def __init__(self) -> None:
        self._length_at: dict[int, int] = {}  # first page -> length
        self._start_of: dict[int, int] = {}  # page after the last -> first page
        self._classes: list[dict[int, None]] = []  # class -> first pages, oldest first

    def add(self, start: int, length: int) -> None:
        """Enter free pages, joined with the runs on both sides."""
        before = self._start_of.get(start)
        if before is not None:
            length += self._drop(before)
            start = before
        if start + length in self._length_at:
            length += self._drop(start + length)
        self._enter(start, length)

    def remove(self, count: int) -> list[tuple[int, int]]:
        """Take `count` pages out: of one run where one is long enough, else of the longest there are."""
        taken: list[tuple[int, int]] = []
        while count > 0:
            start = self._find(count)
            length = self._drop(start)
            part = min(length, count)
            if length > part:
                self._enter(start + part, length - part)
            taken.append((start, part))
            count -= part
        return taken

    def _find(self, count: int) -> int:
        """Return the oldest run of exactly this class if it fits, else one of the next class up, else of the longest.

        Of the own class only the oldest few are tried, as runs there may be too short; a class above always fits.
        """
        own = count.bit_length() - 1
        if own < len(self._classes):
            for tried, start in enumerate(self._classes[own]):
                if self._length_at[start] >= count:
                    return start
                if tried == 8:
                    break
        for runs in self._classes[own + 1 :]:
            if runs:
                return next(iter(runs))
        for runs in reversed(self._classes[: own + 1]):
            if runs:
                return next(iter(runs))
        raise AssertionError("the count of free pages and the runs of free pages disagree")

    def _enter(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_of[start + length] = start
        size_class = length.bit_length() - 1
        while len(self._classes) <= size_class:
            self._classes.append({})
        self._classes[size_class][start] = None

    def _drop(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._start_of[start + length]
        del self._classes[length.bit_length() - 1][start]
        return length


def _runs_of(ordered: NDArray[np.integer]) -> list[tuple[int, int]]:
    """Split ascending page ids into (first, length) of adjacent ones."""
    if ordered.size == 0:
        return []
    cuts = np.flatnonzero(np.diff(ordered.astype(np.int64)) != 1) + 1
    bounds = [0, *cuts.tolist(), ordered.size]
    firsts = ordered[bounds[:-1]].tolist()
    return [(first, stop - at) for first, at, stop in zip(firsts, bounds[:-1], bounds[1:], strict=True)]
