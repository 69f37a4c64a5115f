"""How an engine's paged KV cache lies in memory, reduced to planes of whole blocks.

Every layout in use comes down to the same picture: a list of *planes*, each a two-dimensional byte view
`(num_blocks, row_bytes)` with its own block stride. A plane is what one layer keeps of one block in one dense run of
memory: K and V joined where they lie side by side, K and V apart where the cache is `(2, blocks, ...)`, one head where
heads lie outside blocks, all layers together where the block is outermost (cross-layer blocks).

A chunk slot in host memory is the concatenation over planes, then over the chunk's blocks, of those rows:

    slot[plane][block_in_chunk][row_bytes]

so a layer's share of a chunk is one contiguous range, and a load can go layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from math import prod
from typing import Any

from kvkernels.errors import LayoutError

__all__ = ["DTYPES", "PagedLayout", "Plane", "TensorSpec", "describe"]

DTYPES = frozenset(
    {
        "bfloat16",
        "float16",
        "float32",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "int8",
        "uint8",  # engines keep fp8 caches, packed MLA rows included, as plain bytes
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor's place in memory without the framework: sizes, strides in bytes, dtype name, device type."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str
    device: str

    @classmethod
    def of(cls, tensor: Any) -> TensorSpec:
        """Read a torch tensor, a NumPy array or a JAX array (which has no strides and counts as dense)."""
        shape = tuple(int(n) for n in tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if hasattr(tensor, "element_size"):
            itemsize = int(tensor.element_size())
            strides = tuple(int(s) * itemsize for s in tensor.stride())
            device = str(tensor.device.type)
        else:
            itemsize = int(tensor.dtype.itemsize)
            strides = getattr(tensor, "strides", None) or _dense_strides(shape, itemsize)
            device = "jax" if hasattr(tensor, "sharding") else "cpu"
        return cls(shape=shape, strides=tuple(strides), itemsize=itemsize, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """One dense row a block: byte `offset` from the start of tensor `tensor`, then `block_stride` bytes a block."""

    tensor: int
    offset: int
    row_bytes: int
    block_stride: int
    layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedLayout:
    """The planes of one engine's KV cache and the size of a chunk over them.

    `planes` is layer-major. `form` says how one block's bytes are ordered in each plane; it and the dtype are what
    two caches must share for their bytes to be exchangeable. `cross_layer` is true where every plane holds
    something of every layer, so that no layer can be loaded before another.
    """

    planes: tuple[Plane, ...]
    num_blocks: int
    block_tokens: int
    chunk_blocks: int
    num_layers: int
    cross_layer: bool
    dtype: str
    device: str
    form: str

    @property
    def chunk_tokens(self) -> int:
        """Tokens in a chunk."""
        return self.block_tokens * self.chunk_blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all planes."""
        return sum(plane.row_bytes for plane in self.planes)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one chunk slot over all planes."""
        return self.block_bytes * self.chunk_blocks

    def plane_starts(self) -> tuple[int, ...]:
        """Byte offset of every plane in a slot, and the slot's size as the last element."""
        starts = [0]
        for plane in self.planes:
            starts.append(starts[-1] + plane.row_bytes * self.chunk_blocks)
        return tuple(starts)

    def planes_of_layer(self, layer: int) -> range:
        """The planes that must have arrived before `layer` may attend; IndexError outside `range(num_layers)`."""
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer {layer} of {self.num_layers}")
        if self.cross_layer:
            return range(len(self.planes))
        indices = [i for i, plane in enumerate(self.planes) if plane.layer == layer]
        return range(indices[0], indices[-1] + 1)

    def fingerprint(self) -> str:
        """A stable string of everything here that changes a slot's bytes, for namespaces.

        The number of blocks and where they lie are left out: two engines that differ only there can share chunks. So
        is the chunk size, which names the chunk elsewhere.
        """
        rows = ",".join(f"{len(list(same))}x{size}" for size, same in groupby(p.row_bytes for p in self.planes))
        kind = "cross" if self.cross_layer else "layers"
        return f"kv1:{self.device}:{self.dtype}:b{self.block_tokens}:{kind}{self.num_layers}:{rows}:{self.form}"


@dataclass(frozen=True, slots=True)
class _Dim:
    index: int
    size: int
    stride: int


def describe(
    tensors: Mapping[str, Any] | Sequence[Any],
    *,
    num_blocks: int,
    block_tokens: int,
    chunk_tokens: int,
    num_layers: int | None = None,
    block_dim: int | None = None,
    layer_dim: int | None = None,
    order: str = "",
) -> PagedLayout:
    """Work out the layout of a KV cache from its tensors' shapes and strides.

    Args:
        tensors: one tensor a layer in layer order (a mapping's values are taken in its own order), or one tensor for
            all layers, with `num_layers` given. torch, NumPy and JAX arrays are taken; nothing is read or copied.
        num_blocks: blocks in the cache. A block dimension of k x num_blocks (an attention kernel with smaller blocks
            than the scheduler's) is folded back into num_blocks.
        block_tokens: tokens in a block.
        chunk_tokens: tokens in a chunk, a multiple of block_tokens.
        num_layers: layers of the model; needed only for a single tensor over all layers.
        block_dim: the dimension that counts blocks, where the shapes alone leave it open.
        layer_dim: the dimension that counts layers in a single tensor over all layers, likewise.
        order: the engine's own name for what strides cannot tell (NHD or HND, an ISA's packing); part of the
            fingerprint.

    Returns:
        A PagedLayout; planes are layer-major, then in the order of the tensor's remaining outer dimensions.

    Raises:
        LayoutError: the block dimension is ambiguous or absent, one block's bytes are not dense, blocks overlap,
            dtypes or devices are mixed, or the dtype is not one a KV cache has.
    """
    listed = list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)
    specs = [TensorSpec.of(tensor) for tensor in listed]
    _check_sizes(specs, num_blocks, block_tokens, chunk_tokens)
    whole = len(specs) == 1 and num_layers is not None and num_layers > 1
    if num_layers is not None and not whole and num_layers != len(specs):
        raise LayoutError(f"{len(specs)} tensors for {num_layers} layers: give one a layer, or one for all")
    planes: list[Plane] = []
    forms: list[str] = []
    spans_layers = False
    for index, spec in enumerate(specs):
        layers = num_layers if whole and num_layers else 1
        where = f"tensor {index} of shape {spec.shape}"
        found_layer_dim = _find_layer_dim(spec, layers, layer_dim, where) if whole else None
        dims = _split_block_dim(spec, num_blocks, block_tokens, block_dim, found_layer_dim, where)
        outer, inner, block = _sort_dims(spec, dims, num_blocks, where)
        spans_layers = whole and all(dim.index != found_layer_dim for dim in outer)
        planes += _planes(index, outer, inner, block, spec.itemsize, found_layer_dim)
        forms.append(_form(spec, outer, inner))
    if any(form != forms[0] for form in forms):
        forms = [f"{len(list(same))}*{form}" for form, same in groupby(forms)]
    else:
        forms = forms[:1]
    return PagedLayout(
        planes=tuple(planes),
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        chunk_blocks=chunk_tokens // block_tokens,
        num_layers=num_layers or len(specs),
        cross_layer=spans_layers,
        dtype=specs[0].dtype,
        device=specs[0].device,
        form=(order + "/" if order else "") + ";".join(forms),
    )


def _check_sizes(specs: Sequence[TensorSpec], num_blocks: int, block_tokens: int, chunk_tokens: int) -> None:
    if not specs:
        raise LayoutError("no KV cache tensors")
    if num_blocks < 1 or block_tokens < 1:
        raise LayoutError(f"{num_blocks} blocks of {block_tokens} tokens")
    if chunk_tokens < block_tokens or chunk_tokens % block_tokens:
        raise LayoutError(f"a chunk of {chunk_tokens} tokens is no multiple of the block of {block_tokens}")
    kinds = {(spec.dtype, spec.device) for spec in specs}
    if len(kinds) > 1:
        raise LayoutError(f"KV cache tensors differ in dtype or device: {sorted(kinds)}")
    if specs[0].dtype not in DTYPES:
        raise LayoutError(f"dtype {specs[0].dtype} is not one of {sorted(DTYPES)}")


def _dense_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * prod(shape[i + 1 :]) for i in range(len(shape)))


def _find_layer_dim(spec: TensorSpec, layers: int, given: int | None, where: str) -> int:
    found = [given] if given is not None else [i for i, size in enumerate(spec.shape[:3]) if size == layers]
    if len(found) != 1 or not 0 <= found[0] < len(spec.shape) or spec.shape[found[0]] != layers:
        raise LayoutError(f"{where}: {len(found)} dimensions could count the {layers} layers; pass layer_dim")
    return found[0]


def _split_block_dim(
    spec: TensorSpec, num_blocks: int, block_tokens: int, given: int | None, layer_dim: int | None, where: str
) -> tuple[_Dim, list[_Dim]]:
    """The block dimension, and the others; a block dimension of k x num_blocks leaves a dimension of k among them."""
    leading = range(min(len(spec.shape), 2 if layer_dim is None else 3))
    places = [i for i in leading if i != layer_dim] if given is None else [given]
    exact = [i for i in places if spec.shape[i] == num_blocks]
    folded = [i for i in places if spec.shape[i] % num_blocks == 0 and not block_tokens % (spec.shape[i] // num_blocks)]
    found = exact or [i for i in folded if spec.shape[i]]
    if len(found) != 1:
        raise LayoutError(
            f"{where}: {len(found)} of its leading dimensions could count {num_blocks} blocks; pass block_dim"
        )
    chosen = found[0]
    fold = spec.shape[chosen] // num_blocks
    stride = spec.strides[chosen]
    others = [
        _Dim(i, size, step)
        for i, (size, step) in enumerate(zip(spec.shape, spec.strides, strict=True))
        if i != chosen and size > 1
    ]
    if fold > 1:
        others.append(_Dim(chosen, fold, stride))
    return _Dim(chosen, num_blocks, stride * fold), others


def _sort_dims(
    spec: TensorSpec, dims: tuple[_Dim, list[_Dim]], num_blocks: int, where: str
) -> tuple[list[_Dim], list[_Dim], _Dim]:
    """Outer dimensions (each index is a plane of its own), inner ones (memory order, dense) and the block's."""
    block, others = dims
    inner = sorted((d for d in others if d.stride < block.stride), key=lambda d: d.stride, reverse=True)
    outer = [d for d in others if d.stride >= block.stride]
    dense = spec.itemsize
    for dim in reversed(inner):
        if dim.stride != dense:
            raise LayoutError(
                f"{where}: the bytes of one block are not dense (dimension {dim.index} has a stride of {dim.stride} "
                f"bytes where {dense} were expected); whole blocks cannot be copied"
            )
        dense *= dim.size
    if num_blocks > 1 and block.stride < dense:
        raise LayoutError(f"{where}: blocks of {dense} bytes overlap at a stride of {block.stride}")
    reach = (num_blocks - 1) * block.stride + dense
    for dim in sorted(outer, key=lambda d: d.stride):
        if dim.stride < reach:
            raise LayoutError(f"{where}: dimension {dim.index} interleaves with the blocks; not handled")
        reach = (dim.size - 1) * dim.stride + reach
    return outer, inner, block


def _planes(
    tensor: int, outer: list[_Dim], inner: list[_Dim], block: _Dim, itemsize: int, layer_dim: int | None
) -> list[Plane]:
    row_bytes = itemsize * prod(dim.size for dim in inner)
    # Layer-major whatever the dimension order, so that a layer's planes are neighbours in the slot.
    ordered = sorted(outer, key=lambda dim: (dim.index != layer_dim, dim.index))
    leads = bool(ordered) and ordered[0].index == layer_dim
    return [
        Plane(
            tensor=tensor,
            offset=sum(i * dim.stride for i, dim in zip(place, ordered, strict=True)),
            row_bytes=row_bytes,
            block_stride=block.stride,
            layer=place[0] if leads else tensor,
        )
        for place in product(*(range(dim.size) for dim in ordered))
    ]


def _form(spec: TensorSpec, outer: list[_Dim], inner: list[_Dim]) -> str:
    outside = "".join(f"[d{dim.index}:{dim.size}]" for dim in outer)
    inside = "x".join(f"d{dim.index}:{dim.size}" for dim in inner)
    return f"{outside}({inside})*{spec.itemsize}"
