"""What the server does with each message: it turns them into the core's events, and decisions into replies.

No socket, no thread, no wall clock here: a message in, a reply out.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeAlias

from kvcore.live import wire
from kvcore.live.allocator import PageAllocator
from kvcore.live.arena import Arena
from kvcore.live.book import PAGE_ID, Room
from kvcore.live.held import HeldTable
from kvcore.live.members import Instance, Member, Members, RefusedError, UnknownMemberError, Work
from kvcore.live.metrics import Metrics, model_of
from kvcore.live.pretouch import Pretouch
from kvcore.live.ranks import Acknowledgements
from kvcore.live.recorder import Recorder, Seen
from kvcore.live.settings import Settings
from kvcore.live.status import kept_elsewhere, status
from kvcore.live.stores.pool import StorePool
from kvcore.live.takeover import State
from kvcore.live.transport import QUARANTINE, LiveTransport, Shape
from kvcore.live.writers import MEMBER_SLOTS
from kvcore.policy import (
    Chunk,
    Cleared,
    Clock,
    Decision,
    Driver,
    Event,
    InstanceLeft,
    InstanceRegistered,
    LeaseExpired,
    LoadDone,
    LoadFailed,
    LookedUp,
    Pinned,
    QuotaSet,
    RequestEnded,
    RoomAsked,
    StoreAborted,
    StoreCommitted,
    UnknownInstanceError,
    Unpinned,
)
from kvtraces.journal import JournalWriter

Handler: TypeAlias = Callable[[Any], wire.Reply]
_LOG = logging.getLogger("kvcore.service")
_DONE = wire.Done()
_DELETES_REST_NS = 30_000_000_000
_MOST_UNDELETED = 100_000
"""Chunks that L2 would not delete and that are remembered for another try."""


class MonotonicClock:
    """The system's monotonic clock, not behind `start_ns`."""

    def __init__(self, start_ns: int = 0) -> None:
        self._ahead_ns = max(0, start_ns - time.monotonic_ns())

    def now_ns(self) -> int:
        """Return the time, in ns."""
        return time.monotonic_ns() + self._ahead_ns


@dataclass(slots=True, eq=False, kw_only=True)
class Parts:
    """What a service is made of."""

    settings: Settings
    arena: Arena
    allocator: PageAllocator
    state: State
    clock: Clock
    liveness_path: str
    journal: JournalWriter | None = None
    recorder: Recorder | None = None
    pool: StorePool | None = None
    held: HeldTable | None = None


class Service:
    """Owns the core, the driver and everything that is known of engines. One thread's: the request loop's."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.settings = parts.settings
        self.clock = parts.clock
        self.started_ns = parts.clock.now_ns()
        self.metrics = Metrics()
        for salt in parts.state.core.tiers[0].quotas:
            self.metrics.name(salt)
        self.members = Members(
            chunk_tokens=parts.settings.chunk_size,
            page_bytes=parts.arena.page_bytes,
            l1_pages=parts.state.core.config.tiers[0].pages or 0,
            lease_ns=round(parts.settings.lease_s * 1e9),
        )
        self.transport = LiveTransport(
            parts.arena,
            parts.allocator,
            parts.state.book,
            clock=parts.clock,
            shape_of=self._shape_of,
            pool=parts.pool,
            staging_pages=parts.settings.staging_pages,
            journal=parts.journal,
        )
        self.driver = Driver(parts.state.core, self.transport, self._observe)
        self.transport.handle = self.driver.handle
        self.pretouch: Pretouch | None = None
        """How far the arena's pages are faulted in, where that was asked for."""
        self.look: Callable[[Member], object] = lambda _: None
        """Takes in that a member's liveness connection has ended, where the loop has not come to that yet."""
        self.later: list[Callable[[], None]] = []
        """What is to be done after the replies are out."""
        self.strays: deque[bytes] = deque(chunk for chunk in parts.state.strays if isinstance(chunk, bytes))
        """Chunks that lie in L2, or may, as found at the start or left by deletes; another thread appends."""
        self._undeleted: dict[bytes, None] = {}
        """Chunks that a delete, or a put that failed, may have left in L2, to be deleted again."""
        self._delete_again_ns = 0
        self.journal_failure = ""
        """Why the journal was given up, if it was."""
        self.works: dict[str, Work] = {}
        self._stores = Acknowledgements()
        self._loads = Acknowledgements()
        self._quarantined: list[Chunk] = []
        self._handlers: dict[type[wire.Message], Handler] = {
            wire.Ping: self._ping,
            wire.Register: self._register,
            wire.Lookup: self._lookup,
            wire.Poll: self._poll,
            wire.Ask: self._ask,
            wire.Committed: self._committed,
            wire.Aborted: self._aborted,
            wire.Loaded: self._loaded,
            wire.LoadFailed: self._load_failed,
            wire.End: self._end,
            wire.Leave: self._leave,
            wire.Renew: self._renew,
            wire.Record: self._record,
            wire.Status: lambda _: wire.Report(status(self)),
            wire.GetConfig: lambda _: wire.Report(self.settings.shown()),
            wire.GetMetrics: lambda _: wire.Report(self.metrics.report(kept_elsewhere(self))),
            wire.Clear: self._clear,
            wire.Pin: self._pin,
            wire.Unpin: self._unpin,
            wire.SetQuota: self._set_quota,
            wire.Where: self._where,
        }
        self._quarantine()

    def handle(self, message: wire.Message) -> wire.Reply:
        """Return the reply to a request.

        Raises RefusedError and UnknownMemberError, which are replies too; whatever else it raises is a fault.
        """
        try:
            return self._handlers[type(message)](message)
        except UnknownInstanceError as error:
            raise UnknownMemberError(str(error)) from None
        finally:
            self.transport.answers.clear()

    # Members

    def _ping(self, _: wire.Ping) -> wire.Pong:
        return wire.Pong("1", self.parts.arena.epoch, os.getpid())

    def _register(self, message: wire.Register) -> wire.Registered:
        now_ns = self.clock.now_ns()
        sized = self.members.size(message)
        if (holder := self.members.holder(message)) is not None:
            self.look(holder)
        instance, old = self.members.find(message)
        if old is not None:
            self.gone(old)
            instance = self.members.instances.get(message.instance)
        if message.role == "worker":
            self._refuse_beyond_the_table()
        if instance is None:
            instance = sized
            self._feed(
                InstanceRegistered(
                    now_ns=now_ns,
                    instance=instance.name,
                    chunk_pages=instance.chunk_pages,
                    chunk_bytes=instance.chunk_bytes,
                )
            )
        if message.engine and self.parts.journal is not None:
            self.parts.journal.engine(instance.name, message.engine)
        member = self.members.enter(message, instance, now_ns)
        _LOG.info("%r registered, process %d", member.name, message.pid)
        arena = self.parts.arena
        return wire.Registered(
            member=member.token,
            chunk_tokens=instance.chunk_tokens,
            chunk_pages=instance.chunk_pages,
            shard_bytes=instance.shard_bytes,
            arena_path=str(arena.path),
            page_bytes=arena.page_bytes,
            pages=arena.pages,
            epoch=arena.epoch,
            lease_ms=round(self.settings.lease_s * 1000),
            liveness_path=self.parts.liveness_path,
            record=self.parts.recorder is not None,
            held_token=0 if self.parts.held is None else self.parts.held.token,
        )

    def _refuse_beyond_the_table(self) -> None:
        """Raise RefusedError where the arena's table has no room for one worker more, those on their way counted."""
        coming = sum(member.role == "worker" and not member.here for member in self.members)
        if self.parts.arena.writers.free <= coming:
            raise RefusedError(f"the arena's table of workers is full: {MEMBER_SLOTS} processes are the most")

    def here(self, token: int, pid: int) -> Member:
        """Take in a member's liveness connection.

        Raises:
            UnknownMemberError: it is not registered.
            ArenaError: the table of workers is full, for all that registration could see.
        """
        member = self.members.heard(token, self.clock.now_ns())
        if member.role == "worker":
            writers = self.parts.arena.writers
            if member.drained_epoch:
                writers.leave(member.name, pid)
            member.instance.writer = writers.join(member.name, pid, member.instance.writer)
        member.pid = pid
        member.here = True
        return member

    def gone(self, member: Member) -> None:
        """Take in that a member is gone for certain, or starts anew with its copies ended."""
        instance = member.instance
        self.members.remove(member)
        try:
            self._expire(instance)
            if member.role == "worker":
                self._acknowledge_all(instance, member.rank)
        finally:  # after a fault, too: with its last member all that an instance holds is given up
            if member.role == "worker":
                self.parts.arena.writers.leave(member.name, member.pid)
            if not instance.members:
                self._left(instance)
            self.transport.answers.clear()

    def _left(self, instance: Instance) -> None:
        for acknowledgements in (self._stores, self._loads):
            for name in acknowledgements.of(instance.prefix):
                acknowledgements.forget(name)
        for name in tuple(instance.works):
            self._forget(name)
        self._feed(InstanceLeft(now_ns=self.clock.now_ns(), instance=instance.name))

    def _leave(self, message: wire.Leave) -> wire.Done:
        self.gone(self._heard(message.member))
        return _DONE

    def _renew(self, message: wire.Renew) -> wire.Done:
        self._heard(message.member)
        return _DONE

    def _heard(self, token: int) -> Member:
        return self.members.heard(token, self.clock.now_ns())

    def sweep(self) -> None:
        """Take back what belongs to nobody, and what has had its time.

        Leases that have run out, members that never came, quarantined pages, chunks that have expired.
        """
        now_ns = self.clock.now_ns()
        for member in self.members.never_here(now_ns):
            self.gone(member)
        for instance in self.members.silent(now_ns):
            self._expire(instance)
        if self._quarantined:
            self._release_quarantine()
        if self._undeleted and now_ns >= self._delete_again_ns:
            self.strays.extend(self._undeleted)
            self._undeleted.clear()
        if self.strays:
            self._delete_strays()
        if self.parts.state.core.due(now_ns):  # any event lets what has expired leave, and this one does nothing else
            self._feed(Unpinned(now_ns=now_ns, chunks=()))
        self.transport.answers.clear()

    def _expire(self, instance: Instance) -> None:
        """Give up every request of an instance; what its workers are still writing stays taken until they say so."""
        for name in tuple(instance.works):
            self._feed(LeaseExpired(now_ns=self.clock.now_ns(), request=name))
            self._loads.forget(name)
            self._forget(name)

    def _acknowledge_all(self, instance: Instance, rank: int) -> None:
        """Say in the name of a rank that is gone that it copies nothing any more."""
        for name in self._stores.of(instance.prefix):
            self._settle_stores(name, *self._stores.take(name, rank, None, copied=False))
        for name in self._loads.of(instance.prefix):
            self._settle_loads(name, *self._loads.take(name, rank, None, copied=False))

    # Pages that a worker of an earlier server may still be writing

    def _quarantine(self) -> None:
        """Have the core count with the pages that the allocator does not hand out."""
        count = self.parts.allocator.quarantined
        if not count:
            return
        now_ns = self.clock.now_ns()
        chunks = tuple(sha256(b"quarantined %d" % index).digest() for index in range(count))
        name = QUARANTINE
        self._feed(InstanceRegistered(now_ns=now_ns, instance=name, chunk_pages=1))
        self._feed(LookedUp(now_ns=now_ns, request=name, instance=name, chunks=chunks, salt=name))
        for _ in range(1 + (self.settings.admission == "second-use")):
            self._feed(RoomAsked(now_ns=now_ns, request=name, chunks=chunks))
        self._quarantined = list(chunks)
        self.transport.answers.clear()

    def _release_quarantine(self) -> None:
        freed = self.parts.allocator.reap(self.parts.arena.writers.alive)
        if not freed:
            return
        chunks, self._quarantined = self._quarantined[:freed], self._quarantined[freed:]
        now_ns = self.clock.now_ns()
        self._feed(StoreAborted(now_ns=now_ns, request=QUARANTINE, tier=0, chunks=tuple(chunks)))
        if not self._quarantined:
            self._feed(InstanceLeft(now_ns=now_ns, instance=QUARANTINE))

    # Requests: what is cached

    def _lookup(self, message: wire.Lookup) -> wire.Found:
        start = time.perf_counter()
        member = self._heard(message.member)
        instance = member.instance
        if not instance.ready:
            return wire.Found(epoch=self.parts.arena.epoch)
        _refuse_duplicates(message.chunks)
        now_ns = self.clock.now_ns()
        name = instance.prefix + message.request
        work = self.works.get(name)
        fresh = work is None or work.ended
        ending = fresh and self.parts.state.core.knows(name)
        if work is None or work.ended:  # that came back, preempted: to the core another request of that name
            work = Work(name, instance, message.chunks, message.salt, message.computed_chunks)
            self.works[name] = instance.works[name] = work
        event = LookedUp(
            now_ns=now_ns,
            request=name,
            instance=instance.name,
            chunks=message.chunks,
            computed_chunks=message.computed_chunks,
            salt=message.salt,
            queued_bytes=message.queued_bytes,
            resumed=message.resumed,
        )
        try:
            self._feed(event)
        except UnknownInstanceError:
            self._forget(name)
            raise
        matched = self.transport.answers[name].matched
        if fresh and matched is not None:
            # What the core says of a life that is still ending was found of that one's prompt, and is not loaded again.
            work.hits = (0,) * len(matched.hits) if ending else matched.hits
            self._note_lookup(work, message, now_ns)
        self._take_run(work)
        found = self._found(work, message.computed_chunks)
        self.metrics.histograms["kvcore_lookup_seconds",].add(time.perf_counter() - start)
        return found

    def _note_lookup(self, work: Work, message: wire.Lookup, now_ns: int) -> None:
        self.metrics.looked_up(
            work,
            tokens=message.input_tokens,
            salt=message.salt,
            resumed=message.resumed,
            probe=message.probe,
            now_ns=now_ns,
        )
        if self.parts.recorder is not None:
            instance = work.instance
            seen = Seen(
                seq=0,
                timestamp_ms=max(0.0, now_ns / 1e6 - message.waited_ms),
                instance=instance.name,
                model=model_of(work),
                salt=message.salt,
                chunk_tokens=instance.chunk_tokens,
                hits=work.hits,
            )
            self.parts.recorder.looked_up(work.name, seen, resumed=message.resumed)

    def _take_run(self, work: Work) -> None:
        run = self.transport.runs.pop(work.name, None)
        if run:
            work.run, work.start = run, work.chunks.index(run[0])
            self._loads.expect(work.name, run, work.instance.register.world)

    def _poll(self, message: wire.Poll) -> wire.Found:
        member = self._heard(message.member)
        work = self.works.get(member.instance.prefix + message.request)
        if work is None:
            return wire.Found(epoch=self.parts.arena.epoch)
        self._take_run(work)
        return self._found(work, work.start)

    def _found(self, work: Work, computed: int) -> wire.Found:
        """Return what a request's engine is to load, from what it has computed on."""
        epoch, fetching = self.parts.arena.epoch, self.transport.fetching
        if not work.run:
            wanted = work.chunks[work.start : sum(work.hits)]
            pending = bool(fetching) and not fetching.keys().isdisjoint(wanted) and not work.ended
            return wire.Found(work.hits, pending, epoch=epoch)
        start, run, resident = work.start, work.run, self.parts.state.book.resident
        if computed < start and all(chunk in resident for chunk in work.chunks[computed:start]):
            start, run = computed, work.chunks[computed:start] + run  # the engine has lost some since it asked first
        pages, generations = _joined([resident[chunk] for chunk in run])
        if len(pages) != len(run) * work.instance.chunk_pages * PAGE_ID.itemsize:
            self._settle_loads(work.name, *self._loads.take(work.name, wire.ALL_RANKS, None, copied=False))
            raise RefusedError(f"{work.name}: chunks of another size are stored under these names")
        return wire.Found(work.hits, False, start, len(run), pages, generations, epoch)

    # Requests: stores

    def _ask(self, message: wire.Ask) -> wire.Granted:
        member = self._heard(message.member)
        instance, epoch = member.instance, self.parts.arena.epoch
        name = instance.prefix + message.request
        if name not in self.works or not instance.ready:
            return wire.Granted(refused={"unknown": len(message.chunks)}, epoch=epoch)
        _refuse_duplicates(message.chunks)
        chunks, strangers = message.chunks, set(message.chunks).difference(self.works[name].chunks)
        if strangers:  # the end of a request tells the policy of its prompt's chunks
            chunks = tuple(chunk for chunk in chunks if chunk not in strangers)
        self._feed(RoomAsked(now_ns=self.clock.now_ns(), request=name, chunks=chunks))
        answer = self.transport.answers[name]
        if strangers:
            answer.refused["unknown"] = answer.refused.get("unknown", 0) + len(strangers)
        placed = answer.placed
        if not placed:
            return wire.Granted(refused=answer.refused, epoch=epoch)
        # Of ranks that hold the same KV one writes it, but each may have computed on a load of its own that failed.
        self._stores.expect(name, placed, instance.register.world)
        if placed == message.chunks[: len(placed)]:
            indices: tuple[int, ...] = tuple(range(len(placed)))
        else:
            where = {chunk: at for at, chunk in enumerate(message.chunks)}
            indices = tuple(where[chunk] for chunk in placed)  # type: ignore[index]  # what was asked for is placed
        return wire.Granted(indices, *_joined(answer.rooms), answer.refused, epoch)

    def _committed(self, message: wire.Committed) -> wire.Done:
        member = self._rank(message)
        name = member.instance.prefix + message.request
        work = self.works.get(name)
        self.metrics.stored(
            member.instance.register.namespace.get("model", ""),
            tokens=message.tokens if message.rank == 0 else 0,
            nbytes=message.bytes,
            seconds=message.seconds,
            salt="" if work is None else work.salt,
        )
        self._settle_stores(name, *self._stores.take(name, message.rank, message.chunks, copied=True))
        return _DONE

    def _aborted(self, message: wire.Aborted) -> wire.Done:
        name = self._rank(message).instance.prefix + message.request
        self._settle_stores(name, *self._stores.take(name, message.rank, message.chunks, copied=False))
        return _DONE

    def _settle_stores(self, name: str, copied: list[Chunk], failed: list[Chunk]) -> None:
        now_ns = self.clock.now_ns()
        if copied:
            self._feed(StoreCommitted(now_ns=now_ns, request=name, tier=0, chunks=tuple(copied)))
        if failed:
            self._feed(StoreAborted(now_ns=now_ns, request=name, tier=0, chunks=tuple(failed)))
        self._forget_if_over(name)

    # Requests: loads, and the end

    def _loaded(self, message: wire.Loaded) -> wire.Done:
        member = self._rank(message)
        name = member.instance.prefix + message.request
        tokens = message.tokens if message.rank == 0 else 0
        work = self.works.get(name)
        self.metrics.loaded(
            work,
            member.instance.register.namespace.get("model", ""),
            tokens=tokens,
            nbytes=message.bytes,
            seconds=message.seconds,
            salt="" if work is None else work.salt,
        )
        if self.parts.recorder is not None and tokens:
            self.parts.recorder.loaded(name, tokens)
        self._settle_loads(name, *self._loads.take(name, message.rank, message.chunks, copied=True))
        return _DONE

    def _load_failed(self, message: wire.LoadFailed) -> wire.Done:
        name = self._rank(message).instance.prefix + message.request
        self._settle_loads(name, *self._loads.take(name, message.rank, message.chunks, copied=False))
        return _DONE

    def _settle_loads(self, name: str, copied: list[Chunk], failed: list[Chunk]) -> None:
        now_ns = self.clock.now_ns()
        if copied:
            self._feed(LoadDone(now_ns=now_ns, request=name, tier=0, chunks=tuple(copied)))
        if failed:
            self._feed(LoadFailed(now_ns=now_ns, request=name, tier=0, chunks=tuple(failed)))
        self._forget_if_over(name)

    def _rank(self, message: wire.Committed | wire.Aborted | wire.Loaded | wire.LoadFailed) -> Member:
        """Return the member that acknowledges copies. Raises RefusedError where it may not speak for that rank."""
        member = self._heard(message.member)
        expected = member.rank if member.role == "worker" else wire.ALL_RANKS
        if message.rank != expected:
            raise RefusedError(f"{member.role} {member.rank} cannot acknowledge copies of rank {message.rank}")
        return member

    def _end(self, message: wire.End) -> wire.Done:
        name = self._heard(message.member).instance.prefix + message.request
        work = self.works.get(name)
        if work is not None:
            work.ended = True
        self._feed(RequestEnded(now_ns=self.clock.now_ns(), request=name))
        self._forget_if_over(name)
        return _DONE

    def _record(self, message: wire.Record) -> wire.Done:
        name = self._heard(message.member).instance.prefix + message.request
        recorder = self.parts.recorder
        if recorder is not None:
            self.later.append(lambda: recorder.take(name, message))
        return _DONE

    def _forget_if_over(self, name: str) -> None:
        work = self.works.get(name)
        if work is not None and work.ended and not self._loads.waits(name) and not self._stores.waits(name):
            self._forget(name)

    def _forget(self, name: str) -> None:
        work = self.works.pop(name, None)
        if work is not None:
            work.instance.works.pop(name, None)
            self.transport.runs.pop(name, None)

    # The operator

    def _clear(self, message: wire.Clear) -> wire.Done:
        _LOG.info("clear: %s", "everything" if message.chunks is None else f"{len(message.chunks)} chunks")
        self._feed(Cleared(now_ns=self.clock.now_ns(), chunks=message.chunks))
        return _DONE

    def _pin(self, message: wire.Pin) -> wire.Done:
        self._feed(Pinned(now_ns=self.clock.now_ns(), chunks=message.chunks))
        kept = self.parts.state.core.tiers[0].kept
        missing = sum(chunk not in kept for chunk in message.chunks)
        _LOG.info("pin: %d chunks, of which %d are not in L1", len(message.chunks), missing)
        return wire.Done(missing)

    def _unpin(self, message: wire.Unpin) -> wire.Done:
        _LOG.info("unpin: %d chunks", len(message.chunks))
        self._feed(Unpinned(now_ns=self.clock.now_ns(), chunks=message.chunks))
        return _DONE

    def _set_quota(self, message: wire.SetQuota) -> wire.Done:
        self.metrics.name(message.salt)
        _LOG.info("quota of %r: %s", message.salt, "none" if message.pages is None else f"{message.pages} pages")
        self._feed(QuotaSet(now_ns=self.clock.now_ns(), salt=message.salt, pages=message.pages))
        return _DONE

    def _where(self, message: wire.Where) -> wire.Places:
        places = map(self.parts.state.core.where, message.chunks)
        return wire.Places(tuple(-1 if tier is None else tier for tier in places))

    # The shell

    def lose_journal(self, reason: str) -> None:
        """Go on without the journal; the arena says so before anybody is told of what the journal lacks."""
        self.parts.arena.mark_unjournaled()
        self.parts.journal = self.transport.journal = None
        self.journal_failure = reason

    def collect(self) -> None:
        """Take in what L2's threads have done."""
        for done in self.transport.collect():
            if done.left:
                self._delete_again(done.left)
            count = len(done.left) if done.operation == "delete" else 1
            self.metrics.counts["kvcore_l2_chunks", done.operation, done.outcome.value] += count
            self.metrics.time("kvcore_l2_seconds", done.duration_ns / 1e9, done.operation)
        self.transport.answers.clear()

    def _delete_again(self, chunks: tuple[bytes, ...]) -> None:
        """Keep chunks that a delete or a failed put has left for another delete: the core counts their room as free."""
        if not self._undeleted:
            self._delete_again_ns = self.clock.now_ns() + _DELETES_REST_NS
        self._undeleted.update(dict.fromkeys(chunks[: max(0, _MOST_UNDELETED - len(self._undeleted))]))

    def _delete_strays(self) -> None:
        """Delete from L2 what the core does not know of: an earlier server's."""
        names = [self.strays.popleft() for _ in range(len(self.strays))]
        below = self.parts.state.core.tiers[1]
        if self.parts.pool is not None:
            self.parts.pool.submit_delete([name for name in names if not below.holds(name)])

    def _feed(self, event: Event) -> None:
        self.driver.handle(event)

    def _observe(self, event: Event, decisions: tuple[Decision, ...]) -> None:
        if self.parts.journal is not None:
            self.parts.journal.step(event, decisions)
        self.transport.learn(event, decisions)
        self.metrics.observe(event, decisions)

    def _shape_of(self, request: str) -> Shape:
        instance = self.works[request].instance
        return Shape(instance.chunk_pages, instance.chunk_bytes, instance.writer)


def _refuse_duplicates(chunks: tuple[bytes, ...]) -> None:
    if len(set(chunks)) != len(chunks):
        raise RefusedError("a chunk is named twice")


def _joined(rooms: list[Room]) -> tuple[bytes, bytes]:
    return b"".join([room.ids for room in rooms]), b"".join([room.generations for room in rooms])
