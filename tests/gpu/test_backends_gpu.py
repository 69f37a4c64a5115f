# ruff: noqa: E402  (skipped before its imports where torch is absent)
"""The backends on a CUDA device against the oracle, bit for bit."""

import mmap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.vllm.transfers import CudaTransfers
from kvkernels import HostArena, describe
from kvkernels.cases import CASE_DTYPES, CASE_FORMS, random_case, random_ids, random_slots, round_trip_faults
from kvkernels.choose import backend_of, best_backend
from kvkernels.cuda_batch import BatchTransfer
from kvkernels.cuda_driver import cuda_driver
from kvkernels.cuda_streams import CudaRuntime
from kvkernels.packed_cases import fill, packable_case, packed_round_trip_faults, rejected_chunks
from kvkernels.packing import PackedRow, packed_layout
from kvkernels.pieces import StagedPiece
from kvkernels.reference import ReferenceTransfer
from kvkernels.reference_pack import pack_rows, unpack_rows
from kvkernels.registered import BounceTransfer, RegisteredArena
from kvkernels.staged import STAGING_BYTES
from kvkernels.transfer import check_request

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
def test_times_are_the_devices(make):
    """What a transfer had to wait for is none of its time, and a stream stands still only where it came too early."""
    rng, runtime = np.random.default_rng(4), CudaRuntime(0)
    case = random_case(rng, form="joined", block_tokens=128, device="cuda")
    layout, ids = case.layout, random_ids(rng, case.layout, 1)
    arena = HostArena(runtime.pinned(layout.slot_bytes), is_pinned=True)
    slots = [[(0, layout.slot_bytes)]]
    transfer = make(layout, case.tensors, arena)
    long = 400_000_000  # cycles: 0.2 s at 2 GHz
    torch.cuda._sleep(long)
    store = transfer.store(ids, slots)
    store.wait()
    assert 0 < store.measured().seconds < 0.05
    assert store.measured().stalled == 0
    load = transfer.load(slots, ids)
    torch.cuda._sleep(long)
    load.wait_layer(layout.num_layers - 1)
    torch.cuda.synchronize()
    assert 0 < load.measured().seconds < 0.05
    assert load.measured().stalled == 0
    busy = runtime.stream(urgent=False)
    busy.launch(lambda: torch.cuda._sleep(long))
    request = check_request(layout, arena, ids, slots, None, loading=True)
    late = transfer.start(request, loading=True, after=busy.record())
    for layer in range(layout.num_layers):
        late.wait_layer(layer)
    torch.cuda.synchronize()
    assert 0.1 < late.measured().stalled < 0.5
    transfer.close()


@pytest.mark.parametrize("rest_s", [0.0, 0.003, 3600.0])
@pytest.mark.parametrize("make", [batched, triton])
def test_blocks_may_be_overwritten_behind_wait_sources(make, rest_s):
    rng = np.random.default_rng(12)
    case = random_case(rng, form="joined", block_tokens=128, device="cuda")
    layout = case.layout
    chunks = layout.num_blocks // layout.chunk_blocks
    ids = random_ids(rng, layout, chunks)
    wanted = np.concatenate([case.slot(mine) for mine in ids.reshape(chunks, -1)])
    arena = HostArena(CudaRuntime(0).pinned(len(wanted)), is_pinned=True)
    transfer = make(layout, case.tensors, arena)
    torch.cuda._sleep(20_000_000)
    slots = [[(i * layout.slot_bytes, layout.slot_bytes)] for i in range(chunks)]
    handle = transfer.store(ids, slots, rest_s=rest_s)
    handle.wait_sources()
    for memory in case.memory:
        memory.zero_()
    handle.wait()
    assert np.array_equal(arena.array, wanted)
    transfer.close()


@pytest.mark.parametrize("make", [batched, triton])
def test_a_store_rests_behind_the_engines_work(make):
    case = random_case(np.random.default_rng(14), form="joined", block_tokens=128, device="cuda")
    layout = case.layout
    ids = random_ids(np.random.default_rng(14), layout, 1)
    arena = HostArena(CudaRuntime(0).pinned(layout.slot_bytes), is_pinned=True)
    transfer = make(layout, case.tensors, arena)
    slots = [[(0, layout.slot_bytes)]]
    transfer.store(ids, slots).wait()  # its kernels have run
    arena.array[:] = 0
    for rest_s in (0.0, 0.1):
        torch.cuda._sleep(20_000_000)
        handle = transfer.store(ids, slots, rest_s=rest_s)
        torch.cuda.current_stream().synchronize()
        worked = time.perf_counter()
        assert not (rest_s and arena.array.any())
        handle.wait()
        assert time.perf_counter() - worked >= 0.9 * rest_s
        assert np.array_equal(arena.array, case.slot(ids))
        arena.array[:] = 0
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


def test_a_graph_is_captured_while_a_server_comes_back():
    """Its arena is mapped by another thread then, as `kvcore.vllm` does it, and what copies is built over it."""
    case = packable_case(np.random.default_rng(22), form="joined", spoilt=0.0, device="cuda")
    packed = packed_layout(case.layout)
    memory = np.frombuffer(mmap.mmap(-1, -(-packed.slot_bytes // 4096) * 4096), np.uint8)
    cache = SimpleNamespace(tensors=case.tensors, packed=True, layout=lambda chunk_tokens: case.layout)
    value, graph, built = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph(), []

    def come_back(begun):
        begun.wait()
        while not captured.is_set():
            built.append(CudaTransfers(cache, 0, memory, "triton_pack"))
            built[-1].close()
            built[-1].unpin()

    begun, captured = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(come_back, begun)
        with torch.cuda.graph(graph):
            begun.set()
            while not built and not coming.done():
                value += 1
            for _ in range(1000):
                value += 1
        captured.set()
        coming.result()
    graph.replay()
    torch.cuda.synchronize()
    assert value.item() > 1000
    assert built


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


def triton_pack(layout, tensors, arena, **options):
    module = pytest.importorskip("kvkernels.triton_pack")
    row = max(plane.row_bytes for plane in packed_layout(layout).planes)
    small = {"staging_bytes": 6 * 5 * row, "copy_bytes": 4 * row, "group_bytes": row}
    return module.triton_pack_transfer(layout, tensors, arena, CudaRuntime(0), **{**small, **options})


@pytest.mark.parametrize("form", CASE_FORMS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32), spoilt=st.sampled_from([0.0, 0.2]))
def test_packed_round_trip(form, seed, spoilt):
    rng = np.random.default_rng(seed)
    case = packable_case(rng, form=form, spoilt=spoilt, device="cuda")
    pinned = CudaRuntime(0).pinned
    assert packed_round_trip_faults(case, triton_pack, triton_pack, rng, allocate=pinned) == []


def rows_to_pack(rng, count, values):
    """Rows of values that can be packed but for each sixth, which is of random bits; specials among them."""
    bits = torch.from_numpy(rng.standard_normal((count, values)).astype(np.float32)).bfloat16().view(torch.int16)
    anything = torch.from_numpy(rng.integers(-(1 << 15), 1 << 15, (count, values), dtype=np.int16))
    bits = torch.where(torch.from_numpy(rng.random((count, values)) < 0.02), anything & -32641, bits)  # exponent 0
    escapes = torch.from_numpy(rng.random((count, values)) < rng.choice([0, 0.001, 0.012], (count, 1)))
    bits = torch.where(escapes, anything & -28673, bits)  # exponents below 32
    bits[3::6, 0] = 0x7FC1  # a NaN, which makes escapes of its whole vector
    bits[5::6] = anything[5::6]
    return bits.contiguous().view(torch.uint8)


@pytest.mark.parametrize("vectors", [1, 2, 3, 17, 64, 100, 128, 130, 256, 512])
def test_packed_bytes_equal_the_references(vectors):
    """Bit for bit but for the order of the escapes and what is undefined; and the way back from the reference's."""
    rng = np.random.default_rng(vectors)
    count, row = 96, PackedRow(128 * vectors)
    rows = rows_to_pack(rng, count, row.values)
    wanted, counts = pack_rows(rows)
    tensors = [rows.view(torch.bfloat16).cuda()]
    layout = describe(tensors, num_blocks=count, block_tokens=1, chunk_tokens=1, block_dim=0)
    arena = HostArena(CudaRuntime(0).pinned(count * row.nbytes), is_pinned=True)
    arena.array[:] = 0
    slots = [[(i * row.nbytes, row.nbytes)] for i in range(count)]
    for _ in range(2):  # the first launch is Triton's, later ones are the driver's
        transfer = triton_pack(layout, tensors, arena)
        handles = [transfer.store(range(count), slots) for _ in range(2)]
        for handle in handles:
            handle.wait()
            assert handle.rejected() == tuple(i for i, n in enumerate(counts.tolist()) if n > row.capacity)
        transfer.close()
    got = torch.from_numpy(arena.array.reshape(count, -1).copy())
    good = [i for i, n in enumerate(counts.tolist()) if n <= row.capacity]
    assert 0 < len(good) < count
    assert torch.equal(got[:, :4].contiguous().view(torch.int32)[:, 0], counts)
    for start, size in ((row.bases, row.vectors), (row.codes, row.values // 2), (row.rest, row.values)):
        assert torch.equal(got[good, start : start + size], wanted[good, start : start + size])
    for i in good:
        listed = [
            one[i, 16 : 16 + 4 * int(counts[i])].contiguous().view(torch.int32).sort()[0] for one in (got, wanted)
        ]
        assert torch.equal(*listed)
    assert torch.equal(unpack_rows(got[good], rows.shape[1]), rows[good])
    arena.array.reshape(count, -1)[:] = wanted.numpy()
    tensors[0].zero_()
    transfer = triton_pack(layout, tensors, arena)
    transfer.load([slots[i] for i in good], good).wait()
    assert torch.equal(tensors[0].view(torch.uint8).cpu()[good], rows[good])
    transfer.close()


def test_rejected_chunks_are_named_on_every_launch():
    rng = np.random.default_rng(21)
    case = packable_case(rng, form="joined", device="cuda")
    packed = packed_layout(case.layout)
    chunks = case.layout.num_blocks // case.layout.chunk_blocks
    arena = HostArena(CudaRuntime(0).pinned(chunks * packed.slot_bytes), is_pinned=True)
    slots = [[(i * packed.slot_bytes, packed.slot_bytes)] for i in range(chunks)]
    transfer = triton_pack(case.layout, case.tensors, arena)
    found = 0
    for spoilt in (0.0, 0.1, 0.5, 0.0, 1.0):
        fill(case, rng, spoilt=spoilt)
        ids = random_ids(rng, case.layout, chunks)
        handle = transfer.store(ids, slots)
        handle.wait()
        assert handle.rejected() == rejected_chunks(case, ids)
        found += len(handle.rejected())
    assert found
    transfer.close()


def test_what_is_uploaded_is_whole_and_its_memory_used_again():
    runtime = CudaRuntime(0)
    stream, rng, kept, places = runtime.stream(urgent=True), np.random.default_rng(2), [], set()
    for turn in range(60):
        values = rng.integers(0, 1 << 60, int(rng.integers(1, 5000)))
        kept.append((values, runtime.upload(values, stream)))
        stream.record().synchronize()
        places.add(kept[-1][1].data_ptr())
        for wanted, uploaded in kept:
            assert np.array_equal(uploaded.cpu().numpy(), wanted)
        if turn % 3 == 2:
            kept.clear()
    assert len(places) <= 3 * 4


@pytest.mark.parametrize("take", ["upload", "staging"])
def test_what_is_queued_does_not_write_into_memory_that_is_taken_meanwhile(take):
    """An engine's step is queued, and what it needs for a moment is given back to torch before it runs."""
    values, runtime = np.arange(1024), CudaRuntime(0)
    stream, engine = runtime.stream(urgent=False), torch.cuda.Stream()
    torch.empty(1024, dtype=torch.int64, pin_memory=True)  # is used again: pinning would wait for the device
    with torch.cuda.stream(engine):
        torch.cuda._sleep(200_000_000)
        freed = torch.empty(1024, dtype=torch.int64, device="cuda").fill_(7)
        del freed
        if take == "upload":
            taken = runtime.upload(values, stream)
        else:
            taken = runtime.staging(8 * 1024).view(torch.int64)
            source = torch.from_numpy(values).pin_memory()
            stream.copy(*(np.array([n]) for n in (taken.data_ptr(), source.data_ptr(), 8 * 1024)))
    stream.record().synchronize()
    engine.synchronize()
    assert np.array_equal(taken.cpu().numpy(), values)


@pytest.mark.parametrize("known", [False, True])
def test_the_first_store_beside_a_step(known):
    """Of a backend that nothing has run on: one built for a server that has come back."""
    rng = np.random.default_rng(21)
    case = packable_case(rng, form="joined", spoilt=0.0, device="cuda")
    layout, packed = case.layout, packed_layout(case.layout)
    chunks = layout.num_blocks // layout.chunk_blocks
    arena = HostArena(CudaRuntime(0).pinned(chunks * packed.slot_bytes), is_pinned=True)
    make = backend_of if known else lambda _, *given, **options: best_backend(*given, **options).transfer
    transfer = make("triton_pack", layout, case.tensors, arena, packed=True)
    ids = random_ids(rng, layout, chunks)
    full = [case.rows(b) for b in ids.tolist()]
    slots = [[(i * packed.slot_bytes, packed.slot_bytes)] for i in range(chunks)]
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        for _ in range(8):
            torch.empty(1024, dtype=torch.int64, device="cuda").zero_()
        transfer.store(ids, slots, rest_s=0.003).wait()
    for tensor in case.memory:
        tensor.zero_()
    transfer.load(slots, ids).wait()
    assert all(all(map(np.array_equal, case.rows(b), rows)) for b, rows in zip(ids.tolist(), full, strict=True))
    transfer.close()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ahead", [4, 64])
def test_one_transfer_again_and_again(packed, ahead):
    """Steps the first time, all rows at once from then on; many chunks, any number, both ways at a time."""
    rng, runtime = np.random.default_rng(31 + ahead), CudaRuntime(0)
    blocks, planes = 2048, 6
    tensors = [torch.randn(blocks, 16, 8, 32, device="cuda").bfloat16() for _ in range(planes)]
    layout = describe(tensors, num_blocks=blocks, block_tokens=16, chunk_tokens=64, block_dim=0)
    if packed:
        module = pytest.importorskip("kvkernels.triton_pack")
        size = packed_layout(layout).slot_bytes
    else:
        module = pytest.importorskip("kvkernels.triton_gather")
        size = layout.slot_bytes
    make = module.triton_pack_transfer if packed else module.triton_transfer
    arena = HostArena(runtime.pinned(256 * size), is_pinned=True)
    options = {"staging_bytes": 40 * size, "copy_bytes": size // 3, "group_bytes": size, "ahead": ahead}
    transfer = make(layout, tensors, arena, runtime, **options)
    full = [tensor.clone() for tensor in tensors]
    written = 0
    for _ in range(12):
        chunks = int(rng.integers(1, 128))
        order = torch.from_numpy(rng.permutation(blocks)).cuda()
        mine, spare = order[: 4 * chunks].tolist(), order[4 * chunks : 8 * chunks].tolist()
        at = rng.permutation(256)
        slots = [[(int(i) * size, size)] for i in at[:chunks]]
        more = [[(int(i) * size, size)] for i in at[chunks : 2 * chunks]]
        transfer.store(mine, slots).wait()
        back = transfer.store(spare, more)  # beside the load, into other slots
        back.wait_sources()
        load = transfer.load(slots, spare[::-1])
        load.wait_layer(planes - 1)
        for tensor, before in zip(tensors, full, strict=True):
            assert torch.equal(tensor[spare[::-1]], before[mine])
        load.wait()
        back.wait()
        again = transfer.load(more, spare)
        for layer in range(planes):
            again.wait_layer(layer)
            assert torch.equal(tensors[layer][spare], full[layer][spare])
        again.wait()
        for tensor, before in zip(tensors, full, strict=True):
            assert torch.equal(tensor, before)
        written += sum(len(plan.pieces) for plan in transfer._plans.values() if plan._rows is not None)
    assert written > 500
    transfer.close()


def test_packed_and_ordered_with_the_engines_stream():
    rng = np.random.default_rng(4)
    case = packable_case(rng, form="joined_token_major", device="cuda")
    layout, packed = case.layout, packed_layout(case.layout)
    ids = random_ids(rng, layout, 1)
    arena = HostArena(CudaRuntime(0).pinned(packed.slot_bytes), is_pinned=True)
    slots = [[(0, packed.slot_bytes)]]
    before = [memory.clone() for memory in case.memory]
    transfer = triton_pack(layout, case.tensors, arena)
    for memory, content in zip(case.memory, before, strict=True):
        memory.zero_()
        torch.cuda._sleep(20_000_000)
        memory.copy_(content)
    handle = transfer.store(ids, slots)
    handle.wait_sources()
    for memory in case.memory:
        memory.zero_()
    handle.wait()
    empty = case.emptied()
    target = triton_pack(layout, empty.tensors, arena)
    handle = target.load(slots, ids)
    copies = []
    for layer in range(layout.num_layers):
        handle.wait_layer(layer)
        copies.append(empty.memory[layer].clone())
    torch.cuda.synchronize()
    for copy, full in zip(copies, before, strict=True):
        assert torch.equal(copy[ids].view(torch.uint8), full[ids].view(torch.uint8))
    transfer.close()
    target.close()


def test_packed_slots_are_bounced_until_they_are_registered():
    rng = np.random.default_rng(6)
    case = packable_case(rng, form="joined_token_major", spoilt=0.1, device="cuda")
    layout, runtime = case.layout, CudaRuntime(0)
    chunks = layout.num_blocks // layout.chunk_blocks
    slots, nbytes = random_slots(rng, packed_layout(layout), chunks)
    ids = random_ids(rng, layout, chunks)
    wanted = rejected_chunks(case, ids)
    good = [i for i in range(chunks) if i not in wanted]
    loaded = ids.reshape(chunks, -1)[good].ravel()
    memory = mmap.mmap(-1, -(-nbytes // 4096) * 4096)
    arena = RegisteredArena(memory, cuda_driver(), enter_thread=runtime.enter_thread, slice_bytes=4096)
    for _ in range(2):
        bounce = BounceTransfer(triton_pack(layout, case.tensors, arena), arena, runtime)
        handle = bounce.store(ids, slots)
        handle.wait()
        assert handle.rejected() == wanted
        empty = case.emptied()
        target = BounceTransfer(triton_pack(layout, empty.tensors, arena), arena, runtime)
        target.load([slots[i] for i in good], loaded).wait()
        assert all(all(map(np.array_equal, empty.rows(b), case.rows(b))) for b in loaded.tolist())
        bounce.close()
        target.close()
        assert arena.wait().error is None
    arena.close()


@pytest.mark.parametrize("spoilt", [0.0, 1.0])
def test_the_packing_choice_serves_and_leaves_the_cache_as_it_was(spoilt):
    rng = np.random.default_rng(8)
    case = packable_case(rng, form="joined", spoilt=spoilt, device="cuda")
    layout, packed = case.layout, packed_layout(case.layout)
    before = [memory.clone() for memory in case.memory]
    arena = HostArena(CudaRuntime(0).pinned(packed.slot_bytes), is_pinned=True)
    choice = best_backend(layout, case.tensors, arena, packed=True)
    for memory, content in zip(case.memory, before, strict=True):
        assert torch.equal(memory.view(torch.uint8), content.view(torch.uint8))
    assert choice.profile["backend"] == "triton_pack"
    assert ("error" in choice.profile["curves"]["triton_pack"]) == bool(spoilt)
    fill(case, rng)
    ids = random_ids(rng, layout, 1)
    choice.transfer.store(ids, [[(0, packed.slot_bytes)]]).wait()
    full = [case.rows(b) for b in ids.tolist()]
    for memory in case.memory:
        memory.zero_()
    choice.transfer.load([[(0, packed.slot_bytes)]], ids).wait()
    assert all(all(map(np.array_equal, case.rows(b), rows)) for b, rows in zip(ids.tolist(), full, strict=True))
    choice.transfer.close()


def test_a_known_backend_is_built_by_a_thread_that_never_saw_the_device():
    """As when a server has come back: over its arena, which is being pinned, beside a step under way."""
    rng = np.random.default_rng(9)
    case = packable_case(rng, form="joined", spoilt=0.0, device="cuda")
    layout, packed = case.layout, packed_layout(case.layout)
    memory = mmap.mmap(-1, -(-packed.slot_bytes // 4096) * 4096)
    runtime = CudaRuntime(0)

    def build():
        arena = RegisteredArena(memory, cuda_driver(), enter_thread=runtime.enter_thread, slice_bytes=4096)
        with torch.cuda.device(runtime.device):
            return arena, backend_of("triton_pack", layout, case.tensors, arena, packed=True)

    with ThreadPoolExecutor(1) as pool:
        arena, transfer = pool.submit(build).result()
    ids = random_ids(rng, layout, 1)
    full = [case.rows(b) for b in ids.tolist()]
    transfer.store(ids, [[(0, packed.slot_bytes)]]).wait()
    assert arena.wait().error is None
    for tensor in case.memory:
        tensor.zero_()
    transfer.load([[(0, packed.slot_bytes)]], ids).wait()
    assert all(all(map(np.array_equal, case.rows(b), rows)) for b, rows in zip(ids.tolist(), full, strict=True))
    held = torch.cuda.memory_allocated()
    transfer.close()
    del transfer
    assert held - torch.cuda.memory_allocated() >= STAGING_BYTES, "its staging is free before another is made"
    arena.close()


@pytest.mark.parametrize("programs", [1, 8, 16, 32])
@pytest.mark.parametrize("escapes", [0.0, 1e-4, 1e-2])
def test_rates_of_the_packing_kernels(programs, escapes):
    """Unpacked bytes a second of the kernels alone, between the cache and staging; shown with -s."""
    module = pytest.importorskip("kvkernels.triton_pack")
    runtime, blocks, planes = CudaRuntime(0), 256, 4
    tensors = [torch.randn(blocks, 16, 8, 256, device="cuda").bfloat16() for _ in range(planes)]
    for tensor in tensors:
        tensor[torch.rand(tensor.shape, device="cuda") < escapes] = 1e-6
    layout = describe(tensors, num_blocks=blocks, block_tokens=16, chunk_tokens=256, block_dim=0)
    packed = packed_layout(layout)
    mover = module.TritonPackMover(layout, tensors, programs=programs)
    stream = runtime.stream(urgent=False)
    chunks = blocks // layout.chunk_blocks
    piece = StagedPiece(range(planes), range(chunks), range(layout.chunk_blocks), packed.planes[0].row_bytes)
    staging = runtime.staging(piece.rows * piece.row_bytes)
    order = torch.randperm(blocks, device="cuda")
    marks = runtime.pinned(4 * chunks).view(np.int32)
    marks[:] = 0
    torch.cuda.synchronize()
    nbytes = layout.block_bytes * blocks
    before = [tensor.clone() for tensor in tensors]
    rates = {}
    for way in ("pack", "unpack"):
        for turn in range(4):
            began = time.perf_counter()
            for _ in range(4):
                if way == "pack":
                    mover.gather(stream, order, piece, staging, marks)
                else:
                    mover.scatter(stream, order, piece, staging)
            stream.record().synchronize()
            rates[way] = nbytes * 4 / (time.perf_counter() - began) / 1e9 if turn else 0.0
        if way == "pack":
            for tensor in tensors:
                tensor.zero_()
            torch.cuda.synchronize()
    assert not marks.any()
    for tensor, full in zip(tensors, before, strict=True):
        assert torch.equal(tensor.view(torch.int16), full.view(torch.int16))
    print(f"\n{programs} programs, {escapes:g} escapes: " + ", ".join(f"{w} {r:.1f} GB/s" for w, r in rates.items()))


@pytest.mark.parametrize("loading", [True, False], ids=["load", "store"])
@pytest.mark.parametrize("kind", ["batched", "triton", "triton_pack"])
def test_an_engines_own_copies_get_in_between(kind, loading):
    """A step's input and its tokens go by small copies, which must not come behind a whole transfer."""
    pytest.importorskip("triton")
    from kvkernels.triton_gather import triton_transfer  # noqa: PLC0415
    from kvkernels.triton_pack import triton_pack_transfer  # noqa: PLC0415

    make = {"batched": BatchTransfer, "triton": triton_transfer, "triton_pack": triton_pack_transfer}[kind]
    runtime, blocks = CudaRuntime(0), 1024
    tensors = [torch.randn(blocks, 16, 8, 256, device="cuda").bfloat16() for _ in range(24)]
    layout = describe(tensors, num_blocks=blocks, block_tokens=16, chunk_tokens=256, block_dim=0)
    size = (packed_layout(layout) if kind == "triton_pack" else layout).slot_bytes
    arena = HostArena(runtime.pinned(blocks // 16 * size), is_pinned=True)
    slots = [[(chunk * size, size)] for chunk in range(blocks // 16)]
    transfer = make(layout, tensors, arena, runtime)
    transfer.store(range(blocks), slots).wait()
    host, device = torch.zeros(4096).pin_memory(), torch.zeros(4096, device="cuda")
    for _ in range(3):  # kernels are compiled in the first turn
        torch.cuda.synchronize()
        handle = transfer.load(slots, range(blocks)) if loading else transfer.store(range(blocks), slots)
        for _ in range(6):
            target, source = (device, host) if loading else (host, device)
            target.copy_(source, non_blocking=True)
            device.add_(1)
        torch.cuda.current_stream().synchronize()
        before_its_end = not handle.done()
        handle.wait()
    assert before_its_end
    transfer.close()
