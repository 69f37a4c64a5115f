"""A worker's half over a real arena and torch tensors: no vLLM, no server."""

import pickle
import threading
import time
import weakref

import numpy as np
import pytest
from msgspec import structs

torch = pytest.importorskip("torch")

from kvcore.live.arena import Arena, ArenaError, ArenaPaths  # noqa: E402
from kvcore.live.wire import Registered  # noqa: E402
from kvcore.vllm.copies import LateBlocks  # noqa: E402
from kvcore.vllm.jobs import Copy, StepPlan  # noqa: E402
from kvcore.vllm.mover import Cache  # noqa: E402
from kvcore.vllm.transfers import Backends, HostTransfers  # noqa: E402
from kvcore.vllm.worker import WorkerSide  # noqa: E402
from kvkernels import DeviceError, HostArena, LayoutError, Measured, choose  # noqa: E402
from kvkernels.reference import ReferenceTransfer  # noqa: E402

BLOCKS, LAYERS, BLOCK, PER_CHUNK = 40, 3, 16, 4
PAGE = 4096


class Plain:
    """torch's own indexing, without a measurement."""

    def __init__(self, cache, chunk_tokens, data):
        self.transfer = ReferenceTransfer(cache.layout(chunk_tokens), cache.tensors, HostArena(data))

    def close(self):
        self.transfer.close()

    def unpin(self):
        pass


class Line:
    def __init__(self, registered):
        self.registered = registered
        self.said = []

    def committed(self, request, chunks, **counts):
        self.said.append(("committed", request, tuple(chunks), counts))

    def aborted(self, request, chunks, **counts):
        self.said.append(("aborted", request, tuple(chunks), counts))

    def loaded(self, request, chunks, **counts):
        self.said.append(("loaded", request, tuple(chunks), counts))

    def load_failed(self, request, chunks, **counts):
        self.said.append(("load_failed", request, tuple(chunks), counts))

    def register_again(self, after_s=0.0):
        self.said.append(("register_again", after_s))
        if after_s:
            self.registered = None

    def leave(self):
        self.said.append(("leave",))


class Rig:
    """An arena of 64 pages, a KV cache of random bytes, and the worker's half between them."""

    def __init__(self, folder, rank=0, shards=1, in_step=True, factory=Plain, packing="none"):
        self.arena = Arena.open(ArenaPaths(folder, f"rig{rank}"), size_bytes=64 * PAGE, page_bytes=PAGE)
        torch.manual_seed(rank)
        self.tensors = {f"layer.{i}": torch.randn(BLOCKS, 2, BLOCK, 8) for i in range(LAYERS)}
        if packing != "none":  # values of bf16, in rows of whole vectors
            self.tensors = {name: one.bfloat16() for name, one in self.tensors.items()}
        cache = Cache(self.tensors, num_blocks=BLOCKS, block_tokens=BLOCK, order="", packing=packing)
        self.block_bytes = cache.block.block_bytes
        shard = self.block_bytes * PER_CHUNK
        self.pages = -(-shard * shards // PAGE)
        self.registered = Registered(
            member=1,
            chunk_tokens=BLOCK * PER_CHUNK,
            chunk_pages=self.pages,
            shard_bytes=shard,
            arena_path=str(self.arena.path),
            page_bytes=PAGE,
            pages=64,
            epoch=self.arena.epoch,
            lease_ms=1000,
            liveness_path="",
        )
        self.line = Line(self.registered)
        self.side = WorkerSide(cache, rank=rank, shards=shards, factory=factory, in_step=in_step, layerwise=not in_step)
        self.side.connect(self.line)

    def copy(self, blocks, *, at=0, asynchronous=False, scattered=False):
        """A copy between blocks, (chunks, PER_CHUNK), and pages from `at` on, in order or the other way round."""
        table = np.array(blocks, dtype=np.int64).reshape(-1, PER_CHUNK)
        pages = np.arange(at, at + len(table) * self.pages, dtype=np.uint32).reshape(len(table), -1)
        if scattered:
            pages = pages[:, ::-1].copy()
        return Copy(
            request="r",
            name="r",
            chunks=tuple(b"chunk%d" % i for i in range(len(table))),
            epoch=self.registered.epoch,
            pages=pages,
            generations=self.arena.generations[pages].copy(),
            blocks=table,
            tokens=0,
            asynchronous=asynchronous,
        )

    def step(self, plan):
        self.side.start_loads(plan)
        self.side.finish_step(plan)
        return self.side.received()

    def said(self, kind):
        return [one for one in self.line.said if one[0] == kind]

    def names_said_in_time(self, kind):
        """The chunks of what is said so, by a thread that ends copies, once there is some."""
        until = time.monotonic() + 5
        while not self.said(kind) and time.monotonic() < until:
            time.sleep(0.01)
        return [one[2] for one in self.said(kind)]

    def meet_another_server(self):
        """The one at hand stops cleanly, so that its file is gone, and another makes its own."""
        paths = ArenaPaths(self.arena.path.parent, "rig0")
        self.arena.close()
        self.arena = Arena.open(paths, size_bytes=64 * PAGE, page_bytes=PAGE)
        self.registered = self.line.registered = structs.replace(self.registered, epoch=self.arena.epoch + 1)

    def rows(self, blocks):
        return {name: tensor[list(blocks)].clone() for name, tensor in self.tensors.items()}

    def equal(self, rows, blocks):
        return all(torch.equal(rows[name], tensor[list(blocks)]) for name, tensor in self.tensors.items())


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path)
    yield made
    made.side.close()
    made.arena.close()


@pytest.mark.parametrize("scattered", [False, True])
def test_what_was_stored_is_loaded_elsewhere(rig, scattered):
    stored = rig.rows(range(8))
    rig.step(StepPlan(stores=[rig.copy(range(8), scattered=scattered)]))
    rig.step(StepPlan(loads=[rig.copy(range(20, 28), scattered=scattered)]))
    assert rig.equal(stored, range(20, 28))
    ((_, _, chunks, counts),) = rig.said("committed")
    assert chunks == (b"chunk0", b"chunk1")
    assert (counts["tokens"], counts["nbytes"]) == (128, 8 * rig.block_bytes)
    assert rig.said("loaded")[0][3]["tokens"] == 128
    assert rig.side.counters.take()["loaded_bytes"] == 8 * rig.block_bytes


def test_blocks_left_out_of_a_load_keep_what_they_hold(rig):
    stored = rig.rows(range(8))
    rig.step(StepPlan(stores=[rig.copy(range(8))]))
    before = rig.rows(range(20, 28))
    rig.step(StepPlan(loads=[rig.copy([-1, -1, 22, 23, 24, 25, 26, -1])]))
    assert rig.equal({name: rows[2:7] for name, rows in stored.items()}, range(22, 27))
    assert rig.equal({name: rows[[0, 1, 7]] for name, rows in before.items()}, [20, 21, 27])
    assert rig.said("loaded")[0][3]["tokens"] == 5 * BLOCK
    assert rig.side.bad_blocks() == set()


@pytest.fixture(params=["lossless", "auto"])
def packed(tmp_path, request):
    made = Rig(tmp_path, factory=Backends(HostTransfers), packing=request.param)
    yield made
    made.side.close()
    made.arena.close()


def test_packed_chunks_take_less_room_and_come_back_bit_for_bit(packed):
    stored = packed.rows(range(12))
    packed.step(StepPlan(stores=[packed.copy(range(12))]))
    assert packed.block_bytes < 0.85 * LAYERS * 2 * BLOCK * 8 * 2
    before = packed.rows([30, 31])
    packed.step(StepPlan(loads=[packed.copy([20, 21, 22, 23, 24, 25, 26, 27, 28, 29, -1, -1])]))
    assert packed.equal({name: rows[:10] for name, rows in stored.items()}, range(20, 30))
    assert packed.equal(before, [30, 31])
    assert packed.said("loaded")[0][3]["nbytes"] == 10 * packed.block_bytes


def test_a_chunk_that_cannot_be_packed_is_aborted_and_the_others_are_stored(packed, caplog):
    packed.tensors["layer.1"][5] = torch.randint(-(1 << 15), 1 << 15, (2, BLOCK, 8), dtype=torch.int16).view(
        torch.bfloat16
    )
    with caplog.at_level("WARNING", logger="kvcore"):
        packed.step(StepPlan(stores=[packed.copy(range(12))]))
    assert "1 chunks so far could not be packed" in caplog.text
    assert [said[2] for said in packed.said("committed")] == [(b"chunk0", b"chunk2")]
    assert [said[2] for said in packed.said("aborted")] == [(b"chunk1",)]


def test_a_chunk_that_cannot_be_packed_is_told_from_one_whose_pages_are_anothers(packed):
    packed.tensors["layer.1"][5] = torch.randint(-(1 << 15), 1 << 15, (2, BLOCK, 8), dtype=torch.int16).view(
        torch.bfloat16
    )
    copy = packed.copy(range(12))
    packed.arena.generations[copy.pages[0]] += 1
    packed.step(StepPlan(stores=[copy]))
    assert [said[2] for said in packed.said("committed")] == [(b"chunk2",)]
    assert [said[2] for said in packed.said("aborted")] == [(b"chunk0", b"chunk1")]


def test_what_cannot_be_packed_at_all_is_left_as_it_is_or_refused():
    tensors = {"layer": torch.randn(BLOCKS, 2, BLOCK, 8)}  # float32
    assert not Cache(tensors, num_blocks=BLOCKS, block_tokens=BLOCK, order="", packing="auto").packed
    with pytest.raises(LayoutError, match="not packable"):
        Cache(tensors, num_blocks=BLOCKS, block_tokens=BLOCK, order="", packing="lossless")


def test_changed_generation_fails_the_load_from_there_on(rig):
    rig.step(StepPlan(stores=[rig.copy(range(12))]))
    load = rig.copy(range(20, 32))
    rig.arena.generations[load.pages[1, 0]] += 1
    rig.step(StepPlan(loads=[load]))
    assert rig.said("loaded")[0][2] == (b"chunk0",)
    assert rig.said("load_failed")[0][2] == (b"chunk1", b"chunk2")
    assert rig.side.bad_blocks() == set(range(24, 32))
    assert rig.side.bad_blocks() == set()
    assert rig.side.report()().failures == {0: 1}


def test_generation_that_changes_during_the_copy_fails_the_load(rig, monkeypatch):
    rig.step(StepPlan(stores=[rig.copy(range(4))]))
    load = rig.copy(range(20, 24))
    whole = ReferenceTransfer.load

    def slow(self, *args, **kwargs):
        handle = whole(self, *args, **kwargs)
        rig.arena.generations[load.pages[0, 0]] += 1
        return handle

    monkeypatch.setattr(ReferenceTransfer, "load", slow)
    rig.step(StepPlan(loads=[load]))
    assert rig.side.bad_blocks() == set(range(20, 24))
    assert not rig.said("loaded")


def test_nothing_is_stored_until_the_scheduler_knows_of_a_failed_load(rig):
    load = rig.copy(range(20, 24))
    load.epoch += 1
    rig.step(StepPlan(loads=[load], stores=[rig.copy(range(4), at=10)]))
    assert rig.said("aborted")
    assert not rig.said("committed")
    rig.step(StepPlan(stores=[rig.copy(range(4), at=10)], failures_seen=rig.side.report()().failures))
    assert rig.said("committed")


def test_a_step_does_not_tell_of_a_load_that_fails_in_the_next(rig):
    """Its report is made when its tokens are asked for. What the next step loads, the scheduler would think it knew."""
    failing = rig.copy(range(20, 24))
    failing.epoch += 1
    rig.step(StepPlan(loads=[failing]))
    rig.side.bad_blocks()
    first = rig.side.report()
    rig.step(StepPlan(loads=[failing]))
    second = rig.side.report()
    assert first().failures == {0: 1}
    assert second().failures == {0: 2}
    assert rig.side.report()().failures == {0: 2}


def test_store_into_pages_that_were_given_away_is_aborted(rig):
    store = rig.copy(range(4))
    rig.arena.generations[store.pages[0, 0]] += 1
    rig.step(StepPlan(stores=[store]))
    assert rig.said("aborted")
    assert not rig.said("committed")


def test_a_scheduler_that_lost_its_grants_has_every_worker_register_anew(rig):
    copy = rig.copy([0, 1, 2, 3])
    rig.step(StepPlan(stores=[copy]))
    rig.step(StepPlan(loads=[copy], grants_lost=True))
    rig.step(StepPlan())
    assert [said[0] for said in rig.line.said] == ["committed", "register_again", "loaded"]


def test_server_away_fails_loads_and_aborts_stores(rig):
    rig.line.registered = None
    rig.step(StepPlan(loads=[rig.copy(range(20, 24))]))
    assert rig.side.bad_blocks() == set(range(20, 24))


def test_asynchronous_load_is_reported_when_it_has_ended(rig, monkeypatch):
    stored = rig.rows(range(4))
    rig.step(StepPlan(stores=[rig.copy(range(4))]))
    gate, whole = threading.Event(), ReferenceTransfer.load

    def gated(self, *args, **kwargs):
        assert gate.wait(5)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(ReferenceTransfer, "load", gated)
    assert rig.step(StepPlan(loads=[rig.copy(range(20, 24), asynchronous=True)])) == set()
    drained = threading.Thread(target=rig.side.drain)
    drained.start()
    drained.join(0.1)
    assert drained.is_alive()
    gate.set()
    drained.join(5)
    assert not drained.is_alive()
    assert rig.step(StepPlan()) == {"r"}
    assert rig.equal(stored, range(20, 24))


def test_registered_anew_with_the_same_server_the_arena_needs_no_name(rig):
    stored = rig.rows(range(4))
    rig.step(StepPlan(stores=[rig.copy(range(4))]))
    rig.arena.path.unlink()
    rig.line.registered = structs.replace(rig.registered, member=2)
    rig.step(StepPlan(loads=[rig.copy(range(20, 24))]))
    assert rig.equal(stored, range(20, 24))


class Made:
    """What a factory was asked for, and what it made of it."""

    def __init__(self):
        self.all = []

    def __call__(self, cache, chunk_tokens, data):
        self.all.append(Plain(cache, chunk_tokens, data))
        self.all[-1].unpinned = threading.Event()
        self.all[-1].unpin = self.all[-1].unpinned.set
        return self.all[-1]


@pytest.fixture
def counted(tmp_path):
    made = Made()
    rig = Rig(tmp_path, factory=made)
    rig.made = made.all
    yield rig
    rig.side.close()
    rig.arena.close()


def test_a_server_that_takes_the_arena_over_finds_it_mapped(counted):
    stored = counted.rows(range(4))
    counted.step(StepPlan(stores=[counted.copy(range(4))]))
    paths = ArenaPaths(counted.arena.path.parent, "rig0")
    counted.arena.close(unlink=False)
    counted.arena = Arena.open(paths, size_bytes=64 * PAGE, page_bytes=PAGE)
    counted.registered = counted.line.registered = structs.replace(counted.registered, epoch=counted.arena.epoch)
    counted.side.server_is_back()
    counted.step(StepPlan(loads=[counted.copy(range(20, 24))]))
    assert counted.equal(stored, range(20, 24))
    assert len(counted.made) == 1
    assert not counted.made[0].unpinned.is_set()


def test_the_arena_of_a_new_server_is_mapped_before_a_request_needs_it(counted):
    counted.step(StepPlan(stores=[counted.copy(range(4))]))
    counted.meet_another_server()
    counted.side.server_is_back()
    assert len(counted.made) == 2
    assert counted.made[0].unpinned.wait(10)  # in another thread
    stored = counted.rows(range(4))
    counted.step(StepPlan(stores=[counted.copy(range(4))]))
    counted.step(StepPlan(loads=[counted.copy(range(20, 24))]))
    assert counted.equal(stored, range(20, 24))
    assert len(counted.made) == 2


def test_an_arena_that_stays_pinned_is_told_of(counted, caplog):
    def refuse():
        raise DeviceError("cuMemHostUnregister: no")

    counted.step(StepPlan(stores=[counted.copy(range(4))]))
    counted.made[0].unpin = refuse
    gone = counted.side._mover
    counted.meet_another_server()
    with caplog.at_level("ERROR", logger="kvcore"):
        counted.side.server_is_back()
        counted.side.close()  # waits for that thread
    assert "an earlier server's arena, whose memory stays taken: cuMemHostUnregister: no" in caplog.text
    with pytest.raises(ArenaError, match="closed"):
        _ = gone.arena.data


def test_what_has_to_be_measured_waits_for_the_engines_thread(counted):
    counted.side.server_is_back()  # no server was there when the engine started
    assert not counted.made
    counted.step(StepPlan(stores=[counted.copy(range(4))]))
    assert len(counted.made) == 1


@pytest.mark.parametrize("error", [LayoutError("no backend"), torch.OutOfMemoryError("no memory"), ValueError("sizes")])
def test_an_arena_that_cannot_be_used_is_told_once_and_nothing_is_stored_there(tmp_path, error, caplog):
    def refuse(cache, chunk_tokens, data):
        raise error

    rig = Rig(tmp_path, factory=refuse)
    with caplog.at_level("ERROR", logger="kvcore"):
        for _ in range(2):
            rig.step(StepPlan(stores=[rig.copy(range(4))]))
            if rig.line.registered is None:
                rig.line.registered = structs.replace(rig.registered)
    assert caplog.text.count(f"cannot use the server's arena, nothing is loaded or stored: {error}") == 1
    assert len(rig.said("aborted")) == 2
    assert rig.said("register_again") == [("register_again", 60.0)] * 2, "it leaves, so that nothing is a hit"
    rig.side.close()
    rig.arena.close()


def test_backends_are_measured_once_for_a_size_of_chunks(tmp_path, monkeypatch):
    measured = []
    whole = choose.best_backend
    monkeypatch.setattr(choose, "best_backend", lambda *args, **kwargs: measured.append(1) or whole(*args, **kwargs))
    tensors = {"layer": torch.randn(BLOCKS, 2, BLOCK, 8)}
    cache = Cache(tensors, num_blocks=BLOCKS, block_tokens=BLOCK, order="")
    backends = Backends(HostTransfers)
    data = np.zeros(8 * PER_CHUNK * cache.block.block_bytes, np.uint8)
    names = [backends(cache, chunks * BLOCK, data).transfer.name for chunks in (1, 1, 2, 2, 1)]
    assert len(measured) == 2
    made = backends(cache, BLOCK, data)
    backend = weakref.ref(made.transfer)
    made.transfer.store(np.arange(1), [[(0, cache.block.block_bytes)]]).wait()
    made.close()
    assert backend() is None, "its memory is free before another is made"
    made.unpin()
    assert names[0] == names[1] == names[4]


def test_asynchronous_load_that_cannot_begin_is_reported_with_its_blocks(rig):
    load = rig.copy(range(20, 24), asynchronous=True)
    load.epoch += 1
    assert rig.step(StepPlan(loads=[load])) == {"r"}
    assert rig.side.bad_blocks() == set(range(20, 24))
    assert rig.side.report() is None


class Handed:
    """A copy engine's handle: done when the test says so."""

    def __init__(self):
        self.gate = threading.Event()
        self.sources_waited = 0
        self.layers = []

    def done(self):
        return self.gate.is_set()

    def wait(self):
        assert self.gate.wait(10)

    def wait_layer(self, layer):
        self.layers.append(layer)

    def wait_sources(self):
        self.sources_waited += 1

    def rejected(self):
        return ()

    def measured(self):
        return Measured(0.25, 0.125)


class Device(Plain):
    """A device that copies by itself: the bytes move at once, their ends are told when the test says so."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.handles = []
        self.inner = inner = self.transfer
        self.transfer = self
        self.rests = []
        self.load = lambda *call: self.hand(inner.load(*call))
        self.closes = inner.close

    def store(self, ids, slots, *, rest_s):
        self.rests.append(rest_s)
        return self.hand(self.inner.store(ids, slots))

    def hand(self, _):
        self.handles.append(Handed())
        return self.handles[-1]

    def close(self):
        self.closes()


@pytest.fixture
def device(tmp_path):
    made = []

    def factory(*arguments):
        made.append(Device(*arguments))
        return made[-1]

    rig = Rig(tmp_path, in_step=False, factory=factory)
    rig.devices = made
    yield rig
    for one in made:
        for handle in one.handles:
            handle.gate.set()
    rig.side.close()
    rig.arena.close()


def test_a_store_is_acknowledged_while_the_engine_idles(device):
    device.step(StepPlan(stores=[device.copy(range(8))]))
    assert not device.said("committed")
    device.devices[0].handles[0].gate.set()
    assert device.names_said_in_time("committed") == [(b"chunk0", b"chunk1")]


def test_a_store_lets_the_tokens_of_its_step_out_first(device):
    device.step(StepPlan(stores=[device.copy(range(8))]))
    assert device.devices[0].rests == [0.003]
    device.devices[0].handles[0].gate.set()


def test_a_step_that_writes_a_block_waits_for_the_store_that_reads_it(device):
    device.step(StepPlan(stores=[device.copy(range(8)), device.copy(range(12, 16))]))
    first, second = device.devices[0].handles
    device.step(StepPlan(handed_out=np.array([20, 21])))
    assert (first.sources_waited, second.sources_waited) == (0, 0)
    device.step(StepPlan(handed_out=np.array([20, 13])))
    assert (first.sources_waited, second.sources_waited) == (0, 1)
    first.gate.set()
    second.gate.set()


def load_in_thread(device, plan, *, layers, one_graph=False):
    device.side.start_loads(plan, one_graph=one_graph)
    handle = device.devices[-1].handles[-1]
    for layer in range(layers):
        device.side.wait_for_layer(f"layer.{layer}")
    ordered = list(handle.layers)
    handle.gate.set()
    device.side.finish_step(StepPlan())
    return ordered


def test_attention_waits_for_its_layer_and_one_graph_for_all(device):
    count = len(device.tensors)
    plan = StepPlan(loads=[device.copy(range(20, 28))])
    device.side.warm_up()
    assert load_in_thread(device, plan, layers=count) == list(range(count))
    assert load_in_thread(device, plan, layers=0, one_graph=True) == list(range(count))
    assert not device.side.bad_blocks()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_load_begins_once_and_before_the_step_is_prepared_where_that_is_safe(device, at_once):
    device.side.warm_up()
    plan = StepPlan(loads=[device.copy(range(20, 28))], load_at_once=at_once)
    device.side.step_begins(plan)
    assert not device.devices[-1].handles  # no step has told the engine's thread yet
    device.side.start_loads(StepPlan())
    other = threading.Thread(target=device.side.step_begins, args=(plan,))
    other.start()
    other.join()
    assert not device.devices[-1].handles
    device.side.step_begins(plan)
    assert len(device.devices[-1].handles) == int(at_once)
    load_in_thread(device, plan, layers=len(device.tensors))
    assert len(device.devices[-1].handles) == 1
    device.side.step_begins(StepPlan(loads=[device.copy(range(28, 32))], load_at_once=True))
    assert len(device.devices[-1].handles) == 2


def test_a_load_that_attention_did_not_wait_for_has_failed(device):
    device.side.warm_up()
    load_in_thread(device, StepPlan(loads=[device.copy(range(20, 28))]), layers=1)
    assert device.side.bad_blocks() == set(range(20, 28))


def step_with_load_under_way(device, stores=()):
    """A step whose load is in its place for every layer and has not ended; returns its handle and chunks' copy."""
    device.side.warm_up()
    load = device.copy(range(20, 28))
    plan = StepPlan(loads=[load], stores=list(stores))
    device.side.start_loads(plan)
    handle = device.devices[-1].handles[-1]
    for layer in range(len(device.tensors)):
        device.side.wait_for_layer(f"layer.{layer}")
    device.side.finish_step(plan)
    return handle, load


def test_a_step_does_not_wait_for_its_load_and_its_outcome_does(device):
    handle, _ = step_with_load_under_way(device)
    bad, report = device.side.bad_blocks(), device.side.report()
    device.side.start_loads(StepPlan())  # the next step begins meanwhile
    assert bad, "as vLLM asks, between two stages of a pipeline, say, it does not wait either"
    seen = {}
    asks = {
        "bad": lambda: len(bad),
        "sent": lambda: pickle.loads(pickle.dumps(bad)),
        "report": lambda: report().load_stalls,
    }
    readers = [threading.Thread(target=lambda n=name, a=ask: seen.update({n: a()})) for name, ask in asks.items()]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(0.1)
        assert reader.is_alive()
    assert not device.said("loaded")
    handle.gate.set()
    for reader in readers:
        reader.join(5)
    assert seen == {"bad": 0, "sent": set(), "report": {"r": 0.125}}  # not what the load took, nor how long ago
    device.side.close()
    assert [one[-1]["seconds"] for one in device.said("loaded")] == [0.25]
    assert device.side.report() is None
    assert device.side.counters.take()["load_seconds"] == 0.25


@pytest.mark.parametrize("closing", [False, True])
def test_a_load_is_acknowledged_when_its_step_has_its_token(device, monkeypatch, closing):
    """By another thread, a little later; as an engine ends, when no thread takes work any more, at once."""
    monkeypatch.setattr("kvcore.vllm.worker._LATER_S", 0.2)
    handle, _ = step_with_load_under_way(device)
    if not closing:
        handle.gate.set()
        assert device.side.report()().load_stalls
        assert not device.said("loaded")
        time.sleep(0.4)
    else:
        device.side._aside.shutdown()
        handle.gate.set()
    device.side.close()
    assert len(device.said("loaded")) == 1
    assert device.line.said[-1] == ("leave",)


def test_a_load_that_fails_after_its_step_is_told_with_that_steps_outcome(device):
    handle, load = step_with_load_under_way(device)
    bad, report = device.side.bad_blocks(), device.side.report()
    device.arena.generations[load.pages[1, 0]] += 1
    handle.gate.set()
    device.side.start_loads(StepPlan())  # the next step finds it first, and does not take the news
    assert device.side.bad_blocks() == set()
    assert pickle.loads(pickle.dumps(bad)) == set(range(24, 28))
    assert report().failures == {0: 1}
    assert {24} <= bad
    assert 20 not in bad


def test_what_is_computed_on_a_load_under_way_is_stored_only_if_it_ends_well(device):
    handle, load = step_with_load_under_way(device, stores=[device.copy(range(8), at=20)])
    device.arena.generations[load.pages[0, 0]] += 1
    handle.gate.set()
    store = device.devices[-1].handles[-1]
    store.gate.set()
    assert device.names_said_in_time("aborted") == [(b"chunk0", b"chunk1")]
    assert not device.said("committed")


def test_two_ranks_write_their_shards_of_one_chunk(tmp_path):
    first, second = Rig(tmp_path, rank=0, shards=2), Rig(tmp_path, rank=1, shards=2)
    second.line.registered = first.registered
    second.registered = first.registered
    stored = [one.rows(range(4)) for one in (first, second)]
    for one in (first, second):
        one.step(StepPlan(stores=[first.copy(range(4), scattered=True)]))
    for one, rows in zip((first, second), stored, strict=True):
        one.step(StepPlan(loads=[first.copy(range(30, 34), scattered=True)]))
        assert one.equal(rows, range(30, 34))
    for one in (first, second):
        one.side.close()
        one.arena.close()


def test_ranks_that_hold_the_same_kv_store_once_and_load_the_same(tmp_path):
    first, second = Rig(tmp_path, rank=0, shards=1), Rig(tmp_path, rank=1, shards=1)
    second.line.registered = first.registered
    second.registered = first.registered
    stored = first.rows(range(4))
    for one in (first, second):
        one.step(StepPlan(stores=[first.copy(range(4))]))
        one.step(StepPlan(loads=[first.copy(range(30, 34))]))
        assert one.equal(stored, range(30, 34))
    names = (b"chunk0",)
    assert [said[2] for said in first.said("committed")] == [said[2] for said in second.said("committed")] == [names]
    assert first.said("committed")[0][3]["nbytes"] > 0
    assert not second.said("committed")[0][3].get("nbytes"), "what it did not write"
    assert second.said("loaded")
    for one in (first, second):
        one.side.close()
        one.arena.close()


def test_ranks_that_hold_the_same_kv_store_nothing_that_one_of_them_computed_on_a_failed_load(tmp_path):
    """Attention of the first adds up what all have computed, and it does not know of the second's load."""
    made = []

    def factory(*arguments):
        made.append(Device(*arguments))
        return made[-1]

    rig = Rig(tmp_path, rank=1, shards=1, in_step=False, factory=factory)
    load = rig.copy(range(8, 12), at=2 * rig.pages)
    rig.side.start_loads(StepPlan(loads=[load]))
    rig.arena.generations[load.pages] += 1  # given to others while it was under way
    for layer in rig.tensors:
        rig.side.wait_for_layer(layer)
    rig.side.finish_step(StepPlan(stores=[rig.copy(range(4))]))
    assert not rig.said("committed")
    assert not rig.said("aborted"), "the load is still under way"
    made[0].handles[0].gate.set()
    assert rig.names_said_in_time("aborted") == [(b"chunk0",)]
    assert not rig.said("committed")
    rig.side.close()
    rig.arena.close()


@pytest.mark.parametrize("kind", ["load", "store"])
def test_a_copy_that_the_device_refuses_at_once_fails_and_not_the_engine(tmp_path, kind):
    made = []

    class Refusing(Plain):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)
            self.inner, self.transfer = self.transfer, self
            self.load = self.store = self.refuse

        def refuse(self, *_, **__):
            raise DeviceError("out of events")

        def close(self):
            self.inner.close()

    rig = Rig(tmp_path, in_step=False, factory=Refusing)
    copy = rig.copy(range(4))
    rig.step(StepPlan(loads=[copy]) if kind == "load" else StepPlan(stores=[copy]))
    said = "load_failed" if kind == "load" else "aborted"
    assert rig.names_said_in_time(said) == [(b"chunk0",)]
    assert set(rig.side.bad_blocks()) == (set(range(4)) if kind == "load" else set())
    rig.side.close()
    rig.arena.close()


def test_a_store_whose_device_does_not_say_what_it_took_is_given_up(device):
    device.step(StepPlan(stores=[device.copy(range(8))]))

    def broken():
        raise DeviceError("lost")

    device.devices[0].handles[0].measured = broken
    device.devices[0].handles[0].gate.set()
    assert device.names_said_in_time("aborted") == [(b"chunk0", b"chunk1")]


def test_a_worker_that_could_not_use_the_arena_comes_back_to_one_that_it_can(tmp_path):
    rig = Rig(tmp_path)
    missing = structs.replace(rig.registered, arena_path=str(tmp_path / "none.arena"), epoch=9)
    rig.line.registered = missing
    assert not rig.side.warm_up()
    assert [one[0] for one in rig.line.said] == ["register_again"]
    rig.line.registered = structs.replace(missing)
    rig.side.server_is_back()
    assert len(rig.said("register_again")) == 2, "still not there, which is found out before a hit"
    rig.line.registered = rig.registered
    rig.side.server_is_back()
    stored = rig.rows(range(4))
    rig.step(StepPlan(stores=[rig.copy(range(4))]))
    rig.step(StepPlan(loads=[rig.copy(range(20, 24))]))
    assert rig.equal(stored, range(20, 24))
    assert len(rig.said("register_again")) == 2
    rig.side.close()
    rig.arena.close()


def test_a_worker_is_closed_where_threads_take_no_more_work(rig, monkeypatch):
    rig.step(StepPlan(stores=[rig.copy(range(4))]))
    mover = rig.side._mover

    def refused(*_):  # what an executor says once the interpreter is ending
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr("concurrent.futures.ThreadPoolExecutor.submit", refused)
    rig.side.close()
    assert rig.line.said[-1] == ("leave",)
    with pytest.raises(ArenaError, match="closed"):
        _ = mover.arena.data


def test_a_worker_that_is_closed_maps_no_arena(counted):
    counted.step(StepPlan(stores=[counted.copy(range(4))]))
    counted.side.close()
    assert not counted.side.warm_up()
    assert len(counted.made) == 1


def test_a_step_is_guarded_before_it_runs_whenever_its_loads_begin(device):
    """vLLM 0.32 begins the loads of a step behind it where none is synchronous."""
    device.step(StepPlan(stores=[device.copy(range(8))]))
    (store,) = device.devices[0].handles
    plan = StepPlan(handed_out=np.array([3]))
    device.side.step_begins(plan)
    assert store.sources_waited == 1
    device.side.start_loads(plan)
    assert store.sources_waited == 1
    store.gate.set()


def test_what_is_stored_comes_behind_a_load_that_attention_did_not_wait_for(device):
    device.side.warm_up()
    plan = StepPlan(loads=[device.copy(range(20, 28))], stores=[device.copy(range(8), at=20)])
    device.side.start_loads(plan)
    load = device.devices[-1].handles[-1]
    device.side.finish_step(plan)
    assert load.layers == list(range(len(device.tensors)))


class Fails:
    """Of a transfer that has failed, which is not known yet when the step's loads have just begun."""

    def __init__(self, error):
        self.error = error
        self.known = False

    def fail(self, *_):
        raise self.error

    wait = wait_layer = wait_sources = rejected = fail

    def done(self):
        if self.known:
            self.fail()
        self.known = True
        return False

    def measured(self):
        return None


FAULTS = pytest.mark.parametrize(
    "error",
    [DeviceError("cuMemcpyBatchAsync: no"), torch.OutOfMemoryError("no memory"), ValueError("askew")],
    ids=lambda error: type(error).__name__,
)


@FAULTS
@pytest.mark.parametrize("one_graph", [True, False])
def test_a_load_that_fails_before_attention_asks_for_it_is_computed(device, error, one_graph):
    device.side.warm_up()
    device.devices[-1].load = lambda *_: Fails(error)
    plan = StepPlan(loads=[device.copy(range(20, 28))])
    device.side.start_loads(plan, one_graph=one_graph)
    for layer in device.tensors:
        device.side.wait_for_layer(layer)
    device.side.finish_step(plan)
    assert set(device.side.bad_blocks()) == set(range(20, 28))
    assert device.said("load_failed")


@FAULTS
def test_a_store_that_fails_harms_no_step_and_is_aborted(device, error):
    device.side.warm_up()
    gate, failing = threading.Event(), Fails(error)
    failing.wait = lambda: gate.wait(10) and failing.fail()
    device.devices[-1].store = lambda *_, rest_s: failing
    device.step(StepPlan(stores=[device.copy(range(8))]))
    threading.Timer(0.1, gate.set).start()
    device.step(StepPlan(handed_out=np.array([3])))  # it waits for the end of what was begun
    assert gate.is_set()
    device.side._thread.submit(int).result(10)  # behind the store's end
    assert device.said("aborted")
    assert not device.side._storing


@FAULTS
def test_draining_waits_for_all_copies_whatever_one_of_them_says(device, error):
    device.side.warm_up()
    device.step(StepPlan(stores=[device.copy(range(8)), device.copy(range(12, 16))]))
    first, second = device.devices[0].handles
    gate = threading.Event()

    def fail():
        if threading.current_thread().name.startswith("kvcore-store"):
            gate.wait(10)  # it does not know yet
        raise error

    first.wait = fail
    draining = threading.Thread(target=device.side.drain)
    draining.start()
    draining.join(0.3)
    assert draining.is_alive(), "a copy is under way"
    second.gate.set()
    draining.join(5)
    gate.set()
    assert not draining.is_alive()


def test_a_load_that_ends_as_its_step_does_has_not_failed(device, caplog):
    device.side.warm_up()
    plan = StepPlan(loads=[device.copy(range(20, 28))])
    device.side.start_loads(plan)
    (handle,) = device.devices[-1].handles
    within, go = threading.Event(), threading.Event()

    def measured():
        within.set()
        go.wait(5)
        return Measured(0.25, 0.125)

    handle.measured = measured
    handle.gate.set()
    other = threading.Thread(target=device.side.received)  # as where a store ends
    other.start()
    assert within.wait(5)
    for layer in device.tensors:
        device.side.wait_for_layer(layer)  # it is over: there is nothing to order
    threading.Timer(0.2, go.set).start()
    with caplog.at_level("ERROR", logger="kvcore"):
        device.side.finish_step(plan)
    other.join(5)
    assert "did not wait" not in caplog.text
    assert not device.side.bad_blocks()


def test_the_staging_of_before_is_free_though_the_last_step_has_loaded_by_it(tmp_path):
    before, freed, make = [], [], Backends(HostTransfers)

    def factory(*arguments):
        freed[:] = [one() is None for one in before]
        return make(*arguments)

    rig = Rig(tmp_path, factory=factory, packing="lossless")
    rig.step(StepPlan(stores=[rig.copy(range(4))]))
    rig.step(StepPlan(loads=[rig.copy(range(20, 24))]))
    assert not rig.side.bad_blocks()
    transfer = rig.side._mover._transfers.transfer
    before += map(weakref.ref, [transfer._in, transfer._out])
    del transfer
    rig.meet_another_server()
    rig.side.server_is_back()
    assert freed == [True, True], "or twice as much is needed while the next one is made"
    rig.side.close()
    rig.arena.close()


def test_late_blocks_joined_to_a_set_are_a_set():
    """As where several connectors' are."""
    found = set()
    found |= LateBlocks(lambda: {1, 2})
    assert found == {1, 2}
