# ruff: noqa: E402  (skipped before its imports where JAX is absent)
"""The Pallas kernels interpreted against NumPy, and lowered (not run) for the accelerators they are meant for."""

import contextlib
import inspect
from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkernels import HostArena, LayoutError, RequestError, describe
from kvkernels.jax_pallas import JaxTransfer, gather_rows, scatter_rows

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.uint8)
BLOCKS, TOKENS, CHUNK_BLOCKS = 9, 16, 2

FORMS = {
    "per_layer": ([(BLOCKS, TOKENS, 4, 8)] * 3, {}),
    "odd_row": ([(BLOCKS, TOKENS, 3, 5)] * 2, {}),
    "kv_planes": ([(2, BLOCKS, TOKENS, 2, 32)] * 2, {}),
    "mla": ([(BLOCKS, TOKENS, 72)] * 2, {}),
    "layers_outermost": ([(4, BLOCKS, TOKENS, 2, 8)], {"num_layers": 4, "layer_dim": 0, "block_dim": 1}),
    "cross_layer": ([(BLOCKS, 4, TOKENS, 2, 8)], {"num_layers": 4, "layer_dim": 1}),
}
ROWS = {
    "kv_planes": lambda host, block: [h[kv, block] for h in host for kv in range(2)],
    "layers_outermost": lambda host, block: [host[0][layer, block] for layer in range(4)],
}


def cache(form, dtype, rng):
    shapes, hints = FORMS[form]
    itemsize = np.dtype(dtype).itemsize
    host = [
        rng.integers(0, 256, (*shape[:-1], shape[-1] * itemsize), dtype=np.uint8).view(dtype).reshape(shape)
        for shape in shapes
    ]
    arrays = [jnp.asarray(h) for h in host]
    layout = describe(arrays, num_blocks=BLOCKS, block_tokens=TOKENS, chunk_tokens=TOKENS * CHUNK_BLOCKS, **hints)
    return host, arrays, layout


def rows_of(form, host, block):
    """The block's rows in plane order, as bytes."""
    rows = ROWS.get(form, lambda host, block: [h[block] for h in host])(host, block)
    return [np.ascontiguousarray(row).view(np.uint8).ravel() for row in rows]


def slot_of(form, host, ids):
    by_block = [rows_of(form, host, block) for block in ids]
    return np.concatenate([rows[plane] for plane in range(len(by_block[0])) for rows in by_block])


@pytest.mark.parametrize("platform", ["interpret", "interpret_tpu"])
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES), chunks=st.integers(1, 4))
def test_round_trip(platform, form, seed, dtype, chunks):
    rng = np.random.default_rng(seed)
    host, arrays, layout = cache(form, dtype, rng)
    ids = rng.permutation(BLOCKS)[: chunks * CHUNK_BLOCKS]
    size = layout.slot_bytes
    order = rng.permutation(2 * chunks)
    half = size // 2 + 1  # an odd piece border, usually inside a row
    slots = [[(int(a) * size, half), (int(b) * size, size)] for a, b in order.reshape(chunks, 2)]
    arena = HostArena(rng.integers(0, 256, 2 * chunks * size, dtype=np.uint8))
    options = {"platform": platform, "staging_bytes": 2 * size}
    JaxTransfer(layout, arrays, arena, **options).store(ids, slots).wait()
    for slot, mine in zip(slots, ids.reshape(chunks, -1), strict=True):
        got = np.concatenate([arena.array[o : o + n] for o, n in slot])[:size]
        assert np.array_equal(got, slot_of(form, host, mine))
    empty = JaxTransfer(layout, [jnp.zeros_like(array) for array in arrays], arena, **options)
    ids = np.where(rng.random(len(ids)) < rng.choice([0, 0.3, 1]), -1, ids)  # some blocks may be left out
    handle = empty.load(slots, ids)
    handle.wait()
    assert handle.done()
    found = [np.asarray(array) for array in empty.arrays]
    for block in range(BLOCKS):
        for got, wanted in zip(rows_of(form, found, block), rows_of(form, host, block), strict=True):
            assert np.array_equal(got, wanted if block in ids else np.zeros_like(wanted))


def test_a_layer_alone():
    rng = np.random.default_rng(0)
    host, arrays, layout = cache("kv_planes", jnp.bfloat16, rng)
    arena = HostArena(np.zeros(layout.slot_bytes, np.uint8))
    transfer = JaxTransfer(layout, arrays, arena)
    transfer.store([3, 1], [[(0, layout.slot_bytes)]], planes=layout.planes_of_layer(1)).wait()
    half = layout.slot_bytes // 2
    assert not arena.array[:half].any()
    assert np.array_equal(arena.array[half:], slot_of("kv_planes", host, [3, 1])[half:])


def test_bad_requests_are_refused():
    _, arrays, layout = cache("per_layer", jnp.bfloat16, np.random.default_rng(0))
    arena = HostArena(np.zeros(layout.slot_bytes, np.uint8))
    transfer = JaxTransfer(layout, arrays, arena)
    with pytest.raises(RequestError, match="twice"):
        transfer.load([[(0, layout.slot_bytes)]], [2, 2])
    with pytest.raises(RequestError, match="whole chunks"):
        transfer.store([2], [[(0, layout.slot_bytes)]])


def test_blocks_that_are_not_dense_are_refused():
    views = np.zeros((BLOCKS, 3, TOKENS, 8), np.float16)
    layout = describe(
        [views[:, layer] for layer in range(3)], num_blocks=BLOCKS, block_tokens=TOKENS, chunk_tokens=TOKENS
    )
    with pytest.raises(LayoutError, match="dense"):
        JaxTransfer(layout, [jnp.zeros((BLOCKS, TOKENS, 8), jnp.float16)] * 3, HostArena(np.zeros(9, np.uint8)))


@pytest.mark.parametrize(
    ("elements", "itemsize", "fits"),
    [(2**31 - 512, 1, True), (2**31, 1, False), (2**32, 1, False), (2**31, 2, False), (2**31 + 512, 2, True)],
)
def test_an_array_whose_elements_outnumber_the_kernels_offsets_is_refused(elements, itemsize, fits):
    _, arrays, layout = cache("per_layer", jnp.uint8, np.random.default_rng(0))
    transfer = JaxTransfer(layout, arrays, HostArena(np.zeros(layout.slot_bytes, np.uint8)))
    large = SimpleNamespace(shape=(elements // 512, TOKENS, 4, 8), nbytes=elements * itemsize)
    refused = contextlib.nullcontext() if fits else pytest.raises(LayoutError, match=f"{elements} elements overflows")
    with refused:
        transfer.bind([arrays[0], large, arrays[2]])
    assert (transfer.arrays[1] is large) == fits


def h100():
    """What newer JAX wants to know of a GPU that is not there."""
    device = getattr(jax.sharding, "AbstractDevice", None)
    if device is None or "platform" not in inspect.signature(device).parameters:
        return contextlib.nullcontext()
    abstract = device(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("platform", "target", "call"), [("gpu", "cuda", "triton"), ("tpu", "tpu", "tpu_custom_call")])
def test_kernels_lower_for_accelerators(dtype, platform, target, call):
    ids = jax.ShapeDtypeStruct((32,), jnp.int32)
    staged = jax.ShapeDtypeStruct((32, 32768), f"uint{8 * np.dtype(dtype).itemsize}")
    rows = jax.ShapeDtypeStruct((2000, 32768), dtype)
    gather = jax.jit(lambda ids, rows: gather_rows(ids, rows, platform=platform))
    scatter = jax.jit(lambda ids, staged, rows: scatter_rows(ids, staged, rows, platform=platform))
    with h100() if target == "cuda" else contextlib.nullcontext():
        for operation, shapes in ((gather, (ids, rows)), (scatter, (ids, staged, rows))):
            lowered = operation.trace(*shapes).lower(lowering_platforms=(target,))
            assert call in lowered.as_text()
