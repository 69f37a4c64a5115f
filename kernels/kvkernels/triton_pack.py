"""Packing and unpacking of bf16 rows in Triton, between paged blocks and staging (see `packing` for the format).

As in `triton_gather`, one launch serves any number of planes and chunks, and a handful of programs keeps up with the
bus: 8 of them are to move 75 GB/s of unpacked bytes, so that the bus carries 0.785 of what the cache sees. A program
takes one row at a time, in tiles of whole vectors whose two halves are two blocks of values: value j and value j + 64
share a byte, and every thread keeps eight neighbours of each, sixteen bytes of the cache.

What a program does not do matters more than for plain copies, since it has processors to itself that the model's
kernels then lack: packing goes two values at a time, all but ignores escapes where there are none, and no warp waits
for another.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import triton
import triton.language as tl

from kvkernels.arena import Arena
from kvkernels.compiled import Launch
from kvkernels.cuda_streams import CudaStream
from kvkernels.errors import LayoutError
from kvkernels.layouts import PagedLayout
from kvkernels.packing import VECTOR, PackedRow, packed_layout
from kvkernels.pieces import StagedPiece
from kvkernels.staged import StagedTransfer
from kvkernels.streams import Runtime, Stream
from kvkernels.transfer import Tensors
from kvkernels.triton_rows import VARYING, RowKernels

__all__ = ["TritonPackMover", "triton_pack_transfer"]

_TILE_VALUES = 32 * 1024
_WARPS = 32
_WORD = 4
_LEAST_VECTORS = 4
"""Half the values of so many are four words for each thread of a warp."""


@triton.jit(do_not_specialize=["rejected", *VARYING])  # type: ignore[untyped-decorator]
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
    ON_GPU: tl.constexpr,  # noqa: N803
):
    # Where a row begins and ends nothing waits: its counter is set before all rows and read behind all, and where the
    # next one lies is asked for a row ahead. So each warp goes on by itself, and some work while others wait.
    row = tl.program_id(0)
    step = tl.num_programs(0)
    mine = tl.arange(0, 128) * step
    first = row
    while first < rows:  # not range(): Triton's interpreter cannot take it with NumPy 2.4
        tl.store(_counters(staging, first + mine, PACKED), 0, mask=first + mine < rows)
        first += 128 * step
    tl.debug_barrier()
    address = _paged(row, addresses, strides, ids, first_plane, first_chunk, first_block, planes, blocks, chunk_blocks)
    while row < rows:
        later = tl.minimum(row + step, rows - 1)
        following = _paged(
            later, addresses, strides, ids, first_plane, first_chunk, first_block, planes, blocks, chunk_blocks
        )
        paged = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), ALIGN)
        staged = tl.multiple_of(staging + row.to(tl.int64) * PACKED, 16)
        count = 0
        first = 0
        while first < VALUES // 128:
            vector = first + tl.arange(0, VECTORS)
            escapes = _pack_vectors(paged, staged, vector, VALUES, LIST, CAPACITY, BASES, CODES, REST, ON_GPU)
            if not ON_GPU:  # noqa: SIM102  (known when it is compiled, the other is not)
                if tl.max(tl.max(escapes.to(tl.int32), axis=1), axis=0) > 0:
                    tl.debug_barrier()  # the bases are read again, by other threads
                    count = _list_escapes(paged, staged, first * 128, count, VALUES, LIST, CAPACITY, BASES, VECTORS)
            first += VECTORS
        if not ON_GPU:
            tl.store(staged.to(tl.pointer_type(tl.int32)), count)
        address = following
        row += step
    tl.debug_barrier()
    first = tl.program_id(0)
    while first < rows:
        counters = _counters(staging, first + mine, PACKED)
        counts = tl.load(counters, mask=first + mine < rows, other=0, volatile=True)
        chunk = first_chunk + (first + mine) // (blocks * planes)
        marks = (rejected + chunk.to(tl.int64) * 4).to(tl.pointer_type(tl.int32))
        tl.store(marks, 1, mask=counts > CAPACITY)
        first += 128 * step


@triton.jit
def _paged(  # type: ignore[no-untyped-def] # noqa: PLR0913, PLR0917
    row, addresses, strides, ids, first_plane, first_chunk, first_block, planes, blocks, chunk_blocks
):
    """The address of the block that a row of staging is for, 0 where it is left out."""
    plane = first_plane + (row // blocks) % planes
    chunk = first_chunk + row // (blocks * planes)
    page = tl.load(ids + chunk * chunk_blocks + first_block + row % blocks)
    return tl.where(page < 0, 0, tl.load(addresses + plane) + page * tl.load(strides + plane))


@triton.jit  # type: ignore[untyped-decorator]
def _counters(staging, row, PACKED: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    return (staging + row.to(tl.int64) * PACKED).to(tl.pointer_type(tl.int32))


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
    """The escapes of a tile behind the `count` of tiles before it, without what only a GPU has.

    The tile is read again, a quarter at a time: slots of the list are for single values, and what the tile has in its
    registers, eight neighbours a thread, would all have to change threads. On an H100 that takes four times as long
    as all the rest of the packing.
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


@triton.jit  # type: ignore[untyped-decorator]
def _pack_vectors(  # type: ignore[no-untyped-def] # noqa: PLR0913, PLR0917
    paged,
    staged,
    vector,
    VALUES: tl.constexpr,  # noqa: N803
    LIST: tl.constexpr,  # noqa: N803
    CAPACITY: tl.constexpr,  # noqa: N803
    BASES: tl.constexpr,  # noqa: N803
    CODES: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
    ON_GPU: tl.constexpr,  # noqa: N803
):
    """Pack these vectors of a row, on a GPU with their escapes; return which pairs of values hold one.

    It goes two neighbours at a time, in the halves of a word, which takes half as many instructions.
    """
    words = paged.to(tl.pointer_type(tl.int32), bitcast=True)
    column = tl.arange(0, 32)[None, :]
    mask = (vector < VALUES // 128)[:, None]
    place = vector[:, None] * 64 + column
    low = tl.load(words + place, mask=mask, other=0)
    high = tl.load(words + place + 32, mask=mask, other=0)
    low_exponent = (low >> 7) & 0xFF00FF
    high_exponent = (high >> 7) & 0xFF00FF
    largest = _larger_halves(low_exponent, high_exponent, ON_GPU)
    base = tl.maximum(tl.max(tl.maximum(largest & 0xFFFF, largest >> 16), axis=1) - 15, 0)[:, None]
    bases = staged + BASES + vector[:, None]
    if ON_GPU:
        _store_bases(bases, base, mask & (column == 0))
    else:
        tl.store(bases, base.to(tl.uint8), mask=mask)
    both = base * 0x10001
    low_code = _larger_halves(low_exponent, both, ON_GPU) - both
    high_code = _larger_halves(high_exponent, both, ON_GPU) - both
    _store_halves(staged + CODES, place - 32 * vector[:, None], low_code | (high_code << 4), mask)
    _store_halves(staged + REST, place, ((low >> 8) & 0x800080) | (low & 0x7F007F), mask)
    _store_halves(staged + REST, place + 32, ((high >> 8) & 0x800080) | (high & 0x7F007F), mask)
    if ON_GPU:
        _note_escapes(low_code, low, 2 * place, staged, LIST, CAPACITY)
        _note_escapes(high_code, high, 2 * place + 64, staged, LIST, CAPACITY)
    return (((low_code & 0xFFFF) == 0) | (low_code < 0x10000)) | (((high_code & 0xFFFF) == 0) | (high_code < 0x10000))


@triton.jit
def _store_bases(start, base, mask):  # type: ignore[no-untyped-def]
    """Store a byte a row of the mask, where that is true, by the thread which has it.

    A thread has four neighbours of a row at a time, of which the mask has the first alone. Triton would pass the bytes
    through shared memory to other threads, and every warp would wait for all.
    """
    tl.inline_asm_elementwise(
        _STORING,
        _STORING_OPERANDS,
        [tl.broadcast_to(start.to(tl.int64, bitcast=True), mask.shape), base, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=_WORDS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _larger_halves(a, b, ON_GPU: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """The larger of the lower halves and the larger of the upper ones, none of them negative."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            "max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.maximum(a & 0xFFFF, b & 0xFFFF) | (tl.maximum(a >> 16, b >> 16) << 16)


def _listing(words: int) -> str:
    """PTX that lists the escapes of so many words of two values: given are codes, values and places, as words.

    Nearly always no code is 0, and all that is done is to see that.
    """

    def operand(number: int, word: int) -> str:
        return f"${words * (number + 1) + word}"

    lines = [".reg .pred some, one, fits;", ".reg .b32 all, slot, code, value, entry;", ".reg .b64 address;"]
    lines.append("mov.b32 all, 0x80008000;")
    for word in range(words):  # the top bit of a half is set where 0x7FFF and its code make that much
        lines += [f"add.u32 code, {operand(0, word)}, 0x7FFF7FFF;", "and.b32 all, all, code;"]
    lines += ["setp.eq.u32 some, all, 0x80008000;", "@some bra NONE;"]
    for word in range(words):
        for half, place in ((0, 0), (16, 1)):
            lines += [
                f"bfe.u32 code, {operand(0, word)}, {half}, 16;",
                f"bfe.u32 value, {operand(1, word)}, {half}, 16;",
                "and.b32 entry, value, 0x7F80;",
                "setp.eq.u32 one, code, 0;",
                "setp.ne.and.u32 one, entry, 0, one;",
                "mov.b32 slot, -1;",
                f"@one atom.global.add.u32 slot, [{operand(3, 0)}], 1;",
                f"setp.lt.u32 fits, slot, {operand(5, 0)};",
                f"add.u32 entry, {operand(2, word)}, {place};",
                "shl.b32 entry, entry, 16;",
                "or.b32 entry, entry, value;",
                f"mad.wide.u32 address, slot, 4, {operand(4, 0)};",
                "@fits st.global.b32 [address], entry;",
            ]
    lines += ["NONE:", *(f"mov.b32 ${word}, 0;" for word in range(words))]
    return "{" + " ".join(lines) + "}"


_WORDS = tl.constexpr(4)
_STORING = tl.constexpr(
    "{ .reg .pred first; setp.ne.u32 first, $12, 0; @first st.global.u8 [$4], $8;"
    + "".join(f" mov.b32 ${word}, 0;" for word in range(4))
    + " }"
)
_STORING_OPERANDS = tl.constexpr(",".join(["=r"] * 4 + ["l"] * 4 + ["r"] * 8))
_LISTING = tl.constexpr(_listing(4))
_OPERANDS = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 12 + ["l"] * 8 + ["r"] * 4))


@triton.jit  # type: ignore[untyped-decorator]
def _note_escapes(code, value, place, staged, LIST: tl.constexpr, CAPACITY: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Give every escape the next slot of the row's list.

    By hand, for they are few: threads without one go on, and one with one waits for its own slot alone. Triton's
    atomics on a whole tile send all of it through shared memory.
    """
    counter = staged.to(tl.int64, bitcast=True)
    tl.inline_asm_elementwise(
        _LISTING,
        _OPERANDS,
        [code, value, place, counter, counter + LIST, CAPACITY],
        dtype=tl.int32,
        is_pure=False,
        pack=_WORDS,
    )


@triton.jit
def _store_halves(start, offsets, words, mask):  # type: ignore[no-untyped-def]
    """Store the lower byte of both halves of every word, side by side."""
    halves = start.to(tl.pointer_type(tl.int16), bitcast=True) + offsets
    tl.store(tl.max_contiguous(halves, [1, 4]), (words | (words >> 8)).to(tl.int16), mask=mask)


@triton.jit
def _load_bytes(start, offsets, mask):  # type: ignore[no-untyped-def]
    # Eight a thread, as values of two bytes have it: of sixteen, every second eight would change threads on their way.
    return tl.load(tl.max_contiguous(start + offsets, [1, 8]), mask=mask, other=0).to(tl.int32)


@triton.jit(do_not_specialize=VARYING)  # type: ignore[untyped-decorator]
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
    step = tl.num_programs(0)
    address = _paged(row, addresses, strides, ids, first_plane, first_chunk, first_block, planes, blocks, chunk_blocks)
    while row < rows:
        later = tl.minimum(row + step, rows - 1)
        following = _paged(
            later, addresses, strides, ids, first_plane, first_chunk, first_block, planes, blocks, chunk_blocks
        )
        wanted = address != 0
        paged = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), ALIGN)
        staged = tl.multiple_of(staging + row.to(tl.int64) * PACKED, 16)
        # The whole list, before its length is known: these two need not wait for each other, nor the rest for them.
        count = tl.load(staged.to(tl.pointer_type(tl.int32)))
        listed = tl.load((staged + LIST).to(tl.pointer_type(tl.int32)) + entry, mask=entry < CAPACITY, other=0)
        first = 0
        while first < VALUES // 128:
            vector = first + tl.arange(0, VECTORS)
            inside = (vector < VALUES // 128) & wanted
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
        written = (entry < count) & (entry < CAPACITY) & (place < VALUES) & wanted
        tl.store(paged + place, listed.to(tl.int16), mask=written)
        address = following
        row += step


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

    Raises:
        LayoutError: a block lies at no multiple of four bytes.
    """

    rejects = True

    def __init__(self, layout: PagedLayout, tensors: Tensors, *, programs: int = 8) -> None:
        self._rows = RowKernels(layout, tensors, programs=programs)
        if self._rows.align % _WORD:
            raise LayoutError("values are packed by twos, and a block lies at an odd one")

    def gather(self, stream: Stream, ids: Any, piece: StagedPiece, staging: Any, rejected: Any) -> None:
        """Launch the packing of the piece's blocks."""
        constants = partial(self._constants, piece, packing=True, on_gpu=isinstance(stream, CudaStream))
        marks = [int(rejected.ctypes.data)]
        self._rows.launch(
            _pack_rows, stream, ids, piece, staging, constants, gather=True, units=piece.rows, further=marks
        )

    def scatter(self, stream: Stream, ids: Any, piece: StagedPiece, staging: Any) -> None:
        """Launch their unpacking."""
        constants = partial(self._constants, piece, packing=False)
        self._rows.launch(_unpack_rows, stream, ids, piece, staging, constants, gather=False, units=piece.rows)

    def written(self, piece: StagedPiece, *, gather: bool) -> Launch | None:
        """The piece's launch in numbers."""
        return self._rows.written(piece, gather=gather, units=piece.rows, further=int(gather))

    def _constants(self, piece: StagedPiece, *, packing: bool, on_gpu: bool = True) -> tuple[dict[str, Any], int]:
        given = row_constants(self._rows.row_bytes(piece), self._rows.align, packing=packing, on_gpu=on_gpu)
        return given, warps_of(given["VECTORS"])


def row_constants(row_bytes: int, align: int, *, packing: bool, on_gpu: bool = True) -> dict[str, int]:
    """The kernels' constants for rows of so many bytes, in blocks whose addresses are multiples of `align`.

    `on_gpu`: by instructions that only a GPU has; escapes are listed in any order.
    """
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
        "VECTORS": min(_TILE_VALUES // VECTOR, max(_LEAST_VECTORS, 1 << (row.vectors - 1).bit_length())),
    }
    if packing:
        return {**constants, "ON_GPU": int(on_gpu)}
    return {**constants, "ENTRIES": 1 << (row.capacity - 1).bit_length()}


def warps_of(vectors: int) -> int:
    """Warps for tiles of so many vectors: fewer where the tile is the whole of a short row."""
    return max(1, min(_WARPS, vectors * VECTOR * _WARPS // _TILE_VALUES))


def triton_pack_transfer(
    layout: PagedLayout, tensors: Tensors, arena: Arena, runtime: Runtime, *, programs: int = 8, **pipeline: Any
) -> StagedTransfer:
    """The packing Triton backend: `StagedTransfer` (which names the further arguments) over `TritonPackMover`.

    `layout` is the cache's own; the transfer's layout is the packed one.
    """
    mover = TritonPackMover(layout, tensors, programs=programs)
    return StagedTransfer(packed_layout(layout), arena, runtime, mover, name="triton_pack", **pipeline)
