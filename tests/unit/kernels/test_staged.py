# ruff: noqa: E402  (skipped before its imports where torch is absent)
"""The staged pipeline's scheduling, with streams that run in any order that its events allow."""

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from kvkernels import HostArena, LayoutError, describe
from kvkernels.cases import random_case, random_ids, random_slots
from kvkernels.cuda_batch import BatchTransfer
from kvkernels.pieces import load_pieces, plane_groups, store_pieces
from kvkernels.reference import plane_views
from kvkernels.staged import StagedTransfer


class TorchMover:
    """Rows by torch indexing, in single bytes."""

    def __init__(self, layout, tensors):
        self.views = [view.view(torch.uint8) for view in plane_views(layout, tensors)]
        self.blocks = layout.chunk_blocks

    def rows(self, ids, piece, staging):
        staged = staging[: piece.rows * piece.row_bytes].view(
            len(piece.chunks), len(piece.planes), len(piece.blocks), piece.row_bytes
        )
        for c, chunk in enumerate(piece.chunks):
            start = chunk * self.blocks
            for p, plane in enumerate(piece.planes):
                yield self.views[plane], ids[start + piece.blocks.start : start + piece.blocks.stop], staged[c, p]

    def gather(self, ids, piece, staging):
        for view, blocks, rows in self.rows(ids, piece, staging):
            rows.copy_(view[blocks])

    def scatter(self, ids, piece, staging):
        for view, blocks, rows in self.rows(ids, piece, staging):
            view[blocks] = rows


def staged(runtime, layout, tensors, arena, *, rows=3, lanes=2, buffers=2):
    row = max(plane.row_bytes for plane in layout.planes)
    return StagedTransfer(
        layout,
        arena,
        runtime,
        TorchMover(layout, tensors),
        name="staged",
        staging_bytes=2 * buffers * rows * row,
        buffers=buffers,
        lanes=lanes,
        copy_bytes=row * 4,
    )


def batched(runtime, layout, tensors, arena):
    return BatchTransfer(layout, tensors, arena, runtime, batch_rows=2)


def setting(seed, chunks=2):
    rng = np.random.default_rng(seed)
    case = random_case(rng, block_tokens=16)
    slots, nbytes = random_slots(rng, case.layout, chunks)
    return case, random_ids(rng, case.layout, chunks), slots, HostArena(np.zeros(nbytes, np.uint8))


def stored_right(case, ids, slots, arena):
    size = case.layout.slot_bytes
    got = [np.concatenate([arena.array[o : o + n] for o, n in slot])[:size] for slot in slots]
    wanted = [case.slot(mine) for mine in ids.reshape(len(slots), -1)]
    return all(map(np.array_equal, got, wanted))


def loaded_right(case, empty, ids):
    return all(all(map(np.array_equal, empty.rows(b), case.rows(b))) for b in ids.tolist())


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
def test_a_layer_is_whole_once_waited_for_and_not_before_earlier_work(lazy_runtime, make, seed):
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


@pytest.mark.parametrize("make", [staged, batched])
def test_what_streams_read_outlives_a_dropped_handle(lazy_runtime, make):
    case, ids, slots, arena = setting(5)
    runtime = lazy_runtime(5)
    transfer = make(runtime, case.layout, case.tensors, arena)
    transfer.store(ids, slots)
    gc.collect()
    runtime.run_all()
    assert stored_right(case, ids, slots, arena)


@pytest.mark.parametrize("make", [staged, batched])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_stores_and_loads_interleaved(lazy_runtime, make, seed):
    """Many transfers over the same staging, the handles awaited at the end."""
    rng = np.random.default_rng(seed)
    case = random_case(rng, block_tokens=16)
    empty = case.emptied()
    layout, runtime = case.layout, lazy_runtime(seed)
    rounds = min(4, layout.num_blocks // layout.chunk_blocks)
    ids = rng.permutation(layout.num_blocks)[: rounds * layout.chunk_blocks].reshape(rounds, -1)
    slots, nbytes = random_slots(rng, layout, rounds)
    arena = HostArena(np.zeros(nbytes, np.uint8))
    source = make(runtime, layout, case.tensors, arena)
    target = make(runtime, layout, empty.tensors, arena)
    for mine, slot in zip(ids, slots, strict=True):
        source.store(mine, [slot]).wait()
    handles = [target.load([slot], mine) for mine, slot in zip(ids, slots, strict=True)]
    handles += [source.store(mine, [slot]) for mine, slot in zip(ids, slots, strict=True)]
    target.close()
    source.close()
    assert all(handle.done() for handle in handles)
    assert loaded_right(case, empty, ids.ravel())


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
