"""Rows straight between blocks and slots: every copy of a request in prepared arrays, a driver call for hundreds.

No kernel and no staging, so nothing is taken from the model at all; what it costs is the copy engine's and the driver's
overhead for every row, so it suits large rows (cross-layer blocks, long blocks), single blocks, and consecutive block
ids, whose rows are merged into one copy. The arrays of addresses are computed by NumPy; see `cuda_driver.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvkernels.arena import Arena, Ints
from kvkernels.handles import StreamHandle
from kvkernels.layouts import PagedLayout
from kvkernels.pipelined import Direction, PipelinedTransfer
from kvkernels.slots import merge_copies
from kvkernels.streams import Event, Runtime
from kvkernels.transfer import Request, Tensors, listed

__all__ = ["BatchTransfer"]


class BatchTransfer(PipelinedTransfer[Direction]):
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
        caches = listed(tensors)
        self._batch_rows = batch_rows
        self._call_copies = call_copies
        self._bases = np.array([caches[p.tensor].data_ptr() + p.offset for p in layout.planes], np.int64)
        self._starts = layout.plane_starts()
        out = Direction(runtime, f"{name}-store", urgent=False, ahead=ahead)
        into = Direction(runtime, f"{name}-load", urgent=True, ahead=ahead)
        super().__init__(name, layout, arena, runtime, out=out, into=into, reads=caches)

    def _steps(
        self, request: Request, side: Direction, after: Event, handle: StreamHandle, *, loading: bool
    ) -> Iterator[Event | None]:
        side.copies.turn().wait(after)
        handle.begun(side.copies.record(timed=True))  # every later copy is behind it
        last: list[Event] = []
        for group in self._groups(request):
            host, device, length = self._copies(request, group)
            target, source = (device, host) if loading else (host, device)
            for at in range(0, len(length), self._call_copies):
                yield side.window.full()
                mine = slice(at, at + self._call_copies)
                side.copies.turn().copy(target[mine], source[mine], length[mine])
                last = [side.copies.record(timed=mine.stop >= len(length))]
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
