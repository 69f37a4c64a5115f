"""The pipeline shared by backends that gather into device staging and let the copy engine do the rest.

Store: gather piece i + 1 while piece i is copied out. Load: copy piece i + 1 in while piece i is scattered. Staging is
a ring of a few buffers for each direction; events alone keep a buffer from being filled before it was emptied.

The calling thread checks the request and enqueues the first pieces; a thread for each direction enqueues the rest (see
`submit.py`). What side streams read (block ids, staging) is held until their last event, whatever the caller does with
the handle.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from kvkernels.arena import Arena
from kvkernels.errors import DeviceError, LayoutError, RequestError
from kvkernels.handles import InFlight, StreamHandle
from kvkernels.layouts import PagedLayout
from kvkernels.pieces import PieceCopies, StagedPiece, load_pieces, piece_copies, store_pieces
from kvkernels.slots import Slots
from kvkernels.streams import Event, Runtime, Stream
from kvkernels.submit import Window, Work
from kvkernels.transfer import BlockIds, Handle, Request, check_request

__all__ = ["STAGING_BYTES", "CopyLanes", "Mover", "StagedTransfer", "give_up", "ready_request"]

MIB = 1 << 20
STAGING_BYTES = 240 * MIB
_LANES = 2
_PLANNED_PIECES = 4, 32
"""Pieces planned at once: few at first, so that the bus need not wait, then many, for a plan has a fixed cost."""


class Mover(Protocol):
    """Moves rows between paged blocks and a staging buffer, on a stream."""

    @property
    def rejects(self) -> bool:
        """Whether a gather may find that a chunk cannot be stored."""
        ...

    def gather(self, stream: Stream, ids: Any, piece: StagedPiece, staging: Any, rejected: Any) -> None:
        """Rows of the piece's blocks into staging; `ids` holds the whole request's block ids, chunk after chunk.

        A mover that rejects writes 1 into `rejected`, an int32 a chunk of the request in pinned memory, for each chunk
        that cannot be stored; to others it is None.
        """
        ...

    def scatter(self, stream: Stream, ids: Any, piece: StagedPiece, staging: Any) -> None:
        """The way back."""
        ...


class _Buffer:
    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.address = int(memory.data_ptr())
        self.emptied: Event | None = None


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
        self._lanes.append(self._lanes.pop(0))
        if self._last is not None:
            self._lanes[0].wait(self._last)
        return self._lanes[0]

    def record(self) -> Event:
        """An event behind all copies so far."""
        self._last = self._lanes[0].record()
        return self._last

    def give_up(self) -> Event:
        """An event behind all copies so far, one included that was put on its stream and not recorded."""
        first, *others = self._lanes
        for lane in others:
            first.wait(lane.record())
        return self.record()


class _Direction:
    """One direction's staging ring, its streams for kernels and copies, and what enqueues on them."""

    def __init__(self, runtime: Runtime, name: str, *, nbytes: int, buffers: int, urgent: bool, ahead: int) -> None:
        self.capacity = nbytes // buffers
        self._buffers = [_Buffer(runtime.staging(self.capacity)) for _ in range(buffers)]
        self._turn = 0
        self.kernels = runtime.stream(urgent=urgent)
        self.copies = CopyLanes(runtime)
        self.submitter = runtime.submitter(name, urgent=urgent)
        self.window = Window(ahead)

    def next(self) -> _Buffer:
        self._turn = (self._turn + 1) % len(self._buffers)
        return self._buffers[self._turn]

    def give_up(self) -> list[Event]:
        """After a failure half-way: what was enqueued is over, and every buffer is empty, at these events."""
        self.kernels.wait(self.copies.give_up())
        over = self.kernels.record()
        for buffer in self._buffers:
            buffer.emptied = over
        return [over]


class StagedTransfer:
    """Paged blocks <-> staging <-> slots; see `kvkernels.transfer.Transfer`.

    Args:
        layout: what `describe` returned for the cache behind `mover`; with a mover that packs, `packed_layout` of it.
        arena: the host memory that slots point into; pinned where the runtime needs that.
        runtime: the device.
        mover: gather and scatter.
        name: the backend's name.
        staging_bytes: device memory for staging over both directions, all buffers.
        buffers: staging buffers in each direction's ring.
        copy_bytes: layers are loaded in groups until one copy is this long (see `load_pieces`).
        group_bytes: the fewest bytes of a group of layers.
        ahead: the most pieces of a direction that are in the device's queues at a time.

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
        staging_bytes: int = STAGING_BYTES,
        buffers: int = 3,
        copy_bytes: int = 4 * MIB,
        group_bytes: int = 8 * MIB,
        ahead: int = 64,
    ) -> None:
        self.name = name
        self.layout = layout
        self._arena = arena
        self._runtime = runtime
        self._mover = mover
        self._copy_bytes = copy_bytes
        self._group_bytes = group_bytes
        half = staging_bytes // 2
        if max(plane.row_bytes for plane in layout.planes) > half // buffers:
            raise LayoutError(f"a row of this layout does not fit a staging buffer of {half // buffers} bytes")

        def direction(way: str, *, urgent: bool) -> _Direction:
            return _Direction(runtime, f"kv-{way}", nbytes=half, buffers=buffers, urgent=urgent, ahead=ahead)

        self._out = direction("store", urgent=False)
        self._in = direction("load", urgent=True)
        self._flying = InFlight()

    def store(self, block_ids: BlockIds, slots: Slots, *, planes: range | None = None) -> Handle:
        """Copy blocks into slots after the current stream's work so far."""
        request = ready_request(self.layout, self._arena, self._runtime, block_ids, slots, planes, loading=False)
        return self.start(request, loading=False)

    def load(self, slots: Slots, block_ids: BlockIds, *, planes: range | None = None) -> Handle:
        """Copy slots into blocks, layer after layer; blocks are written after the current stream's work so far."""
        request = ready_request(self.layout, self._arena, self._runtime, block_ids, slots, planes, loading=True)
        return self.start(request, loading=True)

    def start(self, request: Request, *, loading: bool, after: Event | None = None) -> Handle:
        """Carry out a checked request after the current stream's work so far, or after a given event."""
        side = self._in if loading else self._out
        handle = StreamHandle(self.layout, self._runtime, side.submitter)
        handle.keep(side, self._arena, self._mover)
        steps = self._load if loading else self._store
        after = after or self._runtime.current().record()
        self._flying.add(handle)
        side.submitter.submit(Work(steps(request, side, after, handle), partial(give_up, side, handle)))
        return handle

    def over(self, arena: Arena) -> Self:
        """The same streams, staging and cache over another arena."""
        sibling = copy.copy(self)
        sibling._arena = arena
        return sibling

    def close(self) -> None:
        """Wait for what is under way."""
        self._flying.drain()
        for side in (self._out, self._in):
            side.submitter.close()

    def _store(self, request: Request, side: _Direction, after: Event, handle: StreamHandle) -> Iterator[Event | None]:
        rejected = self._marks(request.chunks) if self._mover.rejects else None
        handle.rejecting(rejected)
        ids = self._begin(request, side, after, handle)
        pieces = list(store_pieces(self.layout, request.chunks, request.planes, side.capacity))
        gathered = copied = after
        for piece, ranges in self._planned(request, pieces):
            yield side.window.full()
            buffer = side.next()
            if buffer.emptied is not None:
                side.kernels.wait(buffer.emptied)
            self._mover.gather(side.kernels, ids, piece, buffer.memory, rejected)
            gathered = side.kernels.record()
            copies = side.copies.turn()
            copies.wait(gathered)
            copies.copy(self._arena.address + ranges.host, buffer.address + ranges.staged, ranges.length)
            copied = buffer.emptied = side.copies.record()
            side.window.add(copied)
        handle.ended([copied], [gathered])

    def _load(self, request: Request, side: _Direction, after: Event, handle: StreamHandle) -> Iterator[Event | None]:
        ids = self._begin(request, side, after, handle)
        sizes = {"copy_bytes": self._copy_bytes, "group_bytes": self._group_bytes}
        pieces = list(load_pieces(self.layout, request.chunks, request.planes, side.capacity, **sizes))
        followers = [piece.planes for piece in pieces[1:]]
        scattered = after
        for (piece, ranges), planes_after in zip_longest(self._planned(request, pieces), followers):
            yield side.window.full()
            buffer = side.next()
            copies = side.copies.turn()
            if buffer.emptied is not None:
                copies.wait(buffer.emptied)
            copies.copy(buffer.address + ranges.staged, self._arena.address + ranges.host, ranges.length)
            side.kernels.wait(side.copies.record())
            self._mover.scatter(side.kernels, ids, piece, buffer.memory)
            scattered = buffer.emptied = side.kernels.record()
            side.window.add(scattered)
            if planes_after != piece.planes:
                handle.arrived(piece.planes.stop, [scattered])
        handle.ended([scattered], [scattered])

    def _begin(self, request: Request, side: _Direction, after: Event, handle: StreamHandle) -> Any:
        """Order the kernels, which touch the cache, behind the engine's work so far; return the ids on the device."""
        side.kernels.wait(after)
        ids = self._runtime.upload(request.block_ids.ravel(), side.kernels)
        handle.keep(ids, side, self._arena, self._mover)
        return ids

    def _marks(self, chunks: int) -> NDArray[np.int32]:
        """A zero for every chunk, which the device can write."""
        marks = self._runtime.pinned(4 * max(1, chunks)).view(np.int32)[:chunks]
        marks[:] = 0
        return marks

    def _planned(self, request: Request, pieces: Sequence[StagedPiece]) -> Iterator[tuple[StagedPiece, PieceCopies]]:
        """Every piece with its copies."""
        few, many = _PLANNED_PIECES
        bounds = [0, *range(few, len(pieces), many), len(pieces)]
        for start, stop in pairwise(bounds):
            batch = pieces[start:stop]
            copies = piece_copies(self.layout, request.table, batch, split_bytes=self._arena.split_bytes)
            yield from zip(batch, copies, strict=True)


def ready_request(
    layout: PagedLayout,
    arena: Arena,
    runtime: Runtime,
    block_ids: BlockIds,
    slots: Slots,
    planes: range | None,
    *,
    loading: bool,
) -> Request:
    """`check_request`, and every slot byte within the device's reach."""
    request = check_request(layout, arena, block_ids, slots, planes, loading=loading)
    if runtime.needs_pinned and not arena.pinned(*request.table.pieces):
        raise RequestError("the slots lie in host memory that is not registered with the device")
    return request


class _Stoppable(Protocol):
    def give_up(self) -> list[Event]:
        """After a failure half-way: what was enqueued is over at these events."""
        ...


def give_up(side: _Stoppable, handle: StreamHandle, error: Exception) -> None:
    """End a transfer that failed half-way, when what was enqueued of it is over."""
    try:
        over = side.give_up()
    except (DeviceError, RuntimeError):  # a device that takes no events any more has nothing to be waited for
        over = []
    handle.failed(error, over)
