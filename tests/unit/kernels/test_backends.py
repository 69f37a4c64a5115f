# ruff: noqa: E402  (skipped before its imports where torch is absent)
"""Backends that need no GPU against the oracle, bit for bit, on every layout."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from pipelines import faults_of_blocks_far_apart

from kvkernels import HostArena, RequestError, describe
from kvkernels.cases import CASE_DTYPES, CASE_FORMS, random_case, random_ids, random_slots, round_trip_faults
from kvkernels.cuda_batch import BatchTransfer
from kvkernels.reference import ReferenceTransfer
from kvkernels.streams import HostRuntime


def memmove(layout, tensors, arena):
    return BatchTransfer(layout, tensors, arena, HostRuntime(), batch_rows=3)


MAKERS = {"reference": ReferenceTransfer, "memmove": memmove}
BACKENDS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@BACKENDS
@pytest.mark.parametrize("form", CASE_FORMS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(CASE_DTYPES), tokens=st.sampled_from([16, 32, 64, 128]))
def test_round_trip(make, form, seed, dtype, tokens):
    rng = np.random.default_rng(seed)
    case = random_case(rng, form=form, dtype=dtype, block_tokens=tokens)
    assert round_trip_faults(case, make, rng) == []


@BACKENDS
def test_blocks_may_be_gigabytes_apart(make):
    assert faults_of_blocks_far_apart(make) == ([], ())


@BACKENDS
@pytest.mark.parametrize("form", CASE_FORMS)
def test_layer_by_layer_equals_whole(make, form):
    rng = np.random.default_rng(11)
    case = random_case(rng, form=form)
    layout = case.layout
    ids = random_ids(rng, layout, 2)
    slots, nbytes = random_slots(rng, layout, 2)
    whole, layered = HostArena(np.zeros(nbytes, np.uint8)), HostArena(np.zeros(nbytes, np.uint8))
    make(layout, case.tensors, whole).store(ids, slots).wait()
    for layer in range(layout.num_layers):
        make(layout, case.tensors, layered).store(ids, slots, planes=layout.planes_of_layer(layer)).wait()
    assert np.array_equal(whole.array, layered.array)
    empty = case.emptied()
    transfer = make(layout, empty.tensors, whole)
    for layer in range(layout.num_layers):
        handle = transfer.load(slots, ids, planes=layout.planes_of_layer(layer))
        handle.wait_layer(layer)
        assert handle.done()
    for block in ids.tolist():
        assert all(map(np.array_equal, empty.rows(block), case.rows(block)))


@BACKENDS
def test_one_layer_leaves_the_others_alone(make):
    rng = np.random.default_rng(3)
    case = random_case(rng, form="layers_outermost")
    layout = case.layout
    ids = random_ids(rng, layout, 1)
    arena = HostArena(np.zeros(layout.slot_bytes, np.uint8))
    make(layout, case.tensors, arena).store(ids, [[(0, layout.slot_bytes)]], planes=range(1, 2)).wait()
    starts = layout.plane_starts()
    assert arena.array[starts[1] : starts[2]].any()
    assert not arena.array[: starts[1]].any()
    assert not arena.array[starts[2] :].any()


@BACKENDS
def test_a_wrong_block_id_changes_bytes(make):
    """The negative control of all the comparisons above."""
    rng = np.random.default_rng(7)
    case = random_case(rng, form="joined")
    layout = case.layout
    ids = random_ids(rng, layout, 1)
    other = np.setdiff1d(np.arange(layout.num_blocks), ids)
    arena = HostArena(np.zeros(layout.slot_bytes, np.uint8))
    slots = [[(0, layout.slot_bytes)]]
    make(layout, case.tensors, arena).store(ids, slots).wait()
    right = arena.array.copy()
    assert np.array_equal(right, case.slot(ids))
    make(layout, case.tensors, arena).store([*ids[:-1], other[0]], slots).wait()
    assert not np.array_equal(arena.array, right)


@pytest.fixture
def refused():
    tensors = [torch.zeros(10, 2, 16, 8, dtype=torch.bfloat16) for _ in range(2)]
    layout = describe(tensors, num_blocks=10, block_tokens=16, chunk_tokens=32)
    arena = HostArena(np.zeros(4 * layout.slot_bytes, np.uint8))
    return layout, tensors, arena


@BACKENDS
@pytest.mark.parametrize(
    ("ids", "slots", "planes", "words"),
    [
        ([0, 1, 2], [0, 1], None, "whole chunks"),
        ([0], [0], None, "whole chunks"),
        ([0, 10], [0], None, "cache of 10 blocks"),
        ([-2, 3], [0], None, "cache of 10 blocks"),
        ([0, 1], [4], None, "outside the arena"),
        ([0, 1], [0], range(3), "not contiguous planes"),
        ([0, 1], [0], range(0, 2, 2), "not contiguous planes"),
    ],
)
def test_bad_requests_copy_nothing(make, refused, ids, slots, planes, words):
    layout, tensors, arena = refused
    arena.array[:] = 7
    places = [[(slot * layout.slot_bytes, layout.slot_bytes)] for slot in slots]
    transfer = make(layout, tensors, arena)
    with pytest.raises(RequestError, match=words):
        transfer.store(ids, places, planes=planes)
    with pytest.raises(RequestError, match=words):
        transfer.load(places, ids, planes=planes)
    assert (arena.array == 7).all()
    assert not any(tensor.any() for tensor in tensors)


@BACKENDS
def test_repeated_ids_are_refused_on_load_only(make, refused):
    layout, tensors, arena = refused
    transfer = make(layout, tensors, arena)
    slots = [[(0, layout.slot_bytes)]]
    transfer.store([4, 4], slots).wait()
    with pytest.raises(RequestError, match="twice"):
        transfer.load(slots, [4, 4])


@BACKENDS
def test_a_load_may_leave_blocks_out_and_a_store_may_not(make, refused):
    layout, tensors, arena = refused
    transfer = make(layout, tensors, arena)
    slots = [[(0, layout.slot_bytes)], [(layout.slot_bytes, layout.slot_bytes)]]
    with pytest.raises(RequestError, match="from -1 to 3"):
        transfer.store([0, 1, -1, 3], slots)
    arena.array[:] = 7
    transfer.load(slots, [-1, -1, -1, -1]).wait()
    assert not any(tensor.any() for tensor in tensors)
    transfer.load(slots, [-1, 5, -1, -1]).wait()
    assert all(
        bool((tensor[block].view(torch.uint8) == (7 if block == 5 else 0)).all())
        for tensor in tensors
        for block in range(10)
    )


@BACKENDS
def test_overlapping_slots_are_refused_on_store_only(make, refused):
    layout, tensors, arena = refused
    transfer = make(layout, tensors, arena)
    slots = [[(0, layout.slot_bytes)], [(8, layout.slot_bytes)]]
    with pytest.raises(RequestError, match="overlap"):
        transfer.store([0, 1, 2, 3], slots)
    transfer.load(slots, [0, 1, 2, 3]).wait()


@BACKENDS
def test_nothing_to_copy(make, refused):
    layout, tensors, arena = refused
    transfer = make(layout, tensors, arena)
    handle = transfer.load([], [])
    handle.wait()
    handle.wait_layer(0)
    handle.wait_sources()
    assert handle.done()
    assert transfer.store([], []).done()
