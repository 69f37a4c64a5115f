"""Rows straight between blocks and slots: every copy of a request in prepared arrays, one driver call a layer group.

No kernel and no staging, so nothing is taken from the model at all; what it costs is the copy engine's overhead for
every row, so it suits large rows (cross-layer blocks, long blocks) and consecutive block ids, whose rows are merged
into one copy. The arrays of addresses are computed by NumPy and reused from call to call; see `cuda_driver.py`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from kvkernels.arena import Arena, Ints
from kvkernels.layouts import PagedLayout
from kvkernels.slots import Slot, merge_copies
from kvkernels.staged import EventHandle, InFlight, ready_request
from kvkernels.streams import Event, Runtime
from kvkernels.transfer import BlockIds, Handle, Request, Tensors, listed

__all__ = ["BatchTransfer"]


class BatchTransfer:
    """One copy a row, in batches; see `kvkernels.transfer.Transfer`.

    Args:
        layout: what `describe` returned for these tensors.
        tensors: the engine's KV cache.
        arena: the host memory that slots point into.
        runtime: the device.
        batch_rows: the fewest rows that a driver call is made for, but for the last: small loads still get an event
            a layer, large ones do not wait for planning.
        lanes: streams in each direction that batches are dealt out to.
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
        lanes: int = 2,
        name: str = "cuda_batch",
    ) -> None:
        self.name = name
        self.layout = layout
        self._tensors = listed(tensors)  # held: only their addresses are used below
        self._arena = arena
        self._runtime = runtime
        self._batch_rows = batch_rows
        self._bases = np.array([self._tensors[p.tensor].data_ptr() + p.offset for p in layout.planes], np.int64)
        self._starts = layout.plane_starts()
        self._out = [runtime.stream(urgent=False) for _ in range(lanes)]
        self._in = [runtime.stream(urgent=True) for _ in range(lanes)]
        self._lock = threading.Lock()
        self._flying = InFlight()

    def store(
        self, block_ids: BlockIds, slots: Sequence[Slot], *, planes: range | None = None, after: Event | None = None
    ) -> Handle:
        """Copy blocks into slots after the current stream's work so far, or after a given event."""
        return self._run(block_ids, slots, planes, after, loading=False)

    def load(
        self, slots: Sequence[Slot], block_ids: BlockIds, *, planes: range | None = None, after: Event | None = None
    ) -> Handle:
        """Copy slots into blocks, layer after layer, after the current stream's work so far."""
        return self._run(block_ids, slots, planes, after, loading=True)

    def over(self, arena: Arena) -> Self:
        """The same streams, staging and cache over another arena."""
        sibling = copy.copy(self)
        sibling._arena = arena
        return sibling

    def close(self) -> None:
        """Wait for what is under way."""
        self._flying.drain()

    def _run(
        self,
        block_ids: BlockIds,
        slots: Sequence[Slot],
        planes: range | None,
        after: Event | None,
        *,
        loading: bool,
    ) -> Handle:
        request = ready_request(self.layout, self._arena, self._runtime, block_ids, slots, planes, loading=loading)
        with self._lock:
            start = after or self._runtime.current().record()
            lanes = self._in if loading else self._out
            for lane in lanes:
                lane.wait(start)
            marks: list[tuple[int, list[Event]]] = []
            for group in self._groups(request):
                host, device, length = self._copies(request, group)
                target, source = (device, host) if loading else (host, device)
                for number, lane in enumerate(lanes):
                    mine = slice(number, None, len(lanes))
                    lane.copy(target[mine], source[mine], length[mine])
                marks.append((group.stop, [lane.record() for lane in lanes]))
            last = marks[-1][1] if marks else []
            return self._flying.add(
                EventHandle(self.layout, self._runtime, last, marks if loading else (), self._arena)
            )

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
        found = request.table.resolve(starts.ravel(), np.broadcast_to(rows, shape).ravel())
        device = pages.ravel()[found.index] + found.within
        return merge_copies(self._arena.address + found.offset, device, found.length)
