"""The reference backend: torch on any device, whole blocks, nothing in flight when a call returns.

Every other backend must equal it bit for bit. On the CPU it is also the fast path: one `index_select` or `index_copy_`
per plane and chunk, over words of eight bytes (over single bytes torch's CPU kernels run at a third of the speed).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from kvkernels.arena import Arena
from kvkernels.layouts import PagedLayout
from kvkernels.slots import Slots
from kvkernels.transfer import BlockIds, DoneHandle, Handle, Request, Tensors, check_request, listed

__all__ = ["ReferenceTransfer", "plane_views", "word_bytes"]

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class ReferenceTransfer:
    """Copies whole blocks with torch indexing; see `kvkernels.transfer.Transfer`.

    Args:
        layout: what `describe` returned for these tensors.
        tensors: the engine's KV cache, as given to `describe`.
        arena: the host memory that slots point into.
    """

    name = "reference"

    def __init__(self, layout: PagedLayout, tensors: Tensors, arena: Arena) -> None:
        self.layout = layout
        self._arena = arena
        self._host = torch.from_numpy(arena.array)
        self._views = plane_views(layout, tensors)
        self._device = self._views[0].device
        self._starts = layout.plane_starts()

    def store(self, block_ids: BlockIds, slots: Slots, *, planes: range | None = None, rest_s: float = 0.0) -> Handle:
        """Copy blocks into slots; done on return, without a rest."""
        request = check_request(self.layout, self._arena, block_ids, slots, planes, loading=False)
        for plane, ids, pieces in self._rows(request):
            view = self._views[plane]
            whole = self._whole(pieces, view.dtype)
            if whole is not None and view.device.type == "cpu":
                torch.index_select(view, 0, ids, out=whole.view(len(ids), -1))
                continue
            rows = torch.index_select(view, 0, ids).view(torch.uint8).flatten()
            for within, piece in pieces:
                piece.copy_(rows[within : within + len(piece)])
        return DoneHandle()

    def load(self, slots: Slots, block_ids: BlockIds, *, planes: range | None = None) -> Handle:
        """Copy slots into blocks; done on return."""
        request = check_request(self.layout, self._arena, block_ids, slots, planes, loading=True)
        for plane, ids, pieces in self._rows(request):
            view = self._views[plane]
            whole = self._whole(pieces, view.dtype)
            if whole is None:
                whole = torch.cat([piece for _, piece in pieces]).view(view.dtype)
            rows, kept = whole.view(len(ids), -1).to(view.device), ids >= 0
            if kept.all():
                view.index_copy_(0, ids, rows)
            else:
                view.index_copy_(0, ids[kept], rows[kept])
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return DoneHandle()

    def close(self) -> None:
        """Nothing is held."""

    def _rows(self, request: Request) -> Iterator[tuple[int, torch.Tensor, list[tuple[int, torch.Tensor]]]]:
        """For every chunk and plane: the block ids on the device, and the host pieces that hold their rows."""
        starts = np.array(self._starts, np.int64)
        planes = np.arange(request.planes.start, request.planes.stop)
        slots = np.arange(request.chunks)[:, None] * self.layout.slot_bytes
        sizes = np.broadcast_to((starts[1:] - starts[:-1])[planes], (request.chunks, len(planes)))
        found = request.table.resolve((slots + starts[planes]).ravel(), sizes.ravel())
        pieces: list[list[tuple[int, torch.Tensor]]] = [[] for _ in range(sizes.size)]
        for index, within, offset, length in zip(*(column.tolist() for column in found.columns()), strict=True):
            pieces[index].append((within, self._host[offset : offset + length]))
        for chunk, block_ids in enumerate(request.block_ids):
            ids = torch.from_numpy(block_ids).to(self._device)
            for place, plane in enumerate(request.planes):
                yield plane, ids, pieces[chunk * len(planes) + place]

    @staticmethod
    def _whole(pieces: list[tuple[int, torch.Tensor]], word: torch.dtype) -> torch.Tensor | None:
        """The rows as one run of words, where one aligned piece holds them all."""
        if len(pieces) > 1 or pieces[0][1].data_ptr() % word.itemsize:
            return None
        return pieces[0][1].view(word)


def plane_views(layout: PagedLayout, tensors: Tensors) -> list[torch.Tensor]:
    """Every plane as a two-dimensional view `(num_blocks, row)` of the widest words that its addresses allow."""
    sources = listed(tensors)
    views = []
    for plane in layout.planes:
        tensor = sources[plane.tensor]
        start = tensor.storage_offset() * tensor.element_size() + plane.offset
        word = word_bytes(tensor.data_ptr() + plane.offset, start, plane.row_bytes, plane.block_stride)
        view = torch.empty(0, dtype=_WORDS[word], device=tensor.device)
        view.set_(
            tensor.untyped_storage(),
            start // word,
            (layout.num_blocks, plane.row_bytes // word),
            (plane.block_stride // word, 1),
        )
        views.append(view)
    return views


def word_bytes(*values: int) -> int:
    """The widest of 8, 4, 2 and 1 that divides every address and size given."""
    return next(word for word in (8, 4, 2, 1) if all(value % word == 0 for value in values))
