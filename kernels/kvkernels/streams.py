"""What the pipelined backends need of a device, so that their scheduling runs, and is tested, without one.

Work is put on streams, in order within each; events order streams against one another; nothing else does. The CUDA
runtime is in `cuda_streams.py`; `HostRuntime` does everything at once on the calling thread.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from kvkernels.arena import Ints
from kvkernels.slots import ordinals
from kvkernels.submit import InlineSubmitter, Submitter

__all__ = ["Event", "HostCopier", "HostRuntime", "Runtime", "Stream", "move_bytes"]

_THREADED_BYTES = 4 << 20  # less is not worth waking threads for
_SHARED_BYTES = 1 << 20  # longer ranges are shared among threads


class Event(Protocol):
    """A point in a stream's work."""

    def query(self) -> bool:
        """Whether the point has been reached; never blocks."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until it has been reached."""
        ...

    def since(self, earlier: Event) -> float:
        """Seconds on the device from another event to this one, both recorded with `timed` and reached."""
        ...

    def fault(self) -> Exception | None:
        """What kept some of its transfer's work before it from being enqueued, where that is known only afterwards."""
        ...


class Stream(Protocol):
    """Work in order."""

    def wait(self, event: Event) -> None:
        """Later work of this stream starts only after the event."""
        ...

    def record(self, *, timed: bool = False) -> Event:
        """An event reached when all earlier work of this stream is done; `timed` for one that tells when."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until all work so far is done."""
        ...

    def copy(self, target: Ints, source: Ints, length: Ints) -> None:
        """Copy `length[i]` bytes from address `source[i]` to `target[i]` for all i, in no order among themselves."""
        ...

    def launch(self, kernel: Callable[[], None]) -> None:
        """Run a function that enqueues device work, with this stream current."""
        ...


class Runtime(Protocol):
    """A device: its streams and its memory."""

    @property
    def needs_pinned(self) -> bool:
        """Whether copies reach only host memory that the device knows."""
        ...

    def stream(self, *, urgent: bool) -> Stream:
        """A new stream; urgent ones go first where work competes."""
        ...

    def current(self) -> Stream:
        """The stream that the calling thread's own work goes to."""
        ...

    def staging(self, nbytes: int) -> Any:
        """Device memory: a torch tensor of bytes."""
        ...

    def upload(self, values: Ints, stream: Stream) -> Any:
        """An int64 torch tensor on the device, filled in stream order; valid while the caller keeps it."""
        ...

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that the device's copy engine can reach."""
        ...

    def writing(self) -> Any:
        """The `kvkernels.pump.Program` that the calling thread writes; None where everything is done at once."""
        ...

    def enter_thread(self) -> None:
        """Make the device usable from the calling thread."""
        ...

    def submitter(self, name: str, *, urgent: bool) -> Submitter:
        """What hands transfers to the device; those of one submitter keep their order."""
        ...


class _Reached:
    def __init__(self) -> None:
        self._when = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def since(self, earlier: Event) -> float:
        return self._when - cast("_Reached", earlier)._when

    def fault(self) -> None:
        pass


class HostCopier:
    """Copies in host memory by several threads: one core alone does not fill the memory bus.

    Args:
        threads: how many share a large copy, the calling one included.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "kv-memmove") if threads > 1 else None

    def copy(self, target: Ints, source: Ints, length: Ints) -> None:
        """Copy every range; done on return."""
        if self._pool is None or int(length.sum()) < _THREADED_BYTES:
            move_bytes(target, source, length)
            return
        target, source, length = _cut(target, source, length, _SHARED_BYTES)
        parts = [slice(number, None, self._threads) for number in range(self._threads)]
        jobs = [self._pool.submit(move_bytes, target[part], source[part], length[part]) for part in parts[1:]]
        move_bytes(target[parts[0]], source[parts[0]], length[parts[0]])
        for job in jobs:
            job.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


class HostStream:
    """Does its work before each call returns."""

    def __init__(self, copier: HostCopier) -> None:
        self._copier = copier

    def wait(self, event: Event) -> None:
        """Everything already happened."""

    def record(self, *, timed: bool = False) -> Event:
        """An event in the past."""
        return _Reached()

    def synchronize(self) -> None:
        """Everything already happened."""

    def copy(self, target: Ints, source: Ints, length: Ints) -> None:
        """One memmove a range, dealt out over the threads."""
        self._copier.copy(target, source, length)

    def launch(self, kernel: Callable[[], None]) -> None:
        """Call it."""
        kernel()


class HostRuntime:
    """The CPU as a device; needs torch.

    Args:
        threads: how many threads share a large copy, the calling one included.
    """

    needs_pinned = False

    def __init__(self, *, threads: int = 1) -> None:
        self._stream = HostStream(HostCopier(threads))

    def stream(self, *, urgent: bool) -> Stream:
        """All streams are alike."""
        return self._stream

    def current(self) -> Stream:
        """All streams are alike."""
        return self._stream

    def staging(self, nbytes: int) -> Any:
        """Plain memory."""
        import torch  # noqa: PLC0415  (this module serves engines without torch)

        return torch.empty(nbytes, dtype=torch.uint8)

    def upload(self, values: Ints, stream: Stream) -> Any:
        """A copy as a CPU tensor."""
        import torch  # noqa: PLC0415  (this module serves engines without torch)

        return torch.from_numpy(np.array(values, dtype=np.int64))

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Plain memory."""
        return np.empty(nbytes, np.uint8)

    def writing(self) -> None:
        """Everything is done at once."""

    def enter_thread(self) -> None:
        """Nothing to do."""

    def submitter(self, name: str, *, urgent: bool) -> Submitter:
        """Everything happens in the call."""
        return InlineSubmitter()


@cache
def _memmove() -> Callable[[int, int, int], None]:
    function = ctypes.CDLL(None).memmove
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    function.restype = None

    def move(target: int, source: int, length: int) -> None:
        function(target, source, length)

    return move


def _cut(target: Ints, source: Ints, length: Ints, most: int) -> tuple[Ints, Ints, Ints]:
    """The same copies in ranges of at most so many bytes."""
    counts = -(-length // most)
    if int(counts.max(initial=1)) == 1:
        return target, source, length
    which = np.repeat(np.arange(len(length)), counts)
    begin = ordinals(counts) * most
    return target[which] + begin, source[which] + begin, np.minimum(length[which] - begin, most)


def move_bytes(target: Ints, source: Ints, length: Ints) -> None:
    """Copy ranges of this process's memory; the interpreter lock is free while each is copied."""
    move = _memmove()
    for to, origin, size in zip(target.tolist(), source.tolist(), length.tolist(), strict=True):
        move(to, origin, size)
