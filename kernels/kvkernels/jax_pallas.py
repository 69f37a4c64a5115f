"""The JAX backend: Pallas gather and scatter on GPU and TPU, host memory through JAX's memory kinds.

JAX arrays cannot be written in place from outside, so a load replaces the cache: `JaxTransfer.arrays` holds the
current arrays, the ones given to it are donated, and the engine reads `arrays` after a load (and calls `bind` when it
has replaced them itself). On GPUs the kernels go through Pallas's Triton lowering, on TPUs through Mosaic, and on the
CPU they are interpreted.

Rows move as unsigned words of the dtype's width: a float on its way through a compiler may lose a NaN's payload. The
number of chunks in one call is rounded up to a power of two by repeating the last chunk, so that only a few sizes are
ever compiled.

JAX 0.11 deprecates Pallas's Triton lowering for GPUs; it still works there, with a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from math import gcd, prod
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from numpy.typing import NDArray

from kvkernels.arena import Arena, Ints
from kvkernels.errors import LayoutError
from kvkernels.layouts import PagedLayout
from kvkernels.pieces import StagedPiece, store_pieces
from kvkernels.slots import Slots
from kvkernels.streams import move_bytes
from kvkernels.transfer import BlockIds, DoneHandle, Handle, Request, Tensors, check_request, listed

__all__ = ["JaxTransfer", "gather_rows", "scatter_rows"]

_LANES = 128
_TILE_WORDS = 4096
_PROGRAMS = 16
_PIPELINED = 2  # pieces on their way to the host at once


class JaxTransfer:
    """Copies between JAX arrays and an arena; see `kvkernels.transfer.Transfer`.

    Args:
        layout: what `describe` returned for these arrays.
        arrays: the cache, dense JAX arrays on one device; taken over (a load donates them).
        arena: the host memory that slots point into.
        staging_bytes: device memory for one call's rows; two may be alive at once.
        platform: which kernels, as for `gather_rows`; by default the device's own, interpreted on the CPU.

    Raises:
        LayoutError: an array is not dense over its blocks, or too large for the kernels' offsets.
    """

    name = "jax"

    def __init__(
        self,
        layout: PagedLayout,
        arrays: Tensors,
        arena: Arena,
        *,
        staging_bytes: int = 64 << 20,
        platform: str | None = None,
    ) -> None:
        self.layout = layout
        self.arrays: list[Any] = []
        self._arena = arena
        self._capacity = staging_bytes
        self._starts = layout.plane_starts()
        self._planes = _planes_by_tensor(layout)
        self.bind(arrays)
        (device,) = self.arrays[0].devices()
        self._platform = platform or {"cpu": "interpret", "tpu": "tpu"}.get(device.platform, "gpu")
        self._device = jax.sharding.SingleDeviceSharding(device)
        kinds = {memory.kind for memory in device.addressable_memories()}
        kind = "pinned_host" if "pinned_host" in kinds else None
        self._host = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)

    def bind(self, arrays: Tensors) -> None:
        """Take over the engine's current arrays, of the shapes that the layout was made from."""
        taken = listed(arrays)
        for index, planes in enumerate(self._planes):
            _check_dense(self.layout, taken[index], planes)
        self.arrays = taken

    def store(self, block_ids: BlockIds, slots: Slots, *, planes: range | None = None, rest_s: float = 0.0) -> Handle:
        """Copy blocks into slots; done on return, without a rest."""
        request = check_request(self.layout, self._arena, block_ids, slots, planes, loading=False)
        waiting: list[tuple[StagedPiece, Any]] = []
        for tensor, piece in self._pieces(request):
            rows = gather_rows(self._row_ids(request, piece), self._rows_view(tensor), platform=self._platform)
            waiting.append((piece, jax.device_put(rows, self._host)))
            if len(waiting) == _PIPELINED:
                self._land(request, *waiting.pop(0))
        for piece, rows in waiting:
            self._land(request, piece, rows)
        return DoneHandle()

    def load(self, slots: Slots, block_ids: BlockIds, *, planes: range | None = None) -> Handle:
        """Copy slots into blocks; `arrays` holds the new cache at once, its bytes follow in the device's order."""
        request = check_request(self.layout, self._arena, block_ids, slots, planes, loading=True)
        for tensor, piece in self._pieces(request):
            ids = self._row_ids(request, piece)
            if (ids < 0).all():
                continue
            lifted = self._lift(request, tensor, piece)
            if (ids < 0).any():  # a row that is written twice takes the place of one that is left out
                chosen = np.where(ids < 0, np.argmax(ids >= 0), np.arange(len(ids)))
                ids, lifted = ids[chosen], lifted[chosen]
            staged = jax.device_put(jax.device_put(lifted, self._host), self._device)
            shape = self.arrays[tensor].shape
            filled = scatter_rows(ids, staged, self._rows_view(tensor), platform=self._platform)
            self.arrays[tensor] = filled.reshape(shape)
        return _ArraysHandle(self.arrays)

    def close(self) -> None:
        """Wait for the arrays."""
        jax.block_until_ready(self.arrays)

    def _pieces(self, request: Request) -> list[tuple[int, StagedPiece]]:
        found = []
        for tensor, planes in enumerate(self._planes):
            mine = range(max(planes.start, request.planes.start), min(planes.stop, request.planes.stop))
            if mine:
                pieces = store_pieces(self.layout, request.chunks, mine, self._capacity // 2)
                found += [(tensor, piece) for piece in pieces]
        return found

    def _rows_view(self, tensor: int) -> Any:
        """The array as (rows, words of a row); a change of shape only."""
        array = self.arrays[tensor]
        words = self.layout.planes[self._planes[tensor].start].row_bytes // array.dtype.itemsize
        return array.reshape(-1, words)

    def _row_ids(self, request: Request, piece: StagedPiece) -> Any:
        """Row numbers of `_rows_view` in staging order, the last chunk repeated up to a power of two; -1: none."""
        chunks = _rounded(piece.chunks)
        ids = request.block_ids[np.ix_(chunks, np.asarray(piece.blocks))]
        first = np.array([p.offset // p.row_bytes for p in self.layout.planes], np.int64)[np.asarray(piece.planes)]
        rows = np.where(ids[:, None, :] < 0, -1, first[None, :, None] + ids[:, None, :])
        return rows.ravel().astype(np.int32)

    def _ranges(self, request: Request, piece: StagedPiece) -> tuple[Ints, Ints, Ints]:
        """Arena addresses, offsets into the piece's rows, and lengths."""
        chunks = np.arange(piece.chunks.start, piece.chunks.stop)
        first = self._starts[piece.planes.start] + piece.blocks.start * piece.row_bytes
        size = piece.chunk_bytes
        found = request.table.resolve(chunks * self.layout.slot_bytes + first, np.full(len(chunks), size))
        return self._arena.address + found.offset, found.index * size + found.within, found.length

    def _land(self, request: Request, piece: StagedPiece, rows: Any) -> None:
        """Wait for gathered rows on the host and copy them to their slots."""
        landed = np.ascontiguousarray(np.asarray(rows))
        arena, within, length = self._ranges(request, piece)
        move_bytes(arena, landed.ctypes.data + within, length)

    def _lift(self, request: Request, tensor: int, piece: StagedPiece) -> NDArray[Any]:
        """A piece's rows out of its slots, the last chunk repeated up to a power of two."""
        rounded = len(_rounded(piece.chunks))
        lifted = np.empty((rounded, piece.chunk_bytes), np.uint8)
        arena, within, length = self._ranges(request, piece)
        move_bytes(lifted.ctypes.data + within, arena, length)
        lifted[len(piece.chunks) :] = lifted[len(piece.chunks) - 1]
        words = piece.row_bytes // self.arrays[tensor].dtype.itemsize
        rows: NDArray[Any] = lifted.view(_words(self.arrays[tensor].dtype)).reshape(-1, words)
        return rows


class _ArraysHandle:
    def __init__(self, arrays: Sequence[Any]) -> None:
        self._arrays = list(arrays)

    def done(self) -> bool:
        """Whether every array is ready (or was donated to a later load, which is ordered after this one)."""
        return all(array.is_deleted() or array.is_ready() for array in self._arrays)

    def wait(self) -> None:
        """Block until they are."""
        jax.block_until_ready([array for array in self._arrays if not array.is_deleted()])

    def wait_layer(self, layer: int) -> None:
        """JAX orders what reads an array after what wrote it."""

    def wait_sources(self) -> None:
        """The slots were read before the call returned."""

    def rejected(self) -> tuple[int, ...]:
        """None."""
        return ()

    def measured(self) -> None:
        """JAX has no clock on the device."""


def gather_rows(ids: Any, rows: Any, *, platform: str) -> Any:
    """`rows[ids]` for a two-dimensional array and int32 row numbers, as unsigned words of the same width.

    Args:
        ids: shape (n,).
        rows: shape (m, words).
        platform: `gpu`, `tpu`, `interpret` (the GPU kernel) or `interpret_tpu`.
    """
    return _compiled(platform, "gather")(ids, rows)


def scatter_rows(ids: Any, staged: Any, rows: Any, *, platform: str) -> Any:
    """`rows` with `rows[ids] = staged`, `staged` in unsigned words; `rows` is donated.

    Ids that repeat must carry equal rows.
    """
    return _compiled(platform, "scatter")(ids, staged, rows)


@cache
def _compiled(platform: str, operation: str) -> Any:
    kernels = _TPU if platform.endswith("tpu") else _GPU
    kernel = partial(kernels[operation], interpret=platform.startswith("interpret"))

    def gather(ids: Any, rows: Any) -> Any:
        return kernel(ids, lax.bitcast_convert_type(rows, _words(rows.dtype)))

    def scatter(ids: Any, staged: Any, rows: Any) -> Any:
        filled = kernel(ids, staged, lax.bitcast_convert_type(rows, _words(rows.dtype)))
        return lax.bitcast_convert_type(filled, rows.dtype)

    return jax.jit(gather) if operation == "gather" else jax.jit(scatter, donate_argnums=2)


def _words(dtype: Any) -> Any:
    return np.dtype(f"uint{8 * dtype.itemsize}")


def _move_gpu(ids: Any, source: Any, target: Any, *, rows: int, tile: int, programs: int, gather: bool) -> None:
    """Tiles of rows, dealt out over a fixed number of programs."""
    tiles = source.shape[1] // tile
    first = pl.program_id(0)

    def move(turn: Any, carry: Any) -> Any:
        unit = first + turn * programs
        row = unit // tiles
        words = pl.ds((unit % tiles) * tile, tile)
        paged = ids[row]
        if gather:
            target[row, words] = source[paged, words]
        else:
            target[paged, words] = source[row, words]
        return carry

    lax.fori_loop(0, (rows * tiles - first + programs - 1) // programs, move, 0)


def _gather_gpu(ids: Any, rows: Any, *, interpret: bool) -> Any:
    count, words = ids.shape[0], rows.shape[1]
    tile, programs = _tile(words), _programs(count, words)
    return pl.pallas_call(
        partial(_move_gpu, rows=count, tile=tile, programs=programs, gather=True),
        out_shape=jax.ShapeDtypeStruct((count, words), rows.dtype),
        grid=(programs,),
        compiler_params=plgpu.CompilerParams(num_warps=8),
        interpret=interpret,
    )(ids, rows)


def _scatter_gpu(ids: Any, staged: Any, rows: Any, *, interpret: bool) -> Any:
    count, words = staged.shape
    tile, programs = _tile(words), _programs(count, words)

    def kernel(ids_ref: Any, staged_ref: Any, _: Any, rows_ref: Any) -> None:
        _move_gpu(ids_ref, staged_ref, rows_ref, rows=count, tile=tile, programs=programs, gather=False)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        grid=(programs,),
        input_output_aliases={2: 0},
        compiler_params=plgpu.CompilerParams(num_warps=8),
        interpret=interpret,
    )(ids, staged, rows)


def _copy_tpu(_: Any, source: Any, target: Any) -> None:
    target[...] = source[...]


def _scatter_copy_tpu(_: Any, source: Any, __: Any, target: Any) -> None:
    target[...] = source[...]


def _gather_tpu(ids: Any, rows: Any, *, interpret: bool) -> Any:
    """One row a grid step; row numbers are prefetched scalars, so Pallas overlaps the copies of neighbouring steps."""
    count, block = ids.shape[0], _sublanes(rows.shape[1])
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(count,),
        in_specs=[pl.BlockSpec((None, *block), lambda step, ids: (ids[step], 0, 0))],
        out_specs=pl.BlockSpec((None, *block), lambda step, ids: (step, 0, 0)),
    )
    shape = jax.ShapeDtypeStruct((count, *block), rows.dtype)
    gathered = pl.pallas_call(_copy_tpu, out_shape=shape, grid_spec=spec, interpret=interpret)(
        ids, rows.reshape(-1, *block)
    )
    return gathered.reshape(count, -1)


def _scatter_tpu(ids: Any, staged: Any, rows: Any, *, interpret: bool) -> Any:
    count, block = staged.shape[0], _sublanes(rows.shape[1])
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(count,),
        in_specs=[
            pl.BlockSpec((None, *block), lambda step, ids: (step, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((None, *block), lambda step, ids: (ids[step], 0, 0)),
    )
    cache_rows = rows.reshape(-1, *block)
    filled = pl.pallas_call(
        _scatter_copy_tpu,
        out_shape=jax.ShapeDtypeStruct(cache_rows.shape, rows.dtype),
        grid_spec=spec,
        input_output_aliases={2: 0},
        interpret=interpret,
    )(ids, staged.reshape(count, *block), cache_rows)
    return filled.reshape(rows.shape)


_GPU: dict[str, Any] = {"gather": _gather_gpu, "scatter": _scatter_gpu}
_TPU: dict[str, Any] = {"gather": _gather_tpu, "scatter": _scatter_tpu}


def _tile(words: int) -> int:
    """The widest power of two that divides a row, up to what one program holds in registers."""
    return gcd(words, _TILE_WORDS)


def _programs(rows: int, words: int) -> int:
    return min(_PROGRAMS, rows * (words // _tile(words)))


def _sublanes(words: int) -> tuple[int, int]:
    """A row as (sublanes, lanes), the last two dimensions that a TPU tiles."""
    return (words // _LANES, _LANES) if words % _LANES == 0 else (1, words)


def _rounded(chunks: range) -> Ints:
    size = 1 << (len(chunks) - 1).bit_length()
    return np.minimum(np.arange(chunks.start, chunks.start + size), chunks.stop - 1)


def _planes_by_tensor(layout: PagedLayout) -> list[range]:
    tensors = [plane.tensor for plane in layout.planes]
    return [range(tensors.index(t), tensors.index(t) + tensors.count(t)) for t in sorted(set(tensors))]


def _check_dense(layout: PagedLayout, array: Any, planes: range) -> None:
    for index in planes:
        plane = layout.planes[index]
        if plane.block_stride != plane.row_bytes or plane.offset % plane.row_bytes:
            raise LayoutError(f"plane {index}: JAX arrays are taken with dense blocks only")
    # Pallas's Triton lowering counts elements in 32 bits up to 2**32 bytes.
    if prod(array.shape) >= 2**31 and array.nbytes <= 2**32:
        raise LayoutError(f"an array of {prod(array.shape)} elements overflows the kernels' offsets; split it by layer")
