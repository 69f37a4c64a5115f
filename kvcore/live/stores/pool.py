"""Threads that write to and read from a store on behalf of the request loop, which never waits for them."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

from kvcore.live.stores.base import Parts, Store, StoreError, StoreFull, size_of

_log = logging.getLogger(__name__)
_LONGEST_PAUSE_S = 30.0
_SAID_AGAIN_S = 60.0
_LAST_WAIT_S = 3.0
"""How long a server that stops waits for what a store is at."""


class Outcome(Enum):
    """How an operation ended: a chunk that is missed is not there, or can never be read; one that failed may be."""

    DONE = "done"
    MISS = "miss"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The end of an operation. `token` is what was submitted with it; deletes have None and are told only if failed."""

    token: object
    operation: str  # "put", "get" or "delete"
    outcome: Outcome
    size_bytes: int
    duration_ns: int
    error: str | None = None
    left: tuple[bytes, ...] = ()
    """Chunks that may lie in the store for all that: of a delete that failed, or a put that was begun and failed."""


@dataclass(slots=True)
class _Job:
    operation: str
    token: object
    size_bytes: int
    run: Callable[[], bool]
    left: tuple[bytes, ...] = ()
    """Chunks that may lie in the store if it fails."""


class StorePool:
    """A store's operations, queued and carried out by `writers` + `readers` threads.

    Puts and deletes of one chunk keep their order. `queue_bytes` bounds the bytes of puts that are queued or under way,
    and those of gets likewise; a single larger one is let in when there is no other. The memory that was submitted
    must keep its bytes until the completion is drained; nothing here refers to it from then on.

    Once the store fails, operations fail at once for `pause` seconds, so that what waits is not held up for a store
    that is away; while it fails again and again, for twice as long each time, 30 s at most. `fileno` becomes readable
    when there are completions: for a poller. A delete that failed is no sign that the store is away, and does not keep
    others from it: whoever waits for something will tell.
    """

    def __init__(
        self, store: Store, *, queue_bytes: int, writers: int = 2, readers: int = 2, pause: float = 1.0
    ) -> None:
        self._store = store
        self._pause = self._next_pause = pause
        self._pausing = threading.Lock()
        self._away_until = 0.0
        self._away_error = ""
        self._troubles = _Troubles()
        self._done: deque[Completion] = deque()
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._putting, self._getting = _Budget(queue_bytes), _Budget(queue_bytes)
        self._write_lanes = [_Lane(self._run, f"kvcore-l2-write-{index}") for index in range(writers)]
        self._read_lane = _Lane(self._run, "kvcore-l2-read", threads=readers)

    def fileno(self) -> int:
        """Return the descriptor that is readable while completions wait."""
        return self._event_fd

    @property
    def failing(self) -> dict[str, str]:
        """By operation, with what error it failed when it was tried last; those that worked are not in it."""
        return dict(self._troubles.errors)

    @property
    def corrupt(self) -> int:
        """Chunks that the store found broken."""
        return self._store.corrupt

    def has_room(self, size_bytes: int) -> bool:
        """Whether a put of so many bytes would be queued now."""
        return self._putting.admits(size_bytes)

    def submit_put(self, token: object, chunk: bytes, parts: Parts) -> bool:
        """Queue a write. False, with nothing queued, if the queue is full: the caller gives the store up."""
        size = size_of(parts)
        if not self._putting.enter(size):
            return False
        self._write_lane(chunk).submit(_Job("put", token, size, partial(self._put, chunk, parts), (chunk,)))
        return True

    def submit_get(self, token: object, chunk: bytes, into: Parts) -> bool:
        """Queue a read into memory. False, with nothing queued, if the queue is full: the caller counts a miss."""
        size = size_of(into)
        if not self._getting.enter(size):
            return False
        self._read_lane.submit(_Job("get", token, size, partial(self._store.get, chunk, into)))
        return True

    def submit_delete(self, chunks: Sequence[bytes]) -> None:
        """Queue the removal of chunks, each behind any write of it that is still queued."""
        for lane in self._write_lanes:
            names = tuple(chunk for chunk in chunks if self._write_lane(chunk) is lane)
            if names:
                lane.submit(_Job("delete", None, 0, partial(self._delete, names), names))

    def drain(self) -> list[Completion]:
        """Return what has ended since the last call, in the order in which it ended."""
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            return []
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self, *, finish: bool = True) -> list[Completion]:
        """End the threads and close the store. Returns the last completions.

        What is queued is carried out first, and all waited for; or, if not to `finish`, it fails at once, and a store
        that does not answer in some seconds is left to its threads, which end with the process.
        """
        if not finish:
            self._away_until, self._away_error = float("inf"), "the server stops"
        lanes = (*self._write_lanes, self._read_lane)
        for lane in lanes:
            lane.close()
        until = None if finish else time.monotonic() + _LAST_WAIT_S
        ended = [lane.join(until) for lane in lanes]
        last = self.drain()
        if not all(ended):
            _log.warning("L2 does not answer: the server ends without it")
            return last
        self._store.close()
        os.close(self._event_fd)
        return last

    def _write_lane(self, chunk: bytes) -> "_Lane":
        return self._write_lanes[int.from_bytes(chunk[-4:], "little") % len(self._write_lanes)]

    def _put(self, chunk: bytes, parts: Parts) -> bool:
        self._store.put(chunk, parts)
        return True

    def _delete(self, chunks: Sequence[bytes]) -> bool:
        self._store.delete(chunks)
        return True

    def _run(self, job: _Job) -> None:
        start = time.monotonic_ns()
        outcome, error = self._attempt(job)
        job.run = _spent  # the memory is the caller's again
        if job.operation != "delete":
            (self._putting if job.operation == "put" else self._getting).leave(job.size_bytes)
        elif error is None:
            return
        self._done.append(
            Completion(
                token=job.token,
                operation=job.operation,
                outcome=outcome,
                size_bytes=job.size_bytes,
                duration_ns=time.monotonic_ns() - start,
                error=error,
                left=job.left if outcome is Outcome.FAILED else (),
            )
        )
        os.eventfd_write(self._event_fd, 1)

    def _attempt(self, job: _Job) -> tuple[Outcome, str | None]:
        if time.monotonic() < self._away_until:
            if job.operation == "put":
                job.left = ()  # it is not begun
            return Outcome.FAILED, self._away_error
        try:
            outcome = Outcome.DONE if job.run() else Outcome.MISS
        except StoreFull as error:
            job.left = ()
            self._troubles.failed(job.operation, str(error))
            return Outcome.FAILED, str(error)
        except StoreError as error:
            if job.operation != "delete":
                self._leave_alone(str(error))
            self._troubles.failed(job.operation, str(error))
            return Outcome.FAILED, str(error)
        except Exception as error:  # a vendor's bug; told to the caller, who would else wait for ever
            _log.exception("%s of a chunk in the store", job.operation)
            return (Outcome.MISS if job.operation == "get" else Outcome.FAILED), f"{type(error).__name__}: {error}"
        self._next_pause = self._pause
        self._troubles.worked(job.operation)
        return outcome, None

    def _leave_alone(self, error: str) -> None:
        """Begin a pause, unless another thread has met the same failure just now."""
        with self._pausing:
            self._away_error = error
            now = time.monotonic()
            if now >= self._away_until:
                self._away_until = now + self._next_pause
                self._next_pause = min(2 * self._next_pause, max(self._pause, _LONGEST_PAUSE_S))


def _spent() -> bool:
    raise AssertionError("a job runs once")


class _Troubles:
    """Which operations fail, said when one begins to and when it works again; of each once a minute at most."""

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}
        self._lock = threading.Lock()
        self._said_s: dict[str, float] = {}
        self._told: set[str] = set()
        """Those of which it was said that they fail, and not yet that they work again."""

    def failed(self, operation: str, error: str) -> None:
        with self._lock:
            self.errors = {**self.errors, operation: error}
            now = time.monotonic()
            if operation not in self._told and now - self._said_s.get(operation, -_SAID_AGAIN_S) >= _SAID_AGAIN_S:
                self._told.add(operation)
                self._said_s[operation] = now
                _log.warning("L2 fails: %s: %s", operation, error)

    def worked(self, operation: str) -> None:
        if operation not in self.errors:
            return
        with self._lock:
            self.errors = {name: error for name, error in self.errors.items() if name != operation}
            if operation in self._told:
                self._told.remove(operation)
                _log.warning("L2 works again: %s", operation)


class _Budget:
    """Bytes that may be under way. Entered by one thread, left by many."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self.used = 0

    def admits(self, size: int) -> bool:
        return not self.used or self.used + size <= self._limit

    def enter(self, size: int) -> bool:
        with self._lock:
            if not self.admits(size):
                return False
            self.used += size
            return True

    def leave(self, size: int) -> None:
        with self._lock:
            self.used -= size


class _Lane:
    """A queue with the threads that empty it; with one thread, in order."""

    def __init__(self, run: Callable[[_Job], None], name: str, threads: int = 1) -> None:
        self._run = run
        self._jobs: deque[_Job] = deque()
        self._ready = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: _Job) -> None:
        self._jobs.append(job)
        self._ready.release()

    def close(self) -> None:
        """Let the threads end when the queue is empty."""
        self._ready.release(len(self._threads))

    def join(self, until: float | None) -> bool:
        """Wait for the threads, until then at most; return whether they have ended."""
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while True:
            self._ready.acquire()
            if not self._jobs:
                return
            self._run(self._jobs.popleft())
