"""Copies between the arena and the store behind it: threads that work off queues and post what they did.

The request loop submits and, woken by a file descriptor, collects; it never waits for a store. Jobs on one chunk are
done by one thread in the order in which they were submitted, but that reads, which a request waits for, go first.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

_LOG = logging.getLogger("kvcore.l2")

Kind: TypeAlias = Literal["get", "put", "delete"]


class Store(Protocol):
    """What holds L2's bytes."""

    def put(self, chunk: bytes, parts: list[memoryview]) -> None:
        """Keep a chunk. Raises OSError or a store's own error where it cannot."""

    def get(self, chunk: bytes, into: list[memoryview]) -> bool:
        """Fill `into` with a chunk; False where it is not there whole."""

    def delete(self, chunks: Sequence[bytes]) -> None:
        """Forget chunks; those that are not there are no error."""

    def close(self) -> None:
        """Let go of the store."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One chunk to copy, or to delete."""

    kind: Kind
    request: str
    chunk: bytes
    parts: list[memoryview]

    @property
    def nbytes(self) -> int:
        """Bytes to copy."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A job that has ended, well or not."""

    job: Job
    copied: bool
    seconds: float


class StorePool:
    """Threads that serve one store. `wake_fd` can be read when `collect` has something to return."""

    def __init__(self, store: Store, threads: int, queue_bytes: int) -> None:
        self.queue_bytes = queue_bytes
        self.waiting_bytes = 0
        """Of puts that were submitted and not collected; the request loop's account."""
        self.errors = 0
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._store = store
        self._done: deque[Outcome] = deque()
        self._lanes = [_Lane(self, index) for index in range(threads)]

    def has_room(self, nbytes: int) -> bool:
        """Return whether a put of `nbytes` may still be queued."""
        return self.waiting_bytes + nbytes <= self.queue_bytes

    def submit(self, job: Job) -> None:
        """Queue a job."""
        if job.kind == "put":
            self.waiting_bytes += job.nbytes
        self._lanes[job.chunk[0] % len(self._lanes)].add(job)

    def collect(self) -> list[Outcome]:
        """Return the copies that have ended since the last call."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.wake_fd)
        found: list[Outcome] = []
        while self._done:
            outcome = self._done.popleft()
            if outcome.job.kind == "put":
                self.waiting_bytes -= outcome.job.nbytes
            found.append(outcome)
        return found

    def drain(self, timeout_s: float) -> bool:
        """Wait until every job submitted so far has ended; return whether that is so."""
        deadline = time.monotonic() + timeout_s
        return all(lane.drain(deadline) for lane in self._lanes)

    def close(self) -> None:
        """Drop what waits, end what is under way, and close the store."""
        for lane in self._lanes:
            lane.stop()
        for lane in self._lanes:
            lane.join()
        self._store.close()
        os.close(self.wake_fd)

    def work(self, job: Job) -> None:
        """Do a job, in a lane's thread, and post its outcome."""
        start = time.perf_counter()
        copied = False
        try:
            match job.kind:
                case "get":
                    copied = self._store.get(job.chunk, job.parts)
                case "put":
                    self._store.put(job.chunk, job.parts)
                    copied = True
                case "delete":
                    self._store.delete([job.chunk])
        except Exception:  # a store's errors are its vendor's own; each is logged, counted and told as a failed copy
            self.errors += 1
            _LOG.warning("L2: %s of chunk %s failed", job.kind, job.chunk.hex()[:16], exc_info=True)
        if job.kind != "delete":
            self._done.append(Outcome(job, copied, time.perf_counter() - start))
            os.eventfd_write(self.wake_fd, 1)


class _Lane:
    """One thread and its two queues."""

    def __init__(self, pool: StorePool, index: int) -> None:
        self._pool = pool
        self._reads: deque[Job] = deque()
        self._others: deque[Job] = deque()
        self._busy = False
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"kvcore-l2-{index}", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        with self._changed:
            (self._reads if job.kind == "get" else self._others).append(job)
            self._changed.notify_all()

    def drain(self, deadline: float) -> bool:
        with self._changed:
            return self._changed.wait_for(
                lambda: not (self._busy or self._reads or self._others), max(0.0, deadline - time.monotonic())
            )

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopping or self._reads or self._others)
                if self._stopping:
                    return
                job = (self._reads or self._others).popleft()
                self._busy = True
            self._pool.work(job)
