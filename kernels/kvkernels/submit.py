"""Handing work to a device without holding up the engine's thread.

Planning a large transfer can take tens of milliseconds of host time. A transfer is therefore written as steps, each of
which enqueues a little; the caller runs the first of them itself, so that a load's first layers are on their way when
the call returns, and a thread runs the rest. Streams and events keep the order on the device, whoever enqueues: on CUDA
a pump, for which steps only write down what is to be called (`cuda_streams.PumpSubmitter`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from kvkernels.streams import Event

__all__ = ["InlineSubmitter", "Submitter", "ThreadSubmitter", "Window", "Work"]


@dataclass(slots=True)
class Work:
    """One transfer's steps.

    `steps` enqueues a little at each `next`; an event that it yields must be reached before the next step. `fail` is
    told what a step raised, after which there are no more steps. `rest` is an event, and how many seconds behind it
    the device is to be told of the first step, by a submitter that can wait. `notes` are the submitter's.
    """

    steps: Iterator[Event | None]
    fail: Callable[[BaseException], None]
    rest: tuple[Event, float] | None = None
    notes: Any = None

    def step(self) -> tuple[bool, Event | None]:
        """Run one step: whether there are more, and what must be reached first."""
        try:
            return True, next(self.steps)
        except StopIteration:
            return False, None
        except BaseException as error:
            self.fail(error)  # one that ends the process, too: whoever closes the transfer waits for its end
            if not isinstance(error, Exception):
                raise
            return False, None


class Submitter(Protocol):
    """Runs works one after another, in the order in which they were submitted."""

    def submit(self, work: Work) -> None:
        """Run the work's steps, the rest of them later."""
        ...

    def until(self, reached: Callable[[], bool]) -> None:
        """Block the calling thread until this is true, which steps of submitted works make it."""
        ...

    def catch_up(self) -> None:
        """Return when all that steps have enqueued so far is on the device's streams."""
        ...

    def close(self) -> None:
        """Return when every submitted work has ended."""
        ...


class InlineSubmitter:
    """Runs every work to its end in the thread that submits it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def submit(self, work: Work) -> None:
        """Run all steps."""
        with self._lock:
            more = True
            while more:
                more, before = work.step()
                if before is not None:
                    before.synchronize()

    def until(self, reached: Callable[[], bool]) -> None:
        """It is so once the work has been submitted: another thread may still be at it."""
        if not reached():
            with self._lock:
                pass

    def catch_up(self) -> None:
        """Steps put it there themselves."""

    def close(self) -> None:
        """Nothing is under way."""


class ThreadSubmitter:
    """Runs the first steps in the submitting thread, where nothing else waits, and the rest in a thread of its own.

    Args:
        name: the thread's name.
        enter_thread: called in it before anything else.
        inline_s: how long a submitting thread goes on before it leaves the rest to the other.
    """

    def __init__(self, name: str, enter_thread: Callable[[], None], *, inline_s: float = 0.001) -> None:
        self._name = name
        self._enter_thread = enter_thread
        self._inline_s = inline_s
        self._turn = threading.Lock()
        """Held by whoever runs steps."""
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Work, Event | None]] = deque()
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, work: Work) -> None:
        """Run some steps if nothing is before it, and leave what remains to the thread."""
        if not self._turn.acquire(blocking=False):
            self._enqueue(work, None, held=False)
            return
        try:
            if self._waiting:
                self._enqueue(work, None)
                return
            more, before = self._run_inline(work)
            if more:
                self._enqueue(work, before, first=True)  # what others submitted meanwhile comes after it
        finally:
            self._turn.release()

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait for steps to make it true."""
        with self._changed:
            self._changed.wait_for(reached)

    def catch_up(self) -> None:
        """Steps put it there themselves."""

    def close(self) -> None:
        """Return when every work has ended and so has the thread; a later `submit` starts another."""
        with self._turn:  # a thread that is at its first steps may leave the rest to ours
            pass
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run_inline(self, work: Work) -> tuple[bool, Event | None]:
        until = time.perf_counter() + self._inline_s
        while True:
            more, before = self._step(work)
            self._tell()
            if not more or (before is not None and not before.query()):
                return more, before
            if time.perf_counter() >= until:
                return True, None

    def _enqueue(self, work: Work, before: Event | None, *, first: bool = False, held: bool = True) -> None:
        """Leave a work to the thread, before all others or behind them; `held`: the caller has its turn."""
        with self._changed:
            if first:
                self._waiting.appendleft((work, before))
            else:
                self._waiting.append((work, before))
            refused = None if self._thread is not None else self._start()
            if refused is not None:
                self._waiting.remove((work, before))
            self._changed.notify_all()
        if refused is not None:
            with nullcontext() if held else self._turn:
                self._fail(work, refused)
            self._tell()

    def _start(self) -> Exception | None:
        """Start the thread; return why there is none."""
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the process may have no more threads
            return error
        self._closing, self._thread = False, thread
        return None

    def _run(self) -> None:
        broken: Exception | None = None
        try:
            self._enter_thread()
        except Exception as error:
            broken = error
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closing)
                if not self._waiting:
                    self._thread = None
                    return
            with self._turn:
                work, before = self._waiting.popleft()
                if broken is None:
                    self._run_to_end(work, before)
                else:
                    self._fail(work, broken)
                    self._tell()

    def _run_to_end(self, work: Work, before: Event | None) -> None:
        more = True
        while more:
            if before is not None:
                before.synchronize()
            more, before = self._step(work)
            self._tell()

    def _step(self, work: Work) -> tuple[bool, Event | None]:
        return work.step()

    def _fail(self, work: Work, error: Exception) -> None:
        """End a work of which some steps may have been done."""
        work.fail(error)

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()


class Window:
    """The last so many points that were enqueued, so that no more is in the device's queues at a time.

    A full queue blocks whoever enqueues next, the engine's own thread included. Half of a full window is waited for at
    once: every time that whoever waits wakes up, the engine's thread has to share the interpreter with it.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._points: deque[Event] = deque()

    def add(self, point: Event) -> None:
        """One more was enqueued."""
        self._points.append(point)

    def turn(self, point: Event) -> Event | None:
        """One more is to be enqueued: say what must be reached before."""
        before = self.full()
        self.add(point)
        return before

    def full(self) -> Event | None:
        """What must be reached before another may be enqueued."""
        if len(self._points) < self._size:
            return None
        oldest = [self._points.popleft() for _ in range(-(-self._size // 2))]
        return oldest[-1]
