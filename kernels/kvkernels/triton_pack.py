"""Packing and unpacking of bf16 rows in Triton, between paged blocks and staging (see `packing` for the format).

As in `triton_gather`, one launch serves any number of planes and chunks, and a handful of programs keeps up with the
bus: 16 of them are to move 75 GB/s of unpacked bytes, so that the bus carries 0.785 of what the cache sees. A program
takes one row at a time, in tiles of whole vectors whose two halves are two blocks of values: value j and value j + 64
share a byte, and every thread keeps eight neighbours of each, sixteen bytes of the cache.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl

from kvkernels.arena import Arena
from kvkernels.compiled import CompiledKernel
from kvkernels.cuda_streams import CudaStream
from kvkernels.layouts import PagedLayout
from kvkernels.packing import VECTOR, PackedRow, packed_layout
from kvkernels.pieces import StagedPiece
from kvkernels.staged import StagedTransfer
from kvkernels.streams import Runtime, Stream
from kvkernels.transfer import Tensors, listed

__all__ = ["TritonPackMover", "triton_pack_transfer"]

_TILE_VALUES = 16 * 1024
_WARPS = 16
_ALIGNMENT = 16
_VARYING = ["rejected", "first_plane", "first_chunk", "first_block", "planes", "blocks", "chunk_blocks", "rows"]


@triton.jit(do_not_specialize=_VARYING)  # type: ignore[untyped-decorator]
def _pack_rows(  # type: ignore[no-untyped-def] # noqa: PLR0913, PLR0917
    addresses,
    strides,
    ids,
    staging,
    rejected: tl.int64,  # the address of an int32 a chunk, in host memory
    first_plane,
    first_chunk,
    first_block,
    planes,
    blocks,
    chunk_blocks,
    rows,
    VALUES: tl.constexpr,  # noqa: N803
    LIST: tl.constexpr,  # noqa: N803
    CAPACITY: tl.constexpr,  # noqa: N803
    BASES: tl.constexpr,  # noqa: N803
    CODES: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
    PACKED: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    VECTORS: tl.constexpr,  # noqa: N803
):
    column = tl.arange(0, 64)[None, :]
    row = tl.program_id(0)
    while row < rows:  # not range(): Triton's interpreter cannot take it with NumPy 2.4
        block = row % blocks
        plane = (row // blocks) % planes
        chunk = first_chunk + row // (blocks * planes)
        page = tl.load(ids + chunk * chunk_blocks + first_block + block)
        address = tl.load(addresses + first_plane + plane) + page * tl.load(strides + first_plane + plane)
        paged = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), ALIGN)
        staged = tl.multiple_of(staging + row.to(tl.int64) * PACKED, 16)
        count = 0
        first = 0
        while first < VALUES // 128:
            vector = first + tl.arange(0, VECTORS)
            inside = vector < VALUES // 128
            mask = inside[:, None]
            place = vector[:, None] * 128 + column
            low = tl.load(paged + place, mask=mask, other=0).to(tl.int32)
            high = tl.load(paged + place + 64, mask=mask, other=0).to(tl.int32)
            low_exponent = (low >> 7) & 255
            high_exponent = (high >> 7) & 255
            base = tl.maximum(tl.max(tl.maximum(low_exponent, high_exponent), axis=1) - 15, 0)
            tl.store(staged + BASES + vector, base.to(tl.uint8), mask=inside)
            low_code = tl.maximum(low_exponent - base[:, None], 0)
            high_code = tl.maximum(high_exponent - base[:, None], 0)
            _store_bytes(staged + CODES, vector[:, None] * 64 + column, low_code | (high_code << 4), mask)
            _store_bytes(staged + REST, place, ((low >> 8) & 128) | (low & 127), mask)
            _store_bytes(staged + REST, place + 64, ((high >> 8) & 128) | (high & 127), mask)
            escapes = ((low_code == 0) & (low_exponent > 0)) | ((high_code == 0) & (high_exponent > 0))
            if tl.max(tl.max(escapes.to(tl.int32), axis=1), axis=0) > 0:
                tl.debug_barrier()  # the bases are read again, by other threads
                count = _list_escapes(paged, staged, first * 128, count, VALUES, LIST, CAPACITY, BASES, VECTORS)
            first += VECTORS
        tl.store(staged.to(tl.pointer_type(tl.int32)), count)
        if count > CAPACITY:
            tl.store((rejected + chunk.to(tl.int64) * 4).to(tl.pointer_type(tl.int32)), 1)
        row += tl.num_programs(0)


@triton.jit  # type: ignore[untyped-decorator]
def _list_escapes(  # type: ignore[no-untyped-def] # noqa: PLR0913, PLR0917
    paged,
    staged,
    start,
    count,
    VALUES: tl.constexpr,  # noqa: N803
    LIST: tl.constexpr,  # noqa: N803
    CAPACITY: tl.constexpr,  # noqa: N803
    BASES: tl.constexpr,  # noqa: N803
    VECTORS: tl.constexpr,  # noqa: N803
):
    """The escapes of a tile behind the `count` of tiles before it; they are few, and most tiles have none.

    The tile is read again, a quarter at a time: slots of the list are for single values, and what the tile has in its
    registers, eight neighbours a thread, would all have to change threads.
    """
    PIECE: tl.constexpr = VECTORS * 32  # noqa: N806
    turn = 0
    while turn < 4:
        place = start + turn * PIECE + tl.arange(0, PIECE)
        inside = place < VALUES
        bits = tl.load(paged + place, mask=inside, other=0).to(tl.int32)
        base = tl.load(staged + BASES + place // 128, mask=inside, other=0).to(tl.int32)
        exponent = (bits >> 7) & 255
        escaped = (exponent > 0) & (exponent <= base)
        one = escaped.to(tl.int32)
        slot = count + tl.cumsum(one, axis=0) - one
        listed = (staged + LIST).to(tl.pointer_type(tl.int32)) + slot
        tl.store(listed, (place << 16) | (bits & 0xFFFF), mask=escaped & (slot < CAPACITY))
        count += tl.sum(one, axis=0)
        turn += 1
    return count


@triton.jit
def _store_bytes(start, offsets, values, mask):  # type: ignore[no-untyped-def]
    # Eight a thread, as values of two bytes have it: of sixteen, every second eight would change threads on their way.
    tl.store(tl.max_contiguous(start + offsets, [1, 8]), values.to(tl.uint8), mask=mask)


@triton.jit
def _load_bytes(start, offsets, mask):  # type: ignore[no-untyped-def]
    return tl.load(tl.max_contiguous(start + offsets, [1, 8]), mask=mask, other=0).to(tl.int32)


@triton.jit(do_not_specialize=_VARYING[1:])  # type: ignore[untyped-decorator]
def _unpack_rows(  # type: ignore[no-untyped-def] # noqa: PLR0913, PLR0917
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
    VALUES: tl.constexpr,  # noqa: N803
    LIST: tl.constexpr,  # noqa: N803
    CAPACITY: tl.constexpr,  # noqa: N803
    BASES: tl.constexpr,  # noqa: N803
    CODES: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
    PACKED: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    VECTORS: tl.constexpr,  # noqa: N803
    ENTRIES: tl.constexpr,  # noqa: N803
):
    column = tl.arange(0, 64)[None, :]
    entry = tl.arange(0, ENTRIES)
    row = tl.program_id(0)
    while row < rows:
        block = row % blocks
        plane = (row // blocks) % planes
        chunk = first_chunk + row // (blocks * planes)
        page = tl.load(ids + chunk * chunk_blocks + first_block + block)
        address = tl.load(addresses + first_plane + plane) + page * tl.load(strides + first_plane + plane)
        paged = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), ALIGN)
        staged = tl.multiple_of(staging + row.to(tl.int64) * PACKED, 16)
        # The whole list, before its length is known: these two need not wait for each other, nor the rest for them.
        count = tl.load(staged.to(tl.pointer_type(tl.int32)))
        listed = tl.load((staged + LIST).to(tl.pointer_type(tl.int32)) + entry, mask=entry < CAPACITY, other=0)
        first = 0
        while first < VALUES // 128:
            vector = first + tl.arange(0, VECTORS)
            inside = vector < VALUES // 128
            mask = inside[:, None]
            place = vector[:, None] * 128 + column
            codes = _load_bytes(staged + CODES, vector[:, None] * 64 + column, mask)
            low = _load_bytes(staged + REST, place, mask)
            high = _load_bytes(staged + REST, place + 64, mask)
            base = tl.load(staged + BASES + vector, mask=inside, other=0).to(tl.int32)[:, None]
            tl.store(paged + place, _value(codes & 15, base, low), mask=mask)
            tl.store(paged + place + 64, _value(codes >> 4, base, high), mask=mask)
            first += VECTORS
        tl.debug_barrier()  # an escape is written over what other threads wrote
        place = (listed >> 16) & 0xFFFF
        tl.store(paged + place, listed.to(tl.int16), mask=(entry < count) & (entry < CAPACITY) & (place < VALUES))
        row += tl.num_programs(0)


@triton.jit
def _value(code, base, rest):  # type: ignore[no-untyped-def]
    exponent = tl.where(code == 0, 0, code + base)
    return (((rest & 128) << 8) | (exponent << 7) | (rest & 127)).to(tl.int16)


class TritonPackMover:
    """See `kvkernels.staged.Mover`; packs into staging, and unpacks from it.

    Args:
        layout: the cache's layout, not the packed one.
        tensors: the cache.
        programs: the most programs of one launch: what they take from the model's kernels.
    """

    rejects = True

    def __init__(self, layout: PagedLayout, tensors: Tensors, *, programs: int = 16) -> None:
        self._tensors = listed(tensors)  # the table holds bare addresses, so the tensors must outlive it
        self._programs = programs
        self._kernels: dict[tuple[int, bool], CompiledKernel] = {}
        """Compiled kernels by the bytes of an unpacked row and the direction, once they have run."""
        self._planes = layout.planes
        self._chunk_blocks = layout.chunk_blocks
        device = self._tensors[0].device
        addresses = [self._tensors[plane.tensor].data_ptr() + plane.offset for plane in layout.planes]
        strides = [plane.block_stride for plane in layout.planes]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._strides = torch.tensor(strides, dtype=torch.int64, device=device)
        self._align = gcd(_ALIGNMENT, *addresses, *strides)

    def gather(self, stream: Stream, ids: Any, piece: StagedPiece, staging: Any, rejected: Any) -> None:
        """Launch the packing of the piece's blocks."""
        self._launch(stream, ids, piece, staging, rejected)

    def scatter(self, stream: Stream, ids: Any, piece: StagedPiece, staging: Any) -> None:
        """Launch their unpacking."""
        self._launch(stream, ids, piece, staging, None)

    def _launch(self, stream: Stream, ids: Any, piece: StagedPiece, staging: Any, rejected: Any) -> None:
        row_bytes = self._planes[piece.planes.start].row_bytes
        grid = min(self._programs, piece.rows)
        tensors = (self._addresses, self._strides, ids, staging)
        marks = () if rejected is None else (int(rejected.ctypes.data),)
        sizes = (
            piece.planes.start,
            piece.chunks.start,
            piece.blocks.start,
            len(piece.planes),
            len(piece.blocks),
            self._chunk_blocks,
            piece.rows,
        )
        kernel = self._kernels.get((row_bytes, bool(marks)))
        if kernel is not None and isinstance(stream, CudaStream):
            kernel.launch(stream, grid, [*(tensor.data_ptr() for tensor in tensors), *marks], sizes)
            return
        function = _pack_rows if marks else _unpack_rows
        constants = row_constants(row_bytes, self._align, packing=bool(marks))
        warps = warps_of(constants["VECTORS"])
        compiled: list[Any] = []
        stream.launch(
            lambda: compiled.append(function[(grid,)](*tensors, *marks, *sizes, **constants, num_warps=warps))
        )
        if isinstance(stream, CudaStream):
            pointers = len(tensors) + len(marks)
            self._kernels[row_bytes, bool(marks)] = CompiledKernel(compiled[0], pointers=pointers, integers=len(sizes))


def row_constants(row_bytes: int, align: int, *, packing: bool) -> dict[str, int]:
    """The kernels' constants for rows of so many bytes, in blocks whose addresses are multiples of `align`."""
    row = PackedRow.of(row_bytes)
    constants = {
        "VALUES": row.values,
        "LIST": row.escapes,
        "CAPACITY": row.capacity,
        "BASES": row.bases,
        "CODES": row.codes,
        "REST": row.rest,
        "PACKED": row.nbytes,
        "ALIGN": align,
        "VECTORS": min(_TILE_VALUES // VECTOR, 1 << (row.vectors - 1).bit_length()),
    }
    return constants if packing else {**constants, "ENTRIES": 1 << (row.capacity - 1).bit_length()}


def warps_of(vectors: int) -> int:
    """Warps for tiles of so many vectors: fewer where the tile is the whole of a short row."""
    return max(1, min(_WARPS, vectors * VECTOR * _WARPS // _TILE_VALUES))


def triton_pack_transfer(
    layout: PagedLayout, tensors: Tensors, arena: Arena, runtime: Runtime, *, programs: int = 16, **pipeline: Any
) -> StagedTransfer:
    """The packing Triton backend: `StagedTransfer` (which names the further arguments) over `TritonPackMover`.

    `layout` is the cache's own; the transfer's layout is the packed one.
    """
    mover = TritonPackMover(layout, tensors, programs=programs)
    return StagedTransfer(packed_layout(layout), arena, runtime, mover, name="triton_pack", **pipeline)
