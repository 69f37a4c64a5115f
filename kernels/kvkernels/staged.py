"""The pipeline shared by backends that gather into device staging and let the copy engine do the rest.

Store: gather piece i + 1 while piece i is copied out. Load: copy piece i + 1 in while piece i is scattered. Staging is
a ring of a few buffers for each direction; events alone keep a buffer from being filled before it was emptied.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvkernels.arena import Arena
from kvkernels.errors import LayoutError
from kvkernels.handles import StreamHandle
from kvkernels.layouts import PagedLayout
from kvkernels.pieces import (
    CopyRanges,
    PieceBatch,
    PieceCopies,
    StagedPiece,
    copy_ranges,
    load_pieces,
    piece_batch,
    piece_copies,
    store_pieces,
)
from kvkernels.pipelined import Direction, PipelinedTransfer
from kvkernels.streams import Event, Runtime, Stream
from kvkernels.transfer import Request

if TYPE_CHECKING:
    from kvkernels.compiled import Launch
    from kvkernels.staged_rows import PieceRows, Turns

__all__ = ["STAGING_BYTES", "Mover", "StagedTransfer"]

MIB = 1 << 20
STAGING_BYTES = 240 * MIB
_PLANNED_PIECES = 4, 32
"""Pieces planned at once: few at first, so that the bus need not wait, then many, for a plan has a fixed cost."""
_KEPT_PLANS = 256
"""What depends on the number of chunks alone is kept: it is half of a plan, in the engine's own thread."""


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

    def written(self, piece: StagedPiece, *, gather: bool) -> Launch | None:
        """The same in numbers, for a program; None where it has not run yet, or is no kernel that the driver launches.

        Given later are the block ids, staging, and for a gather that may reject `rejected`.
        """
        ...


class _Plan:
    """The pieces of all requests with so many chunks, for so many planes."""

    def __init__(self, layout: PagedLayout, pieces: list[StagedPiece], *, loading: bool) -> None:
        self._layout = layout
        self.pieces = pieces
        self.loading = loading
        following = [*(piece.planes for piece in pieces), None][1:]
        self.ends = [after != piece.planes for piece, after in zip(pieces, following, strict=True)]
        """Whether the piece is the last one of its planes."""
        self._rows: PieceRows | None = None

    @cached_property
    def batches(self) -> list[PieceBatch]:
        """The pieces as they are planned step by step."""
        few, many = _PLANNED_PIECES
        bounds = [0, *range(few, len(self.pieces), many), len(self.pieces)]
        return [piece_batch(self._layout, self.pieces[start:stop]) for start, stop in pairwise(bounds)]

    @cached_property
    def whole(self) -> PieceBatch:
        """All of them at once."""
        return piece_batch(self._layout, self.pieces)

    def rows(self, mover: Mover) -> PieceRows | None:
        """What is written of all of them at once, as soon as each kernel has run."""
        if self._rows is None:
            launches = [mover.written(piece, gather=not self.loading) for piece in self.pieces]
            known = [launch for launch in launches if launch is not None]
            if known and len(known) == len(launches):
                from kvkernels.staged_rows import PieceRows  # noqa: PLC0415 - of CUDA's

                timed = self.ends if self.loading else [piece is self.pieces[-1] for piece in self.pieces]
                self._rows = PieceRows(known, timed, loading=self.loading)
        return self._rows


class _Buffer:
    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.address = int(memory.data_ptr())
        self.emptied: Event | None = None


class _Direction(Direction):
    """One direction with its staging ring and its stream for kernels."""

    def __init__(self, runtime: Runtime, name: str, *, nbytes: int, buffers: int, urgent: bool, ahead: int) -> None:
        super().__init__(runtime, name, urgent=urgent, ahead=ahead)
        self.capacity = nbytes // buffers
        self._buffers = [_Buffer(runtime.staging(self.capacity)) for _ in range(buffers)]
        self._turn = 0
        self.kernels = runtime.stream(urgent=urgent)

    def next(self) -> _Buffer:
        self._turn = (self._turn + 1) % len(self._buffers)
        return self._buffers[self._turn]

    def turns(self, after: Event, count: int) -> tuple[Turns, list[_Buffer]]:
        """What the next pieces use, and their buffers."""
        from kvkernels.staged_rows import Turns  # noqa: PLC0415 - of CUDA's

        buffers = [self.next() for _ in range(count)]
        lanes, last = self.copies.turns(count)
        turns: Any = {"after": after, "kernels": self.kernels, "lanes": lanes, "last": last}  # CUDA's, all of them
        turns["emptied"] = [buffer.emptied for buffer in buffers[: len(self._buffers)]]
        return Turns(**turns, staging=[buffer.address for buffer in buffers]), buffers

    def give_up(self) -> list[Event]:
        """After a failure half-way: what was enqueued is over, and every buffer is empty, at these events."""
        self.kernels.wait(self.copies.give_up())
        over = self.kernels.record()
        for buffer in self._buffers:
            buffer.emptied = over
        return [over]

    def streams(self) -> list[Stream]:
        """All that something may be enqueued on."""
        return [*super().streams(), self.kernels]


class StagedTransfer(PipelinedTransfer[_Direction]):
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
        self._mover = mover
        self._copy_bytes = copy_bytes
        self._group_bytes = group_bytes
        self._plans: dict[tuple[bool, int, range], _Plan] = {}
        half = staging_bytes // 2
        if max(plane.row_bytes for plane in layout.planes) > half // buffers:
            raise LayoutError(f"a row of this layout does not fit a staging buffer of {half // buffers} bytes")

        def direction(way: str, *, urgent: bool) -> _Direction:
            return _Direction(runtime, f"kv-{way}", nbytes=half, buffers=buffers, urgent=urgent, ahead=ahead)

        out, into = direction("store", urgent=False), direction("load", urgent=True)
        super().__init__(name, layout, arena, runtime, out=out, into=into, reads=mover)

    def _steps(
        self, request: Request, side: _Direction, after: Event, handle: StreamHandle, *, loading: bool
    ) -> Iterator[Event | None]:
        ids = self._runtime.upload(request.block_ids.ravel(), side.kernels)
        handle.keep(ids)
        rejected = self._marks(request.chunks) if self._mover.rejects and not loading else None
        handle.rejecting(rejected)
        plan = self._plan(request, side, loading=loading)
        program = self._runtime.writing()
        rows = None if program is None else plan.rows(self._mover)
        if rows is not None:
            given = [int(ids.data_ptr()), *([] if rejected is None else [int(rejected.ctypes.data)])]
            self._write(program, rows, plan, request, side, after, handle, given)
            return
        side.kernels.wait(after)  # they touch the cache
        copies = self._planned(request, plan)
        if loading:
            yield from self._load(plan, copies, ids, side, after, handle)
        else:
            yield from self._store(plan, copies, ids, rejected, side, after, handle)

    def _write(
        self,
        program: Any,
        rows: PieceRows,
        plan: _Plan,
        request: Request,
        side: _Direction,
        after: Event,
        handle: StreamHandle,
        given: list[int],
    ) -> None:
        """Write all steps down at once."""
        found = copy_ranges(plan.whole, request.table, split_bytes=self._arena.split_bytes)
        turns, buffers = side.turns(after, len(plan.pieces))
        starts = np.repeat(np.array(turns.staging, np.int64), np.diff(found.bounds))
        ranges = CopyRanges(self._arena.address + found.host, starts + found.staged, found.length, found.bounds)
        runtime: Any = self._runtime  # CUDA's, like its events
        full: Any = side.window.turn
        events = rows.write(program, runtime, turns, ranges, full, given)
        for buffer, event in zip(buffers, events.done, strict=True):
            buffer.emptied = event
        side.copies.reached(events.halfway if plan.loading else events.done[-1])
        handle.begun(events.begun)
        if plan.loading:
            for piece, event, ends in zip(plan.pieces, events.done, plan.ends, strict=True):
                if ends:
                    handle.arrived(piece.planes.stop, [event])
        handle.ended(events.done[-1:], events.done[-1:] if plan.loading else [events.halfway])

    def _store(
        self,
        plan: _Plan,
        planned: Iterator[PieceCopies],
        ids: Any,
        rejected: Any,
        side: _Direction,
        after: Event,
        handle: StreamHandle,
    ) -> Iterator[Event | None]:
        gathered = copied = after
        for piece, ranges in zip(plan.pieces, planned, strict=True):
            yield side.window.full()
            buffer = side.next()
            if buffer.emptied is not None:
                side.kernels.wait(buffer.emptied)
            if piece is plan.pieces[0]:
                handle.begun(side.kernels.record(timed=True))
            self._mover.gather(side.kernels, ids, piece, buffer.memory, rejected)
            gathered = side.kernels.record()
            copies = side.copies.turn()
            copies.wait(gathered)
            copies.copy(self._arena.address + ranges.host, buffer.address + ranges.staged, ranges.length)
            copied = buffer.emptied = side.copies.record(timed=piece is plan.pieces[-1])
            side.window.add(copied)
        handle.ended([copied], [gathered])

    def _load(
        self,
        plan: _Plan,
        planned: Iterator[PieceCopies],
        ids: Any,
        side: _Direction,
        after: Event,
        handle: StreamHandle,
    ) -> Iterator[Event | None]:
        scattered = after
        for piece, ranges, ends in zip(plan.pieces, planned, plan.ends, strict=True):
            yield side.window.full()
            buffer = side.next()
            copies = side.copies.turn()
            if buffer.emptied is not None:
                copies.wait(buffer.emptied)
            if piece is plan.pieces[0]:
                handle.begun(copies.record(timed=True))
            copies.copy(buffer.address + ranges.staged, self._arena.address + ranges.host, ranges.length)
            side.kernels.wait(side.copies.record())
            self._mover.scatter(side.kernels, ids, piece, buffer.memory)
            scattered = buffer.emptied = side.kernels.record(timed=ends)
            side.window.add(scattered)
            if ends:
                handle.arrived(piece.planes.stop, [scattered])
        handle.ended([scattered], [scattered])

    def _marks(self, chunks: int) -> NDArray[np.int32]:
        """A zero for every chunk, which the device can write."""
        marks = self._runtime.pinned(4 * max(1, chunks)).view(np.int32)[:chunks]
        marks[:] = 0
        return marks

    def _plan(self, request: Request, side: _Direction, *, loading: bool) -> _Plan:
        """The pieces of a request with so many chunks."""
        key = loading, request.chunks, request.planes
        plan = self._plans.get(key)
        if plan is None:
            if loading:
                sizes = {"copy_bytes": self._copy_bytes, "group_bytes": self._group_bytes}
                pieces = list(load_pieces(self.layout, request.chunks, request.planes, side.capacity, **sizes))
            else:
                pieces = list(store_pieces(self.layout, request.chunks, request.planes, side.capacity))
            plan = _Plan(self.layout, pieces, loading=loading)
            if len(self._plans) >= _KEPT_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _planned(self, request: Request, plan: _Plan) -> Iterator[PieceCopies]:
        """The copies of every piece."""
        for batch in plan.batches:
            yield from piece_copies(batch, request.table, split_bytes=self._arena.split_bytes)
