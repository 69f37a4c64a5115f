# ruff: noqa: E402  (skipped before its imports where torch is absent)
"""The staged pipeline's scheduling, with streams that run in any order that its events allow."""

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from pipelines import TorchMover, batched, loaded_right, setting, staged, stored_right

from kvkernels import DeviceError, HostArena, LayoutError, describe
from kvkernels.cases import random_case, random_ids, random_slots
from kvkernels.handles import StreamHandle
from kvkernels.pieces import load_pieces, plane_groups, store_pieces
from kvkernels.pipelined import CopyLanes
from kvkernels.staged import StagedTransfer
from kvkernels.streams import HostRuntime
from kvkernels.submit import ThreadSubmitter
from kvkernels.transfer import Measured


@pytest.mark.parametrize("make", [staged, batched])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_order_that_events_allow_gives_the_same_bytes(lazy_runtime, make, seed):
    case, ids, slots, arena = setting(seed)
    runtime = lazy_runtime(seed)
    handle = make(runtime, case.layout, case.tensors, arena).store(ids, slots)
    assert not handle.done()
    handle.wait()
    assert handle.done()
    assert stored_right(case, ids, slots, arena)
    empty = case.emptied()
    handle = make(runtime, case.layout, empty.tensors, arena).load(slots, ids)
    handle.wait()
    assert loaded_right(case, empty, ids)


@pytest.mark.parametrize("make", [staged, batched])
def test_without_waits_bytes_are_wrong(lazy_runtime, make):
    """The negative control of the test above: these streams do find a missing wait."""
    wrong = 0
    for seed in range(8):
        case, ids, slots, arena = setting(seed)
        runtime = lazy_runtime(seed, honours_waits=False)
        transfer = make(runtime, case.layout, case.tensors, arena)
        before = [memory.clone() for memory in case.memory]
        # The engine's own work, still queued, is what writes the blocks.
        runtime.main.queue.append((None, lambda case=case, before=before: restore(case, before)))
        for memory in case.memory:
            memory.zero_()
        transfer.store(ids, slots)
        runtime.run_all()
        wrong += not stored_right(case, ids, slots, arena)
    assert wrong


def restore(case, before):
    for memory, content in zip(case.memory, before, strict=True):
        memory.copy_(content)


class SlicedArena(HostArena):
    """Pinned in slices, each an allocation of its own to the device."""

    def __init__(self, buffer, runtime, slice_bytes):
        super().__init__(buffer, is_pinned=True)
        self._slice_bytes = slice_bytes
        for start in range(0, len(self.array), slice_bytes):
            runtime.register(self.address + start, min(slice_bytes, len(self.array) - start))

    @property
    def split_bytes(self):
        return self._slice_bytes


@pytest.mark.parametrize("make", [staged, batched])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.floats(0.02, 2.0), adjacent=st.booleans())
def test_no_copy_crosses_from_one_registered_slice_into_the_next(lazy_runtime, make, seed, share, adjacent):
    rng = np.random.default_rng(seed)
    case = random_case(rng, block_tokens=16)
    layout, runtime = case.layout, lazy_runtime(seed)
    chunks = layout.num_blocks // layout.chunk_blocks
    slots, nbytes = random_slots(rng, layout, chunks)
    ids = random_ids(rng, layout, chunks)
    if adjacent:
        slots, ids = [[(i * layout.slot_bytes, layout.slot_bytes)] for i in range(chunks)], np.sort(ids)
    slice_bytes = max(1, int(share * layout.slot_bytes))
    arena = SlicedArena(np.zeros(max(nbytes, chunks * layout.slot_bytes), np.uint8), runtime, slice_bytes)
    empty = case.emptied()
    options = {"rows": 64} if make is staged else {}
    make(runtime, layout, case.tensors, arena, **options).store(ids, slots).wait()
    assert stored_right(case, ids, slots, arena)
    make(runtime, layout, empty.tensors, arena, **options).load(slots, ids).wait()
    assert loaded_right(case, empty, ids)


@pytest.mark.parametrize("make", [staged, batched])
@pytest.mark.parametrize("seed", range(8))
def test_a_store_sees_the_engines_earlier_work(lazy_runtime, make, seed):
    case, ids, slots, arena = setting(seed)
    runtime = lazy_runtime(seed)
    transfer = make(runtime, case.layout, case.tensors, arena)
    before = [memory.clone() for memory in case.memory]
    for memory in case.memory:
        memory.zero_()
    runtime.main.queue.append((None, lambda: restore(case, before)))
    transfer.store(ids, slots).wait()
    assert stored_right(case, ids, slots, arena)


@pytest.mark.parametrize("make", [staged, batched])
@pytest.mark.parametrize("seed", range(12))
def test_a_layer_is_whole_once_waited_for_and_not_before_earlier_work(lazy_runtime, monkeypatch, make, seed):
    monkeypatch.setattr("kvkernels.staged._PLANNED_PIECES", (1 + seed % 3, 1 + seed % 2))
    case, ids, slots, arena = setting(seed)
    runtime = lazy_runtime(seed)
    make(runtime, case.layout, case.tensors, arena).store(ids, slots).wait()
    empty = case.emptied()
    transfer = make(runtime, case.layout, empty.tensors, arena)
    untouched, whole = [], []
    # Attention of an earlier step still reads the blocks that the load will overwrite.
    runtime.main.queue.append(
        (None, lambda: untouched.append(not any(m.view(torch.uint8).any() for m in empty.memory)))
    )
    handle = transfer.load(slots, ids)
    for layer in range(case.layout.num_layers):
        handle.wait_layer(layer)
        planes = case.layout.planes_of_layer(layer)

        def attend(planes=planes):
            whole.append(all(np.array_equal(empty.rows(b)[p], case.rows(b)[p]) for b in ids.tolist() for p in planes))

        runtime.main.queue.append((None, attend))
    runtime.run_all()
    assert untouched == [True]
    assert whole == [True] * case.layout.num_layers


def first_copy(runtime):
    """Where the time of the first copy is put, by the runtime's clock."""
    times = []

    def moved(move, *ranges):
        times.append(runtime.steps)
        move(*ranges)

    for stream in runtime.streams:
        stream._move = partial(moved, stream._move)
    return times


@pytest.mark.parametrize("make", [staged, batched])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_transfer_is_timed_from_its_first_copy_to_its_last_work(lazy_runtime, make, seed):
    case, ids, slots, arena = setting(seed)
    runtime = lazy_runtime(seed)
    transfer = make(runtime, case.layout, case.tensors, arena)
    runtime.main.queue.extend((None, lambda: None) for _ in range(50))  # what the engine still computes
    copies = first_copy(runtime)
    handle = transfer.store(ids, slots)
    handle.wait()
    measured = handle.measured()
    assert measured.stalled == 0
    assert runtime.steps - copies[0] <= measured.seconds < runtime.steps - 50, "what comes before it is none of it"


@pytest.mark.parametrize("make", [staged, batched])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), busy=st.sampled_from([0, 3, 200]))
def test_a_stall_is_what_a_layer_came_too_late(lazy_runtime, make, seed, busy):
    case, ids, slots, arena = setting(seed)
    runtime = lazy_runtime(seed)
    transfer = make(runtime, case.layout, case.tensors, arena)
    handle = transfer.load(slots, ids)
    came, went = [], []
    for layer in range(case.layout.num_layers):
        runtime.main.queue.extend((None, lambda: None) for _ in range(busy))
        runtime.main.queue.append((None, lambda: came.append(runtime.steps)))
        handle.wait_layer(layer)
        runtime.main.queue.append((None, lambda: went.append(runtime.steps)))
    runtime.run_all()
    measured = handle.measured()
    assert 0 < measured.seconds <= runtime.steps
    assert 0 <= measured.stalled <= sum(b - a for a, b in zip(came, went, strict=True))


def test_stalls_are_told_by_the_waits_that_came_before_their_layers(lazy_runtime):
    """Layer 0 arrives at 5 and layer 1 at 9, and a stream comes for them earlier or later."""

    class At:
        def __init__(self, when):
            self.when = when

        def query(self):
            return self.when is not None

        def since(self, earlier):
            return self.when - earlier.when

        def fault(self):
            return None

    class Stream:
        def __init__(self, times):
            self.times = iter(times)

        def record(self, *, timed):
            assert timed
            return At(next(self.times))

        def wait(self, event):
            pass

    layout, (early, late) = setting(1)[0].layout, (At(5.0), At(9.0))
    planes = [layout.planes_of_layer(layer).stop for layer in range(layout.num_layers)]

    def measured(times, *, begun=True, error=None):
        runtime = lazy_runtime(0)
        runtime.main = Stream(times)
        handle = StreamHandle(planes, runtime, runtime.submitter("load", urgent=True))
        if begun:
            handle.begun(At(1.0))
        handle.arrived(planes[0], [early])
        handle.arrived(planes[1], [late])
        handle.ended([late], [late])
        handle.wait_layer(0)
        handle.wait_layer(0)
        handle.wait_layer(1)
        if error is not None:
            handle.failed(error, [late])
        return handle.measured()

    assert measured([3.0, 8.0]) == Measured(8.0, 2.0 + 1.0)
    assert measured([6.0, 8.5]) == Measured(8.0, 0.5)
    assert measured([3.0, 12.0]) == Measured(8.0, 2.0)
    assert measured([3.0, None]) == Measured(8.0, 2.0)  # it has not come yet, and need not wait when it comes
    assert measured([3.0, 8.0], begun=False) is None
    assert measured([3.0, 8.0], error=DeviceError("no")) is None


def store_then_overwrite(lazy_runtime, make, seed, *, ordered):
    """A store, and work on the engine's stream that overwrites its blocks at once."""
    case, ids, slots, arena = setting(seed)
    runtime = lazy_runtime(seed)
    wanted = [case.slot(mine) for mine in ids.reshape(len(slots), -1)]
    transfer = make(runtime, case.layout, case.tensors, arena)
    handle = transfer.store(ids, slots)
    if ordered:
        handle.wait_sources()
    runtime.main.queue.append((None, lambda: [memory.zero_() for memory in case.memory]))
    runtime.run_all()
    assert handle.done()
    transfer.close()
    got = [np.concatenate([arena.array[o : o + n] for o, n in slot])[: case.layout.slot_bytes] for slot in slots]
    return all(map(np.array_equal, got, wanted))


@pytest.mark.parametrize("make", [staged, batched])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_blocks_may_be_overwritten_behind_wait_sources(lazy_runtime, make, seed):
    assert store_then_overwrite(lazy_runtime, make, seed, ordered=True)


@pytest.mark.parametrize("make", [staged, batched])
def test_without_wait_sources_some_order_stores_what_came_later(lazy_runtime, make):
    assert not all(store_then_overwrite(lazy_runtime, make, seed, ordered=False) for seed in range(10))


@pytest.mark.parametrize("make", [staged, batched])
@pytest.mark.parametrize("seed", range(8))
def test_slots_may_be_overwritten_behind_wait_sources(lazy_runtime, make, seed):
    case, ids, slots, arena = setting(seed)
    runtime = lazy_runtime(seed)
    make(runtime, case.layout, case.tensors, arena).store(ids, slots).wait()
    empty = case.emptied()
    transfer = make(runtime, case.layout, empty.tensors, arena)
    transfer.load(slots, ids).wait_sources()
    runtime.main.queue.append((None, lambda: arena.array.fill(0)))
    runtime.run_all()
    transfer.close()
    assert loaded_right(case, empty, ids)


@pytest.mark.parametrize("make", [staged, batched])
@pytest.mark.parametrize("seed", range(6))
def test_a_failure_half_way_is_told_and_spoils_nothing_later(lazy_runtime, make, seed):
    case, ids, slots, arena = setting(seed)
    runtime = lazy_runtime(seed)
    transfer = make(runtime, case.layout, case.tensors, arena)
    runtime.copies_left = seed % 2
    handle = transfer.store(ids, slots)
    for told in (handle.wait, handle.wait_sources, lambda: handle.wait_layer(0)):
        with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
            told()
    with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
        handle.done()
    runtime.copies_left = None
    later = transfer.store(ids, slots)
    later.wait()
    assert later.done()
    assert stored_right(case, ids, slots, arena)
    transfer.close()


def test_copies_that_a_failed_load_left_queued_do_not_reach_the_next_ones_staging(lazy_runtime):
    failed = 0
    for seed in range(60):
        case, ids, slots, arena = setting(seed)
        runtime = lazy_runtime(seed)
        source = staged(runtime, case.layout, case.tensors, arena)
        source.store(ids, slots).wait()
        empty = case.emptied()
        transfer = staged(runtime, case.layout, empty.tensors, arena, rows=2 + seed % 4)
        runtime.copies_left = 1 + seed % 5
        first = transfer.load(slots[::-1], ids)
        runtime.submitters[-1].until(lambda first=first: first._ended)
        failed += first._error is not None
        runtime.copies_left = None
        transfer.load(slots, ids).wait()
        transfer.close()
        runtime.run_all()
        assert loaded_right(case, empty, ids)
    assert failed > 20


@pytest.mark.parametrize("make", [staged, batched])
@pytest.mark.parametrize("left", ["copies_left", "calls_left"])
def test_a_store_that_failed_writes_no_page_once_it_is_over(lazy_runtime, make, left):
    """Whichever call failed: its pages are somebody else's then."""
    failed = 0
    for seed in range(60):
        case, ids, slots, arena = setting(seed)
        runtime = lazy_runtime(seed)
        transfer = make(runtime, case.layout, case.tensors, arena)
        setattr(runtime, left, 1 + seed % (5 if left == "copies_left" else 23))
        handle = transfer.store(ids, slots)
        with suppress(DeviceError):
            handle.wait()
            continue
        failed += 1
        setattr(runtime, left, None)
        before = arena.array.copy()
        runtime.run_all()
        assert np.array_equal(before, arena.array)
    assert failed > 20


def test_a_load_that_failed_leaves_no_bytes_of_the_next_one_in_its_blocks(lazy_runtime, monkeypatch):
    """Its last kernel is on its stream, and no event behind it: the staging is full until that has run."""
    failed = 0
    for seed in range(40):
        case, ids, slots, arena = setting(seed)
        runtime, empty = lazy_runtime(seed), case.emptied()
        staged(runtime, case.layout, case.tensors, arena).store(ids, slots).wait()
        transfer = staged(runtime, case.layout, empty.tensors, arena)
        kernels = runtime.slowest = transfer._in.kernels
        mine, others = ids.reshape(2, -1)
        answers = iter([None] * (seed % 4) + [DeviceError("cuEventCreate: CUDA_ERROR_OUT_OF_MEMORY (2)")])

        def record(*, timed=False, answers=answers, whole=kernels.record):
            if error := next(answers, None):
                raise error
            return whole(timed=timed)

        with monkeypatch.context() as patch:
            patch.setattr(kernels, "record", record)
            first = transfer.load(slots[:1], mine)
            runtime.submitters[-1].until(lambda first=first: first._ended)
        failed += first._error is not None
        transfer.load(slots[1:], others).wait()
        runtime.run_all()
        assert loaded_right(case, empty, others)
        for block in mine.tolist():
            rows = zip(empty.rows(block), case.rows(block), strict=True)
            assert all(not np.any(got) or np.array_equal(got, wanted) for got, wanted in rows)
    assert failed > 20


@pytest.mark.parametrize("make", [staged, batched])
@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_is_in_the_queues_than_allowed(lazy_runtime, make, ahead):
    case, ids, slots, arena = setting(2)
    runtime = lazy_runtime(2)
    options = {"rows": 1} if make is staged else {"call_copies": 1}
    empty = case.emptied()
    make(runtime, case.layout, case.tensors, arena, **options).store(ids, slots).wait()
    transfer = make(runtime, case.layout, empty.tensors, arena, ahead=ahead, **options)
    handle = transfer.load(slots, ids)
    most = 0
    while runtime.step():
        most = max(most, sum(stream.copies_queued for stream in runtime.streams))
    assert 0 < most <= 2 * ahead  # a copy that crosses a page border is two
    assert handle.done()
    transfer.close()
    assert loaded_right(case, empty, ids)


class ThreadedRuntime(HostRuntime):
    """The host, with transfers handed over by threads as on a GPU; `slow_s` makes every kernel take that long."""

    def __init__(self, slow_s=0.0):
        super().__init__()
        self.slow_s = slow_s

    def submitter(self, name, *, urgent):
        return ThreadSubmitter(name, self.enter_thread, inline_s=self.slow_s)


class SlowMover(TorchMover):
    slow_s = 0.0

    def scatter(self, stream, ids, piece, staging):
        time.sleep(self.slow_s)
        super().scatter(stream, ids, piece, staging)


def test_the_call_returns_early_and_a_layer_is_awaited_until_it_was_handed_over():
    case = random_case(np.random.default_rng(3), form="layers_outermost", block_tokens=16)
    layout = case.layout
    ids, slots = np.arange(layout.chunk_blocks), [[(0, layout.slot_bytes)]]
    arena = HostArena(np.zeros(layout.slot_bytes, np.uint8))
    staged(ThreadedRuntime(), layout, case.tensors, arena).store(ids, slots).wait()
    empty = case.emptied()
    row = max(plane.row_bytes for plane in layout.planes)
    mover = SlowMover(layout, empty.tensors)
    mover.slow_s = 0.05
    options = {"name": "slow", "staging_bytes": 2 * 3 * layout.chunk_blocks * row, "copy_bytes": 1, "group_bytes": 1}
    transfer = StagedTransfer(layout, arena, ThreadedRuntime(), mover, **options)
    began = time.perf_counter()
    handle = transfer.load(slots, ids)
    called = time.perf_counter() - began
    assert not handle.done()
    for layer in range(layout.num_layers):
        handle.wait_layer(layer)
        assert all(np.array_equal(empty.rows(b)[layer], case.rows(b)[layer]) for b in ids.tolist())
    took = time.perf_counter() - began
    assert called < 0.05 * layout.num_layers <= took
    handle.wait()
    transfer.close()


@pytest.mark.parametrize("make", [staged, batched])
def test_threads_that_store_and_load_over_one_transfer(make):
    rng = np.random.default_rng(9)
    case = random_case(rng, form="joined", block_tokens=16)
    layout = case.layout
    chunks = layout.num_blocks // layout.chunk_blocks
    ids = rng.permutation(layout.num_blocks)[: chunks * layout.chunk_blocks].reshape(chunks, -1)
    slots, nbytes = random_slots(rng, layout, chunks)
    arena = HostArena(np.zeros(nbytes, np.uint8))
    empty = case.emptied()
    source = make(ThreadedRuntime(), layout, case.tensors, arena)
    target = make(ThreadedRuntime(), layout, empty.tensors, arena)

    def there_and_back(chunk):
        for _ in range(5):
            source.store(ids[chunk], [slots[chunk]]).wait()
            handle = target.load([slots[chunk]], ids[chunk])
            handle.wait_layer(layout.num_layers - 1)
        handle.wait()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(there_and_back, range(chunks)))
    source.close()
    target.close()
    assert loaded_right(case, empty, ids.ravel())


@pytest.mark.parametrize("make", [staged, batched])
def test_what_streams_read_outlives_a_dropped_handle(lazy_runtime, make):
    case, ids, slots, arena = setting(5)
    runtime = lazy_runtime(5)
    transfer = make(runtime, case.layout, case.tensors, arena)
    transfer.store(ids, slots)
    gc.collect()
    runtime.run_all()
    assert stored_right(case, ids, slots, arena)


def test_an_event_that_cannot_be_waited_for_keeps_no_other_transfer_from_being(lazy_runtime):
    case, ids, slots, arena = setting(5)
    runtime = lazy_runtime(5)
    transfer = staged(runtime, case.layout, case.tensors, arena)
    first, *others = [transfer.store(ids, slots) for _ in range(3)]
    closed = []
    for one in runtime.submitters:
        one.close = partial(closed.append, one)
    runtime.submitters[0].until(lambda: first._ended)

    def refuse():
        raise DeviceError("cuEventSynchronize: CUDA_ERROR_UNKNOWN (999)")

    first._last[0].synchronize = refuse
    with pytest.raises(DeviceError, match="UNKNOWN"):
        transfer.close()
    assert all(one._ended and all(event.reached for event in one._last) for one in others)
    assert len(closed) == len(runtime.submitters)


@pytest.mark.parametrize("make", [staged, batched])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_stores_and_loads_interleaved(lazy_runtime, make, seed):
    """Many over the same staging, the handles awaited at the end: into some blocks, and out of others."""
    rng = np.random.default_rng(seed)
    case = random_case(rng, block_tokens=16)
    layout, runtime = case.layout, lazy_runtime(seed)
    rounds = min(4, layout.num_blocks // layout.chunk_blocks // 2)
    ids = rng.permutation(layout.num_blocks)[: 2 * rounds * layout.chunk_blocks]
    sources, targets = ids.reshape(2, rounds, -1)
    slots, nbytes = random_slots(rng, layout, 2 * rounds)
    arena = HostArena(np.zeros(nbytes, np.uint8))
    transfer = make(runtime, layout, case.tensors, arena)
    for mine, slot in zip(sources, slots[:rounds], strict=True):
        transfer.store(mine, [slot]).wait()
    loaded = [case.slot(mine) for mine in sources]
    for memory in case.memory:
        anything = rng.integers(0, 256, memory.nbytes, dtype=np.uint8)
        memory.view(torch.uint8).copy_(torch.from_numpy(anything).view(memory.view(torch.uint8).shape))
    stored = [case.slot(mine) for mine in sources]
    handles = []
    for source, target, behind, ahead in zip(sources, targets, slots[:rounds], slots[rounds:], strict=True):
        handles += [transfer.load([behind], target), transfer.store(source, [ahead])]
    transfer.close()
    assert all(handle.done() for handle in handles)
    assert all(map(np.array_equal, map(case.slot, targets), loaded))
    got = [np.concatenate([arena.array[o : o + n] for o, n in slot])[: layout.slot_bytes] for slot in slots]
    assert all(map(np.array_equal, got, [*loaded, *stored]))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_plan_is_kept_for_requests_of_its_kind(lazy_runtime, data):
    """One transfer, asked for any number of chunks and any planes, again and again."""
    seed = data.draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    case = random_case(rng, block_tokens=16)
    layout, runtime = case.layout, lazy_runtime(seed)
    most = min(4, layout.num_blocks // layout.chunk_blocks)
    every = range(len(layout.planes))
    slots, nbytes = random_slots(rng, layout, most)
    arena = HostArena(np.zeros(nbytes, np.uint8))
    empty = case.emptied()
    source = staged(runtime, layout, case.tensors, arena)
    target = staged(runtime, layout, empty.tensors, arena)
    asks = st.tuples(st.integers(1, most), st.integers(0, every[-1]), st.integers(1, len(every)))
    for chunks, first, stop in data.draw(st.lists(asks, min_size=1, max_size=6)):
        planes = range(min(first, stop - 1), stop)
        ids = random_ids(rng, layout, chunks)
        for one in (arena.array, *(memory.view(torch.uint8) for memory in empty.memory)):
            one.fill_(0) if isinstance(one, torch.Tensor) else one.fill(0)
        source.store(ids, slots[:chunks], planes=planes).wait()
        target.load(slots[:chunks], ids, planes=planes).wait()
        for block in ids.tolist():
            got, wanted = empty.rows(block), case.rows(block)
            assert all(np.array_equal(got[plane], wanted[plane]) for plane in planes)
            assert not any(np.any(got[plane]) for plane in every if plane not in planes)
    source.close()
    target.close()


def test_not_all_plans_are_kept(lazy_runtime, monkeypatch):
    monkeypatch.setattr("kvkernels.staged._KEPT_PLANS", 3)
    case, ids, slots, arena = next(made for made in map(setting, range(50)) if len(made[0].layout.planes) > 4)
    transfer = staged(lazy_runtime(1), case.layout, case.tensors, arena)
    for stop in range(1, len(case.layout.planes) + 1):
        transfer.store(ids, slots, planes=range(stop)).wait()
        assert 0 < len(transfer._plans) <= 3
    assert stored_right(case, ids, slots, arena)


def qwen3_8b():
    tensors = [np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), (2000, 8, 16, 512), (65536, 8192, 512, 1))] * 36
    return describe(tensors, num_blocks=2000, block_tokens=16, chunk_tokens=256)


def test_loads_start_and_end_with_single_layers():
    layout = qwen3_8b()
    pieces = list(load_pieces(layout, 125, range(36), 40 << 20, copy_bytes=4 << 20, group_bytes=8 << 20))
    groups = []
    for piece in pieces:
        if not groups or groups[-1] != piece.planes:
            groups.append(piece.planes)
    sizes = [len(group) for group in groups]
    assert sizes == [1, 1, 2, 4, 4, 4, 4, 4, 4, 4, 2, 1, 1]
    assert [plane for group in groups for plane in group] == list(range(36))
    assert all(piece.rows * piece.row_bytes <= 40 << 20 for piece in pieces)


@pytest.mark.parametrize(("chunks", "sizes"), [(1, [8, 8, 10, 8, 2]), (2, [4, 4, 8, 10, 5, 4, 1]), (8, [1, 1, 2, 4])])
def test_small_loads_take_few_steps(chunks, sizes):
    options = {"copy_bytes": 16 << 20, "group_bytes": 8 << 20}
    pieces = load_pieces(qwen3_8b(), chunks, range(36), 40 << 20, **options)
    assert [len(piece.planes) for piece in pieces][: len(sizes)] == sizes


def test_stores_copy_whole_chunks_where_they_fit():
    pieces = list(store_pieces(qwen3_8b(), 125, range(36), 40 << 20))
    assert len(pieces) == 125
    assert all(piece.chunk_bytes == 36 << 20 for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_pieces_cover_everything_once_and_fit(seed, data):
    layout = random_case(np.random.default_rng(seed), block_tokens=16).layout
    row = max(plane.row_bytes for plane in layout.planes)
    capacity = data.draw(st.integers(row, 20 * row))
    start = data.draw(st.integers(0, len(layout.planes)))
    planes = range(start, data.draw(st.integers(start, len(layout.planes))))
    chunks = data.draw(st.integers(0, 4))
    copy_bytes = data.draw(st.integers(1, 8 * row))
    group_bytes = data.draw(st.integers(1, 40 * row))
    for pieces in (
        store_pieces(layout, chunks, planes, capacity),
        load_pieces(layout, chunks, planes, capacity, copy_bytes=copy_bytes, group_bytes=group_bytes),
    ):
        covered = []
        for piece in pieces:
            assert piece.rows * piece.row_bytes <= capacity
            covered += [(p, c, b) for p in piece.planes for c in piece.chunks for b in piece.blocks]
        assert sorted(covered) == [(p, c, b) for p in planes for c in range(chunks) for b in range(layout.chunk_blocks)]


@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 9))
def test_groups_partition_the_planes(count, unit, most):
    groups = list(plane_groups(range(3, 3 + count), unit=min(unit, most), most=most))
    assert [plane for group in groups for plane in group] == list(range(3, 3 + count))
    assert all(1 <= len(group) <= most for group in groups)


def test_a_row_larger_than_staging_is_refused(lazy_runtime):
    case, _, _, arena = setting(1)
    with pytest.raises(LayoutError, match="does not fit"):
        StagedTransfer(case.layout, arena, lazy_runtime(0), None, name="staged", staging_bytes=64, buffers=2)


def test_copies_take_turns_each_behind_the_one_before():
    """Whatever a stream waits for, others get in: no stream ever has two copies in a row, and none overtakes."""
    told = []

    class Lane:
        def __init__(self, name):
            self.name = name

        def wait(self, event):
            told.append((self.name, "waits for", event))

        def record(self, *, timed=False):
            told.append((self.name, "records"))
            return f"{self.name}{len(told)}"

    class Streams:
        def __init__(self):
            self.made = []

        def stream(self, *, urgent):
            assert not urgent, "an urgent one would always go first"
            self.made.append(Lane("ab"[len(self.made)]))
            return self.made[-1]

    lanes = CopyLanes(Streams())
    turns, events = [], []
    for _ in range(4):
        turns.append(lanes.turn().name)
        events.append(lanes.record())
    assert turns in (list("abab"), list("baba"))
    assert [row for row in told if row[1] == "waits for"] == [
        (name, "waits for", event) for name, event in zip(turns[1:], events, strict=False)
    ]
    told.clear()
    failed = lanes.turn().name  # and its copy was never recorded
    over = lanes.give_up()
    assert told[0] == (failed, "waits for", events[-1])
    assert {row[0] for row in told if row[1] == "records"} == set("ab")
    assert over.startswith(failed)
