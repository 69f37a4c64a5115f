"""Caches whose values can be packed, but for those of some blocks, and their way through packed slots.

For tests and benchmarks, as `cases` is; what can be packed is counted here by the definition, value after value.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from kvkernels.arena import Arena, Bytes, HostArena, Ints
from kvkernels.cases import Case, random_case, random_ids, random_slots, some_left_out
from kvkernels.layouts import PagedLayout
from kvkernels.packing import ESCAPE_SHARE, VECTOR, packable, packed_layout
from kvkernels.transfer import Transfer

__all__ = ["count_escapes", "fill", "packable_case", "packed_round_trip_faults", "rejected_chunks"]

Make = Callable[[PagedLayout, list[torch.Tensor], Arena], Transfer]


def count_escapes(row: Bytes) -> int:
    """The values of a row of bytes whose exponent is not 0 and 15 or more below the largest of their vector."""
    exponents = ((np.ascontiguousarray(row).view(np.uint16) >> 7) & 255).astype(np.int64).reshape(-1, VECTOR)
    bases = np.maximum(exponents.max(1, keepdims=True) - 15, 0)
    return int(((exponents > 0) & (exponents <= bases)).sum())


def rejected_chunks(case: Case, ids: Ints, planes: range | None = None) -> tuple[int, ...]:
    """The chunks of a store that have a row with too many escapes."""
    chosen = range(len(case.layout.planes)) if planes is None else planes
    rows = {block: case.rows(block) for block in set(ids.tolist())}
    bad = {
        block
        for block, of_block in rows.items()
        if any(count_escapes(of_block[plane]) > len(of_block[plane]) // 2 // ESCAPE_SHARE for plane in chosen)
    }
    return tuple(i for i, mine in enumerate(ids.reshape(-1, case.layout.chunk_blocks)) if bad & set(mine.tolist()))


def fill(case: Case, rng: np.random.Generator, *, spoilt: float = 0.0) -> None:
    """Values that can be packed, with zeros and some escapes; one row in a share of the blocks is of random bits."""
    for memory in case.memory:
        values = rng.standard_normal(memory.shape) * 2.0 ** rng.integers(0, 3, memory.shape[-1])
        values[rng.random(memory.shape) < 0.02] = 0
        values[rng.random(memory.shape) < 0.002] *= 1e-6
        memory.copy_(torch.from_numpy(values.astype(np.float32)))
    for block in np.flatnonzero(rng.random(case.layout.num_blocks) < spoilt).tolist():
        rows = case.form.rows(case.memory, block)
        row = rows[int(rng.integers(len(rows)))]
        bits = rng.integers(-(1 << 15), 1 << 15, tuple(row.shape), dtype=np.int16)
        row.copy_(torch.from_numpy(bits).view(torch.bfloat16))


def packable_case(
    rng: np.random.Generator, *, form: str | None = None, spoilt: float = 0.0, device: str = "cpu"
) -> Case:
    """A small cache of bf16 that is filled in this way."""
    while True:
        case = random_case(rng, form=form, dtype=torch.bfloat16, block_tokens=int(rng.choice([16, 32])), device=device)
        if packable(case.layout):
            fill(case, rng, spoilt=spoilt)
            return case


def packed_round_trip_faults(
    case: Case,
    store: Make,
    load: Make,
    rng: np.random.Generator,
    *,
    planes: range | None = None,
    allocate: Callable[[int], Bytes] = lambda nbytes: np.zeros(nbytes, np.uint8),
) -> list[str]:
    """Store random chunks, load most blocks of those not rejected into an empty cache; what came out wrong, in words.

    Checked are the chunks rejected, the arena's bytes outside the slots, and every block of the cache bit for bit.

    Args:
        case: the cache.
        store: builds the backend that packs, for the cache's own layout.
        load: builds the backend that unpacks.
        rng: draws chunks, block ids and slots.
        planes: what to copy.
        allocate: arena memory of so many bytes.
    """
    layout, packed = case.layout, packed_layout(case.layout)
    chunks = int(rng.integers(1, layout.num_blocks // layout.chunk_blocks + 1))
    ids = random_ids(rng, layout, chunks)
    slots, arena_bytes = random_slots(rng, packed, chunks)
    memory = allocate(arena_bytes)
    memory[:] = 0x5A
    outside = np.ones(arena_bytes, bool)
    for offset, length in (piece for slot in slots for piece in slot):
        outside[offset : offset + length] = False
    arena = HostArena(memory, is_pinned=True)
    transfer = store(layout, case.tensors, arena)
    handle = transfer.store(ids, slots, planes=planes)
    handle.wait()
    transfer.close()
    wanted = rejected_chunks(case, ids, planes)
    faults = [] if handle.rejected() == wanted else [f"store: rejected {handle.rejected()} instead of {wanted}"]
    if (memory[outside] != 0x5A).any():
        faults.append("store: bytes outside the slots were written")
    good = [chunk for chunk in range(chunks) if chunk not in wanted]
    loaded = some_left_out(rng, ids.reshape(chunks, -1)[good].ravel())
    empty = case.emptied()
    transfer = load(layout, empty.tensors, arena)
    transfer.load([slots[chunk] for chunk in good], loaded, planes=planes).wait()
    transfer.close()
    return faults + _wrong_blocks(case, empty, set(loaded.tolist()), planes)


def _wrong_blocks(case: Case, got: Case, loaded: set[int], planes: range | None) -> list[str]:
    faults = []
    for block in range(case.layout.num_blocks):
        for plane, (found, full) in enumerate(zip(got.rows(block), case.rows(block), strict=True)):
            expected = block in loaded and (planes is None or plane in planes)
            if not np.array_equal(found, full if expected else np.zeros_like(full)):
                faults.append(f"load: {'loaded' if expected else 'other'} block {block} differs in plane {plane}")
    return faults
