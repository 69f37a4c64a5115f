"""Random KV caches of every layout, with what a transfer of them must give: for tests, benchmarks and self-checks.

Each cache is filled with random bytes (NaNs of every payload included), and knows the rows of a block by plain
indexing of the memory it was built from, without any of this package's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from kvkernels.arena import Arena, Bytes, HostArena, Ints
from kvkernels.layouts import PagedLayout, describe
from kvkernels.slots import Slot
from kvkernels.transfer import Transfer

__all__ = [
    "CASE_DTYPES",
    "CASE_FORMS",
    "Case",
    "random_case",
    "random_ids",
    "random_slots",
    "round_trip_faults",
    "some_left_out",
]

CASE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)

Memory = list[torch.Tensor]
Make = Callable[[PagedLayout, Memory, Arena], Transfer]


@dataclass(frozen=True, slots=True)
class _Sizes:
    layers: int
    blocks: int
    tokens: int
    heads: int
    dim: int


@dataclass(frozen=True, slots=True)
class _Form:
    """Shapes to allocate, the engine's tensors over them, one block's row in every plane, and hints to `describe`."""

    shapes: list[tuple[int, ...]]
    tensors: Callable[[Memory], Memory]
    rows: Callable[[Memory, int], Memory]
    hints: dict[str, int]


@dataclass(frozen=True, slots=True)
class Case:
    """A cache over `memory`, as an engine would hand it over (`tensors`), and its layout."""

    form: _Form
    memory: Memory
    layout: PagedLayout

    @property
    def tensors(self) -> Memory:
        """What an engine registers."""
        return self.form.tensors(self.memory)

    def rows(self, block: int) -> list[Bytes]:
        """The block's row in every plane, in plane order, by plain indexing of the memory."""
        return [_bytes(row) for row in self.form.rows(self.memory, block)]

    def slot(self, block_ids: Ints) -> Bytes:
        """The bytes that one chunk's slot must hold after a store of these blocks."""
        by_block = [self.rows(int(block)) for block in block_ids]
        return np.concatenate([rows[plane] for plane in range(len(by_block[0])) for rows in by_block])

    def emptied(self) -> Case:
        """The same cache filled with zeros."""
        return Case(self.form, [torch.zeros_like(memory) for memory in self.memory], self.layout)


def _repeat(n: _Sizes, *shape: int) -> list[tuple[int, ...]]:
    return [shape] * n.layers


def _each(memory: Memory, block: int) -> Memory:
    return [layer[block] for layer in memory]


def _both(memory: Memory, block: int) -> Memory:
    return [layer[kv, block] for layer in memory for kv in range(layer.shape[0])]


def _joined(n: _Sizes) -> _Form:
    """(blocks, heads, tokens, 2 x dim), head-major in memory."""
    return _Form(_repeat(n, n.blocks, n.heads, n.tokens, 2 * n.dim), list, _each, {})


def _joined_token_major(n: _Sizes) -> _Form:
    """The same shape, token-major in memory: vLLM's FlashAttention cache."""
    shapes = _repeat(n, n.blocks, n.tokens, n.heads, 2 * n.dim)
    return _Form(shapes, lambda memory: [m.permute(0, 2, 1, 3) for m in memory], _each, {"block_dim": 0})


def _planes_nhd(n: _Sizes) -> _Form:
    """(2, blocks, tokens, heads, dim): K and V apart."""
    return _Form(_repeat(n, 2, n.blocks, n.tokens, n.heads, n.dim), list, _both, {})


def _planes_hnd(n: _Sizes) -> _Form:
    """K and V apart, the same logical shape, head-major in memory."""
    shapes = _repeat(n, 2, n.blocks, n.heads, n.tokens, n.dim)
    return _Form(shapes, lambda memory: [m.permute(0, 1, 3, 2, 4) for m in memory], _both, {})


def _stacked(n: _Sizes) -> _Form:
    """(blocks, 2, tokens, heads, dim): K and V of a block side by side."""
    return _Form(_repeat(n, n.blocks, 2, n.tokens, n.heads, n.dim), list, _each, {})


def _mla(n: _Sizes) -> _Form:
    """(blocks, tokens, latent): one latent row a token, no heads."""
    return _Form(_repeat(n, n.blocks, n.tokens, n.heads * n.dim + n.dim // 2), list, _each, {"block_dim": 0})


def _cross_layer(n: _Sizes) -> _Form:
    """(blocks, layers, heads, tokens, 2 x dim): one contiguous block over all layers."""
    shape = (n.blocks, n.layers + 1, n.heads, n.tokens, 2 * n.dim)
    return _Form([shape], list, _each, {"num_layers": n.layers + 1, "layer_dim": 1})


def _layer_views(n: _Sizes) -> _Form:
    """One tensor a layer, each a view of cross-layer blocks: its blocks lie a whole cross-layer block apart."""
    return _Form(
        [(n.blocks, n.layers, n.heads, n.tokens, 2 * n.dim)],
        lambda memory: [memory[0][:, layer] for layer in range(n.layers)],
        lambda memory, block: [memory[0][block, layer] for layer in range(n.layers)],
        {},
    )


def _layers_outermost(n: _Sizes) -> _Form:
    """(layers, blocks, tokens, heads, 2 x dim) in one tensor."""
    shape = (n.layers + 1, n.blocks, n.tokens, n.heads, 2 * n.dim)
    return _Form([shape], list, _both, {"num_layers": n.layers + 1, "layer_dim": 0, "block_dim": 1})


def _heads_outside(n: _Sizes) -> _Form:
    """(blocks, heads, tokens, 2 x dim) with heads outside the blocks in memory: one plane a head."""
    shapes = _repeat(n, n.heads + 1, n.blocks, n.tokens, 2 * n.dim)
    return _Form(shapes, lambda memory: [m.permute(1, 0, 2, 3) for m in memory], _both, {})


def _folded(n: _Sizes) -> _Form:
    """The attention kernel's blocks are half the scheduler's: (2 x blocks, tokens / 2, heads, 2 x dim)."""
    shapes = _repeat(n, n.blocks, n.tokens, n.heads, 2 * n.dim)
    halves = (2 * n.blocks, n.tokens // 2, n.heads, 2 * n.dim)
    return _Form(shapes, lambda memory: [m.view(halves) for m in memory], _each, {"block_dim": 0})


_BUILDERS: dict[str, Callable[[_Sizes], _Form]] = {
    "joined": _joined,
    "joined_token_major": _joined_token_major,
    "planes_nhd": _planes_nhd,
    "planes_hnd": _planes_hnd,
    "stacked": _stacked,
    "mla": _mla,
    "cross_layer": _cross_layer,
    "layer_views": _layer_views,
    "layers_outermost": _layers_outermost,
    "heads_outside": _heads_outside,
    "folded": _folded,
}
CASE_FORMS = tuple(_BUILDERS)


def _zeros(nbytes: int) -> Bytes:
    return np.zeros(nbytes, np.uint8)


def random_case(
    rng: np.random.Generator,
    *,
    form: str | None = None,
    dtype: torch.dtype | None = None,
    block_tokens: int | None = None,
    device: str = "cpu",
) -> Case:
    """A small cache of the given form (see `CASE_FORMS`), dtype and block size; what is not given is drawn."""
    dtype = dtype or CASE_DTYPES[int(rng.integers(len(CASE_DTYPES)))]
    sizes = _Sizes(
        layers=int(rng.integers(1, 4)),
        blocks=int(rng.integers(8, 24)),
        tokens=block_tokens or int(rng.choice([16, 32, 64, 128])),
        heads=int(rng.integers(1, 4)),
        dim=int(rng.choice([8, 16, 20, 64])),
    )
    built = _BUILDERS[form or str(rng.choice(CASE_FORMS))](sizes)
    memory = [_random_bytes(rng, shape, dtype).to(device) for shape in built.shapes]
    layout = describe(
        built.tensors(memory),
        num_blocks=sizes.blocks,
        block_tokens=sizes.tokens,
        chunk_tokens=sizes.tokens * int(rng.integers(1, 5)),
        num_layers=built.hints.get("num_layers"),
        block_dim=built.hints.get("block_dim"),
        layer_dim=built.hints.get("layer_dim"),
    )
    return Case(built, memory, layout)


def random_ids(rng: np.random.Generator, layout: PagedLayout, chunks: int) -> Ints:
    """Distinct block ids for so many chunks, shuffled, with some runs of consecutive ids."""
    ids = rng.permutation(layout.num_blocks)[: chunks * layout.chunk_blocks].astype(np.int64)
    if len(ids) and rng.integers(2):
        half = len(ids) // 2
        ids[:half] = np.sort(ids[:half])
    return ids


def some_left_out(rng: np.random.Generator, ids: Ints) -> Ints:
    """The same ids for a load, which may leave some of the blocks out."""
    return np.where(rng.random(len(ids)) < rng.choice([0, 0.2, 0.9]), -1, ids)


def random_slots(rng: np.random.Generator, layout: PagedLayout, chunks: int) -> tuple[list[Slot], int]:
    """Slots of odd, shuffled, partly adjacent pieces with slack at their ends, and the arena size they need."""
    page = int(rng.integers(layout.slot_bytes // 5 + 1, layout.slot_bytes + layout.slot_bytes // 3 + 2))
    each = -(-layout.slot_bytes // page)
    pages = rng.permutation(each * chunks + 3)
    slots: list[Slot] = []
    for chunk in range(chunks):
        mine = pages[chunk * each : (chunk + 1) * each]
        if rng.integers(2):
            mine = np.sort(mine)
        slots.append([(int(number) * page, page) for number in mine])
    return slots, page * len(pages)


def round_trip_faults(
    case: Case, make: Make, rng: np.random.Generator, *, allocate: Callable[[int], Bytes] = _zeros
) -> list[str]:
    """Store random chunks of a cache, load most of their blocks into an empty one; what came out wrong, in words.

    Checked bit for bit against the oracle: the slots, the arena's bytes outside them, the loaded blocks, and the
    blocks that were not named.

    Args:
        case: the cache.
        make: builds the backend for a layout, its tensors and an arena that counts as pinned.
        rng: draws chunks, block ids and slots.
        allocate: arena memory of so many bytes.
    """
    layout = case.layout
    chunks = int(rng.integers(1, layout.num_blocks // layout.chunk_blocks + 1))
    ids = random_ids(rng, layout, chunks)
    by_chunk = ids.reshape(chunks, -1)
    slots, arena_bytes = random_slots(rng, layout, chunks)
    memory = allocate(arena_bytes)
    memory[:] = rng.integers(0, 256, arena_bytes, dtype=np.uint8)
    expected = memory.copy()
    for slot, mine in zip(slots, by_chunk, strict=True):
        _write(expected, slot, case.slot(mine))
    arena = HostArena(memory, is_pinned=True)
    faults = []
    transfer = make(layout, case.tensors, arena)
    transfer.store(ids, slots).wait()
    transfer.close()
    if not np.array_equal(memory, expected):
        faults.append(f"store: {np.count_nonzero(memory != expected)} of {arena_bytes} arena bytes differ")
    memory[:] = expected
    empty = case.emptied()
    transfer = make(layout, empty.tensors, arena)
    wanted_ids = some_left_out(rng, ids)
    transfer.load(slots, wanted_ids).wait()
    transfer.close()
    loaded = set(wanted_ids.tolist())
    for block in range(layout.num_blocks):
        wanted = case.rows(block) if block in loaded else [np.zeros_like(row) for row in case.rows(block)]
        found = empty.rows(block)
        wrong = [plane for plane, pair in enumerate(zip(found, wanted, strict=True)) if not np.array_equal(*pair)]
        if wrong:
            kind = "loaded" if block in loaded else "other"
            faults.append(f"load: {kind} block {block} differs in planes {wrong}")
    return faults


def _write(arena: Bytes, slot: Slot, values: Bytes) -> None:
    at = 0
    for offset, length in slot:
        part = values[at : at + length]
        arena[offset : offset + len(part)] = part
        at += length


def _random_bytes(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    raw = rng.integers(0, 256, prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def _bytes(tensor: torch.Tensor) -> Bytes:
    values: Bytes = tensor.contiguous().view(torch.uint8).flatten().cpu().numpy()
    return values
