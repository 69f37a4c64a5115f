# ruff: noqa: E402  (skipped before its imports where torch is absent)
"""An arena that is pinned bit by bit, and transfers over it meanwhile."""

import contextlib
import mmap
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvkernels import DeviceError, HostArena, RequestError
from kvkernels.cases import random_case, random_ids, random_slots
from kvkernels.cuda_batch import BatchTransfer
from kvkernels.registered import BounceTransfer, RegisteredArena, populate
from kvkernels.streams import HostRuntime

SLICE = 4096


class Registrar:
    """Pins one slice for every permit; fails at the address it is told to."""

    def __init__(self, permits=0, fail_at=None):
        self.permits = threading.Semaphore(permits)
        self.fail_at = fail_at
        self.ranges = {}

    def register(self, address, nbytes):
        self.permits.acquire()
        if len(self.ranges) == self.fail_at:
            raise DeviceError("cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY (2)")
        self.ranges[address] = nbytes

    def unregister(self, address):
        del self.ranges[address]


def test_slices_are_pinned_in_order_and_unpinned_on_close():
    registrar = Registrar(permits=100)
    memory = mmap.mmap(-1, 3 * SLICE + 4096 // 2)
    arena = RegisteredArena(memory, registrar, slice_bytes=SLICE)
    done = arena.wait(10)
    assert (done.pinned_bytes, done.total_bytes, done.error) == (len(memory), len(memory), None)
    assert registrar.ranges == {arena.address + i * SLICE: min(SLICE, len(memory) - i * SLICE) for i in range(4)}
    assert arena.pinned(np.array([0]), np.array([len(memory)]))
    arena.close()
    assert registrar.ranges == {}
    assert not arena.pinned(np.array([0]), np.array([1]))


def test_an_arena_that_is_pinned_to_its_end_tells_of_nothing():
    told = []
    arena = RegisteredArena(np.zeros(SLICE, np.uint8), Registrar(permits=9), slice_bytes=SLICE, ended_early=told.append)
    arena.wait(10)
    arena.close()
    assert told == []


def test_a_slice_that_stays_pinned_keeps_no_other():
    registrar = Registrar(permits=100)
    arena = RegisteredArena(np.zeros(4 * SLICE, np.uint8), registrar, slice_bytes=SLICE)
    arena.wait(10)
    stays = arena.address + SLICE
    del registrar.ranges[stays]
    whole = registrar.unregister

    def unregister(address):
        if address == stays:
            raise DeviceError("cuMemHostUnregister: no")
        whole(address)

    registrar.unregister = unregister
    with pytest.raises(DeviceError, match="Unregister: no"):
        arena.close()
    assert registrar.ranges == {}


def test_what_is_not_pinned_yet_is_known():
    registrar = Registrar(permits=2)
    arena = RegisteredArena(np.zeros(4 * SLICE, np.uint8), registrar, slice_bytes=SLICE)
    while arena.progress().pinned_bytes < 2 * SLICE:
        arena.wait(0.01)
    assert arena.pinned(np.array([0, SLICE]), np.array([10, SLICE]))
    assert not arena.pinned(np.array([0, SLICE]), np.array([10, SLICE + 1]))
    registrar.permits.release(2)
    assert arena.wait(10).pinned_bytes == 4 * SLICE
    arena.close()


def test_a_failed_slice_ends_registration_and_is_told():
    registrar = Registrar(permits=100, fail_at=1)
    told = []
    arena = RegisteredArena(np.zeros(3 * SLICE, np.uint8), registrar, slice_bytes=SLICE, ended_early=told.append)
    progress = arena.wait(10)
    assert told == [progress.error]
    assert progress.pinned_bytes == SLICE
    assert "slice at 4096 of 12288 bytes: cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY" in progress.error
    arena.close()
    assert registrar.ranges == {}


def test_a_device_that_cannot_be_used_is_told():
    def enter():
        raise RuntimeError("CUDA error: no CUDA-capable device is detected")

    told, memory = [], np.zeros(SLICE, np.uint8)
    progress = RegisteredArena(memory, Registrar(), enter_thread=enter, ended_early=told.append).wait(10)
    assert told == [progress.error]
    assert progress.pinned_bytes == 0
    assert "no CUDA-capable device" in progress.error


def test_registration_holds_off_while_transfers_are_under_way_but_not_for_ever():
    registrar = Registrar(permits=0)
    arena = RegisteredArena(np.zeros(40 * SLICE, np.uint8), registrar, slice_bytes=SLICE, rest=0)
    arena.defer(10)
    registrar.permits.release(100)
    time.sleep(0.35)
    assert 2 <= len(registrar.ranges) < 20
    arena.close()


def test_registration_rests_in_proportion():
    class Slow(Registrar):
        def register(self, address, nbytes):
            time.sleep(0.01)
            super().register(address, nbytes)

    began = time.monotonic()
    arena = RegisteredArena(np.zeros(5 * SLICE, np.uint8), Slow(permits=100), slice_bytes=SLICE, rest=3.0)
    arena.wait(10)
    assert time.monotonic() - began >= 5 * 0.01 + 4 * 0.03
    arena.close()


def resident_pages(memory, pages):
    """How many pages of a private mapping this process has touched, from /proc."""
    address = np.frombuffer(memory, np.uint8).ctypes.data
    with open("/proc/self/pagemap", "rb") as table:
        table.seek(address // mmap.PAGESIZE * 8)
        entries = np.frombuffer(table.read(8 * pages), np.uint64)
    return int((entries >> np.uint64(63)).sum())


def test_populate_faults_pages_in_and_keeps_their_bytes():
    pages = 64
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    memory[:3] = b"abc"
    populate(np.frombuffer(memory, np.uint8).ctypes.data, len(memory))
    assert memory[:4] == b"abc\0"
    try:
        assert resident_pages(memory, pages) in {pages, 1}  # 1: a kernel without MADV_POPULATE_WRITE
    except OSError:
        pytest.skip("no /proc/self/pagemap")


class Splitting(HostArena):
    """Pinned up to an offset, in slices."""

    def __init__(self, buffer, upto):
        super().__init__(buffer)
        self.upto = upto

    @property
    def split_bytes(self):
        return SLICE

    def pinned(self, offsets, lengths):
        return bool((offsets + lengths <= self.upto).all())


@pytest.fixture
def pinned_runtime(lazy_runtime):
    """A lazy runtime that needs pinned memory, usable from two threads."""

    class PinnedOnly(lazy_runtime):
        needs_pinned = True

    return PinnedOnly


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("held", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_unpinned_slots_go_through_the_bounce_buffer(pinned_runtime, seed, share, held):
    rng = np.random.default_rng(seed)
    case = random_case(rng, block_tokens=16)
    chunks = min(5, case.layout.num_blocks // case.layout.chunk_blocks)
    ids = random_ids(rng, case.layout, chunks)
    slots, nbytes = random_slots(rng, case.layout, chunks)
    arena = Splitting(np.zeros(nbytes, np.uint8), int(share * nbytes))
    runtime = pinned_runtime(seed)
    for start in range(0, arena.upto, SLICE):
        runtime.register(arena.address + start, min(SLICE, nbytes - start))
    options = {"bounce_bytes": 2 * held * case.layout.slot_bytes, "threads": 2}
    bounce = BounceTransfer(BatchTransfer(case.layout, case.tensors, arena, runtime), arena, runtime, **options)
    before = [memory.clone() for memory in case.memory]
    for memory in case.memory:
        memory.zero_()
    runtime.main.queue.append((None, lambda: [m.copy_(b) for m, b in zip(case.memory, before, strict=True)]))
    handle = bounce.store(ids, slots)
    handle.wait()
    assert handle.done()
    for slot, mine in zip(slots, ids.reshape(chunks, -1), strict=True):
        got = np.concatenate([arena.array[o : o + n] for o, n in slot])[: case.layout.slot_bytes]
        assert np.array_equal(got, case.slot(mine))
    empty = case.emptied()
    bounce.close()
    bounce = BounceTransfer(BatchTransfer(case.layout, empty.tensors, arena, runtime), arena, runtime, **options)
    handle = bounce.load(slots, ids)
    handle.wait_layer(0)
    handle.wait()
    assert all(all(map(np.array_equal, empty.rows(b), case.rows(b))) for b in ids.tolist())
    bounce.close()
    runtime.run_all()


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_may_be_overwritten_behind_wait_sources(pinned_runtime, seed, share):
    rng = np.random.default_rng(seed)
    case = random_case(rng, block_tokens=16)
    chunks = min(4, case.layout.num_blocks // case.layout.chunk_blocks)
    ids, size = random_ids(rng, case.layout, chunks), case.layout.slot_bytes
    arena = Splitting(np.zeros(chunks * size, np.uint8), int(share * chunks * size))
    runtime = pinned_runtime(seed)
    wanted = [case.slot(mine) for mine in ids.reshape(chunks, -1)]
    transfer = BounceTransfer(BatchTransfer(case.layout, case.tensors, arena, runtime), arena, runtime, threads=1)
    handle = transfer.store(ids, [[(i * size, size)] for i in range(chunks)])
    handle.wait_sources()
    runtime.main.queue.append((None, lambda: [memory.zero_() for memory in case.memory]))
    handle.wait()
    transfer.close()
    runtime.run_all()
    assert np.array_equal(arena.array, np.concatenate(wanted))


class Failed:
    """A transfer of which a call failed."""

    def wait(self):
        raise DeviceError("cuMemcpyAsync: CUDA_ERROR_OUT_OF_MEMORY (2)")

    done = wait

    def over(self):
        return True


@pytest.mark.parametrize("loading", [True, False])
@pytest.mark.parametrize("ask", ["wait", "done"])
@pytest.mark.parametrize("seed", range(4))
def test_a_bounce_that_fails_is_over_when_all_of_it_is(pinned_runtime, loading, ask, seed):
    """Or what still copies would do so into pages and blocks that others have by then."""
    rng = np.random.default_rng(seed)
    case = random_case(rng, block_tokens=16)
    size = case.layout.slot_bytes
    chunks = min(4, case.layout.num_blocks // case.layout.chunk_blocks)
    ids, slots = random_ids(rng, case.layout, chunks), [[(i * size, size)] for i in range(chunks)]
    arena, runtime = Splitting(np.zeros(chunks * size, np.uint8), size), pinned_runtime(seed)  # the first goes straight
    inner = BatchTransfer(case.layout, case.tensors, arena, runtime)
    bounce = BounceTransfer(inner, arena, runtime, bounce_bytes=2 * size, threads=1)
    started, whole = [], bounce._bounced.start

    def first_fails(*arguments, **options):
        started.append(whole(*arguments, **options) if started else Failed())
        return started[-1]

    bounce._bounced.start = first_fails
    handle = bounce.load(slots, ids) if loading else bounce.store(ids, slots)
    direct = handle._direct[0][0]

    def done():
        while not handle.done():
            with runtime.lock:
                if handle._job.done():
                    runtime.step()

    with pytest.raises(DeviceError):
        (handle.wait if ask == "wait" else done)()
    assert len(started) > 1
    assert all(one.over() for one in (direct, *started))
    bounce.close()


def test_a_load_does_not_stand_behind_stores_that_bounce():
    case = random_case(np.random.default_rng(3), form="joined", block_tokens=16)
    layout, size = case.layout, case.layout.slot_bytes
    chunks = layout.num_blocks // layout.chunk_blocks
    ids, slots = (
        np.arange(layout.num_blocks)[: chunks * layout.chunk_blocks],
        [[(i * size, size)] for i in range(chunks)],
    )
    arena, runtime = Splitting(np.zeros((chunks + 1) * size, np.uint8), 0), HostRuntime()
    arena.array[-size:] = case.slot(ids[: layout.chunk_blocks])
    empty = case.emptied()
    bounce = BounceTransfer(BatchTransfer(layout, case.tensors, arena, runtime), arena, runtime, bounce_bytes=2 * size)
    bounce._inner, of_stores = BatchTransfer(layout, empty.tensors, arena, runtime), bounce._bounced
    loads, may_store, copy = bounce._inner.over(bounce._bounce), threading.Event(), bounce._copier.copy

    def start(request, *, loading, after):
        return (loads if loading else of_stores).start(request, loading=loading, after=after)

    def copying(target, source, length):
        of_store = arena.address <= target[0] < arena.address + len(arena.array)
        assert not of_store or may_store.wait(20)
        copy(target, source, length)

    bounce._bounced, bounce._copier.copy = SimpleNamespace(start=start), copying
    stored = bounce.store(ids, slots)
    load = bounce.load([[(chunks * size, size)]], ids[: layout.chunk_blocks])
    load._job.result(10)
    load.wait_layer(0)
    assert all(all(map(np.array_equal, empty.rows(b), case.rows(b))) for b in ids[: layout.chunk_blocks].tolist())
    assert not stored.done()
    may_store.set()
    stored.wait()
    bounce.close()
    assert np.array_equal(arena.array[:-size], np.concatenate([case.slot(mine) for mine in ids.reshape(chunks, -1)]))


@pytest.mark.parametrize(("upto", "rests"), [(1.0, [0.25]), (0.0, [0.0])])
def test_a_store_rests_where_it_needs_no_bounce(pinned_runtime, upto, rests):
    case = random_case(np.random.default_rng(0))
    size = case.layout.slot_bytes
    arena = Splitting(np.zeros(size, np.uint8), int(upto * size))
    runtime = pinned_runtime(0)
    inner, taken = BatchTransfer(case.layout, case.tensors, arena, runtime), []
    submitter = inner._out.submitter
    submit, submitter.submit = submitter.submit, lambda work: (taken.append(work.rest), submit(work))
    bounce = BounceTransfer(inner, arena, runtime)
    bounce.store(random_ids(np.random.default_rng(0), case.layout, 1), [[(0, size)]], rest_s=0.25).wait()
    bounce.close()
    runtime.run_all()
    assert [0.0 if rest is None else rest[1] for rest in taken] == rests


def test_a_bad_request_is_refused_at_once(pinned_runtime):
    case = random_case(np.random.default_rng(0))
    arena = Splitting(np.zeros(case.layout.slot_bytes, np.uint8), 0)
    runtime = pinned_runtime(0)
    bounce = BounceTransfer(BatchTransfer(case.layout, case.tensors, arena, runtime), arena, runtime)
    with pytest.raises(RequestError, match="whole chunks"):
        bounce.store([0], [])
    bounce.close()


def test_an_engines_log_says_once_why_its_arena_is_not_pinned(monkeypatch, caplog):
    transfers = pytest.importorskip("kvcore.vllm.transfers")

    class Runtime:
        def __init__(self, device):
            pass

        def enter_thread(self):
            pass

        entered = contextlib.nullcontext

    monkeypatch.setattr("kvkernels.cuda_streams.CudaRuntime", Runtime)
    monkeypatch.setattr("kvkernels.cuda_driver.cuda_driver", lambda: Registrar(permits=9, fail_at=0))
    monkeypatch.setattr(transfers._Backend, "__init__", lambda *_: None)
    made = transfers.CudaTransfers(SimpleNamespace(tensors={"0": torch.zeros(1)}), 0, np.zeros(SLICE, np.uint8))
    made._arena.wait(10)
    made.unpin()
    (said,) = caplog.messages
    assert said.startswith("The rest of the arena is not pinned")
    assert "slice at 0 of 4096 bytes: cuMemHostRegister: CUDA_ERROR_OUT_OF_MEMORY (2)" in said
