"""What a journal proves to the next server: of L1, of L2 or of neither."""

import gc
import os
import re
import shutil
import threading
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from kvcore.live.takeover import DamagedJournalError, OtherL2Error, State, apply, go_on, recover
from kvcore.policy import (
    Cleared,
    CoreConfig,
    InstanceRegistered,
    Load,
    LookedUp,
    Place,
    QuotaSet,
    RequestEnded,
    RoomAsked,
    StoreCommitted,
    TierConfig,
)
from kvcore.policy.snapshot import dump
from kvtraces.journal import MAGIC, Equal, Head, JournalWriter, Snapshot, segments, take_snapshot, verify

L1, L2 = TierConfig(name="l1", pages=2), TierConfig(name="l2", pages=None)
CONFIG = CoreConfig(tiers=(L1, L2))
META = {"epoch": 7, "page_bytes": 4096, "chunk_tokens": 256, "l2": "files:///l2"}
HEAD = Head(config=CONFIG, meta=META)
A, B, C, D = (bytes([at]) * 32 for at in range(4))
GENERATIONS = np.zeros(8, np.uint64)


class Life:
    """A server's core, book and journal, without its arena."""

    def __init__(self, folder, head=HEAD):
        self.state = State.empty(head.config)
        self.journal = JournalWriter(folder, head)
        self.now = 0
        self.pages = 0

    def tell(self, kind, **fields):
        self.now += 1
        event = kind(now_ns=self.now, **fields)
        decisions = apply(self.state, event)
        self.journal.step(event, decisions)
        for decision in decisions:
            if (isinstance(decision, Place) and not decision.tier) or (isinstance(decision, Load) and decision.tier):
                self.place(decision)
        self.journal.flush()
        return decisions

    def place(self, decision):
        ids = np.arange(self.pages, self.pages + len(decision.chunks), dtype="<u4").tobytes()
        self.pages += len(decision.chunks)
        generations = np.zeros(len(decision.chunks), "<u8").tobytes()
        self.journal.pages(ids, generations, 4096)
        fetched = isinstance(decision, Load)
        self.state.book.place(decision.request, decision.chunks, ids, generations, 4096, fetched=fetched)

    def store(self, request, *chunks):
        self.tell(LookedUp, request=request, instance="e", chunks=chunks)
        self.tell(RoomAsked, request=request, chunks=chunks)
        self.tell(StoreCommitted, request=request, tier=0, chunks=chunks)
        self.tell(RequestEnded, request=request)


def a_life(folder, head=HEAD):
    """Store two chunks that reach L2, and stop with everything under way that can be."""
    life = Life(folder, head)
    life.tell(InstanceRegistered, instance="e", chunk_pages=1)
    life.tell(QuotaSet, salt="t", pages=1)
    life.store("stored", A, B)
    if len(head.config.tiers) > 1:
        life.tell(StoreCommitted, request="stored", tier=1, chunks=(A, B))
    life.journal.close()
    return life


def busy_life(folder):
    life = a_life(folder)
    life.journal = JournalWriter(folder, HEAD, take_snapshot(life.state.core, life.state.book.dump()))
    life.store("copied", C)  # evicts one, and is on its way to L2
    gone = A if life.state.core.where(A) == 1 else B
    life.tell(StoreCommitted, request="copied", tier=1, chunks=(C,))
    assert any(isinstance(d, Load) for d in life.tell(LookedUp, request="fetches", instance="e", chunks=(gone,)))
    life.tell(LookedUp, request="writes", instance="e", chunks=(D,))
    life.tell(RoomAsked, request="writes", chunks=(D,))
    life.journal.close()
    return life


def start(folder, head, epoch, now_ns=1000):
    """What a server does at its start; return what was found and the state that it goes on from."""
    found = recover(folder, head, epoch=epoch)
    assert found is not None
    snapshot = take_snapshot(found.state.core, found.state.book.dump())
    journal = JournalWriter(folder, found.head_for(head), snapshot)
    state = go_on(journal, found, head, GENERATIONS, now_ns)
    journal.close()
    return found, state


def other(**meta):
    return Head(config=CONFIG, meta=META | {"epoch": 8} | meta)


def with_config(**fields):
    return Head(config=replace(CONFIG, **fields), meta=META | {"epoch": 8})


@pytest.mark.parametrize(
    ("head", "epoch", "kept"),
    [
        (other(), 7, "both"),
        (other(), 0, "l2"),
        (other(), 6, "l2"),
        (with_config(tiers=(TierConfig(name="l1", pages=9, eviction="arc"), L2)), 0, "l2"),
        (with_config(tiers=(TierConfig(name="l1", pages=2, eviction="arc"), L2)), 7, "l2"),
        (with_config(placement="write-back"), 0, "l2"),
        (with_config(quotas=(("t", 1),)), 7, "l2"),
        (with_config(ttl_ns=5), 7, "l2"),
        (with_config(admission="second-use"), 7, "l2"),
        (with_config(tiers=(L1, TierConfig(name="l2", pages=5, eviction="arc"))), 0, "l2"),
    ],
)
def test_what_of_a_journal_is_kept(tmp_path, head, epoch, kept):
    a_life(tmp_path)
    found = recover(tmp_path, head, epoch=epoch)
    assert found.has_l1 == (kept == "both")


@pytest.mark.parametrize("epoch", [0, 7])
@pytest.mark.parametrize(
    ("head", "told"),
    [
        (other(l2="files:///elsewhere"), "--l2 files:///l2 (now files:///elsewhere)"),
        (other(page_bytes=8192), "--page-size 4096 (now 8192)"),
        (other(chunk_tokens=512), "--chunk-size 256 (now 512)"),
        (Head(config=replace(CONFIG, tiers=(L1,)), meta=META | {"l2": ""}), "--l2 files:///l2 (now none)"),
    ],
)
def test_what_would_lose_l2_is_refused_and_without_anything_there_a_start_from_nothing(tmp_path, head, epoch, told):
    with pytest.raises(OtherL2Error, match=re.escape(told)):
        recover(a_life(tmp_path / "full").journal.folder, head, epoch=epoch)
    Life(tmp_path / "empty").journal.close()
    found = recover(tmp_path / "empty", head, epoch=epoch)
    assert found is None or (epoch == 7 and head.meta["l2"] == "files:///elsewhere" and found.has_l1)


def test_without_l2_another_arena_is_a_start_from_nothing(tmp_path):
    head = Head(config=replace(CONFIG, tiers=(L1,)), meta=META)
    a_life(tmp_path, head)
    assert recover(tmp_path, head, epoch=7).has_l1
    assert recover(tmp_path, head, epoch=0) is None


@pytest.mark.parametrize("pages", [2, 5])
@pytest.mark.parametrize("eviction", ["lru", "arc", "s3fifo", "w-tinylfu"])
def test_with_l1_gone_l2_is_kept_and_nothing_else(tmp_path, pages, eviction):
    life = busy_life(tmp_path)
    before = list(life.state.core.tiers[1].resident)
    config = replace(CONFIG, tiers=(TierConfig(name="l1", pages=pages, eviction=eviction), L2))
    found, state = start(tmp_path, Head(config=config, meta=META | {"epoch": 8}), 0)
    assert not found.has_l1
    assert state.core.config == config
    state.core.check()
    top, below = state.core.tiers
    assert (top.used, top.kept, list(state.core.requests())) == (0, {}, [])
    assert (state.book.resident, state.book.writes, state.book.fetches) == ({}, {}, {})
    assert list(below.resident) == before
    assert set(before) == {A, B, C}, "what was being fetched lies there still"
    assert below.idle == below.used == 3
    assert top.quotas == {"t": 1}
    found = verify(tmp_path)
    assert isinstance(found, Equal), str(found)
    assert found.segments == len(segments(tmp_path)) == 4


@pytest.mark.parametrize("ttl_ns", [None, 100])
@pytest.mark.parametrize("eviction", ["lru", "fifo", "lfu", "sieve", "gdsf", "arc", "s3fifo", "w-tinylfu"])
def test_an_l2_of_another_size_keeps_what_it_would_evict_last(tmp_path, eviction, ttl_ns):
    folder = tmp_path / "journal"
    busy_life(folder)
    _, same = start(shutil.copytree(folder, tmp_path / "copy"), other(), 0)
    first, *rest = same.core.tiers[1].policy._pages
    config = replace(CONFIG, tiers=(L1, TierConfig(name="l2", pages=2, eviction=eviction)), ttl_ns=ttl_ns)
    _, state = start(folder, Head(config=config, meta=META | {"epoch": 8}), 7)
    state.core.check()
    below = state.core.tiers[1]
    assert state.strays == [first], "its file is deleted"
    assert set(below.resident) == set(rest)
    assert (below.capacity, below.used, below.idle) == (2, 2, 2)
    assert [entry.chunk for entry in below.victims(1)] == rest[:1], "the new policy begins with the old one's order"
    found = verify(folder)
    assert isinstance(found, Equal), str(found)


def test_quotas_that_the_settings_change_are_theirs_and_others_are_the_operators(tmp_path):
    config = replace(CONFIG, quotas=(("same", 1), ("changed", 1), ("gone", 1)))
    life = a_life(tmp_path, Head(config=config, meta=META))
    life.journal = JournalWriter(tmp_path, life.journal.head, take_snapshot(life.state.core, life.state.book.dump()))
    for salt in ("same", "changed", "gone"):
        life.tell(QuotaSet, salt=salt, pages=2)
    life.journal.close()
    config = replace(CONFIG, quotas=(("same", 1), ("changed", 5), ("new", 3)))
    _, state = start(tmp_path, Head(config=config, meta=META | {"epoch": 8}), 7)
    assert state.core.tiers[0].quotas == {"t": 1, "same": 2, "changed": 5, "new": 3}
    assert isinstance(verify(tmp_path), Equal)


def test_a_copy_to_l2_that_the_end_cut_off_is_given_up_and_its_remains_are_deleted(tmp_path):
    life = a_life(tmp_path)
    life.journal = JournalWriter(tmp_path, HEAD, take_snapshot(life.state.core, life.state.book.dump()))
    life.store("copied", C)
    life.tell(LookedUp, request="ends with its engine", instance="e", chunks=(D,))
    life.tell(RoomAsked, request="ends with its engine", chunks=(D,))
    life.tell(StoreCommitted, request="ends with its engine", tier=0, chunks=(D,))
    life.journal.close()
    for epoch, left in ((7, {C, D}), (0, {C})):
        folder = shutil.copytree(tmp_path, tmp_path / str(epoch))
        _, state = start(folder, other(), epoch)
        assert isinstance(verify(folder), Equal)
        assert set(state.strays) == left
        assert not state.core.tiers[1].writing
        assert state.core.tiers[0].idle == state.core.tiers[0].used, "no copy holds its source any more"


def test_a_server_that_dies_before_l1_is_cleared_is_not_believed_about_the_new_arena(tmp_path):
    busy_life(tmp_path)
    found = recover(tmp_path, other(), epoch=0)
    JournalWriter(tmp_path, found.head_for(other()), take_snapshot(found.state.core, found.state.book.dump())).close()
    found, state = start(tmp_path, other(epoch=9), 8)  # it takes over the arena of the one that died so early
    assert not found.has_l1
    assert not state.book.resident
    assert set(state.core.tiers[1].resident) == {A, B, C}
    assert isinstance(verify(tmp_path), Equal)
    found, state = start(tmp_path, other(epoch=10), 9)
    assert found.has_l1, "from then on the journal tells of the new arena"
    assert set(state.core.tiers[1].resident) == {A, B, C}


def torn(path, how):
    """Leave of a segment what a machine that went down may leave."""
    data = path.read_bytes()
    at = {"empty": 0, "in the head": 30, "in the snapshot": len(data) // 2, "before the snapshot": behind_head(data)}
    path.write_bytes(data[: at[how]])


def behind_head(data):
    return len(MAGIC) + 12 + int.from_bytes(data[len(MAGIC) : len(MAGIC) + 4], "little")


def snapshots(folder, life, count):
    for _ in range(count):
        JournalWriter(folder, HEAD, take_snapshot(life.state.core, life.state.book.dump())).close()


@pytest.mark.parametrize("how", ["empty", "in the head", "before the snapshot", "in the snapshot"])
@pytest.mark.parametrize("lost", [1, 2])
def test_where_the_last_segments_are_torn_the_one_before_tells_what_l2_holds(tmp_path, how, lost):
    snapshots(tmp_path, a_life(tmp_path), 3)
    for path in segments(tmp_path)[-lost:]:
        torn(path, how)
    found, state = start(tmp_path, other(), 7)
    assert not found.has_l1, "an older segment is not believed of the arena"
    assert set(state.core.tiers[1].resident) == {A, B}
    if "snapshot" in how:
        assert isinstance(verify(tmp_path), Equal)


@pytest.mark.parametrize("how", ["empty", "in the head", "before the snapshot", "in the snapshot"])
def test_a_journal_that_is_damaged_throughout_is_no_empty_l2(tmp_path, how):
    snapshots(tmp_path, Life(tmp_path), 2)
    segments(tmp_path)[0].unlink()
    for path in segments(tmp_path):
        torn(path, how)
    with pytest.raises(DamagedJournalError, match="remove the folder"):
        recover(tmp_path, other(), epoch=7)
    assert recover(tmp_path, Head(config=replace(CONFIG, tiers=(L1,)), meta=META | {"l2": ""}), epoch=7) is None


@pytest.mark.parametrize("of", ["core", "book", "step"])
def test_a_segment_of_another_version_is_told_in_a_line_and_the_one_before_it_is_believed(tmp_path, of, caplog):
    life = a_life(tmp_path)
    core, book = dump(life.state.core), life.state.book.dump()
    if of == "core":
        core["tiers"][0]["policy"]["strange"] = 1
    if of == "book":
        book = msgspec.msgpack.encode([[], []])
    writer = JournalWriter(tmp_path, HEAD, Snapshot(core=msgspec.msgpack.encode(core), pages=book))
    if of == "step":
        writer.step(Cleared(now_ns=life.now + 1, chunks=(A,)), ())
    writer.close()
    found = recover(tmp_path, other(), epoch=7)
    assert set(found.state.core.tiers[1].resident) == {A, B}
    (line,) = [entry.getMessage() for entry in caplog.records]
    assert "cannot be believed to its end (00000002.kvj" in line
    assert line.endswith("00000001.kvj")


def test_a_segment_is_on_the_disk_before_an_older_one_is_deleted(tmp_path, monkeypatch):
    done = []

    def noted(name, call):
        return lambda *args, **more: (done.append(name), call(*args, **more))

    for name in ("fsync", "rename", "unlink"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    life = Life(tmp_path)
    done.clear()
    life.journal.keep = 1
    life.journal.rotate(take_snapshot(life.state.core, life.state.book.dump()))
    life.journal.close()
    assert done == ["rename", "fsync", "fsync", "unlink"]


def slow_disk(monkeypatch):
    """Have a disk that takes nothing until told; return who asked it, and what tells it."""
    asked, let_go = [], threading.Event()

    def fsync(fd):
        asked.append(threading.current_thread())
        if threading.current_thread() is not threading.main_thread():
            assert let_go.wait(30)

    monkeypatch.setattr(os, "fsync", fsync)
    return asked, let_go


def test_a_new_segment_does_not_wait_for_the_disk_and_a_kill_meanwhile_costs_nothing(tmp_path, monkeypatch):
    life = a_life(tmp_path / "j")
    life.journal = JournalWriter(tmp_path / "j", HEAD, take_snapshot(life.state.core, life.state.book.dump()), keep=1)
    asked, let_go = slow_disk(monkeypatch)
    life.journal.rotate(take_snapshot(life.state.core, life.state.book.dump()))
    life.store("later", C)
    assert life.journal.settling
    shutil.copytree(tmp_path / "j", tmp_path / "killed")
    shutil.copytree(tmp_path / "j", tmp_path / "down")
    newest = segments(tmp_path / "down")[-1]
    let_go.set()
    life.journal.close()
    assert threading.main_thread() not in asked
    assert not life.journal.settling
    assert [path.name for path in segments(tmp_path / "j")] == [newest.name]

    found = recover(tmp_path / "killed", HEAD, epoch=7)
    assert found.has_l1
    assert take_snapshot(found.state.core).core == take_snapshot(life.state.core).core
    assert found.state.book.dump() == life.state.book.dump()

    whole = newest.read_bytes()
    for size in (0, 5, 8, 100, 300):  # what a machine that went down may have left of it
        newest.write_bytes(whole[:size])
        found = recover(tmp_path / "down", HEAD, epoch=7)
        assert not found.has_l1
        assert set(found.state.core.tiers[1].resident) == {A, B}
    newest.write_bytes(bytes(len(whole)))
    assert set(recover(tmp_path / "down", HEAD, epoch=7).state.core.tiers[1].resident) == {A, B}


def test_a_disk_that_does_not_take_a_segment_is_told_by_the_next_write(tmp_path, monkeypatch):
    life = a_life(tmp_path)
    life.journal = JournalWriter(tmp_path, HEAD, take_snapshot(life.state.core, life.state.book.dump()), keep=1)
    _, let_go = slow_disk(monkeypatch)
    monkeypatch.setattr("kvtraces.journal._sync_folder", lambda _: (_ for _ in ()).throw(OSError(5, "a broken disk")))
    life.journal.rotate(take_snapshot(life.state.core, life.state.book.dump()))
    life.journal.flush()
    let_go.set()
    with pytest.raises(OSError, match="a broken disk"):
        life.journal.rotate(take_snapshot(life.state.core, life.state.book.dump()))
    with pytest.raises(OSError, match="a broken disk"):
        life.journal.flush()
    life.journal.abandon()
    assert len(segments(tmp_path)) == 2, "what is not replaced for certain is not deleted"


def test_the_collector_rests_while_a_snapshot_is_taken(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("kvtraces.journal.dump", lambda core: (seen.append(gc.isenabled()), dump(core))[1])
    take_snapshot(State.empty(CONFIG).core)
    assert seen == [False]
    assert gc.isenabled()
