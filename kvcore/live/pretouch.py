"""Faults an arena's pages in, in the background, so that the first store of a page does not pay for zeroing it."""

import errno
import threading
from collections.abc import Callable
from typing import TypeAlias

from kvcore.live.mapping import HUGE_PAGE_BYTES, Mapping

Progress: TypeAlias = Callable[[int, int], None]
"""Called after each slice, from the background thread, with bytes done and bytes in all."""

_SLICE_BYTES = 32 << 20  # at 1 GB/s, which a cold virtual machine may be, a stop waits 30 ms
_SMALL_PAGE_BYTES = 4096


class Pretouch:
    """A thread that touches `length` bytes of a mapping from `offset` on, in slices, contents kept.

    Where the kernel can, each slice becomes huge pages first. `error` tells why the thread gave up (the memory that
    was reserved is not there after all); None otherwise.
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
        while self.done_bytes < self.total_bytes and not self._stop.is_set():
            length = min(_SLICE_BYTES, self.total_bytes - self.done_bytes)
            try:
                self._touch(self._offset + self.done_bytes, length)
            except OSError as error:
                self.error = error
                return
            self.done_bytes += length
            if self._progress is not None:
                self._progress(self.done_bytes, self.total_bytes)

    def _touch(self, offset: int, length: int) -> None:
        if self._huge_pages and length >= HUGE_PAGE_BYTES:
            self._collapse(offset, length - length % HUGE_PAGE_BYTES)
        code = self._mapping.populate(offset, length)
        if code == errno.EINVAL:
            # An old kernel. Reading faults the pages in just as well; writing from here could undo a worker's write.
            self._mapping.bytes[offset : offset + length : _SMALL_PAGE_BYTES].max()
        elif code != 0:
            raise OSError(code, f"touching the arena at {offset} of {self.total_bytes} bytes: {errno.errorcode[code]}")

    def _collapse(self, offset: int, length: int) -> None:
        code = self._mapping.collapse(offset, length)
        if code == 0:
            self.huge_bytes += length
        elif code == errno.EINVAL:
            self._huge_pages = False  # not on this kernel or file system; any other code: none free just now
