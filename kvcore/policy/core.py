"""The core: events in, decisions out."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from typing import assert_never

from kvcore.policy.config import CoreConfig
from kvcore.policy.cost import chunks_worth_loading
from kvcore.policy.decisions import Decision, Demote, Evict, EvictReason, Load, Matched, Place, Refuse, RefuseReason
from kvcore.policy.events import (
    Cleared,
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
    Unpinned,
)
from kvcore.policy.invariants import check
from kvcore.policy.request import Request
from kvcore.policy.tier import Entry, Tier
from kvcore.policy.types import Chunk


class UnknownInstanceError(ValueError):
    """A lookup names an instance that never registered, or has left."""


class Lost:
    """Writes whose end will not be believed: their pages are held until the writer is heard of or gone."""

    __slots__ = ("entries", "fetching", "instance", "reason")

    def __init__(self, instance: str, reason: RefuseReason) -> None:
        self.instance = instance
        self.reason: RefuseReason = reason
        self.entries: dict[Chunk, Entry] = {}
        self.fetching: dict[Chunk, None] = {}
        """Those that a lower tier fills, so the engine's word is not needed."""


class Core:
    """Decides what is cached where and what is evicted.

    A pure state machine: `handle` is the only mutator, time comes with the events, nothing is drawn at random, and
    decisions are equal for equal events. The semantics, for every policy: a lookup hits the leading resident chunks
    and pins every resident chunk of its chain; room is made inside the ask, and what does not fit is the tail; stored
    chunks can be matched from their commit, and enter the policy together when the request's stores have ended, tail to
    head; then the chunks found at the lookup are touched, tail to head, so that a prefix outlives its extensions.
    """

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.tiers = tuple(Tier(tier, config.ttl_ns) for tier in config.tiers)
        self.tiers[0].quotas.update(config.quotas)
        self._instances: dict[str, InstanceRegistered] = {}
        self._requests: dict[str, Request] = {}
        self._lost: dict[str, Lost] = {}
        self._copying: dict[tuple[int, Chunk], Entry] = {}
        """Entries that are the source of a copy into the tier of the key; pinned until it is done."""
        self._now_ns = 0
        self._missed: OrderedDict[Chunk, None] = OrderedDict()
        """Chunks that were asked for once, for the second-use admission."""

    def handle(self, event: Event) -> tuple[Decision, ...]:  # noqa: C901, PLR0912 - one case for each event
        """Take in one event and return what is decided, in the order in which it is to be carried out.

        Raises:
            UnknownInstanceError: A lookup of an instance that is not registered; nothing has changed.
            ValueError: An instance registers again with chunks of another size; nothing has changed.
        """
        out: list[Decision] = []
        self._now_ns = event.now_ns
        if self.config.ttl_ns is not None:
            for index, tier in enumerate(self.tiers):
                self._gone(index, tier.expired(event.now_ns), out)
        match event:
            case LookedUp():
                self._looked_up(event, out)
            case RoomAsked():
                self._room_asked(event, out)
            case StoreCommitted():
                self._store_committed(event, out)
            case LoadDone():
                self._load_done(event, out)
            case RequestEnded():
                self._request_ended(event, out)
            case StoreAborted():
                self._store_aborted(event, out)
            case LoadFailed():
                self._load_failed(event, out)
            case LeaseExpired():
                self._lease_expired(event, out)
            case InstanceRegistered():
                self._registered(event)
            case InstanceLeft():
                self._instance_left(event, out)
            case Cleared():
                self._cleared(event, out)
            case Pinned():
                self._pinned(event)
            case Unpinned():
                self._unpinned(event.chunks, out)
            case QuotaSet():
                self.tiers[0].set_quota(event.salt, event.pages)
            case _:
                assert_never(event)
        return tuple(out)

    def check(self) -> None:
        """Verify every invariant of the state; raises AssertionError naming the one that does not hold."""
        check(self.tiers, self._requests, self._lost, self._copying)

    def where(self, chunk: Chunk) -> int | None:
        """Return the first tier in which a chunk can be matched, None where there is none."""
        return next((index for index, tier in enumerate(self.tiers) if chunk in tier.resident), None)

    def requests(self) -> Iterator[tuple[str, str]]:
        """Yield the name and the instance of every request that holds anything."""
        yield from [(request.name, request.instance) for request in self._requests.values()]
        yield from [(name, lost.instance) for name, lost in self._lost.items()]

    # Instances

    def _registered(self, event: InstanceRegistered) -> None:
        known = self._instances.get(event.instance)
        if known is not None and (known.chunk_pages, known.chunk_bytes) != (event.chunk_pages, event.chunk_bytes):
            raise ValueError(f"instance {event.instance!r} is registered with chunks of {known.chunk_bytes} bytes")
        self._instances[event.instance] = event

    def _instance_left(self, event: InstanceLeft, out: list[Decision]) -> None:
        self._instances.pop(event.instance, None)
        for request in [r for r in self._requests.values() if r.instance == event.instance]:
            self._void(request, request.writing, request.writing, "left")
            self._give_up(request, out)
        for name in [name for name, lost in self._lost.items() if lost.instance == event.instance]:
            lost = self._lost[name]
            written = tuple(chunk for chunk in lost.entries if chunk not in lost.fetching)
            lost.reason = "left"
            self._settle_lost(name, written, out)

    def _lease_expired(self, event: LeaseExpired, out: list[Decision]) -> None:
        request = self._requests.get(event.request)
        if request is not None:
            self._void(request, request.writing, request.writing, "lease")
            self._give_up(request, out)

    def _give_up(self, request: Request, out: list[Decision]) -> None:
        """End a request whose engine is not expected to say anything more."""
        request.ended = True
        request.loading = 0
        self._finish(request, out)

    def _void(
        self, request: Request, entries: dict[Chunk, Entry], chunks: Iterable[Chunk], reason: RefuseReason
    ) -> None:
        """Stop believing in what is being written to `chunks`; their pages stay taken until the writer is done."""
        for chunk in tuple(chunks):
            lost = self._lost.setdefault(request.name, Lost(request.instance, reason))
            del self.tiers[0].writing[chunk]
            lost.entries[chunk] = entries.pop(chunk)
            if entries is request.fetching:
                lost.fetching[chunk] = None

    def _settle_lost(self, name: str, chunks: Iterable[Chunk], out: list[Decision]) -> bool:
        """Free the pages of voided writes that have ended; return whether the request had any."""
        lost = self._lost.get(name)
        if lost is None:
            return False
        done = tuple(chunk for chunk in chunks if chunk in lost.entries)
        for chunk in done:
            self.tiers[0].release(lost.entries.pop(chunk))
            lost.fetching.pop(chunk, None)
        self._refuse(name, 0, done, lost.reason, out)
        if not lost.entries:
            del self._lost[name]
        return True

    # Lookups

    def _looked_up(self, event: LookedUp, out: list[Decision]) -> None:
        known = self._requests.get(event.request)
        if known is not None:
            out.append(known.matched)
            return
        instance = self._instances.get(event.instance)
        if instance is None:
            raise UnknownInstanceError(f"request {event.request!r}: instance {event.instance!r} is not registered")
        if event.request in self._lost:  # its old writes may still end: a new life under that name could take them over
            out.append(Matched(request=event.request, hits=(0,) * len(self.tiers), resumed=event.resumed))
            return
        request = Request(
            name=event.request, instance=event.instance, salt=event.salt, chunks=event.chunks, resumed=event.resumed
        )
        self._requests[event.request] = request
        where = self._find(request)
        hits = tuple(where.count(tier) for tier in range(len(self.tiers))) if len(self.tiers) > 1 else (len(where),)
        request.matched = Matched(request=event.request, hits=hits, resumed=event.resumed)
        out.append(request.matched)
        self._plan_loads(request, where, event, instance, out)

    def _find(self, request: Request) -> tuple[int, ...]:
        """Pin every resident chunk of the chain; return the tier of each leading hit."""
        chunks = request.chunks
        places: list[list[Entry | None]] = []
        for tier in self.tiers:
            found = [*map(tier.resident.get, chunks)]
            entries = [entry for entry in found if entry is not None] if None in found else found
            tier.pin(entries)  # type: ignore[arg-type]  # no None is left in it
            request.found.append(entries)  # type: ignore[arg-type]
            places.append(found)
        if len(places) == 1:
            first = places[0]
            return (0,) * (first.index(None) if len(request.found[0]) < len(chunks) else len(chunks))
        best = [next((i for i, entry in enumerate(row) if entry is not None), -1) for row in zip(*places, strict=True)]
        return tuple(takewhile(lambda tier: tier >= 0, best))

    def _plan_loads(
        self,
        request: Request,
        where: tuple[int, ...],
        event: LookedUp,
        instance: InstanceRegistered,
        out: list[Decision],
    ) -> None:
        """Decide which hits the engine loads, and fetch those that are not in tier 0."""
        computed, end = event.computed_chunks, len(where)
        if self.config.load_cost is not None and end > computed:
            end = chunks_worth_loading(
                self.config.load_cost,
                tiers=where,
                computed=computed,
                total=len(event.chunks),
                chunk_bytes=instance.chunk_bytes,
                queued_bytes=event.queued_bytes,
            )
            self._refuse(request.name, 0, event.chunks[end : len(where)], "recompute", out)
        below = [i for i in range(computed, end) if where[i]] if len(self.tiers) > 1 else []
        if below:
            fit = self._make_room(
                0, [event.chunks[i] for i in below], instance.chunk_pages, request.name, request.salt, out
            )
            if fit < len(below):
                end = below[fit]
                below = below[:fit]
            request.fetching = self.tiers[0].reserve(
                [event.chunks[i] for i in below], instance.chunk_pages, request.salt
            )
            for tier in range(1, len(self.tiers)):
                wanted = tuple(event.chunks[i] for i in below if where[i] == tier)
                if wanted:
                    out.append(Load(request=request.name, tier=tier, chunks=wanted))
        request.run = event.chunks[computed:end]
        self._load_when_fetched(request, out)

    def _load_when_fetched(self, request: Request, out: list[Decision]) -> None:
        if request.run and not request.fetching and not request.ended:
            request.loading = len(request.run)
            out.append(Load(request=request.name, tier=0, chunks=request.run))
            request.run = ()

    def _load_done(self, event: LoadDone, out: list[Decision]) -> None:
        request = self._requests.get(event.request)
        if event.tier == 0:
            if request is not None:
                request.loading = max(0, request.loading - len(event.chunks))
                self._finish(request, out)
            return
        self._settle_lost(event.request, event.chunks, out)
        if request is None:
            return
        arrived = request.new if self.config.promote_on_hit else request.passing
        for chunk in event.chunks:
            if request.fetching.pop(chunk, None) is not None:
                entry = self.tiers[0].commit(chunk)
                arrived[chunk] = entry
                request.held.append(entry)
        self._load_when_fetched(request, out)
        self._finish(request, out)

    def _load_failed(self, event: LoadFailed, out: list[Decision]) -> None:
        request = self._requests.get(event.request)
        if event.tier == 0:
            if request is not None:
                request.loading = max(0, request.loading - len(event.chunks))
                self._finish(request, out)
            return
        self._remove(event.tier, event.chunks, "failed", out)
        self._settle_lost(event.request, event.chunks, out)
        if request is None:
            return
        self._unfetch(request, event.chunks)
        self._load_when_fetched(request, out)
        self._finish(request, out)

    def _unfetch(self, request: Request, chunks: Iterable[Chunk]) -> None:
        """Give back the room of `chunks` that did not come from below; the engine's run ends before the first."""
        for chunk in chunks:
            entry = request.fetching.pop(chunk, None)
            if entry is not None:
                del self.tiers[0].writing[chunk]
                self.tiers[0].release(entry)
                if chunk in request.run:
                    request.run = request.run[: request.run.index(chunk)]

    # Stores

    def _room_asked(self, event: RoomAsked, out: list[Decision]) -> None:
        request = self._requests.get(event.request)
        if request is None or request.ended:
            self._refuse(event.request, 0, event.chunks, "unknown", out)
            return
        tier = self.tiers[0]
        wanted: Sequence[Chunk] = event.chunks
        busy = tier.writing or tier.leaving or event.request in self._lost
        if busy or self.config.admission != "always" or not tier.resident.keys().isdisjoint(wanted):
            wanted = self._wanted(event, out)
        if not wanted:
            return
        pages = self._instances[request.instance].chunk_pages
        fit = self._make_room(0, wanted, pages, request.name, request.salt, out)
        if fit:
            placed = tuple(wanted[:fit])
            request.writing.update(tier.reserve(placed, pages, request.salt))
            out.append(Place(request=request.name, tier=0, chunks=placed))

    def _wanted(self, event: RoomAsked, out: list[Decision]) -> list[Chunk]:
        """Return the chunks of an ask that are to be written, refusing the others."""
        tier, second_use = self.tiers[0], self.config.admission == "second-use"
        lost = self._lost.get(event.request)
        wanted: list[Chunk] = []
        others: dict[RefuseReason, list[Chunk]] = {}
        for chunk in event.chunks:
            if chunk in tier.resident:
                others.setdefault("resident", []).append(chunk)
            elif chunk in tier.writing:
                others.setdefault("storing", []).append(chunk)
            elif chunk in tier.leaving or (lost is not None and chunk in lost.entries):
                others.setdefault("cleared", []).append(chunk)
            elif second_use and chunk not in self._missed:
                others.setdefault("first_use", []).append(chunk)
                self._missed[chunk] = None
            else:
                wanted.append(chunk)
        while len(self._missed) > self.config.admission_memory:
            self._missed.popitem(last=False)
        for reason, chunks in others.items():
            self._refuse(event.request, 0, tuple(chunks), reason, out)
        return wanted

    def _make_room(
        self, index: int, chunks: Sequence[Chunk], pages: int, name: str, salt: str, out: list[Decision]
    ) -> int:
        """Evict for as many leading `chunks` as can be had; refuse the rest; return how many fit."""
        tier = self.tiers[index]
        fit, by_quota = tier.room_for(len(chunks), pages, salt)
        if fit:
            self._leave(index, tier.quota_victims(fit * pages, salt), "quota", out)
            self._leave(index, tier.victims(fit * pages), "room", out)
        if fit < len(chunks):
            self._refuse(name, index, tuple(chunks[fit:]), "quota" if by_quota else "room", out)
        return fit

    def _leave(self, index: int, victims: list[Entry], reason: EvictReason, out: list[Decision]) -> None:
        """Decide where victims go: down, or away."""
        demoted: dict[Chunk, Entry] = {}
        if victims and self.config.placement == "write-back" and index + 1 < len(self.tiers):
            demoted = self._reserve_below(index, victims, out)
            victims = [entry for entry in victims if entry.chunk not in demoted]
        if victims:
            out.append(Evict(tier=index, chunks=tuple(entry.chunk for entry in victims), reason=reason))
        if demoted:
            out.append(Demote(tier=index, chunks=tuple(demoted)))

    def _reserve_below(
        self, index: int, entries: Sequence[Entry], out: list[Decision], name: str = ""
    ) -> dict[Chunk, Entry]:
        """Make room for `entries`, the least worth keeping first, in the tier below `index`; return those that fit."""
        lower = self.tiers[index + 1]
        placed: dict[Chunk, Entry] = {}
        missing = [entry for entry in entries if not lower.holds(entry.chunk)]
        for (pages, salt), group in groupby(missing, key=lambda entry: (entry.pages, entry.salt)):
            chunks = [entry.chunk for entry in group][::-1]
            fit = self._make_room(index + 1, chunks, pages, name, salt, out)
            reserved = lower.reserve(chunks[:fit][::-1], pages, salt)
            lower.insert([*reserved.values()], self._now_ns)
            placed.update(reserved)
        return placed

    def _write_through(self, index: int, entries: Sequence[Entry], name: str, out: list[Decision]) -> None:
        """Copy `entries` of tier `index`, tail first, to the tier below."""
        if self.config.placement != "write-through" or index + 1 >= len(self.tiers):
            return
        placed = self._reserve_below(index, entries, out, name)
        sources = [entry for entry in entries if entry.chunk in placed]
        self.tiers[index].pin(sources)
        self._copying.update({(index + 1, entry.chunk): entry for entry in sources})
        if placed:
            out.append(Place(request=name, tier=index + 1, chunks=tuple(placed)[::-1]))

    def _store_committed(self, event: StoreCommitted, out: list[Decision]) -> None:
        if event.tier:
            self._copied(event, out)
            return
        request = self._requests.get(event.request)
        settled = self._settle_lost(event.request, event.chunks, out)
        if request is None:
            if not settled:
                self._refuse(event.request, 0, event.chunks, "unknown", out)
            return
        for chunk in event.chunks:
            entry = request.writing.pop(chunk, None)
            if entry is not None:
                request.new[chunk] = self.tiers[0].commit(chunk)
                request.held.append(entry)
        self._finish(request, out)

    def _copied(self, event: StoreCommitted, out: list[Decision]) -> None:
        """A lower tier has taken over chunks."""
        tier = self.tiers[event.tier]
        arrived: list[Entry] = []
        for chunk in reversed(event.chunks):
            if chunk not in tier.writing:
                continue
            entry = tier.commit(chunk)
            if not entry.entered:  # cleared on its way
                tier.remove(chunk, "cleared")
            else:
                arrived.append(entry)
            self._gone(event.tier, tier.unpin((entry,)), out)
        self._release_sources(event.tier, event.chunks, out)
        self._write_through(event.tier, arrived, event.request, out)

    def _release_sources(self, index: int, chunks: Iterable[Chunk], out: list[Decision]) -> None:
        sources = [entry for chunk in chunks if (entry := self._copying.pop((index, chunk), None)) is not None]
        self._gone(index - 1, self.tiers[index - 1].unpin(sources), out)

    def _store_aborted(self, event: StoreAborted, out: list[Decision]) -> None:
        tier = self.tiers[event.tier]
        if event.tier:
            for chunk in event.chunks:
                entry = tier.writing.pop(chunk, None)
                if entry is not None:
                    tier.abandon(entry)
            self._release_sources(event.tier, event.chunks, out)
            return
        request = self._requests.get(event.request)
        self._settle_lost(event.request, event.chunks, out)
        if request is None:
            return
        for chunk in event.chunks:
            entry = request.writing.pop(chunk, None)
            if entry is not None:
                del tier.writing[chunk]
                tier.release(entry)
        self._finish(request, out)

    # The end of a request

    def _request_ended(self, event: RequestEnded, out: list[Decision]) -> None:
        request = self._requests.get(event.request)
        if request is not None:
            request.ended = True
            self._finish(request, out)

    def _finish(self, request: Request, out: list[Decision]) -> None:
        """Once nothing of an ended request is under way, tell the policies what it used and let go of it."""
        if not request.ended or request.busy:
            return
        del self._requests[request.name]
        top = self.tiers[0]
        new = [request.new[chunk] for chunk in request.chunks if chunk in request.new] if request.new else []
        new = [entry for entry in reversed(new) if top.resident.get(entry.chunk) is entry]
        if new:
            top.insert(new, self._now_ns)
            self._write_through(0, new, request.name, out)
        if not request.resumed:
            for tier, found in zip(self.tiers, request.found, strict=True):
                # One that a request still at work has stored is not known to the policy yet, and will be the newest.
                tier.touch([entry.chunk for entry in reversed(found) if entry.entered], self._now_ns)
        for chunk, entry in request.passing.items():
            if top.resident.get(chunk) is entry:
                top.remove(chunk, "passing")
        self._gone(0, top.unpin(request.held), out)
        for index, found in enumerate(request.found):
            self._gone(index, self.tiers[index].unpin(found), out)

    # The operator

    def _cleared(self, event: Cleared, out: list[Decision]) -> None:
        if event.chunks is None:
            self._missed.clear()
        self._unpinned(tuple(self.tiers[0].kept) if event.chunks is None else event.chunks, out)
        for index, tier in enumerate(self.tiers):
            self._remove(index, tuple(tier.resident) if event.chunks is None else event.chunks, "cleared", out)
        wanted = None if event.chunks is None else dict.fromkeys(event.chunks)
        for tier in self.tiers[1:]:
            for chunk, entry in tier.writing.items():
                if entry.entered and (wanted is None or chunk in wanted):
                    tier.policy.forget((chunk,))
                    tier.expiry.pop(chunk, None)
                    entry.entered = False
        for request in list(self._requests.values()):
            self._clear_writes(request, wanted, out)

    def _clear_writes(self, request: Request, wanted: dict[Chunk, None] | None, out: list[Decision]) -> None:
        """Void what is being written to tier 0 for a request, of `wanted` or all of it."""
        for entries in (request.writing, request.fetching):
            hit = {chunk: entry for chunk, entry in entries.items() if wanted is None or chunk in wanted}
            if not hit:
                continue
            if entries is request.fetching:
                first = next(i for i, chunk in enumerate(request.run) if chunk in hit) if request.run else 0
                request.run = request.run[:first]
            self._void(request, entries, hit, "cleared")
        self._load_when_fetched(request, out)
        self._finish(request, out)

    def _pinned(self, event: Pinned) -> None:
        top = self.tiers[0]
        for chunk in event.chunks:
            entry = top.resident.get(chunk)
            if entry is not None and chunk not in top.kept:
                top.pin((entry,))
                top.kept[chunk] = entry

    def _unpinned(self, chunks: Iterable[Chunk], out: list[Decision]) -> None:
        top = self.tiers[0]
        kept = [entry for chunk in chunks if (entry := top.kept.pop(chunk, None)) is not None]
        self._gone(0, top.unpin(kept), out)

    # Decisions

    def _remove(self, index: int, chunks: Iterable[Chunk], reason: EvictReason, out: list[Decision]) -> None:
        """Take `chunks` out of a tier: at once those that nobody holds, the others when they are let go of."""
        tier = self.tiers[index]
        free = [
            entry for chunk in chunks if chunk in tier.resident and (entry := tier.remove(chunk, reason)) is not None
        ]
        self._gone(index, free, out)

    @staticmethod
    def _gone(index: int, entries: Sequence[Entry], out: list[Decision]) -> None:
        for reason, group in groupby(entries, key=lambda entry: entry.reason):
            out.append(Evict(tier=index, chunks=tuple(entry.chunk for entry in group), reason=reason))

    @staticmethod
    def _refuse(name: str, tier: int, chunks: tuple[Chunk, ...], reason: RefuseReason, out: list[Decision]) -> None:
        if chunks:
            out.append(Refuse(request=name, tier=tier, chunks=chunks, reason=reason))


def replay(core: Core, events: Iterable[Event]) -> Iterator[tuple[Event, tuple[Decision, ...]]]:
    """Feed `events` to `core` and yield each with its decisions: what was decided live is decided again."""
    for event in events:
        yield event, core.handle(event)
