"""What the Triton movers share: where the rows of a cache lie, and launching kernels over those of a piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

import torch

from kvkernels.compiled import CompiledKernel, Launch
from kvkernels.cuda_streams import CudaStream
from kvkernels.layouts import PagedLayout
from kvkernels.pieces import StagedPiece
from kvkernels.streams import Stream
from kvkernels.transfer import Tensors, listed

__all__ = ["VARYING", "RowKernels"]

VARYING = ["first_plane", "first_chunk", "first_block", "planes", "blocks", "chunk_blocks", "rows"]
"""The integers that every such kernel takes last, by name: no kernel is to be compiled for their values."""
_ALIGNMENT = 16

Constants = Callable[[], tuple[dict[str, Any], int]]
"""A kernel's constants and its warps."""


class RowKernels:
    """Launches kernels over the rows of one cache, by Triton the first time and by the driver from then on.

    A kernel takes tables of the planes' addresses and strides, the block ids, staging, further pointers, and the
    integers named in `VARYING`.

    Args:
        layout: the cache's layout.
        tensors: the cache.
        programs: the most programs of one launch: what they take from the model's kernels.
    """

    def __init__(self, layout: PagedLayout, tensors: Tensors, *, programs: int) -> None:
        self._tensors = listed(tensors)  # the tables hold bare addresses, so the tensors must outlive them
        self._programs = programs
        self._chunk_blocks = layout.chunk_blocks
        self._compiled: dict[tuple[bool, int], CompiledKernel] = {}
        """Kernels that have run, by direction and the bytes of a row in the cache."""
        device = self._tensors[0].device
        addresses = [self._tensors[plane.tensor].data_ptr() + plane.offset for plane in layout.planes]
        strides = [plane.block_stride for plane in layout.planes]
        self._tables = [torch.tensor(values, dtype=torch.int64, device=device) for values in (addresses, strides)]
        self._row_bytes = [plane.row_bytes for plane in layout.planes]
        self.align = gcd(_ALIGNMENT, *addresses, *strides)
        """What divides the address of every block, 16 at most."""

    def row_bytes(self, piece: StagedPiece) -> int:
        """The bytes of the piece's rows in the cache; in staging they may have fewer."""
        return self._row_bytes[piece.planes.start]

    def launch(  # noqa: PLR0913  (what a kernel is given, and how it is launched)
        self,
        function: Any,
        stream: Stream,
        ids: Any,
        piece: StagedPiece,
        staging: Any,
        constants: Constants,
        *,
        gather: bool,
        units: int,
        further: Sequence[int] = (),
    ) -> None:
        """Launch `function` over the piece's rows.

        Args:
            function: the Triton kernel, one for each direction and size of rows.
            stream: where.
            ids: the request's block ids on the device.
            piece: which rows.
            staging: the buffer.
            constants: asked where the kernel has not run yet.
            gather: the direction.
            units: what the programs share; no more are launched.
            further: addresses, as the kernel's further pointers.
        """
        grid = min(self._programs, units)
        tensors = (*self._tables, ids, staging)
        key = gather, self.row_bytes(piece)
        compiled = self._compiled.get(key)
        if compiled is not None and isinstance(stream, CudaStream):
            compiled.launch(stream, grid, [*(tensor.data_ptr() for tensor in tensors), *further], self._sizes(piece))
            return
        given, warps = constants()
        launched: list[Any] = []
        varying = (*further, *self._sizes(piece))
        stream.launch(lambda: launched.append(function[(grid,)](*tensors, *varying, **given, num_warps=warps)))
        if isinstance(stream, CudaStream):
            self._compiled[key] = CompiledKernel(launched[0])

    def written(self, piece: StagedPiece, *, gather: bool, units: int, further: int = 0) -> Launch | None:
        """The piece's launch in numbers, but for the block ids, staging and further pointers; None before the first."""
        compiled = self._compiled.get((gather, self.row_bytes(piece)))
        if compiled is None:
            return None
        pointers = [*(table.data_ptr() for table in self._tables), *[0] * (2 + further)]
        return compiled.written(min(self._programs, units), pointers, self._sizes(piece))

    def _sizes(self, piece: StagedPiece) -> tuple[int, ...]:
        """What `VARYING` names."""
        starts = piece.planes.start, piece.chunks.start, piece.blocks.start
        return (*starts, len(piece.planes), len(piece.blocks), self._chunk_blocks, piece.rows)
