"""A small engine around the scheduler's half and a real service, in which every message and copy takes its time.

What vLLM does to a connector, in an order drawn by seed: blocks that requests share, prefixes that the engine itself
holds, steps that are planned ahead, preemption, aborts, loads that fail. Beside it stands what every block and page
holds, so that a wrong byte that is given out or stored is seen where it happens.
"""

import os
import random
import shutil
import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from engine_double import EngineRequest, engine_hashes, step

from kvcore.live import client, wire
from kvcore.live.allocator import PageAllocator
from kvcore.live.arena import Arena, ArenaPaths
from kvcore.live.members import RefusedError, UnknownMemberError
from kvcore.live.service import MonotonicClock, Parts, Service
from kvcore.live.settings import load
from kvcore.live.stores.pool import Completion, Outcome
from kvcore.live.takeover import State
from kvcore.policy.hashing import Namespace, chunk_names
from kvcore.vllm.jobs import StepReport
from kvcore.vllm.namespace import Hasher
from kvcore.vllm.scheduler import Options, SchedulerSide

BLOCK, CHUNK = 4, 16
PAGE, PAGES = 4096, 16
BLOCKS = 32
MOST_RUNNING = 8
NAMESPACE = Namespace(model="m", kv_dtype="float32", layout="x", block_tokens=BLOCK)
BAD, MIXED = "bad", "mixed"
"""What a block holds that was not loaded or rests on such, and one that rests on blocks of earlier weights."""


def prompts():
    """Of a tree of prefixes, some long enough for their lookup to be put off."""
    tokens = random.Random(1).choices(range(1000), k=400)
    stems = [tokens[at : at + 80] for at in (0, 80)]
    return [
        stem[:shared] + tokens[200 + 20 * at : 200 + 20 * at + more]
        for stem in stems
        for shared in (6, 16, 31, 32, 48, 80)
        for at, more in enumerate((0, 1, 4, 19))
    ]


PROMPTS = prompts()


@dataclass(eq=False)
class Request(EngineRequest):
    """A request in the engine. `done` counts its tokens that are computed when all steps planned have run."""

    table: list = field(default_factory=list)
    done: int = 0
    state: str = "waiting"
    num_output_placeholders: int = 0
    lives: int = 0

    @property
    def block_hashes(self):
        return engine_hashes(self.prompt_token_ids + [0] * self.num_output_tokens, block=BLOCK)

    @property
    def hashes(self):
        """Of the prompt's full blocks: what they hold when they are right."""
        return self.block_hashes[: self.num_prompt_tokens // BLOCK]


class Connection:
    """A client's connection: what is sent arrives in order and some time, and so do the answers."""

    def __init__(self, engine):
        self.engine, self.count, self.replies, self.closed = engine, 0, deque(), False

    def send(self, message):
        self.count += 1
        self.engine.sent.append((self, self.count, message))
        return self.count

    def receive(self, _):
        here = self.engine.rng.randint(0, len(self.replies))
        return [self.replies.popleft() for _ in range(here)]

    def close(self):
        self.closed = True


class Presence:
    session = None

    def lost(self, *_):
        self.session = None


@dataclass(eq=False)
class Session:
    registered: wire.Registered


class L2:
    """A store below L1, in the place of `StorePool`: it does what it is asked when it is let, or fails to."""

    def __init__(self, rng):
        self.rng, self.held = rng, {}
        self.writes, self.reads, self.done = deque(), [], []

    def submit_put(self, token, chunk, parts):
        self.writes.append((token, chunk, parts))
        return True

    def submit_delete(self, chunks):
        self.writes.extend((None, chunk, None) for chunk in chunks)

    def submit_get(self, token, chunk, parts):
        self.reads.append((token, chunk, parts))
        return True

    def work(self):
        """Writes keep their order, and reads none."""
        if self.writes and self.rng.random() < 0.5:
            token, chunk, parts = self.writes.popleft()
            if parts is None:
                self.held.pop(chunk, None)
            else:
                well = self.rng.random() > 0.1
                if well:
                    self.held[chunk] = b"".join(parts)
                self.end(token, "put", Outcome.DONE if well else Outcome.FAILED)
        elif self.reads:
            token, chunk, (part,) = self.reads.pop(self.rng.randrange(len(self.reads)))
            outcome = Outcome.DONE if chunk in self.held else Outcome.MISS
            if self.rng.random() < 0.1:
                outcome = Outcome.FAILED
            if outcome is Outcome.DONE:
                part[:] = self.held[chunk]
            self.end(token, "get", outcome)

    def end(self, token, operation, outcome):
        self.done.append(Completion(token=token, operation=operation, outcome=outcome, size_bytes=PAGE, duration_ns=1))

    def drain(self):
        done, self.done = self.done, []
        return done


class Pool:
    """The engine's blocks, which keep what they hold until they are handed out again."""

    def __init__(self):
        self.refs = [0] * BLOCKS
        self.free = list(range(BLOCKS))
        self.cached = {}

    def hits(self, request):
        """The blocks of its head that are cached, but for the last token's."""
        found = []
        for name in request.hashes[: (request.num_tokens - 1) // BLOCK]:
            if name not in self.cached:
                break
            found.append(self.cached[name])
        return found

    def room(self, hits=()):
        return len(self.free) - sum(self.refs[block] == 0 for block in hits)

    def take(self, count, hits=()):
        for block in hits:
            if self.refs[block] == 0:
                self.free.remove(block)
            self.refs[block] += 1
        new = [self.free.pop(0) for _ in range(count)]
        for block in new:
            self.refs[block] = 1
            self.evict([block])
        return [*hits, *new]

    def release(self, table):
        for block in reversed(table):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self.free.append(block)

    def cache(self, request, upto):
        for name, block in zip(request.hashes[: upto // BLOCK], request.table, strict=False):
            self.cached.setdefault(name, block)

    def evict(self, blocks):
        self.cached = {name: block for name, block in self.cached.items() if block not in blocks}


class Engine:
    """Everything, for one seed."""

    def __init__(self, seed, monkeypatch):
        self.rng = random.Random(seed)
        self.ahead = self.rng.random() < 0.7
        mode = self.rng.choice(["sync", "async", "auto"])
        self.folder = Path(tempfile.mkdtemp(prefix="kvm-", dir="/dev/shm"))
        self.arena, self.with_l2 = None, self.rng.random() < 0.5
        self.sent, self.said = deque(), deque()
        self.start_server()
        monkeypatch.setattr(client, "Connection", lambda *_: Connection(self))
        monkeypatch.setattr(client, "_PATIENCE_S", 0.0)
        monkeypatch.setattr("kvcore.vllm.namespace._LONG", 16)
        register = wire.Register("e", "scheduler", BLOCK, PAGE * BLOCK // CHUNK)
        self.client = client.SchedulerClient("", register, deadline_s=1e9, wait_s=0.0)
        self.client._presence = Presence()
        options = Options(
            block_tokens=BLOCK, load_mode=mode, copies_in_step=False, grant_wait_s=0.0, plans_ahead=self.ahead
        )
        self.side = SchedulerSide(self.client, Hasher(NAMESPACE, engine_hashes=True), options)
        self.pool, self.holds = Pool(), [None] * BLOCKS
        self.waiting, self.running, self.loading, self.steps = [], [], [], deque()
        self.copying = []
        self.preempted = []
        """Since the last step was planned, also by a failed load or a reset: vLLM tells of all."""
        self.rows = deque(maxlen=40)
        self.failed, self.count, self.epoch = 0, 0, 0
        situations = ("loaded", "load failed", "stored", "preempted", "again", "put off", "lost", "from l2")
        self.seen = dict.fromkeys(situations, 0)
        self.weights = 0
        self.wanted = {}
        """What the blocks of a chunk hold, by its name."""
        self.learn_names()
        self.register()

    def learn_names(self):
        for prompt in PROMPTS:
            one = Request("", prompt)
            holds = [(self.weights, name) for name in one.hashes]
            for at, name in enumerate(chunk_names(Hasher(self.side._hasher.namespace)(one), CHUNK // BLOCK)):
                self.wanted[name] = holds[at * CHUNK // BLOCK : (at + 1) * CHUNK // BLOCK]

    # The server, and the way to it

    def start_server(self):
        if self.arena is not None:
            self.arena.close(unlink=False)
        pages = PAGES // 2 if self.with_l2 else PAGES
        below = {"l2": f"files:{self.folder}/l2", "l2_size_gb": PAGES * PAGE / 2**30} if self.with_l2 else {}
        sizes = {"l1_size_gb": pages * PAGE / 2**30, "page_size": str(PAGE), "chunk_size": CHUNK}
        settings = load({**sizes, **below}, {})
        paths = ArenaPaths(self.folder, "m")
        self.arena = Arena.open(paths, size_bytes=pages * PAGE, page_bytes=PAGE)
        state = State.empty(settings.core_config())
        self.service = Service(
            Parts(
                settings=settings,
                arena=self.arena,
                allocator=PageAllocator(self.arena.generations, self.arena.page_writers, np.empty(0, np.int64)),
                state=state,
                clock=MonotonicClock(),
                liveness_path="",
                pool=L2(self.rng) if self.with_l2 else None,
            )
        )

    def register(self, roles=("scheduler", "worker")):
        """Members come, or come back: with what was said before it is over, and copies have ended."""
        for role in roles:
            came = wire.Register("e", role, BLOCK, PAGE * BLOCK // CHUNK, drained_epoch=self.epoch)
            registered = self.service.handle(came)
            self.service.here(registered.member, os.getpid())
            if role == "scheduler":
                self.client._presence.session = Session(registered)
            else:
                self.said.clear()
                self.copying = [(copy, True) for copy, _ in self.copying]
                self.worker, self.epoch = registered, registered.epoch

    def lose_server(self):
        """Both members, or one that had no answer for too long."""
        lost = self.rng.choice(["scheduler", "worker", "both"])
        if lost != "worker":
            self.client._presence.session = None
        if lost != "scheduler":
            self.worker = None
        self.seen["lost"] += 1

    def server_comes(self):
        away = {"scheduler": self.client._presence.session is None, "worker": self.worker is None}
        if all(away.values()) and self.rng.random() < 0.5:
            self.start_server()
        self.register([role for role, gone in away.items() if gone])

    def l2_works(self):
        if self.with_l2:
            self.service.parts.pool.work()
            self.service.collect()

    def clear(self):
        self.service.handle(wire.Clear(None))

    def deliver(self):
        """A message arrives: the scheduler's next, or the worker's."""
        queue = self.rng.choice([queue for queue in (self.sent, self.said) if queue] or [None])
        if queue is self.said and queue:
            if self.worker is not None:
                self.service.handle(queue.popleft())
        elif queue:
            connection, count, message = queue.popleft()
            if connection.closed:
                return
            try:
                reply = self.service.handle(message)
            except UnknownMemberError as error:
                reply = wire.Error("unknown_instance", str(error))
            except RefusedError as error:
                raise AssertionError(message) from error
            connection.replies.append((count, reply))

    # The engine's scheduler

    def add(self):
        if len(self.waiting) + len(self.running) + len(self.loading) < 10:
            self.count += 1
            most = self.rng.randint(1, 12)
            self.waiting.append(Request(f"r{self.count}", self.rng.choice(PROMPTS), max_tokens=most))

    def forget_locally(self):
        self.pool.cached.clear()

    def other_weights(self):
        """What runs starts anew and nothing stays cached, as vLLM has it; steps that are planned have the old ones."""
        if self.loading or any(one.table for one in self.waiting):
            return  # vLLM resets no cache whose blocks are taken
        for one in list(self.running):
            self.preempt(one)
        self.forget_locally()
        self.weights += 1
        self.side.forget(str(self.weights))
        self.learn_names()

    def abort(self):
        everybody = [*self.waiting, *self.running, *self.loading]
        if everybody:
            self.end(self.rng.choice(everybody))

    def end(self, one):
        self.side.finished(one)
        for queue in (self.waiting, self.running):
            if one in queue:
                queue.remove(one)
                self.pool.release(one.table)
        one.state, one.lives = "ended", one.lives + 1  # blocks that are being loaded are free when they are loaded

    def preempt(self, one):
        self.running.remove(one)
        self.pool.release(one.table)
        one.table, one.done, one.state, one.lives = [], 0, "waiting", one.lives + 1
        one.num_output_placeholders = 0
        one.num_preemptions += 1
        self.waiting.insert(0, one)
        self.preempted.append(one.request_id)
        self.seen["preempted"] += 1

    def plan(self):
        """One step of the scheduler's."""
        budget, rows, before = self.rng.choice([8, 24, 64]), [], len(self.preempted)
        for one in list(self.running):
            if one in self.running:
                budget -= self.grow(one, budget, rows)
        if len(self.preempted) == before:
            for one in list(self.waiting):
                if budget > 0 and len(self.running) + len(self.loading) < MOST_RUNNING:
                    budget -= self.take_up(one, budget, rows)
        rows = [row for row in rows if row[0].state == "running"]
        output = step(
            new=[(one.request_id, table, start, todo) for one, kind, table, start, todo in rows if kind == "new"],
            cached=[
                (one.request_id, table, start, todo, kind == "again")
                for one, kind, table, start, todo in rows
                if kind != "new"
            ],
            preempted=self.preempted,
        )
        self.preempted = []
        self.seen["put off"] += len(self.side._put_off)
        plan = self.side.plan(output)
        computed = [(one, one.lives, start, todo, list(one.table)) for one, _, _, start, todo in rows]
        self.steps.append((plan, computed, self.weights))

    def grow(self, one, budget, rows):
        """Schedule a running request; return its tokens."""
        left = one.num_prompt_tokens + one.max_tokens - 1 - one.done
        todo = min(budget, left if one.done >= one.num_prompt_tokens else one.num_prompt_tokens - one.done)
        if one.done >= one.num_prompt_tokens:
            todo = min(todo, 1)
        if todo <= 0:
            return 0
        lacks = -(-(one.done + todo) // BLOCK) - len(one.table)
        while lacks > self.pool.room():
            last = self.running[-1]
            self.preempt(last)
            if last is one:
                return 0
        new = self.pool.take(max(0, lacks))
        one.table += new
        rows.append((one, "cached", new, one.done, todo))
        self.count_step(one, todo)
        return todo

    def count_step(self, one, todo):
        one.done += todo
        self.pool.cache(one, min(one.done, one.num_prompt_tokens))
        if one.done >= one.num_prompt_tokens:
            one.num_output_placeholders += 1

    def take_up(self, one, budget, rows):
        """Take up a request that waits; return its tokens in this step, all where there is no room for it."""
        hits, external, asynchronous = [], 0, False
        if one.state == "loaded":
            start = one.done
            if start == one.num_tokens:
                start = one.done = one.num_tokens - 1
        if one.state == "waiting" or start == 0:
            if one.state == "loaded":
                self.pool.release(one.table)
                one.table, one.state = [], "waiting"
            hits = self.pool.hits(one)
            external, asynchronous = self.side.matched(one, len(hits) * BLOCK)
            if external is None:
                return 0
            start = len(hits) * BLOCK + external
            assert start < one.num_tokens or (asynchronous and start == one.num_tokens)
        todo = 0 if asynchronous else min(budget, max(1, one.num_prompt_tokens - start))
        lacks = -(-(start + todo) // BLOCK) - len(hits) - len(one.table)
        if lacks > self.pool.room(hits):
            return budget
        one.table += self.pool.take(max(0, lacks), hits)
        self.side.allocated(one, one.table, external)
        self.waiting.remove(one)
        one.done = start
        if asynchronous:
            one.state = "loading"
            self.loading.append(one)
            return 0
        self.running.append(one)
        one.state = "running"
        self.seen["again"] += one.num_preemptions > 0
        rows.append((one, "again" if one.num_preemptions else "new", list(one.table), start, todo))
        self.count_step(one, todo)
        return todo

    # The worker, and what comes of a step

    def run(self):
        """The oldest step that is planned runs, and its outcome is known."""
        plan, computed, weights = self.steps.popleft()
        if plan.grants_lost and self.worker is not None:
            self.register(["worker"])
        invalid, received = set(), set()
        failed_before = self.failed
        for copy in plan.loads:
            if copy.asynchronous:
                self.copying.append((copy, False))
            elif bad := self.load(copy):
                invalid |= bad
                self.failed += 1
        for row in computed:
            self.compute(*row, weights)
        for copy in plan.stores:
            self.store(copy, plan.failures_seen.get(0, 0))
        copying, self.copying = self.copying, []
        for copy, ended in copying:
            if ended or self.rng.random() < 0.4:
                invalid |= self.load(copy, fails=ended)
                received.add(copy.request)
            else:
                self.copying.append((copy, False))
        report = StepReport(failures={0: self.failed}) if self.failed > failed_before else None
        self.take_in(computed, report, invalid, received)

    def bytes_of(self, page):
        """The first bytes of a page, which stand for all: those of a chunk hold its name."""
        return memoryview(self.arena.data)[page * PAGE : page * PAGE + 32]

    def load(self, copy, fails=False):
        """Copy from the arena, or fail; return the blocks that were not loaded."""
        theirs = self.arena.generations[copy.pages]
        here = self.worker is not None and copy.epoch == self.worker.epoch
        same = (theirs == copy.generations).all(axis=1) & here & (self.rng.random() > 0.1) & (not fails)
        bad = set()
        for chunk, pages, blocks, good in zip(
            copy.chunks, copy.pages.tolist(), copy.blocks.tolist(), same, strict=True
        ):
            assert not good or self.bytes_of(pages[0]) == chunk, "another chunk's bytes"
            for block, name in zip(blocks, self.wanted[chunk], strict=True):
                if block >= 0:
                    self.holds[block] = name if good else BAD
                    bad |= set() if good else {block}
        self.tell(copy, same, wire.Loaded, wire.LoadFailed)
        self.seen["loaded"] += int(same.sum())
        self.seen["from l2"] += len(copy.tiers) == 2 and copy.tiers[1] > 0
        self.seen["load failed"] += int((~same).sum())
        return bad

    def compute(self, one, _, start, todo, table, weights):
        """A row of the step: it writes its blocks, whatever has become of its request since it was planned."""
        hashes = one.hashes
        for at in range(start // BLOCK, min(len(hashes), -(-(start + todo) // BLOCK))):
            below = [self.holds[block] == (weights, name) for block, name in zip(table[:at], hashes, strict=False)]
            written = [self.holds[table[at]]] if at * BLOCK < start else []
            rests = [*(self.holds[block] for block in table[:at]), *written]
            if BAD in rests:
                self.holds[table[at]] = BAD
            elif not all(below) or not {(weights, "begun"), (weights, hashes[at])}.issuperset(written):
                self.holds[table[at]] = MIXED
            elif self.holds[table[at]] != (weights, hashes[at]):  # the same is written again where requests share it
                self.holds[table[at]] = weights, hashes[at] if (at + 1) * BLOCK <= start + todo else "begun"

    def store(self, copy, failures_seen):
        theirs = self.arena.generations[copy.pages]
        here = self.worker is not None and copy.epoch == self.worker.epoch and failures_seen >= self.failed
        good = (theirs == copy.generations).all(axis=1) & here & (self.rng.random() > 0.1)
        for chunk, pages, blocks, kept in zip(
            copy.chunks, copy.pages.tolist(), copy.blocks.tolist(), good, strict=True
        ):
            if kept:
                assert [self.holds[block] for block in blocks] == self.wanted[chunk], (
                    f"{copy.name} stores what is wrong"
                )
                self.bytes_of(pages[0])[:] = chunk
        self.tell(copy, good, wire.Committed, wire.Aborted)
        self.seen["stored"] += int(good.sum())

    def tell(self, copy, good, well, badly):
        """Acknowledge a copy, to the server that told of it."""
        if self.worker is None or copy.epoch != self.worker.epoch:
            return
        for kind, which in ((well, good), (badly, ~good)):
            if which.any():
                chunks = tuple(chunk for chunk, one in zip(copy.chunks, which, strict=True) if one)
                self.said.append(kind(self.worker.member, copy.name, 0, chunks))

    def take_in(self, computed, report, invalid, received):
        """What vLLM's scheduler does with a step's outcome, and `recompute_by_preemption`."""
        self.rows.extend(computed)
        tables = [row[-1] for row in self.rows] + [row[-1] for _, rows, _ in self.steps for row in rows]
        for table in [*tables, *(one.table for one in self.running)]:
            if not invalid.isdisjoint(table):
                self.pool.evict(table[next(i for i, block in enumerate(table) if block in invalid) :])
        for one in [one for one in self.running if not invalid.isdisjoint(one.table)]:
            self.preempt(one)
        for one in self.loading:
            if not invalid.isdisjoint(one.table):
                first = next(i for i, block in enumerate(one.table) if block in invalid)
                one.done = min(one.done, first * BLOCK)
        for one, lives, start, todo, table in computed:
            if one.lives == lives and start + todo >= one.num_prompt_tokens:
                for block, name in zip(table, one.hashes, strict=False):
                    held = self.holds[block]
                    assert held == MIXED or held[1] == name, f"{one.request_id} is answered from what is wrong"
                one.num_output_placeholders -= 1
                one.num_output_tokens += 1
                if one.num_output_tokens == one.max_tokens:
                    self.end(one)
        self.side.reported(report, invalid, received)
        for one in [one for one in self.loading if one.request_id in received]:
            self.loading.remove(one)
            if one.state == "ended":
                self.pool.release(one.table)
            else:
                one.state = "loaded"
                self.pool.cache(one, one.done)
                self.waiting.insert(0, one)

    def turn(self):
        """A step is planned, and run: at once, or behind the next one's planning."""
        self.plan()
        while len(self.steps) > (1 if self.ahead and self.rng.random() < 0.9 else 0):
            self.run()

    # What must hold

    def check(self):
        self.service.parts.state.core.check()
        assert sum(count > 0 for count in self.pool.refs) + len(self.pool.free) == BLOCKS

    def close(self):
        """Everybody ends, and everything arrives: nothing is held any more, here or at the server."""
        self.server_comes()
        for one in [*self.waiting, *self.running, *self.loading]:
            self.end(one)
        for _ in range(30):
            self.turn()
            while self.sent or self.said:
                self.deliver()
            for _ in range(20):
                self.l2_works()
        self.service.sweep()
        side, service = self.side, self.service
        left = (side._tracked, side._asking, side._late, side._abandoned, side._put_off, side._loading)
        assert not any(left), left
        assert not self.client.granted()  # and a session that is over is left
        assert not self.client._lookups
        assert not service.works
        assert not service.parts.state.book.writes
        tier = service.parts.state.core.tiers[0]
        assert tier.used == len(tier.resident)
        assert len(self.pool.free) == BLOCKS

    def remove(self):
        self.arena.close()
        shutil.rmtree(self.folder)
