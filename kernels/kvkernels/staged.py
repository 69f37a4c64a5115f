"""The pipeline shared by backends that gather into device staging and let the copy engine do the rest.

Store: gather piece i + 1 while piece i is copied out. Load: copy piece i + 1 in while piece i is scattered. Staging is
a ring of a few buffers for each direction; events alone keep a buffer from being filled before it was emptied. Copies
go over two lanes (streams): the copy engine needs a few microseconds between two copies of one stream, and the other
lane's copy fills that gap.

All of it is enqueued by the calling thread, which never blocks. What side streams read (block ids, staging) is held
until their last event, whatever the caller does with the handle.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, Self

import numpy as np

from kvkernels.arena import Arena, Ints
from kvkernels.errors import LayoutError, RequestError
from kvkernels.layouts import PagedLayout
from kvkernels.pieces import StagedPiece, load_pieces, store_pieces
from kvkernels.slots import Slot, merge_copies
from kvkernels.streams import Event, Runtime
from kvkernels.transfer import BlockIds, Handle, Request, check_request

__all__ = ["EventHandle", "InFlight", "Mover", "StagedTransfer", "ready_request"]

MIB = 1 << 20


class Mover(Protocol):
    """Moves rows between paged blocks and a staging buffer on the device's current stream."""

    def gather(self, ids: Any, piece: StagedPiece, staging: Any) -> None:
        """Rows of the piece's blocks into staging; `ids` holds the whole request's block ids, chunk after chunk."""
        ...

    def scatter(self, ids: Any, piece: StagedPiece, staging: Any) -> None:
        """The way back."""
        ...


class EventHandle:
    """A transfer that is done when its last events are reached; `marks` are (planes loaded up to here, events).

    `keep` is what the device still reads: it lives as long as the handle.
    """

    def __init__(
        self,
        layout: PagedLayout,
        runtime: Runtime,
        last: Sequence[Event],
        marks: Sequence[tuple[int, Sequence[Event]]],
        keep: Any,
    ) -> None:
        self._layout = layout
        self._runtime = runtime
        self._last = list(last)
        self._marks = list(marks)
        self._keep = keep

    def done(self) -> bool:
        """Whether the last events were reached."""
        return all(event.query() for event in self._last)

    def wait(self) -> None:
        """Block until they are."""
        for event in self._last:
            event.synchronize()

    def wait_layer(self, layer: int) -> None:
        """Make the current stream wait for the layer's planes, or for everything where there are no marks."""
        stream = self._runtime.current()
        needed = self._layout.planes_of_layer(layer).stop
        for event in next((events for stop, events in self._marks if stop >= needed), self._last):
            stream.wait(event)


class InFlight:
    """Handles whose transfers may still run, kept so that what they read outlives them."""

    def __init__(self) -> None:
        self._handles: list[Handle] = []

    def add(self, handle: Handle) -> Handle:
        """Keep it, and let go of those that are done."""
        self._handles = [one for one in self._handles if not one.done()]
        self._handles.append(handle)
        return handle

    def drain(self) -> None:
        """Wait for all."""
        for handle in self._handles:
            handle.wait()
        self._handles = []


class _Buffer:
    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.address = int(memory.data_ptr())
        self.emptied: list[Event] = []


class _Direction:
    """One direction's staging ring, kernel stream and copy lanes."""

    def __init__(self, runtime: Runtime, *, nbytes: int, buffers: int, lanes: int, urgent: bool) -> None:
        self.capacity = nbytes // buffers
        self._buffers = [_Buffer(runtime.staging(self.capacity)) for _ in range(buffers)]
        self._turn = 0
        self._lane = 0
        self.kernels = runtime.stream(urgent=urgent)
        self._lanes = [runtime.stream(urgent=urgent) for _ in range(lanes)]

    def next(self) -> _Buffer:
        self._turn = (self._turn + 1) % len(self._buffers)
        return self._buffers[self._turn]

    def copy(self, after: Sequence[Event], target: Ints, source: Ints, length: Ints) -> dict[int, Event]:
        """Deal the copies out, from the lane after the last one used; done when every lane's event is reached."""
        done: dict[int, Event] = {}
        lanes = len(self._lanes)
        for first in range(min(lanes, len(length))):
            number = (self._lane + first) % lanes
            lane = self._lanes[number]
            for event in after:
                lane.wait(event)
            mine = slice(first, None, lanes)
            lane.copy(target[mine], source[mine], length[mine])
            done[number] = lane.record()
        self._lane = (self._lane + len(length)) % lanes
        return done


class StagedTransfer:
    """Paged blocks <-> staging <-> slots; see `kvkernels.transfer.Transfer`.

    Args:
        layout: what `describe` returned for the cache behind `mover`.
        arena: the host memory that slots point into; pinned where the runtime needs that.
        runtime: the device.
        mover: gather and scatter.
        name: the backend's name.
        staging_bytes: device memory for staging over both directions, all buffers.
        buffers: staging buffers in each direction's ring.
        lanes: copy streams in each direction.
        copy_bytes: layers are loaded in groups until one copy is this long (see `load_pieces`).

    Raises:
        LayoutError: a single row does not fit a staging buffer.
    """

    def __init__(  # noqa: PLR0913  (each is a measured choice of its own)
        self,
        layout: PagedLayout,
        arena: Arena,
        runtime: Runtime,
        mover: Mover,
        *,
        name: str,
        staging_bytes: int = 240 * MIB,
        buffers: int = 3,
        lanes: int = 2,
        copy_bytes: int = 4 * MIB,
    ) -> None:
        self.name = name
        self.layout = layout
        self.staging_bytes = staging_bytes
        self._arena = arena
        self._runtime = runtime
        self._mover = mover
        self._copy_bytes = copy_bytes
        half = staging_bytes // 2
        if max(plane.row_bytes for plane in layout.planes) > half // buffers:
            raise LayoutError(f"a row of this layout does not fit a staging buffer of {half // buffers} bytes")
        self._out = _Direction(runtime, nbytes=half, buffers=buffers, lanes=lanes, urgent=False)
        self._in = _Direction(runtime, nbytes=half, buffers=buffers, lanes=lanes, urgent=True)
        self._starts = layout.plane_starts()
        self._lock = threading.Lock()
        self._flying = InFlight()

    def store(
        self, block_ids: BlockIds, slots: Sequence[Slot], *, planes: range | None = None, after: Event | None = None
    ) -> Handle:
        """Copy blocks into slots after the current stream's work so far, or after a given event."""
        request = ready_request(self.layout, self._arena, self._runtime, block_ids, slots, planes, loading=False)
        with self._lock:
            side = self._out
            side.kernels.wait(after or self._runtime.current().record())
            ids = self._runtime.upload(request.block_ids.ravel(), side.kernels)
            last: dict[int, Event] = {}
            for piece in store_pieces(self.layout, request.chunks, request.planes, side.capacity):
                buffer = side.next()
                for event in buffer.emptied:
                    side.kernels.wait(event)
                side.kernels.launch(partial(self._mover.gather, ids, piece, buffer.memory))
                host, device, length = self._copies(request, piece, buffer)
                copied = side.copy([side.kernels.record()], host, device, length)
                buffer.emptied = list(copied.values())
                last.update(copied)  # a lane's later event covers its earlier ones
            return self._flying.add(
                EventHandle(self.layout, self._runtime, list(last.values()), (), (ids, side, self._arena))
            )

    def load(
        self, slots: Sequence[Slot], block_ids: BlockIds, *, planes: range | None = None, after: Event | None = None
    ) -> Handle:
        """Copy slots into blocks, layer after layer; blocks are written after the current stream's work so far."""
        request = ready_request(self.layout, self._arena, self._runtime, block_ids, slots, planes, loading=True)
        with self._lock:
            side = self._in
            side.kernels.wait(after or self._runtime.current().record())
            ids = self._runtime.upload(request.block_ids.ravel(), side.kernels)
            marks: list[tuple[int, list[Event]]] = []
            pieces = load_pieces(
                self.layout, request.chunks, request.planes, side.capacity, copy_bytes=self._copy_bytes
            )
            for piece in pieces:
                buffer = side.next()
                host, device, length = self._copies(request, piece, buffer)
                for event in side.copy(buffer.emptied, device, host, length).values():
                    side.kernels.wait(event)
                side.kernels.launch(partial(self._mover.scatter, ids, piece, buffer.memory))
                buffer.emptied = [side.kernels.record()]
                if marks and marks[-1][0] == piece.planes.stop:
                    marks.pop()
                marks.append((piece.planes.stop, buffer.emptied))
            last = marks[-1][1] if marks else []
            return self._flying.add(EventHandle(self.layout, self._runtime, last, marks, (ids, side, self._arena)))

    def over(self, arena: Arena) -> Self:
        """The same streams, staging and cache over another arena."""
        sibling = copy.copy(self)
        sibling._arena = arena
        return sibling

    def close(self) -> None:
        """Wait for what is under way."""
        self._flying.drain()

    def _copies(self, request: Request, piece: StagedPiece, buffer: _Buffer) -> tuple[Ints, Ints, Ints]:
        """Host addresses, staging addresses and lengths of the copies that fill or empty a piece's staging."""
        chunks = np.arange(piece.chunks.start, piece.chunks.stop)
        first = self._starts[piece.planes.start] + piece.blocks.start * piece.row_bytes
        size = piece.chunk_bytes
        found = request.table.resolve(chunks * request.table.slot_bytes + first, np.full(len(chunks), size))
        device = buffer.address + found.index * size + found.within
        return merge_copies(self._arena.address + found.offset, device, found.length)


def ready_request(
    layout: PagedLayout,
    arena: Arena,
    runtime: Runtime,
    block_ids: BlockIds,
    slots: Sequence[Slot],
    planes: range | None,
    *,
    loading: bool,
) -> Request:
    """`check_request`, and every slot byte within the device's reach."""
    request = check_request(layout, arena, block_ids, slots, planes, loading=loading)
    if runtime.needs_pinned and not arena.pinned(*request.table.pieces):
        raise RequestError("the slots lie in host memory that is not registered with the device")
    return request
