# ruff: noqa: E402  (skipped before its imports where torch is absent)
"""The backends on a CUDA device against the oracle, bit for bit."""

import mmap

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st

from kvkernels import HostArena
from kvkernels.cases import CASE_DTYPES, CASE_FORMS, random_case, random_ids, random_slots, round_trip_faults
from kvkernels.choose import best_backend
from kvkernels.cuda_batch import BatchTransfer
from kvkernels.cuda_driver import cuda_driver
from kvkernels.cuda_streams import CudaRuntime
from kvkernels.reference import ReferenceTransfer
from kvkernels.registered import BounceTransfer, RegisteredArena

pytestmark = pytest.mark.gpu


def triton(layout, tensors, arena):
    module = pytest.importorskip("kvkernels.triton_gather")
    row = max(plane.row_bytes for plane in layout.planes)
    options = {"staging_bytes": 6 * 5 * row, "copy_bytes": 4 * row, "group_bytes": row}
    return module.triton_transfer(layout, tensors, arena, CudaRuntime(0), **options)


def batched(layout, tensors, arena):
    return BatchTransfer(layout, tensors, arena, CudaRuntime(0))


def one_by_one(layout, tensors, arena):
    return BatchTransfer(layout, tensors, arena, CudaRuntime(0, batched=False))


MAKERS = {"reference": ReferenceTransfer, "batched": batched, "one_by_one": one_by_one, "triton": triton}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("form", CASE_FORMS)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(CASE_DTYPES))
def test_round_trip(make, form, seed, dtype):
    rng = np.random.default_rng(seed)
    case = random_case(rng, form=form, dtype=dtype, device="cuda")
    assert round_trip_faults(case, make, rng, allocate=CudaRuntime(0).pinned) == []


@pytest.mark.parametrize("make", [batched, triton])
def test_ordered_with_the_engines_stream(make):
    """A store sees what is queued before it; a layer waited for is whole for what is queued after it."""
    rng = np.random.default_rng(4)
    case = random_case(rng, form="joined", block_tokens=128, device="cuda")
    layout = case.layout
    ids = random_ids(rng, layout, 1)
    arena = HostArena(CudaRuntime(0).pinned(layout.slot_bytes), is_pinned=True)
    slots = [[(0, layout.slot_bytes)]]
    before = [memory.clone() for memory in case.memory]
    transfer = make(layout, case.tensors, arena)
    for memory, content in zip(case.memory, before, strict=True):
        memory.zero_()
        torch.cuda._sleep(20_000_000)
        memory.copy_(content)
    transfer.store(ids, slots).wait()
    assert np.array_equal(arena.array, case.slot(ids))
    empty = case.emptied()
    target = make(layout, empty.tensors, arena)
    handle = target.load(slots, ids)
    copies = []
    for layer in range(layout.num_layers):
        handle.wait_layer(layer)
        copies.append(empty.memory[layer].clone())
    torch.cuda.synchronize()
    for copy, full in zip(copies, case.memory, strict=True):
        assert torch.equal(copy[ids].view(torch.uint8), full[ids].view(torch.uint8))
    transfer.close()
    target.close()


@pytest.mark.parametrize("make", [batched, triton])
def test_blocks_may_be_overwritten_behind_wait_sources(make):
    rng = np.random.default_rng(12)
    case = random_case(rng, form="joined", block_tokens=128, device="cuda")
    layout = case.layout
    chunks = layout.num_blocks // layout.chunk_blocks
    ids = random_ids(rng, layout, chunks)
    wanted = np.concatenate([case.slot(mine) for mine in ids.reshape(chunks, -1)])
    arena = HostArena(CudaRuntime(0).pinned(len(wanted)), is_pinned=True)
    transfer = make(layout, case.tensors, arena)
    torch.cuda._sleep(20_000_000)
    handle = transfer.store(ids, [[(i * layout.slot_bytes, layout.slot_bytes)] for i in range(chunks)])
    handle.wait_sources()
    for memory in case.memory:
        memory.zero_()
    handle.wait()
    assert np.array_equal(arena.array, wanted)
    transfer.close()


@pytest.mark.parametrize("make", [batched, triton])
def test_adjacent_slots_across_registered_slices(make):
    """Blocks in order over adjacent slots: whole chunks would be single copies, were it not for the slices' borders."""
    case = random_case(np.random.default_rng(13), form="cross_layer", block_tokens=128, device="cuda")
    layout, runtime = case.layout, CudaRuntime(0)
    chunks = layout.num_blocks // layout.chunk_blocks
    ids = np.arange(chunks * layout.chunk_blocks)
    slots = [[(i * layout.slot_bytes, layout.slot_bytes)] for i in range(chunks)]
    memory = mmap.mmap(-1, -(-chunks * layout.slot_bytes // 4096) * 4096)
    arena = RegisteredArena(memory, cuda_driver(), enter_thread=runtime.enter_thread, slice_bytes=4096, rest=0)
    assert arena.wait().error is None
    empty = case.emptied()
    source, target = make(layout, case.tensors, arena), make(layout, empty.tensors, arena)
    source.store(ids, slots).wait()
    target.load(slots, ids).wait()
    assert all(all(map(np.array_equal, empty.rows(b), case.rows(b))) for b in ids.tolist())
    source.close()
    target.close()
    arena.close()


def test_a_graph_is_captured_while_an_arena_is_registered():
    runtime = CudaRuntime(0)
    memory = mmap.mmap(-1, 64 << 20)
    value = torch.zeros(1, device="cuda")
    arena = RegisteredArena(memory, cuda_driver(), enter_thread=runtime.enter_thread, slice_bytes=1 << 20, rest=1.0)
    graph = torch.cuda.CUDAGraph()
    while arena.progress().pinned_bytes == 0:
        arena.wait(0.0001)
    with torch.cuda.graph(graph):
        for _ in range(2000):
            value += 1
    graph.replay()
    assert arena.wait().error is None
    torch.cuda.synchronize()
    assert value.item() == 2000
    arena.close()


def test_registered_arena_serves_before_and_after_registration():
    rng = np.random.default_rng(6)
    case = random_case(rng, form="joined_token_major", device="cuda")
    layout, runtime = case.layout, CudaRuntime(0)
    slots, nbytes = random_slots(rng, layout, 2)
    ids = random_ids(rng, layout, 2)
    memory = mmap.mmap(-1, -(-nbytes // 4096) * 4096)
    arena = RegisteredArena(memory, cuda_driver(), enter_thread=runtime.enter_thread, slice_bytes=4096)
    for _ in range(2):
        bounce = BounceTransfer(batched(layout, case.tensors, arena), arena, runtime)
        bounce.store(ids, slots).wait()
        empty = case.emptied()
        target = BounceTransfer(batched(layout, empty.tensors, arena), arena, runtime)
        target.load(slots, ids).wait()
        assert all(all(map(np.array_equal, empty.rows(b), case.rows(b))) for b in ids.tolist())
        bounce.close()
        target.close()
        assert arena.wait().error is None
    arena.close()


def test_choice_serves_over_an_arena_still_being_registered():
    case = random_case(np.random.default_rng(8), form="joined", device="cuda")
    layout = case.layout
    memory = mmap.mmap(-1, -(-layout.slot_bytes // 4096) * 4096)
    arena = RegisteredArena(memory, cuda_driver(), enter_thread=CudaRuntime(0).enter_thread, slice_bytes=4096)
    choice = best_backend(layout, case.tensors, arena)
    ids = np.arange(layout.chunk_blocks)
    choice.transfer.store(ids, [[(0, layout.slot_bytes)]]).wait()
    assert np.array_equal(arena.array[: layout.slot_bytes], case.slot(ids))
    choice.transfer.close()
    arena.close()
    assert choice.profile["backend"] in {"triton", "cuda_batch", "reference"}
    assert all("error" not in curve for curve in choice.profile["curves"].values())
