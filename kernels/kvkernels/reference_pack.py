"""Packing in torch, many rows at once: what the Triton kernels must equal, and the backend of workers on the CPU.

See `packing` for the format.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from kvkernels.arena import Arena
from kvkernels.layouts import PagedLayout
from kvkernels.packing import HALF, VECTOR, PackedRow, packed_layout
from kvkernels.pieces import StagedPiece
from kvkernels.reference import plane_views
from kvkernels.staged import StagedTransfer
from kvkernels.streams import Runtime, Stream
from kvkernels.transfer import Tensors

__all__ = ["PackMover", "pack_rows", "reference_pack_transfer", "unpack_rows"]

_SIGN_AND_MANTISSA = 0x807F - (1 << 16)  # as an int16
_BATCH_BYTES = 1 << 20
"""Rows are handled in batches whose intermediate values stay in the processor's cache."""


def pack_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack rows of bytes, (rows, row_bytes) uint8.

    Returns:
        The packed rows, (rows, packed row_bytes) uint8, and the number of escapes of each: one that has more than
        `PackedRow.capacity` is not packed, and its bytes are of no use.
    """
    row = PackedRow.of(rows.shape[1])
    packed = torch.zeros(len(rows), row.nbytes, dtype=torch.uint8, device=rows.device)
    bits = rows.contiguous().view(torch.int16).view(len(rows), row.vectors, VECTOR)
    exponents = (bits >> 7).to(torch.uint8)
    bases = exponents.amax(2, keepdim=True).clamp_(min=15) - 15
    codes = torch.maximum(exponents, bases) - bases
    packed[:, row.bases : row.bases + row.vectors] = bases[:, :, 0]
    packed[:, row.codes : row.codes + row.values // 2] = (codes[:, :, :HALF] | (codes[:, :, HALF:] << 4)).flatten(1)
    packed[:, row.rest : row.rest + row.values] = _rest(bits).flatten(1)
    escaped = ((codes == 0) & (exponents > 0)).flatten(1)
    counts = escaped.sum(1, dtype=torch.int32)
    packed[:, :4] = counts[:, None].view(torch.uint8)
    lists = _escape_lists(escaped, counts, bits.flatten(1), row)
    packed[:, row.escapes : row.escapes + 4 * row.capacity] = lists.view(torch.uint8)
    return packed, counts


def unpack_rows(packed: torch.Tensor, row_bytes: int) -> torch.Tensor:
    """The rows, (rows, row_bytes) uint8, of what `pack_rows` made of them.

    Of rows that could not be packed it makes something, and reads nothing outside them.
    """
    row = PackedRow.of(row_bytes)
    halves = packed[:, row.codes : row.codes + row.values // 2].reshape(len(packed), row.vectors, HALF)
    codes = torch.cat((halves & 15, halves >> 4), 2)
    exponents = (codes + packed[:, row.bases : row.bases + row.vectors, None]) * (codes > 0)
    rest = packed[:, row.rest : row.rest + row.values].view(torch.int8).to(torch.int16)
    bits = rest.bitwise_and_(_SIGN_AND_MANTISSA).bitwise_or_(exponents.flatten(1).to(torch.int16) << 7)
    counts = packed[:, :4].contiguous().view(torch.int32)
    lists = packed[:, row.escapes : row.escapes + 4 * row.capacity].contiguous().view(torch.int32)
    places = (lists >> 16) & 0xFFFF
    listed = (torch.arange(row.capacity, device=packed.device) < counts) & (places < row.values)
    index, slot = listed.nonzero(as_tuple=True)
    bits[index, places[index, slot].long()] = lists[index, slot].to(torch.int16)
    return bits.view(torch.uint8)


def _rest(bits: torch.Tensor) -> torch.Tensor:
    """Sign and mantissa of every value."""
    return ((bits >> 8).to(torch.uint8) & 0x80) | (bits.to(torch.uint8) & 0x7F)


def _escape_lists(escaped: torch.Tensor, counts: torch.Tensor, bits: torch.Tensor, row: PackedRow) -> torch.Tensor:
    """Each row's list of escapes in order, (rows, capacity) int32; what goes beyond it is left out."""
    lists = torch.zeros(len(bits), row.capacity, dtype=torch.int32, device=bits.device)
    index, place = escaped.nonzero(as_tuple=True)
    slot = torch.arange(len(index), device=bits.device) - (counts.cumsum(0) - counts)[index]
    fits = slot < row.capacity
    index, place, slot = index[fits], place[fits], slot[fits]
    lists[index, slot] = ((place << 16) | (bits[index, place].long() & 0xFFFF)).to(torch.int32)
    return lists


class PackMover:
    """See `kvkernels.staged.Mover`; packs into staging, and unpacks from it.

    Args:
        layout: the cache's layout, not the packed one.
        tensors: the cache.
    """

    rejects = True

    def __init__(self, layout: PagedLayout, tensors: Tensors) -> None:
        self._planes = layout.planes
        self._chunk_blocks = layout.chunk_blocks
        self._views = plane_views(layout, tensors)

    def gather(self, stream: Stream, ids: Any, piece: StagedPiece, staging: Any, rejected: Any) -> None:
        """Pack the piece's blocks."""
        stream.launch(partial(self._pack, ids, piece, staging, rejected))

    def scatter(self, stream: Stream, ids: Any, piece: StagedPiece, staging: Any) -> None:
        """Unpack them."""
        stream.launch(partial(self._unpack, ids, piece, staging))

    def written(self, piece: StagedPiece, *, gather: bool) -> None:
        """No kernel of a driver's."""

    def _pack(self, ids: Any, piece: StagedPiece, staging: Any, rejected: Any) -> None:
        marks = torch.from_numpy(rejected)
        for plane, chunks, blocks, rows in self._batches(ids, piece, staging):
            view = self._views[plane]
            packed, counts = pack_rows(view[blocks.flatten()].view(torch.uint8))
            rows.copy_(packed.view(rows.shape))
            row = PackedRow.of(self._planes[plane].row_bytes)
            marks[chunks] |= (counts.view(blocks.shape) > row.capacity).any(1)

    def _unpack(self, ids: Any, piece: StagedPiece, staging: Any) -> None:
        for plane, _, blocks, rows in self._batches(ids, piece, staging):
            view = self._views[plane]
            kept = blocks >= 0
            bits = unpack_rows(rows[kept], self._planes[plane].row_bytes)
            view.index_copy_(0, blocks[kept], bits.view(view.dtype))

    def _batches(
        self, ids: Any, piece: StagedPiece, staging: Any
    ) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
        """Some chunks at a time: plane, chunks of the request, block ids (chunks, blocks), their rows in staging."""
        shape = (len(piece.chunks), len(piece.planes), len(piece.blocks), piece.row_bytes)
        staged = staging[: piece.rows * piece.row_bytes].view(shape)
        by_chunk = ids.view(-1, self._chunk_blocks)[:, piece.blocks.start : piece.blocks.stop]
        step = max(1, _BATCH_BYTES // (len(piece.blocks) * piece.row_bytes))
        for at in range(0, len(piece.chunks), step):
            chunks = piece.chunks[at : at + step]
            mine = slice(chunks.start, chunks.stop)
            for place, plane in enumerate(piece.planes):
                yield plane, mine, by_chunk[mine], staged[at : at + step, place]


def reference_pack_transfer(
    layout: PagedLayout, tensors: Tensors, arena: Arena, runtime: Runtime, **pipeline: Any
) -> StagedTransfer:
    """The packing backend without Triton: `StagedTransfer` (which names the further arguments) over `PackMover`."""
    mover = PackMover(layout, tensors)
    return StagedTransfer(packed_layout(layout), arena, runtime, mover, name="reference_pack", **pipeline)
