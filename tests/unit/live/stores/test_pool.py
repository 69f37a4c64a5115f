import os
import random
import select
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvcore.live.stores.base import Parts, StoreError, StoreFull
from kvcore.live.stores.files import FileStore
from kvcore.live.stores.pool import Completion, Outcome, StorePool


class GatedStore:
    """Keeps chunks in a dict; each operation first waits for the gate, then raises `fault` if there is one."""

    def __init__(self) -> None:
        self.corrupt = 0
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.fault: Exception | None = None
        self.kept: dict[bytes, bytes] = {}
        self.calls: list[tuple[str, bytes]] = []
        self.closed = False

    def _enter(self, operation: str, chunk: bytes) -> None:
        self.entered.release()
        assert self.gate.wait(30)
        self.calls.append((operation, chunk))
        if self.fault is not None:
            raise self.fault

    def put(self, chunk: bytes, parts: Parts) -> None:
        self._enter("put", chunk)
        self.kept[chunk] = b"".join(parts)

    def get(self, chunk: bytes, into: Parts) -> bool:
        self._enter("get", chunk)
        if chunk not in self.kept:
            return False
        into[0][:] = self.kept[chunk]
        return True

    def delete(self, chunks: Sequence[bytes]) -> None:
        for chunk in chunks:
            self._enter("delete", chunk)
            self.kept.pop(chunk, None)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def store() -> GatedStore:
    return GatedStore()


@pytest.fixture
def pool(store: GatedStore) -> Iterator[StorePool]:
    pool = StorePool(store, queue_bytes=100, pause=0.3)
    yield pool
    store.gate.set()
    pool.close(finish=False)
    assert store.closed


def wait_for(pool: StorePool, count: int) -> list[Completion]:
    """Wait as a poller does: for the descriptor."""
    found: list[Completion] = []
    deadline = time.monotonic() + 30
    while len(found) < count:
        readable, _, _ = select.select([pool], [], [], max(0, deadline - time.monotonic()))
        assert readable, f"{len(found)} of {count} completions came"
        found += pool.drain()
    return found


def room(size: int) -> list[memoryview]:
    return [memoryview(bytearray(size))]


def test_a_round_trip_is_told_on_the_descriptor(pool: StorePool) -> None:
    assert pool.drain() == []
    assert select.select([pool], [], [], 0)[0] == []
    assert pool.submit_put("p", b"a", [memoryview(b"12"), memoryview(b"345")])
    (put,) = wait_for(pool, 1)
    assert (put.token, put.operation, put.outcome, put.size_bytes, put.error) == ("p", "put", Outcome.DONE, 5, None)
    into = room(5)
    assert pool.submit_get("g", b"a", into)
    assert pool.submit_get("m", b"b", room(5))
    ends = {end.token: end.outcome for end in wait_for(pool, 2)}
    assert ends == {"g": Outcome.DONE, "m": Outcome.MISS}
    assert into[0] == b"12345"
    assert select.select([pool], [], [], 0)[0] == []


def test_a_full_queue_refuses_until_something_ends(pool: StorePool, store: GatedStore) -> None:
    store.gate.clear()
    assert pool.submit_put(0, b"a", room(60))
    assert pool.submit_put(1, b"b", room(40))
    assert not pool.submit_put(2, b"c", room(1))
    assert pool.submit_get(3, b"a", room(100)), "gets have a budget of their own"
    assert not pool.submit_get(4, b"a", room(1))
    assert not pool.has_room(1)
    store.gate.set()
    assert {end.token for end in wait_for(pool, 3)} == {0, 1, 3}
    assert pool.has_room(100)
    assert pool.submit_get(6, b"a", room(100))
    wait_for(pool, 1)
    assert pool.submit_put(5, b"d", room(1000)), "alone, even one beyond the budget is let in"
    wait_for(pool, 1)
    assert (b"c" in store.kept, b"d" in store.kept) == (False, True)


def test_writes_of_one_chunk_keep_their_order(store: GatedStore) -> None:
    pool = StorePool(store, queue_bytes=100)
    store.gate.clear()
    for round_ in range(4):
        for chunk in (b"a", b"b", b"c"):
            assert pool.submit_put(round_, chunk, [memoryview(bytes([round_]))])
        if round_ in (1, 2):
            pool.submit_delete([b"a", b"b", b"c"])
    store.gate.set()
    pool.close()
    for chunk in (b"a", b"b", b"c"):
        calls = [operation for operation, name in store.calls if name == chunk]
        assert calls == ["put", "put", "delete", "put", "delete", "put"]
    assert store.kept == {b"a": b"\3", b"b": b"\3", b"c": b"\3"}


def test_a_failing_store_is_left_alone_for_a_while(pool: StorePool, store: GatedStore) -> None:
    store.fault = StoreError("away")
    assert pool.submit_put(1, b"a", room(1))
    (end,) = wait_for(pool, 1)
    assert (end.outcome, end.error) == (Outcome.FAILED, "away")
    store.fault = None
    assert pool.submit_get(2, b"a", room(1))
    (end,) = wait_for(pool, 1)
    assert (end.outcome, end.error) == (Outcome.FAILED, "away")
    assert len(store.calls) == 1, "the store was asked while it was away"
    time.sleep(0.35)
    assert pool.submit_put(3, b"a", room(1))
    assert wait_for(pool, 1)[0].outcome is Outcome.DONE


def test_a_store_that_stays_away_is_asked_less_and_less(
    pool: StorePool, store: GatedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    clock = SimpleNamespace(monotonic=lambda: now, monotonic_ns=time.monotonic_ns)
    monkeypatch.setattr("kvcore.live.stores.pool.time", clock)

    def asked() -> bool:
        before = len(store.calls)
        assert pool.submit_get(0, b"a", room(1))
        (end,) = wait_for(pool, 1)
        assert end.outcome is (Outcome.FAILED if store.fault else Outcome.MISS)
        return len(store.calls) > before

    store.fault = StoreError("away")
    assert asked()
    for pause in (0.3, 0.6, 1.2, 2.4, 4.8, 9.6, 19.2, 30.0, 30.0):
        now += pause - 0.01
        assert not asked()
        now += 0.02
        assert asked()
    store.fault = None
    now += 31.0
    assert asked()
    store.fault = StoreError("away")
    assert asked()
    now += 0.31
    assert asked(), "once it was there the first pause is short again"


def test_a_full_store_is_not_away(pool: StorePool, store: GatedStore) -> None:
    store.fault = StoreFull("full")
    assert pool.submit_put(1, b"a", room(1))
    assert wait_for(pool, 1)[0].error == "full"
    store.fault = None
    assert pool.submit_put(2, b"a", room(1))
    assert wait_for(pool, 1)[0].outcome is Outcome.DONE


def test_a_vendors_bug_is_told_and_the_threads_live_on(
    pool: StorePool, store: GatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.fault = ZeroDivisionError("oops")
    for token in range(6):
        assert pool.submit_put(token, bytes([token]), room(1))
    assert {end.error for end in wait_for(pool, 6)} == {"ZeroDivisionError: oops"}
    assert "ZeroDivisionError" in caplog.text
    store.fault = None
    assert pool.submit_put(9, b"a", room(1))
    assert wait_for(pool, 1)[0].outcome is Outcome.DONE


def test_a_failed_delete_is_told(pool: StorePool, store: GatedStore) -> None:
    store.fault = StoreError("away")
    pool.submit_delete([b"a"])
    (end,) = wait_for(pool, 1)
    assert (end.operation, end.outcome, end.token) == ("delete", Outcome.FAILED, None)


def test_close_finishes_or_fails_what_is_queued(store: GatedStore) -> None:
    finishing = StorePool(store, queue_bytes=100)
    for token in range(5):
        assert finishing.submit_put(token, bytes([token]), room(1))
    ends = finishing.close()
    assert [end.outcome for end in ends] == [Outcome.DONE] * 5
    assert len(store.kept) == 5

    hasty = StorePool(store, queue_bytes=100, writers=1)
    store.gate.clear()
    for token in range(5):
        assert hasty.submit_put(token, bytes([10 + token]), room(1))
    threading.Timer(0.2, store.gate.set).start()
    ends = hasty.close(finish=False)
    assert sorted(end.token for end in ends) == [0, 1, 2, 3, 4]
    assert sum(end.outcome is Outcome.DONE for end in ends) <= 1
    assert {end.error for end in ends} <= {None, "the server stops"}


def test_memory_is_let_go_before_the_end_is_told(
    pool: StorePool, store: GatedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = np.zeros(8, np.uint8)
    memory = weakref.ref(array)
    was_gone: list[bool] = []
    tell = os.eventfd_write

    def look(fd: int, value: int) -> None:
        was_gone.append(memory() is None)
        tell(fd, value)

    monkeypatch.setattr(os, "eventfd_write", look)
    store.gate.clear()
    assert pool.submit_put(1, b"a", [array.data])
    del array
    assert memory() is not None
    store.gate.set()
    wait_for(pool, 1)
    assert was_gone == [True]


def test_many_operations_on_files_end_as_a_dict_would(tmp_path: Path) -> None:
    pool = StorePool(FileStore(tmp_path), queue_bytes=1 << 20)
    rng = random.Random(0)
    model: dict[bytes, bytes] = {}
    submitted = 0
    for step in range(300):
        chunk = bytes([rng.randrange(12)]) * 32
        if rng.random() < 0.7:
            value = rng.randbytes(1000)
            assert pool.submit_put(step, chunk, [memoryview(value)])
            submitted += 1
            model[chunk] = value
        else:
            pool.submit_delete([chunk])
            model.pop(chunk, None)
    ends = pool.close()
    assert [end.outcome for end in ends] == [Outcome.DONE] * submitted
    store = FileStore(tmp_path)
    assert {chunk for chunk, _ in store.scan()} == set(model)
    for chunk, value in model.items():
        into = room(1000)
        assert store.get(chunk, into)
        assert into[0] == value
    store.close()


def test_a_store_that_fails_is_said_once_and_so_is_that_it_works_again(
    pool: StorePool, store: GatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    def operate(fault: Exception | None, count: int) -> None:
        store.fault = fault
        for at in range(count):
            assert pool.submit_put(at, b"chunk", room(1))
            wait_for(pool, 1)

    operate(StoreFull("no space"), 5)
    assert pool.failing == {"put": "no space"}
    operate(None, 3)
    assert pool.failing == {}
    operate(StoreFull("no space"), 1)
    operate(None, 1)
    assert [entry.getMessage() for entry in caplog.records] == ["L2 fails: put: no space", "L2 works again: put"], (
        "once a minute"
    )
    operate(StoreError("away"), 1)
    assert pool.failing == {"put": "away"}


def test_a_delete_that_failed_tells_its_chunks_and_keeps_nothing_else_from_the_store(
    pool: StorePool, store: GatedStore
) -> None:
    store.fault = StoreError("stuck")
    pool.submit_delete([b"a", b"b"])
    ends = wait_for(pool, len({pool._write_lane(chunk) for chunk in (b"a", b"b")}))
    assert {chunk for end in ends for chunk in end.left} == {b"a", b"b"}
    assert pool.failing == {"delete": "stuck"}
    store.fault = None
    assert pool.submit_put(1, b"a", room(1))
    assert wait_for(pool, 1)[0].outcome is Outcome.DONE


def test_a_store_that_does_not_answer_does_not_hold_up_the_end(
    store: GatedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcore.live.stores.pool._LAST_WAIT_S", 0.2)
    pool = StorePool(store, queue_bytes=100)
    store.gate.clear()
    assert pool.submit_put(1, b"a", room(1))
    assert pool.submit_get(2, b"b", room(1))
    assert all(store.entered.acquire(timeout=30) for _ in range(2))
    start = time.monotonic()
    pool.close(finish=False)
    assert time.monotonic() - start < 5
    assert not store.closed, "its threads are at work in it"
    store.gate.set()
