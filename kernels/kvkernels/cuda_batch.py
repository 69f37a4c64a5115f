"""Rows straight between blocks and slots: every copy of a request in prepared arrays, a driver call for hundreds.

No kernel and no staging, so nothing is taken from the model at all; what it costs is the copy engine's and the driver's
overhead for every row, so it suits large rows (cross-layer blocks, long blocks), single blocks, and consecutive block
ids, whose rows are merged into one copy. The arrays of addresses are computed by NumPy; see `cuda_driver.py`. The
calling thread checks the request and makes the first driver calls, a thread for each direction the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Self

import numpy as np

from kvkernels.arena import Arena, Ints
from kvkernels.handles import InFlight, StreamHandle
from kvkernels.layouts import PagedLayout
from kvkernels.slots import Slots, merge_copies
from kvkernels.staged import CopyLanes, give_up, ready_request
from kvkernels.streams import Event, Runtime
from kvkernels.submit import Window, Work
from kvkernels.transfer import BlockIds, Handle, Request, Tensors, listed

__all__ = ["BatchTransfer"]


class _Direction:
    """One direction's streams, and what enqueues on them."""

    def __init__(self, runtime: Runtime, name: str, *, urgent: bool, ahead: int) -> None:
        self.copies = CopyLanes(runtime)
        self.submitter = runtime.submitter(name, urgent=urgent)
        self.window = Window(ahead)

    def give_up(self) -> list[Event]:
        """After a failure half-way: what was enqueued is over at this event."""
        return [self.copies.give_up()]


class BatchTransfer:
    """One copy a row, in batches; see `kvkernels.transfer.Transfer`.

    Args:
        layout: what `describe` returned for these tensors.
        tensors: the engine's KV cache.
        arena: the host memory that slots point into.
        runtime: the device.
        batch_rows: the fewest rows that an event is recorded for, but for the last: small loads still get an event
            a layer, large ones do not wait for planning.
        call_copies: the most copies of one driver call.
        ahead: the most driver calls of a direction that are in the device's queues at a time.
        name: the backend's name.
    """

    def __init__(
        self,
        layout: PagedLayout,
        tensors: Tensors,
        arena: Arena,
        runtime: Runtime,
        *,
        batch_rows: int = 256,
        call_copies: int = 256,
        ahead: int = 16,
        name: str = "cuda_batch",
    ) -> None:
        self.name = name
        self.layout = layout
        self._tensors = listed(tensors)  # held: only their addresses are used below
        self._arena = arena
        self._runtime = runtime
        self._batch_rows = batch_rows
        self._call_copies = call_copies
        self._bases = np.array([self._tensors[p.tensor].data_ptr() + p.offset for p in layout.planes], np.int64)
        self._starts = layout.plane_starts()
        self._out = _Direction(runtime, f"{name}-store", urgent=False, ahead=ahead)
        self._in = _Direction(runtime, f"{name}-load", urgent=True, ahead=ahead)
        self._flying = InFlight()

    def store(self, block_ids: BlockIds, slots: Slots, *, planes: range | None = None) -> Handle:
        """Copy blocks into slots after the current stream's work so far."""
        request = ready_request(self.layout, self._arena, self._runtime, block_ids, slots, planes, loading=False)
        return self.start(request, loading=False)

    def load(self, slots: Slots, block_ids: BlockIds, *, planes: range | None = None) -> Handle:
        """Copy slots into blocks, layer after layer, after the current stream's work so far."""
        request = ready_request(self.layout, self._arena, self._runtime, block_ids, slots, planes, loading=True)
        return self.start(request, loading=True)

    def start(self, request: Request, *, loading: bool, after: Event | None = None) -> Handle:
        """Carry out a checked request after the current stream's work so far, or after a given event."""
        side = self._in if loading else self._out
        handle = StreamHandle(self.layout, self._runtime, side.submitter)
        handle.keep(side, self._arena, self._tensors)
        after = after or self._runtime.current().record()
        self._flying.add(handle)
        steps = self._steps(request, side, after, handle, loading=loading)
        side.submitter.submit(Work(steps, partial(give_up, side, handle)))
        return handle

    def over(self, arena: Arena) -> Self:
        """The same streams and cache over another arena."""
        sibling = copy.copy(self)
        sibling._arena = arena
        return sibling

    def close(self) -> None:
        """Wait for what is under way."""
        self._flying.drain()
        for side in (self._out, self._in):
            side.submitter.close()

    def _steps(
        self, request: Request, side: _Direction, after: Event, handle: StreamHandle, *, loading: bool
    ) -> Iterator[Event | None]:
        side.copies.turn().wait(after)
        side.copies.record()  # every later copy is behind it
        last: list[Event] = []
        for group in self._groups(request):
            host, device, length = self._copies(request, group)
            target, source = (device, host) if loading else (host, device)
            for at in range(0, len(length), self._call_copies):
                yield side.window.full()
                mine = slice(at, at + self._call_copies)
                side.copies.turn().copy(target[mine], source[mine], length[mine])
                last = [side.copies.record()]
                side.window.add(last[0])
            handle.arrived(group.stop, last)
        handle.ended(last, last)

    def _groups(self, request: Request) -> Iterator[range]:
        """As few planes as make a batch worth its call."""
        planes = request.planes if request.chunks else range(0)
        size = max(1, -(-self._batch_rows // max(1, request.block_ids.size)))
        for at in range(planes.start, planes.stop, size):
            yield range(at, min(at + size, planes.stop))

    def _copies(self, request: Request, group: range) -> tuple[Ints, Ints, Ints]:
        """Host addresses, device addresses and lengths of every row of these planes, neighbours merged."""
        planes = [self.layout.planes[index] for index in group]
        shape = (len(planes), request.chunks, self.layout.chunk_blocks)
        rows = np.array([plane.row_bytes for plane in planes], np.int64)[:, None, None]
        strides = np.array([plane.block_stride for plane in planes], np.int64)[:, None, None]
        firsts = np.array([self._starts[index] for index in group], np.int64)[:, None, None]
        chunks = np.arange(request.chunks, dtype=np.int64)[None, :, None] * self.layout.slot_bytes
        starts = chunks + firsts + rows * np.arange(shape[2], dtype=np.int64)
        pages = self._bases[group.start : group.stop, None, None] + strides * request.block_ids
        kept = np.broadcast_to(request.block_ids >= 0, shape)
        found = request.table.resolve(starts[kept], np.broadcast_to(rows, shape)[kept])
        device = pages[kept][found.index] + found.within
        split_bytes = self._arena.split_bytes
        _, host, device, length = merge_copies(found.offset, device, found.length, split_bytes=split_bytes)
        return self._arena.address + host, device, length
