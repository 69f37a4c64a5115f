"""Gather and scatter of paged blocks in Triton, with a grid small enough to leave the GPU to the model.

One launch serves any number of planes and chunks: planes are given as a table of addresses, so a store of all layers
is one kernel. Each program moves whole tiles of a row, 64 KiB in flight at a time; a handful of programs (`programs`)
keeps up with the bus many times over, and the rest of the GPU goes on computing. The copy over the bus is the copy
engine's (see `staged.py`).
"""

from __future__ import annotations

from math import gcd
from typing import Any

import triton
import triton.language as tl

from kvkernels.arena import Arena
from kvkernels.compiled import Launch
from kvkernels.layouts import PagedLayout
from kvkernels.pieces import StagedPiece
from kvkernels.staged import StagedTransfer
from kvkernels.streams import Runtime, Stream
from kvkernels.transfer import Tensors
from kvkernels.triton_rows import VARYING, RowKernels

__all__ = ["TritonMover", "triton_transfer"]

_TILE_BYTES = 64 * 1024
_WORD_BYTES = 8
_WARPS = 16


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
def _move_rows(  # type: ignore[no-untyped-def] # noqa: PLR0913, PLR0917
    addresses,
    strides,
    ids,
    staging,
    first_plane,
    first_chunk,
    first_block,
    planes,
    blocks,
    chunk_blocks,
    rows,
    ROW_WORDS: tl.constexpr,  # noqa: N803
    WORD: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    GATHER: tl.constexpr,  # noqa: N803
):
    tiles = (ROW_WORDS + TILE - 1) // TILE
    unit = tl.program_id(0)
    while unit < rows * tiles:  # not range(): Triton's interpreter cannot take it with NumPy 2.4
        row = unit // tiles
        block = row % blocks
        plane = (row // blocks) % planes
        chunk = row // (blocks * planes)
        page = tl.load(ids + (first_chunk + chunk) * chunk_blocks + first_block + block)
        address = tl.load(addresses + first_plane + plane)
        stride = tl.load(strides + first_plane + plane)
        paged = tl.multiple_of((address + page * stride).to(tl.pointer_type(WORD)), ALIGN)
        staged = tl.multiple_of(staging.to(tl.pointer_type(WORD)) + row.to(tl.int64) * ROW_WORDS, ALIGN)
        word = (unit % tiles) * TILE + tl.arange(0, TILE)
        inside = (word < ROW_WORDS) & (page >= 0)  # a block that is left out has no page
        if GATHER:
            tl.store(staged + word, tl.load(paged + word, mask=inside), mask=inside)
        else:
            tl.store(paged + word, tl.load(staged + word, mask=inside), mask=inside)
        unit += tl.num_programs(0)


class TritonMover:
    """See `kvkernels.staged.Mover`.

    Args:
        layout: the cache's layout.
        tensors: the cache.
        programs: the most programs of one launch: what gathers take from the model's kernels.
    """

    rejects = False

    def __init__(self, layout: PagedLayout, tensors: Tensors, *, programs: int = 8) -> None:
        self._rows = RowKernels(layout, tensors, programs=programs)
        self._align = gcd(self._rows.align, *(plane.row_bytes for plane in layout.planes))
        self._word = min(_WORD_BYTES, self._align)

    def gather(self, stream: Stream, ids: Any, piece: StagedPiece, staging: Any, rejected: Any) -> None:
        """Launch the gather."""
        self._launch(stream, ids, piece, staging, gather=True)

    def scatter(self, stream: Stream, ids: Any, piece: StagedPiece, staging: Any) -> None:
        """Launch the scatter."""
        self._launch(stream, ids, piece, staging, gather=False)

    def _launch(self, stream: Stream, ids: Any, piece: StagedPiece, staging: Any, *, gather: bool) -> None:
        row_words, tile = self._tiles(piece)

        def constants() -> tuple[dict[str, Any], int]:
            word = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}[self._word]
            given = {"ROW_WORDS": row_words, "WORD": word, "ALIGN": self._align, "TILE": tile, "GATHER": gather}
            return given, _WARPS if tile * self._word >= _TILE_BYTES // 4 else 4

        units = self._units(piece)
        self._rows.launch(_move_rows, stream, ids, piece, staging, constants, gather=gather, units=units)

    def written(self, piece: StagedPiece, *, gather: bool) -> Launch | None:
        """The piece's launch in numbers."""
        return self._rows.written(piece, gather=gather, units=self._units(piece))

    def _tiles(self, piece: StagedPiece) -> tuple[int, int]:
        """Words of a row, and of a tile."""
        row_words = piece.row_bytes // self._word
        return row_words, min(_TILE_BYTES // self._word, 1 << (row_words - 1).bit_length())

    def _units(self, piece: StagedPiece) -> int:
        """Tiles that the programs share."""
        row_words, tile = self._tiles(piece)
        return piece.rows * -(-row_words // tile)


def triton_transfer(
    layout: PagedLayout, tensors: Tensors, arena: Arena, runtime: Runtime, *, programs: int = 8, **pipeline: Any
) -> StagedTransfer:
    """The Triton backend: `StagedTransfer` (which names the further arguments) over `TritonMover`."""
    mover = TritonMover(layout, tensors, programs=programs)
    return StagedTransfer(layout, arena, runtime, mover, name="triton", **pipeline)
