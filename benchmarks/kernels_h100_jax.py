# ruff: noqa: PLC0415  (JAX may be absent)
"""The JAX transfer on one CUDA GPU. For kernels_h100.py."""

import time

import numpy as np
import torch
from kernels_h100_bench import BLOCK, BLOCKS, CHUNK, HEAD_DIM, HEADS, LAYERS, SEED, seconds_of

from kvkernels import HostArena, describe
from kvkernels.cases import CASE_DTYPES, random_case, random_ids, random_slots
from kvkernels.reference import ReferenceTransfer


def jax_random_shapes(bench, budget_s):
    """JAX on the GPU against the reference on the CPU, over the same random bytes."""
    import jax.numpy as jnp
    import ml_dtypes

    from kvkernels.jax_pallas import JaxTransfer

    forms = ("joined", "planes_nhd", "stacked", "mla", "cross_layer", "layers_outermost")
    began = time.perf_counter()
    checked = 0
    while checked < len(forms) or time.perf_counter() - began < budget_s:
        case = random_case(bench.rng, form=forms[checked % len(forms)], dtype=CASE_DTYPES[checked % len(CASE_DTYPES)])
        layout = case.layout
        name = layout.dtype
        dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
        arrays = [jnp.asarray(m.view(torch.uint8).numpy().view(dtype).reshape(m.shape)) for m in case.memory]
        chunks = layout.num_blocks // layout.chunk_blocks
        ids = random_ids(bench.rng, layout, chunks)
        slots, nbytes = random_slots(bench.rng, layout, chunks)
        wanted, got = HostArena(np.zeros(nbytes, np.uint8)), HostArena(np.zeros(nbytes, np.uint8))
        ReferenceTransfer(layout, case.tensors, wanted).store(ids, slots).wait()
        JaxTransfer(layout, arrays, got).store(ids, slots).wait()
        if not np.array_equal(wanted.array, got.array):
            raise AssertionError(f"JAX store differs from the reference: {layout.fingerprint()}")
        empty = case.emptied()
        ReferenceTransfer(layout, empty.tensors, wanted).load(slots, ids).wait()
        loaded = JaxTransfer(layout, [jnp.zeros_like(array) for array in arrays], got)
        loaded.load(slots, ids).wait()
        for mine, theirs in zip(loaded.arrays, empty.memory, strict=True):
            if np.asarray(mine).tobytes() != theirs.view(torch.uint8).numpy().tobytes():
                raise AssertionError(f"JAX load differs from the reference: {layout.fingerprint()}")
        checked += 1
        if time.perf_counter() - began > 3 * budget_s:
            break
    return {"caches": checked, "faults": 0, "seconds": round(time.perf_counter() - began, 1)}


def jax_whole(bench, tokens):
    """Store and load of Qwen3-8B's cache held by JAX."""
    import jax
    import jax.numpy as jnp

    from kvkernels.jax_pallas import JaxTransfer

    keys = jax.random.split(jax.random.key(SEED), LAYERS)
    shape = (BLOCKS, BLOCK, HEADS, 2 * HEAD_DIM)
    arrays = [jax.random.bits(key, shape, np.uint16).view(jnp.bfloat16) for key in keys]
    layout = describe(arrays, num_blocks=BLOCKS, block_tokens=BLOCK, chunk_tokens=CHUNK, block_dim=0, order="NHD")
    chunks = tokens // CHUNK
    ids, slots = bench.ids[: chunks * layout.chunk_blocks], bench.adjacent[:chunks]
    nbytes = chunks * layout.slot_bytes
    transfer = JaxTransfer(layout, arrays, bench.arena)
    store = seconds_of(lambda: transfer.store(ids, slots).wait(), repeats=2)
    load = seconds_of(lambda: transfer.load(slots, ids).wait(), repeats=2)
    return {
        "tokens": chunks * CHUNK,
        "store_gbps": round(nbytes / store / 1e9, 2),
        "load_gbps": round(nbytes / load / 1e9, 2),
        "store_ratio": round(nbytes / store / 1e9 / bench.rates["store"], 4),
        "load_ratio": round(nbytes / load / 1e9 / bench.rates["load"], 4),
    }
