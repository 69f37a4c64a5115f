"""A service under everything that engines, operators and crashes do to it, in an order drawn by seed.

Beside the accounts, which must agree, the machine keeps what each page holds: engines write to what they were granted
at any time until they have acknowledged, the lease run out or not, the server another one or not. What a reader is told
and finds unchanged must be the bytes of the chunk it asked for.
"""

import os
import random
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from kvcore.live import wire
from kvcore.live.allocator import PageAllocator
from kvcore.live.arena import Arena, ArenaPaths
from kvcore.live.book import page_ids
from kvcore.live.members import RefusedError, UnknownMemberError
from kvcore.live.service import Parts, Service
from kvcore.live.settings import load
from kvcore.live.takeover import State, go_on, recover
from kvtraces.journal import Equal, Head, JournalWriter, take_snapshot, verify

PAGE = 4096
PAGES = 12
NAMES = [bytes([at]) * 32 for at in range(32)]
"""Chunks of one page, then of two: a name stands for a namespace, and so for a size."""
LEASE_NS = 10**9


class Clock:
    def __init__(self):
        self.ns = 0

    def now_ns(self):
        self.ns += 1
        return self.ns


@dataclass(eq=False)
class Told:
    """Pages that an engine was told of."""

    request: str
    epoch: int
    chunks: tuple
    pages: np.ndarray
    generations: np.ndarray
    acknowledged: set = field(default_factory=set)
    begun: list | None = None
    """Which chunks are being written; None: nobody has begun."""


@dataclass(eq=False)
class Engine:
    name: str
    world: int
    block_bytes: int
    members: dict = field(default_factory=dict)
    grants: list = field(default_factory=list)
    loads: list = field(default_factory=list)
    epoch: int = 0

    @property
    def names(self):
        return tuple(NAMES[:16] if self.world * self.block_bytes == PAGE else NAMES[16:])


class World:
    """A service, its engines, and what the arena's pages hold."""

    def __init__(self, seed, **settings):
        self.rng = random.Random(seed)
        self.folder = Path(tempfile.mkdtemp(prefix="kvm-", dir="/dev/shm"))
        self.settings = load(
            {
                "l1_size_gb": PAGES * PAGE / 2**30,
                "page_size": str(PAGE),
                "chunk_size": 16,
                "admission": self.rng.choice(["always", "always", "second-use"]),
                "eviction_policy": self.rng.choice(["lru", "s3fifo"]),
                "lease_s": LEASE_NS / 1e9,
                **settings,
            },
            {},
        )
        self.paths = ArenaPaths(self.folder, "m")
        self.clock = Clock()
        self.memory = {}
        self.engines = []
        self.requests = 0
        self.arena = None
        self.open()
        self.workers_mapping = Arena.attach(self.paths.arena)  # an arena that nobody maps has no writers either

    def open(self):
        previous = 0 if self.arena is None else self.arena.epoch
        if self.arena is not None:
            self.arena.close(unlink=False)
        self.arena = Arena.open(self.paths, size_bytes=PAGES * PAGE, page_bytes=PAGE)
        config = self.settings.core_config()
        folder = self.folder / "journal"
        head = Head(config=config, meta={"epoch": self.arena.epoch, "page_bytes": PAGE})
        found = recover(folder, head, epoch=previous) if previous else None
        snapshot = None if found is None else take_snapshot(found.state.core, found.state.book.dump())
        self.journal = JournalWriter(folder, head, snapshot, keep=1000)
        state = State.empty(config)
        if found is not None:
            assert found.has_l1
            state = go_on(self.journal, found, head, self.arena.generations, self.clock.now_ns())
        allocator = PageAllocator(
            self.arena.generations, self.arena.page_writers, page_ids(state.book.resident.values())
        )
        self.service = Service(
            Parts(
                settings=self.settings,
                arena=self.arena,
                allocator=allocator,
                state=state,
                clock=self.clock,
                liveness_path="",
                journal=self.journal,
            )
        )
        self.journal.flush()

    def call(self, message):
        """As the request loop does: the journal is written before anybody is told."""
        try:
            return self.service.handle(message)
        except (UnknownMemberError, RefusedError) as error:
            return error
        finally:
            self.journal.flush()

    # Engines come and go

    def engine_comes(self):
        world, pages = self.rng.choice([(1, 1), (1, 2), (2, 1), (2, 2)])
        engine = Engine(f"e{len(self.engines)}", world, pages * PAGE // world)
        self.engines.append(engine)
        self.register(engine)

    def engine_registers_again(self):
        self.register(self.any_engine())

    def register(self, engine):
        """Register every member; an engine that was here before has drained its copies, and may begin others later."""
        engine.grants, engine.loads = [told for told in engine.grants if told.begun is None], []
        for role, rank in (("scheduler", 0), *(("worker", rank) for rank in range(engine.world))):
            message = wire.Register(
                engine.name, role, 16, engine.block_bytes, rank, engine.world, engine.world, {}, 1, engine.epoch
            )
            if (old := self.service.members.holder(message)) is not None and old.here:
                self.service.gone(old)  # its liveness connection is closed first
            registered = self.call(message)
            assert isinstance(registered, wire.Registered), registered
            self.service.here(registered.member, os.getpid())
            engine.members[role, rank] = registered.member
        engine.epoch = registered.epoch

    def any_engine(self):
        return self.rng.choice(self.engines)

    def heal(self, engine):
        """What clients do by themselves: renew, and register again where the server does not know them."""
        replies = [self.call(wire.Renew(member)) for member in engine.members.values()]
        if any(isinstance(reply, UnknownMemberError) for reply in replies):
            self.register(engine)
        self.service.sweep()
        self.journal.flush()

    def member_dies(self):
        """A process is gone: what it was copying, it copies no more; the other ranks go on."""
        engine = self.any_engine()
        role, rank = self.rng.choice(sorted(engine.members))
        member = self.service.members.find_token(engine.members[role, rank])
        if member is None:
            return
        self.service.gone(member)
        self.journal.flush()
        if role == "worker":
            for told in (*engine.grants, *engine.loads):
                told.acknowledged.add(rank)

    def everybody_renews(self):
        for engine in self.engines:
            for member in engine.members.values():
                self.call(wire.Renew(member))

    def time_passes(self):
        self.clock.ns += self.rng.choice([LEASE_NS // 2, 2 * LEASE_NS])
        self.service.sweep()
        self.journal.flush()

    def crash(self):
        """The server dies and another starts; engines go on with what they were told until they register."""
        if self.rng.random() < 0.5:
            self.take_a_step_that_nobody_learns_of()
        self.journal.close()
        self.open()

    def take_a_step_that_nobody_learns_of(self):
        """Pages are handed out, and chunks evicted for them, of which neither engine nor journal is told."""
        engine = self.any_engine()
        member = engine.members["scheduler", 0]
        for message in (wire.Lookup(member, "lost", engine.names), wire.Ask(member, "lost", engine.names[::-1])):
            with suppress(UnknownMemberError, RefusedError):
                self.service.handle(message)
        self.journal._waiting.clear()

    # Requests

    def request(self, *, well):
        """A request looks up and asks for what it did not find; if all goes well it also loads, stores and ends."""
        engine = self.any_engine()
        self.requests += 1
        start = self.rng.randrange(3) * 4
        name, chunks = f"r{self.requests}", engine.names[start : start + self.rng.randrange(1, 7)]
        self.heal(engine)
        found = self.look_up(engine, name, chunks, 0 if well else self.rng.randrange(3))
        granted = self.ask_for(engine, name, chunks)
        if not well:
            return
        for told, kind in ((found, wire.Loaded), (granted, wire.Committed)):
            if told is None:
                continue
            if told is granted:
                self.fill(engine, told)
            for rank in range(engine.world):
                told.acknowledged.add(rank)
                self.call(kind(engine.members["worker", rank], name, rank, told.chunks))
        self.call(wire.End(engine.members["scheduler", 0], name))

    def a_work(self):
        """Return a request at work: its engine, name and chunks; None where there is none."""
        if not self.service.works:
            return None
        work = self.rng.choice([*self.service.works.values()])
        engine = next(engine for engine in self.engines if engine.name == work.instance.name)
        return engine, work.name.removeprefix(f"{engine.name}/"), work.chunks

    def look_up_again(self):
        if (work := self.a_work()) is not None:
            self.look_up(*work, self.rng.randrange(4))

    def look_up(self, engine, name, chunks, computed):
        found = self.call(wire.Lookup(engine.members["scheduler", 0], name, chunks, min(computed, len(chunks))))
        if not isinstance(found, wire.Found) or not found.load_chunks:
            return None
        run = chunks[found.load_start : found.load_start + found.load_chunks]
        engine.loads.append(self.told(name, found, run))
        return engine.loads[-1]

    def ask_again(self):
        if (work := self.a_work()) is not None:
            engine, name, chunks = work
            self.ask_for(engine, name, chunks[self.rng.randrange(3) :])

    def ask_for(self, engine, name, wanted):
        granted = self.call(wire.Ask(engine.members["scheduler", 0], name, wanted))
        if not isinstance(granted, wire.Granted) or not granted.chunks:
            return None
        engine.grants.append(self.told(name, granted, tuple(wanted[at] for at in granted.chunks)))
        return engine.grants[-1]

    def told(self, name, reply, chunks):
        pages = np.frombuffer(reply.pages, "<u4").reshape(len(chunks), -1)
        generations = np.frombuffer(reply.generations, "<u8").reshape(len(chunks), -1)
        assert np.array_equal(self.arena.generations[pages], generations)
        return Told(name, reply.epoch, chunks, pages, generations)

    def end(self):
        if (work := self.a_work()) is not None:
            engine, name, _ = work
            self.call(wire.End(engine.members["scheduler", 0], name))

    # Copies

    def write(self):
        """Ranks that have not acknowledged write, whatever has become of lease and server."""
        for engine in self.engines:
            for told in engine.grants:
                if len(told.acknowledged) < engine.world and self.rng.random() < 0.5:
                    self.fill(engine, told)

    def fill(self, engine, told):
        """A worker begins with what is still its own, and goes on with that."""
        if told.begun is None:
            theirs = [self.arena.generations[pages] for pages in told.pages]
            same = [np.array_equal(*both) for both in zip(theirs, told.generations, strict=True)]
            told.begun = [one and told.epoch == engine.epoch for one in same]
        for chunk, pages, begun in zip(told.chunks, told.pages, told.begun, strict=True):
            for page in pages.tolist() if begun else ():
                self.memory[page] = chunk

    def acknowledge(self, *, stores):
        """A rank says that a copy has ended, well or not."""
        engine = self.any_engine()
        told = self.rng.choice((engine.grants if stores else engine.loads) or [None])
        rank = self.rng.randrange(engine.world)
        if told is None or rank in told.acknowledged:
            return
        well = self.rng.random() < 0.7
        if stores and well:
            self.fill(engine, told)
        told.acknowledged.add(rank)
        if told.epoch != engine.epoch:
            return  # a client says nothing to a server about what another told
        member, done = engine.members["worker", rank], told.chunks if well else ()
        if stores and well:
            done = tuple(chunk for chunk, begun in zip(told.chunks, told.begun, strict=True) if begun)
        left = tuple(chunk for chunk in told.chunks if chunk not in done)
        kinds = (wire.Committed, wire.Aborted) if stores else (wire.Loaded, wire.LoadFailed)
        for kind, chunks in zip(kinds, (done, left), strict=True):
            if chunks:
                self.call(kind(member, told.request, rank, chunks))

    # The operator

    def clear(self):
        everything = self.rng.random() < 0.3
        self.call(wire.Clear(None if everything else tuple(self.rng.sample(NAMES, 5))))

    def pin(self):
        kind = self.rng.choice([wire.Pin, wire.Unpin, wire.Unpin])
        self.call(kind(tuple(self.rng.sample(NAMES, 2))))

    # What must hold

    def check(self):
        parts = self.service.parts
        core, book, allocator = parts.state.core, parts.state.book, parts.allocator
        core.check()
        tier = core.tiers[0]
        assert set(book.resident) == set(tier.resident) | set(tier.leaving)
        rooms = [*book.resident.values(), *(room for rooms in book.writes.values() for room in rooms.values())]
        pages = page_ids(rooms).tolist()
        assert len(set(pages)) == len(pages), "two chunks in one page"
        assert allocator.used == len(pages)
        assert allocator.quarantined == len(self.service._quarantined)
        assert tier.used == len(pages) + allocator.quarantined
        assert not self.service.transport.answers
        for engine in self.engines:
            for told in engine.loads:
                for chunk, pages, generations in zip(told.chunks, told.pages, told.generations, strict=True):
                    if np.array_equal(self.arena.generations[pages], generations):
                        assert {self.memory[page] for page in pages.tolist()} == {chunk}, "another chunk's bytes"

    def close(self):
        """Everybody goes: nothing is held any more, and the journal tells all of it."""
        for engine in self.engines:
            for member in engine.members.values():
                if (known := self.service.members.find_token(member)) is not None:
                    self.service.gone(known)
        self.check()
        assert not self.service.parts.state.book.writes, "engines that are gone hold nothing"
        assert not self.service.works
        self.journal.close()
        found = verify(self.folder / "journal")
        assert isinstance(found, Equal), str(found)
        self.workers_mapping.close()
        self.arena.close()


OPERATIONS = {
    World.engine_comes: 2,
    World.engine_registers_again: 2,
    World.member_dies: 3,
    World.everybody_renews: 10,
    World.time_passes: 3,
    World.crash: 2,
    World.look_up_again: 6,
    World.ask_again: 6,
    World.end: 12,
    World.write: 10,
    World.clear: 2,
    World.pin: 2,
}


def requests_well(world):
    world.request(well=True)


def requests(world):
    world.request(well=False)


def acknowledges_stores(world):
    world.acknowledge(stores=True)


def acknowledges_loads(world):
    world.acknowledge(stores=False)


OPERATIONS |= {requests_well: 20, requests: 20, acknowledges_stores: 20, acknowledges_loads: 20}


@pytest.mark.parametrize("seed", range(100))
def test_nothing_wrong_is_read_and_nothing_is_lost(operate, seed):
    world = World(seed)
    try:
        world.engine_comes()
        operate(world, seed, OPERATIONS, 300)
    finally:
        shutil.rmtree(world.folder)


def test_chunks_of_another_size_under_the_same_names_are_misses():
    """Names stand for sizes; a client that breaks this gets nothing of others' pages, and nothing stays pinned."""
    world = World(0)
    try:
        for pages in (1, 2):
            engine = Engine(f"e{pages}", 1, pages * PAGE)
            world.engines.append(engine)
            world.register(engine)
        one, two = world.engines
        chunks = tuple(NAMES[:3])
        for _ in range(2):  # the first may be refused under second-use admission
            world.look_up(one, "a", chunks, 0)
            granted = world.ask_for(one, "a", chunks)
            if granted is not None:
                world.call(wire.Committed(one.members["worker", 0], "a", 0, chunks))
        world.call(wire.End(one.members["scheduler", 0], "a"))
        found = world.call(wire.Lookup(two.members["scheduler", 0], "b", chunks))
        assert isinstance(found, RefusedError)
        assert "another size" in str(found)
        assert world.ask_for(two, "b", chunks) is None
        world.call(wire.End(two.members["scheduler", 0], "b"))
        assert not world.service.works
        assert world.service.parts.state.core.tiers[0].idle == 3
        world.close()
    finally:
        shutil.rmtree(world.folder)


def test_a_request_that_comes_back_is_told_of_nothing_from_its_earlier_life():
    """It had loaded, was storing when all was cleared, and was preempted: that run is not there any more."""
    world = World(1)
    try:
        world.engines.append(Engine("e", 1, PAGE))
        (engine,) = world.engines
        world.register(engine)
        scheduler, worker = engine.members["scheduler", 0], engine.members["worker", 0]
        a, b = NAMES[:2]
        for _ in range(2):
            world.look_up(engine, "first", (a,), 0)
            if world.ask_for(engine, "first", (a,)) is not None:
                world.call(wire.Committed(worker, "first", 0, (a,)))
        world.call(wire.End(scheduler, "first"))
        assert world.call(wire.Lookup(scheduler, "r", (a, b))).load_chunks == 1
        world.call(wire.Loaded(worker, "r", 0, (a,)))
        for _ in range(2):
            granted = world.call(wire.Ask(scheduler, "r", (b,)))
        assert granted.chunks == (0,) or granted.refused == {"storing": 1}
        world.call(wire.Clear())
        world.call(wire.End(scheduler, "r"))
        found = world.call(wire.Lookup(scheduler, "r", (a, b), resumed=True))
        assert (found.hits, found.load_chunks) == ((0,), 0)
        world.call(wire.Aborted(worker, "r", 0, (b,)))
        world.call(wire.End(scheduler, "r"))
        world.check()
        assert not world.service.works
        assert world.service.parts.allocator.free == PAGES
        world.close()
    finally:
        shutil.rmtree(world.folder)


@pytest.fixture
def world():
    made = World(1)
    yield made
    shutil.rmtree(made.folder)


def register(world, name, ranks, shards, epoch=0):
    members = {}
    for role, rank in (("scheduler", 0), *(("worker", rank) for rank in range(ranks))):
        told = world.call(wire.Register(name, role, 16, PAGE, rank, ranks, shards, {}, 1, epoch))
        world.service.here(told.member, os.getpid())
        members[role, rank] = told.member
    return members, told.epoch


def granted(world, members):
    """Pages of two chunks, and their generations; who is granted room at second use only asks twice."""
    world.call(wire.Lookup(members["scheduler", 0], "r", tuple(NAMES[:2]), 0, "", 32))
    for _ in range(2):
        answer = world.call(wire.Ask(members["scheduler", 0], "r", tuple(NAMES[:2])))
        if answer.chunks:
            return np.frombuffer(answer.pages, "<u4"), np.frombuffer(answer.generations, "<u8")
    raise AssertionError(answer)


def test_what_was_granted_before_a_worker_came_back_is_void(world):
    """It lost the server for a moment, which lived, and did not raise its epoch."""
    members, epoch = register(world, "e", 1, 1)
    pages, generations = granted(world, members)
    world.service.gone(world.service.members.find_token(members["worker", 0]))  # it closes its liveness connection
    again = world.call(wire.Register("e", "worker", 16, PAGE, 0, 1, 1, {}, 1, epoch))
    world.service.here(again.member, os.getpid())
    assert again.epoch == epoch
    assert world.service.parts.allocator.free == PAGES
    assert (world.arena.generations[pages] != generations).all(), "the worker would still write there"


def test_a_rank_that_stores_nothing_frees_nothing_when_it_goes(world):
    members, _ = register(world, "e", 2, 1)  # both ranks hold the same KV
    granted(world, members)
    free = world.service.parts.allocator.free
    world.service.gone(world.service.members.find_token(members["worker", 1]))
    assert world.service.parts.allocator.free == free < PAGES, "rank 0 still writes them"


def test_a_run_begins_where_its_first_chunk_is(world):
    """Of a request that was looked up again while a store of it was under way, and again when that had ended."""
    members, _ = register(world, "e", 1, 1)
    scheduler, worker, chunks = members["scheduler", 0], members["worker", 0], tuple(NAMES[:4])
    for name, computed, stored in (("first", 0, chunks[:2]), ("second", 2, chunks[2:])):
        world.call(wire.Lookup(scheduler, name, chunks, computed))
        for _ in range(2):  # room is granted at second use, with some seeds
            world.call(wire.Ask(scheduler, name, stored))
        if name == "first":
            world.call(wire.Committed(worker, name, 0, stored))
        world.call(wire.End(scheduler, name))
    assert not world.call(wire.Lookup(scheduler, "second", chunks, 1)).load_chunks
    world.call(wire.Committed(worker, "second", 0, chunks[2:]))
    found = world.call(wire.Lookup(scheduler, "second", chunks, 3))
    assert (found.load_start, found.load_chunks) == (3, 1)
    assert found.pages == world.service.parts.state.book.resident[chunks[3]].ids


def test_a_lookup_under_the_name_of_a_request_that_is_still_ending_finds_nothing(world):
    """What the core says then was found of the earlier prompt; its load is not acknowledged yet."""
    members, _ = register(world, "e", 1, 1)
    scheduler, worker = members["scheduler", 0], members["worker", 0]
    granted(world, members)
    world.call(wire.Committed(worker, "r", 0, tuple(NAMES[:2])))
    world.call(wire.End(scheduler, "r"))
    assert world.call(wire.Lookup(scheduler, "again", tuple(NAMES[:2]))).load_chunks == 2
    world.call(wire.End(scheduler, "again"))
    before = dict(world.service.metrics.counts)
    found = world.call(wire.Lookup(scheduler, "again", (NAMES[9],)))
    assert (sum(found.hits), found.load_chunks, found.pending) == (0, 0, False)
    counts = {key: count - before.get(key, 0) for key, count in world.service.metrics.counts.items()}
    sums = {
        name: sum(count for key, count in counts.items() if key[0] == f"kvcore_{name}_tokens")
        for name in ("requested", "matched", "missed")
    }
    assert sums == {"requested": 16, "matched": 0, "missed": 16}
    world.call(wire.Loaded(worker, "again", 0, tuple(NAMES[:2])))
    world.call(wire.End(scheduler, "again"))
    world.check()
    assert not world.service.works
    found = world.call(wire.Lookup(scheduler, "again", tuple(NAMES[:2])))
    assert (sum(found.hits), found.load_chunks) == (2, 2), "the name is free again"
    world.call(wire.Loaded(worker, "again", 0, tuple(NAMES[:2])))
    world.call(wire.End(scheduler, "again"))
    world.close()


def test_what_has_expired_leaves_though_nobody_asks_anything():
    world = World(1, ttl_s=5.0)
    try:
        members, _ = register(world, "e", 1, 1)
        granted(world, members)
        world.call(wire.Committed(members["worker", 0], "r", 0, tuple(NAMES[:2])))
        world.call(wire.End(members["scheduler", 0], "r"))
        assert world.call(wire.Pin((NAMES[0], NAMES[7]))).missing == 1
        world.clock.ns += 4 * 10**9
        world.service.sweep()
        assert world.service.parts.allocator.used == 2
        world.clock.ns += 2 * 10**9
        world.service.sweep()
        assert world.service.parts.allocator.used == 1, "the other one is pinned"
        steps = world.journal.written_bytes, len(world.journal._waiting)
        world.service.sweep()
        assert (world.journal.written_bytes, len(world.journal._waiting)) == steps, "time alone is not told"
        world.call(wire.Unpin((NAMES[0],)))
        world.clock.ns += 6 * 10**9
        assert world.call(wire.Pin((NAMES[0],))).missing == 1, "it had expired"
        world.check()
        world.close()
    finally:
        shutil.rmtree(world.folder)


def test_what_is_told_of_the_operator_and_of_members(world, caplog):
    caplog.set_level("INFO")
    members, _ = register(world, "e", 1, 1)
    granted(world, members)
    for message in (
        wire.SetQuota("bob", 5),
        wire.Pin(tuple(NAMES[:2])),
        wire.Unpin(tuple(NAMES[:1])),
        wire.Clear(tuple(NAMES[:1])),
        wire.Clear(),
    ):
        world.call(message)
    assert [entry.getMessage() for entry in caplog.records if entry.name == "kvcore.service"] == [
        "'e/scheduler/0' registered, process 1",
        "'e/worker/0' registered, process 1",
        "quota of 'bob': 5 pages",
        "pin: 2 chunks, of which 2 are not in L1",
        "unpin: 1 chunks",
        "clear: 1 chunks",
        "clear: everything",
    ]
    assert world.call(wire.Status()).data["quotas"] == {"bob": {"pages": 5, "used_pages": 0}}
    world.call(wire.SetQuota("bob", None))
    assert world.call(wire.Status()).data["quotas"] == {}
