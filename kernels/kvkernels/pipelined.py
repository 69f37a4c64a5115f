"""What the backends on streams share: requests are checked, and their steps handed over, in one way.

The calling thread checks the request and writes or enqueues the first steps; a thread for each direction does the rest
(see `submit.py`). What side streams read (block ids, staging) is held until their last event, whatever the caller does
with the handle.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Generic, Self, TypeVar

from kvkernels.arena import Arena
from kvkernels.errors import DeviceError, RequestError
from kvkernels.handles import InFlight, StreamHandle
from kvkernels.layouts import PagedLayout
from kvkernels.slots import Slots
from kvkernels.streams import Event, Runtime, Stream
from kvkernels.submit import Submitter, Window, Work
from kvkernels.transfer import BlockIds, Handle, Request, check_request

__all__ = ["CopyLanes", "Direction", "PipelinedTransfer"]

_LANES = 2


class CopyLanes:
    """Streams that take one direction's copies by turns, each behind the one before.

    The copy engine that serves a direction serves its streams by turns, but leaves one only when that has to wait: on
    a single stream a load of 32,000 tokens kept the engine's own small copies, its next step's input, waiting to the
    load's end (72 ms on an H100). Since each copy waits for another stream's, the engine's get in between any two.
    None of these streams is urgent, or they would always go first.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._lanes = [runtime.stream(urgent=False) for _ in range(_LANES)]
        self._last: Event | None = None

    def turn(self) -> Stream:
        """The stream for the next copies, behind all before."""
        (stream,), last = self.turns(1)
        if last is not None:
            stream.wait(last)
        return stream

    def turns(self, count: int) -> tuple[list[Stream], Event | None]:
        """The streams for as many copies, one after another, and the event that the first is to wait for.

        Who puts them there sees to it that each waits for the one before, and tells of the last one (`reached`).
        """
        streams = []
        for _ in range(count):
            self._lanes.append(self._lanes.pop(0))
            streams.append(self._lanes[0])
        return streams, self._last

    def reached(self, last: Event) -> None:
        """All copies so far are done at this event."""
        self._last = last

    def record(self, *, timed: bool = False) -> Event:
        """An event behind all copies so far."""
        self._last = self._lanes[0].record(timed=timed)
        return self._last

    def give_up(self) -> Event:
        """An event behind all copies so far, one included that was put on its stream and not recorded."""
        first, *others = self._lanes
        for lane in others:
            first.wait(lane.record())
        return self.record()

    def streams(self) -> list[Stream]:
        """All of them."""
        return list(self._lanes)


class Direction:
    """One direction's streams for copies, and what enqueues on them.

    Args:
        runtime: the device.
        name: the submitter's.
        urgent: whether the engine waits for it.
        ahead: the most points that are in the device's queues at a time.
    """

    def __init__(self, runtime: Runtime, name: str, *, urgent: bool, ahead: int) -> None:
        self.copies = CopyLanes(runtime)
        self.submitter: Submitter = runtime.submitter(name, urgent=urgent)
        self.window = Window(ahead)

    def give_up(self) -> list[Event]:
        """After a failure half-way: what was enqueued is over at these events."""
        return [self.copies.give_up()]

    def streams(self) -> list[Stream]:
        """All that something may be enqueued on."""
        return self.copies.streams()

    def finish(self) -> None:
        """Return when what was enqueued is over, on a device that takes no events any more."""
        self.submitter.catch_up()
        for stream in self.streams():
            with suppress(DeviceError, RuntimeError):  # then nothing is known of it, and nothing can be done
                stream.synchronize()


_DirectionT = TypeVar("_DirectionT", bound=Direction)


class PipelinedTransfer(ABC, Generic[_DirectionT]):
    """Requests in steps on a device's streams; see `kvkernels.transfer.Transfer`.

    Args:
        name: the backend's name.
        layout: the layout of the cache.
        arena: the host memory that slots point into; pinned where the runtime needs that.
        runtime: the device.
        out: streams of stores.
        into: streams of loads.
        reads: what the device reads beside the arena, held for as long as a handle lives.
    """

    def __init__(
        self,
        name: str,
        layout: PagedLayout,
        arena: Arena,
        runtime: Runtime,
        *,
        out: _DirectionT,
        into: _DirectionT,
        reads: Any,
    ) -> None:
        self.name = name
        self.layout = layout
        self._stops = [layout.planes_of_layer(layer).stop for layer in range(layout.num_layers)]
        self._arena = arena
        self._runtime = runtime
        self._out, self._in = out, into
        self._reads = reads
        self._flying = InFlight()

    @abstractmethod
    def _steps(
        self, request: Request, side: _DirectionT, after: Event, handle: StreamHandle, *, loading: bool
    ) -> Iterator[Event | None]:
        """Enqueue a little at each `next` and tell the handle (see `kvkernels.submit.Work`)."""

    def store(self, block_ids: BlockIds, slots: Slots, *, planes: range | None = None, rest_s: float = 0.0) -> Handle:
        """Copy blocks into slots after the current stream's work so far."""
        return self._checked(block_ids, slots, planes, loading=False, rest_s=rest_s)

    def load(self, slots: Slots, block_ids: BlockIds, *, planes: range | None = None) -> Handle:
        """Copy slots into blocks, layer after layer; blocks are written after the current stream's work so far."""
        return self._checked(block_ids, slots, planes, loading=True)

    def start(self, request: Request, *, loading: bool, after: Event | None = None, rest_s: float = 0.0) -> Handle:
        """Carry out a checked request after the current stream's work so far, or after a given event, and a rest."""
        side = self._in if loading else self._out
        handle = StreamHandle(self._stops, self._runtime, side.submitter)
        handle.keep(side, self._arena, self._reads)
        after = after or self._runtime.current().record()
        self._flying.add(handle)
        steps = self._steps(request, side, after, handle, loading=loading)
        rest = (after, rest_s) if rest_s else None
        side.submitter.submit(Work(steps, partial(_give_up, side, handle), rest))
        return handle

    def over(self, arena: Arena) -> Self:
        """The same streams, staging and cache over another arena."""
        sibling = copy.copy(self)
        sibling._arena = arena
        return sibling

    def close(self) -> None:
        """Wait for what is under way."""
        try:
            self._flying.drain()
        finally:
            for side in (self._out, self._in):
                side.submitter.close()

    def _checked(
        self, block_ids: BlockIds, slots: Slots, planes: range | None, *, loading: bool, rest_s: float = 0.0
    ) -> Handle:
        request = check_request(self.layout, self._arena, block_ids, slots, planes, loading=loading)
        if self._runtime.needs_pinned and not self._arena.pinned(*request.table.pieces):
            raise RequestError("the slots lie in host memory that is not registered with the device")
        return self.start(request, loading=loading, rest_s=rest_s)


def _give_up(side: Direction, handle: StreamHandle, error: BaseException) -> None:
    """End a transfer that failed half-way, when what was enqueued of it is over."""
    try:
        over = side.give_up()
    except (DeviceError, RuntimeError):
        side.finish()
        over = []
    handle.failed(error, over)
