"""Handles of transfers that are enqueued bit by bit, perhaps by another thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvkernels.streams import Event, Runtime, Stream
from kvkernels.submit import Submitter
from kvkernels.transfer import Measured

__all__ = ["InFlight", "StreamHandle"]


class StreamHandle:
    """A transfer that is done when its last events are reached; see `kvkernels.transfer.Handle`.

    Whoever enqueues tells it what was enqueued (`keep`, `arrived`, then `ended` or `failed`); everybody else waits for
    that on the submitter, then for the events.

    Args:
        stops: for each layer, behind which planes it is whole (`planes_of_layer`).
        runtime: the device.
        submitter: what runs the transfer's steps.
    """

    def __init__(self, stops: Sequence[int], runtime: Runtime, submitter: Submitter) -> None:
        self._stops = stops
        self._runtime = runtime
        self._submitter = submitter
        self._kept: tuple[Any, ...] = ()
        self._rejected: NDArray[np.int32] | None = None
        self._begin: Event | None = None
        self._marks: list[tuple[int, Sequence[Event]]] = []
        self._waits: list[tuple[Event, Sequence[Event], Stream]] = []
        """When a stream came to wait, for what, and which."""
        self._last: Sequence[Event] = ()
        self._sources: Sequence[Event] = ()
        self._error: BaseException | None = None
        self._ended = False

    # Whoever enqueues

    def keep(self, *values: Any) -> None:
        """Hold what the device reads too, until it is known to be over."""
        self._kept += values

    def rejecting(self, rejected: NDArray[np.int32] | None) -> None:
        """Where the device marks chunks that it rejects, if it may; held like what it reads."""
        self._rejected = rejected

    def begun(self, event: Event) -> None:
        """The first copy comes right behind this (timed) event."""
        self._begin = event

    def arrived(self, stop: int, events: Sequence[Event]) -> None:
        """All planes before `stop` are in place at these (timed) events."""
        self._marks.append((stop, events))

    def ended(self, last: Sequence[Event], sources: Sequence[Event]) -> None:
        """Everything is enqueued: complete at `last`, all sources read at `sources`."""
        self._last, self._sources = last, sources
        self._ended = True

    def failed(self, error: BaseException, last: Sequence[Event]) -> None:
        """No more is enqueued; what was, is over at `last`."""
        self._error = error
        self.ended(last, last)

    # Everybody else

    def done(self) -> bool:
        """Whether the last events were reached."""
        if not self.over():
            return False
        self._check()
        return True

    def wait(self) -> None:
        """Block until they are."""
        self.settle()
        self._check()

    def wait_layer(self, layer: int) -> None:
        """Make the current stream wait for the layer's planes, or for everything where it has no event of its own."""
        needed = self._stops[layer]
        if not (self._ended or (self._marks and self._marks[-1][0] >= needed)):
            self._submitter.until(lambda: self._ended or bool(self._marks and self._marks[-1][0] >= needed))
        self._check()
        events = next((events for stop, events in self._marks if stop >= needed), self._last)
        stream = self._runtime.current()
        if not events or (self._waits and self._waits[-1][1:] == (events, stream)):
            return  # it waits for these already
        self._waits.append((stream.record(timed=True), events, stream))
        for event in events:
            stream.wait(event)

    def wait_sources(self) -> None:
        """Make the current stream wait until all sources were read."""
        self._submitter.until(lambda: self._ended)
        self._check()
        stream = self._runtime.current()
        for event in self._sources:
            stream.wait(event)

    def rejected(self) -> tuple[int, ...]:
        """The chunks that the device has marked."""
        self._check()
        return () if self._rejected is None else tuple(np.flatnonzero(self._rejected).tolist())

    def measured(self) -> Measured | None:
        """By the timed events; nothing of a transfer that failed, or copied nothing."""
        if self._fault() is not None or self._begin is None or not self._last:
            return None
        seconds = max(event.since(self._begin) for event in self._last)
        waited = [(came, events) for came, events, _ in self._waits if came.query()]  # who comes later need not wait
        stalls = (max(event.since(came) for event in events) for came, events in waited)
        return Measured(seconds, sum(max(0.0, stall) for stall in stalls))

    def over(self) -> bool:
        """Whether nothing of it is under way, failed or not."""
        if not (self._ended and all(event.query() for event in self._last)):
            return False
        self._let_go()
        return True

    def settle(self) -> None:
        """Block until nothing of it is under way, failed or not."""
        self._submitter.until(lambda: self._ended)
        for event in self._last:
            event.synchronize()
        self._let_go()

    def _let_go(self) -> None:
        """Nothing reads what was kept any more; of one that failed without an event behind it, nobody knows."""
        if self._last or self._error is None:
            self._kept = ()

    def _check(self) -> None:
        if (fault := self._fault()) is not None:
            raise fault

    def _fault(self) -> BaseException | None:
        """What the transfer failed by, as far as it is known."""
        return self._error or next(filter(None, (event.fault() for event in self._last)), None)


class InFlight:
    """Handles whose transfers may still run, kept so that what they read outlives them."""

    def __init__(self) -> None:
        self._handles: list[StreamHandle] = []
        self._lock = threading.Lock()

    def add(self, handle: StreamHandle) -> None:
        """Keep it, and let go of those that are over."""
        with self._lock:
            self._handles = [one for one in self._handles if not one.over()]
            self._handles.append(handle)

    def drain(self) -> None:
        """Wait for all; a failure is told by the transfer's own handle, but the first event that cannot be waited for.

        That one keeps no other transfer from being waited for: its memory would be given out while it is read.
        """
        with self._lock:
            handles, self._handles = self._handles, []
        errors = []
        for handle in handles:
            try:
                handle.settle()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
