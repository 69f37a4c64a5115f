"""A small engine around the scheduler's half and a real service, in which every message and copy takes its time.

What vLLM does to a connector, in an order drawn by seed: blocks that requests share, prefixes that the engine itself
holds, steps that are planned ahead, preemption, aborts, loads that fail. Beside it stands what every block and page
holds, so that a wrong byte that is given out or stored is seen where it happens.
"""

import os
import random
import shutil
import tempfile
from collections import Counter, deque
from pathlib import Path

import numpy as np
from engine_double import step
from machine_parts import (
    BAD,
    BLOCK,
    BLOCKS,
    CHUNK,
    L2,
    MIXED,
    MOST_RUNNING,
    NAMESPACE,
    PAGE,
    PAGES,
    PROMPTS,
    Connection,
    Pool,
    Presence,
    Request,
    Session,
    loaded,
)
from machine_worker import Worker

from kvcore.live import client, wire
from kvcore.live.allocator import PageAllocator
from kvcore.live.arena import Arena, ArenaPaths
from kvcore.live.members import RefusedError, UnknownMemberError
from kvcore.live.service import MonotonicClock, Parts, Service
from kvcore.live.settings import load
from kvcore.live.takeover import State
from kvcore.policy.hashing import chunk_names
from kvcore.vllm.jobs import StepReport
from kvcore.vllm.namespace import Hasher
from kvcore.vllm.scheduler import Options, SchedulerSide


class Engine:
    """Everything, for one seed."""

    def __init__(self, seed, monkeypatch):
        self.rng = random.Random(seed)
        self.ahead = self.rng.random() < 0.7
        mode = self.rng.choice(["sync", "async", "auto"])
        self.folder = Path(tempfile.mkdtemp(prefix="kvm-", dir="/dev/shm"))
        self.arena, self.with_l2 = None, self.rng.random() < 0.5
        self.world = self.rng.choice([1, 1, 2])
        self.workers = [Worker(self, rank) for rank in range(self.world)]
        self.sent = deque()
        self.start_server()
        monkeypatch.setattr(client, "Connection", lambda *_: Connection(self))
        monkeypatch.setattr(client, "_PATIENCE_S", 0.0)
        monkeypatch.setattr("kvcore.vllm.namespace._LONG", 16)
        self.client = client.SchedulerClient("", self.member("scheduler"), deadline_s=1e9, wait_s=0.0)
        self.client._presence = Presence()
        options = Options(
            block_tokens=BLOCK, load_mode=mode, copies_in_step=False, grant_wait_s=0.0, plans_ahead=self.ahead
        )
        self.side = SchedulerSide(self.client, Hasher(NAMESPACE, engine_hashes=True), options)
        self.pool = Pool()
        self.waiting, self.running, self.loading, self.steps = [], [], [], deque()
        self.over = Counter()
        """Ranks whose part of a request's asynchronous load is over."""
        self.preempted = []
        """Since the last step was planned, also by a failed load or a reset: vLLM tells of all."""
        self.rows = deque(maxlen=40)
        self.count = 0
        situations = ("loaded", "load failed", "stored", "preempted", "again", "put off", "lost", "from l2")
        self.seen = dict.fromkeys(situations, 0)
        self.weights = 0
        self.wanted = {}
        """What the blocks of a chunk hold, by its name."""
        self.learn_names()
        self.server_comes()

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

    def member(self, role, rank=0, epoch=0):
        size = PAGE * BLOCK // CHUNK // self.world
        return wire.Register("e", role, BLOCK, size, rank, self.world, self.world, drained_epoch=epoch)

    def enter(self, role, rank=0, epoch=0):
        """Register a member, which was here before or not."""
        message = self.member(role, rank, epoch)
        if (old := self.service.members.holder(message)) is not None:
            self.service.gone(old)  # its liveness connection is closed first
        registered = self.service.handle(message)
        self.service.here(registered.member, os.getpid())
        return registered

    def lose_server(self):
        """All members, or one that had no answer for too long."""
        lost = self.rng.choice(["all", "scheduler", *self.workers])
        if lost in ("all", "scheduler"):
            self.client._presence.session = None
        for worker in self.workers:
            if lost in ("all", worker):
                worker.registered = None
        self.seen["lost"] += 1

    def server_comes(self):
        """Those that lost it find it again: another one, perhaps, where all did."""
        lost = [worker for worker in self.workers if worker.registered is None]
        alone = self.client._presence.session is None
        if alone and len(lost) == self.world and self.rng.random() < 0.5:
            self.start_server()
        if alone:
            self.client._presence.session = Session(self.enter("scheduler"))
        for worker in lost:
            worker.register()

    def l2_works(self):
        if self.with_l2:
            self.service.parts.pool.work()
            self.service.collect()

    def clear(self):
        self.service.handle(wire.Clear(None))

    def deliver(self):
        """A message arrives: the scheduler's next, or a worker's."""
        ways = [way for way in (self.sent, *(worker.said for worker in self.workers if worker.registered)) if way]
        queue = self.rng.choice(ways or [None])
        if queue is not None and queue is not self.sent:
            self.service.handle(queue.popleft())
        elif queue is self.sent:
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
        prompt = one.num_prompt_tokens - one.done
        todo = min(budget, prompt if prompt > 0 else min(1, prompt + one.max_tokens - 1))
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

    # The workers, and what comes of a step

    def run(self):
        """The oldest step that is planned runs, and its outcome is known."""
        plan, computed, weights = self.steps.popleft()
        invalid, received, report = set(), set(), StepReport()
        for worker in self.workers:
            if bad := worker.begin(plan):
                invalid |= bad
                report.failures[worker.rank] = worker.failed
        for row in computed:
            self.compute(*row, weights)
        for copy in plan.stores:
            self.store(copy, plan.failures_seen)
        for worker in self.workers:
            bad, over = worker.arrive()
            invalid |= bad
            self.over.update(over)
        for request in [request for request, ranks in self.over.items() if ranks == self.world]:
            received.add(request)
            del self.over[request]
        self.take_in(computed, report, invalid, received)

    def compute(self, one, _, start, todo, table, weights):
        """A row of the step: it writes its blocks, whatever has become of its request since it was planned."""
        hashes = one.hashes
        for at in range(start // BLOCK, min(len(hashes), -(-(start + todo) // BLOCK))):
            block, begun = table[at], at * BLOCK < start
            whole, part = (weights, hashes[at]), (weights, "begun")
            rests = table[: at + begun]
            bad = any(worker.holds[one] == BAD for worker in self.workers for one in rests)
            for holds in (worker.holds for worker in self.workers):
                right = [holds[one] for one in table[:at]] == [(weights, name) for name in hashes[:at]]
                if bad:
                    holds[block] = BAD
                elif not right or (begun and holds[block] not in (whole, part)):
                    holds[block] = MIXED
                elif holds[block] != whole:  # the same is written again where requests share it
                    holds[block] = whole if (at + 1) * BLOCK <= start + todo else part

    def store(self, copy, failures_seen):
        """A chunk is stored when all ranks have: it must be right in all of them."""
        kept = np.all([worker.store(copy, failures_seen.get(worker.rank, 0)) for worker in self.workers], axis=0)
        self.seen["stored"] += int(kept.sum())
        for chunk, blocks, whole in zip(copy.chunks, copy.blocks.tolist(), kept, strict=True):
            for worker in self.workers if whole else ():
                assert [worker.holds[block] for block in blocks] == self.wanted[chunk], f"{copy.name} stores it wrong"

    def take_in(self, computed, report, invalid, received):
        """What vLLM's scheduler does with a step's outcome, and `recompute_by_preemption`."""
        self.rows.extend(computed)
        tables = [row[-1] for row in self.rows] + [row[-1] for _, rows, _ in self.steps for row in rows]
        for table in [*tables, *(one.table for one in self.running)]:
            self.pool.evict(table[loaded(table, invalid) :])
        for one in [one for one in self.running if not invalid.isdisjoint(one.table)]:
            self.preempt(one)
        for one in self.loading:
            one.done = min(one.done, loaded(one.table, invalid) * BLOCK)
        for one, lives, start, todo, table in computed:
            if one.lives == lives and start + todo >= one.num_prompt_tokens:
                self.answer(one, table)
        self.side.reported(report, invalid, received)
        for one in [one for one in self.loading if one.request_id in received]:
            self.loading.remove(one)
            if one.state == "ended":
                self.pool.release(one.table)
            else:
                one.state = "loaded"
                self.pool.cache(one, one.done)
                self.waiting.insert(0, one)

    def answer(self, one, table):
        """A request has its next token."""
        for block, name in zip(table, one.hashes, strict=False):
            for held in (worker.holds[block] for worker in self.workers):
                assert held == MIXED or held[1] == name, f"{one.request_id} is answered from what is wrong"
        one.num_output_placeholders -= 1
        one.num_output_tokens += 1
        if one.num_output_tokens == one.max_tokens:
            self.end(one)

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
            while self.sent or any(worker.said for worker in self.workers):
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
