"""Faults an arena's pages in, in the background, so that the first store of a page does not pay for zeroing it."""

import errno
import threading
from collections.abc import Callable, Iterator
from typing import TypeAlias

from kvcore.live.mapping import HUGE_PAGE_BYTES, Mapping

Progress: TypeAlias = Callable[[int, int], None]
"""Called after each slice, from the background thread, with bytes done and bytes in all."""

_SLICE_BYTES = 32 << 20  # at 1 GB/s, which a cold virtual machine may be, a stop waits 30 ms
_SMALL_PAGE_BYTES = 4096
_REFUSALS = 3


class Pretouch:
    """A thread that touches `length` bytes of a mapping from `offset` on, in slices, contents kept.

    When all are touched (`done_bytes` of `total_bytes`, told to `progress`), it goes over them again and turns them
    into huge pages where the kernel can (`huge_bytes`): that takes several times as long, and is of use to whoever
    maps or pins the arena later. `error` tells why touching was given up (the memory that was reserved is not there
    after all); None otherwise.
    """

    def __init__(
        self, mapping: Mapping, *, offset: int, length: int, huge_pages: bool, progress: Progress | None = None
    ) -> None:
        self._mapping = mapping
        self._offset = offset
        self._huge_pages = huge_pages
        self._progress = progress
        self._stop = threading.Event()
        self.total_bytes = length
        self.done_bytes = 0
        self.huge_bytes = 0
        self.error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="kvcore-pretouch", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether slices are still to come."""
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> bool:
        """Wait, `timeout` seconds at most. Returns whether all that will be touched has been."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stop after the slice at hand and wait for that."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            for at, length in self._slices():
                self._touch(at, length)
                self.done_bytes += length
                if self._progress is not None:
                    self._progress(self.done_bytes, self.total_bytes)
        except OSError as error:
            self.error = error
            return
        if self._huge_pages and self.done_bytes == self.total_bytes:
            self._make_huge()

    def _slices(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in order until all have been or somebody stops it."""
        end = self._offset + self.total_bytes
        for at in range(self._offset, end, _SLICE_BYTES):
            if self._stop.is_set():
                return
            yield at, min(_SLICE_BYTES, end - at)

    def _touch(self, at: int, length: int) -> None:
        code = self._mapping.populate(at, length)
        if code == errno.EINVAL:
            # An old kernel. Reading faults the pages in just as well; writing from here could undo a worker's write.
            self._mapping.bytes[at : at + length : _SMALL_PAGE_BYTES].max()
        elif code != 0:
            raise OSError(code, f"touching the arena at byte {at}: {errno.errorcode[code]}")

    def _make_huge(self) -> None:
        """Go on until the kernel has refused some slices: it cannot at all, has none free, or pages are pinned."""
        refused = 0
        for at, length in self._slices():
            whole = length - length % HUGE_PAGE_BYTES
            if whole and self._mapping.collapse(at, whole) == 0:
                self.huge_bytes += whole
            else:
                refused += 1
            if refused == _REFUSALS:
                return
