"""A naive twin of the core: plain lists, everything recomputed at every step, no accounts kept.

It follows DESIGN's semantics sentence by sentence and shares with the core only the eviction policies (which have naive
twins of their own in their tests) and the names of events and decisions.
"""

from dataclasses import dataclass, field

from kvcore.policy import (
    CoreConfig,
    Demote,
    Evict,
    Load,
    Matched,
    Place,
    Refuse,
    Unpinned,
)
from kvcore.policy.eviction import make_policy


@dataclass(eq=False)
class Copy:
    """A chunk in a tier, from the moment that room is made for it."""

    chunk: object
    pages: int
    salt: str
    state: str = "writing"  # then resident, perhaps leaving; lost: written by one who is not believed
    known: bool = False  # to the policy
    reason: str = "cleared"
    born: int = 0  # or used last, for the TTL


@dataclass(eq=False)
class Asker:
    name: str
    instance: str
    salt: str
    chunks: tuple
    resumed: bool
    matched: object = None
    found: list = field(default_factory=list)  # (tier, copy) resident at the lookup
    stored: list = field(default_factory=list)  # copies that became resident for it
    passing: list = field(default_factory=list)
    writing: list = field(default_factory=list)
    fetching: list = field(default_factory=list)
    awaited: list = field(default_factory=list)
    borrowed: list = field(default_factory=list)  # stored by the fetch of another
    run: tuple = ()
    loading: int = 0
    ended: bool = False


class Naive:
    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.tiers = [[] for _ in config.tiers]  # copies
        self.policies = [make_policy(tier.eviction, tier.pages) for tier in config.tiers]
        self.instances = {}
        self.askers = {}
        self.lost = []  # [request, instance, reason, copy, whether a tier fills it]
        self.copying = []  # (tier below, chunk, source copy)
        self.kept = []
        self.quotas = dict(config.quotas)
        self.missed = []
        self.now = 0
        self.out = []

    # What holds, by definition

    def pins(self, copy):
        n = sum(one is copy for asker in self.askers.values() for _, one in asker.found)
        for asker in self.askers.values():
            n += sum(one is copy for one in [*asker.stored, *asker.writing, *asker.fetching])
        n += sum(source is copy for _, _, source in self.copying)
        n += sum(one is copy for one in self.kept)
        return n + (copy.state == "writing" and copy.known)

    def get(self, tier, chunk, *states):
        found = [c for c in self.tiers[tier] if c.chunk == chunk and c.state in (states or ("resident",))]
        assert len(found) <= 1
        return found[0] if found else None

    def used(self, tier):
        return sum(copy.pages for copy in self.tiers[tier])

    def free_or_idle(self, tier, salt=None):
        """Pages that can be had: free ones and those of idle chunks (of a tenant under its quota, if given)."""
        mine = [c for c in self.tiers[tier] if salt is None or c.salt == salt]
        idle = sum(c.pages for c in mine if c.state == "resident" and not self.pins(c))
        limit = self.quotas[salt] if salt is not None else self.config.tiers[tier].pages
        return max(0, limit - sum(c.pages for c in mine) + idle)

    # Events

    def handle(self, event):
        self.out = []
        self.now = event.now_ns
        if self.config.ttl_ns is not None:
            self.expire()
        getattr(self, type(event).__name__)(event)
        return tuple(self.out)

    def expire(self):
        for tier, copies in enumerate(self.tiers):
            due = [c for c in copies if c.known and c.born + self.config.ttl_ns <= self.now]
            gone = []
            for copy in sorted(due, key=lambda c: self.used_order(tier, c)):
                if copy.state == "resident" and not self.pins(copy):
                    self.take_out(tier, copy, "expired")
                    gone.append(copy.chunk)
                else:
                    copy.born = self.now
                    self.order[tier].remove(copy.chunk)
                    self.order[tier].append(copy.chunk)
            self.say_evict(tier, gone, "expired")

    order = None

    def used_order(self, tier, copy):
        return self.order[tier].index(copy.chunk)

    def note_use(self, tier, copy):
        if self.order is None:
            self.order = [[] for _ in self.tiers]
        copy.born = self.now
        if copy.chunk in self.order[tier]:
            self.order[tier].remove(copy.chunk)
        self.order[tier].append(copy.chunk)

    def forget(self, tier, copy):
        copy.known = False
        self.policies[tier].forget((copy.chunk,))
        self.order[tier].remove(copy.chunk)

    def take_out(self, tier, copy, reason):
        """Unmatchable from now on; away at once if nobody holds it."""
        copy.reason = reason
        if copy.known:
            self.forget(tier, copy)
        if self.pins(copy):
            copy.state = "leaving"
            return False
        self.tiers[tier].remove(copy)
        return True

    def let_go(self, tier, copies):
        """Say who leaves now that pins of `copies` are gone, in the order in which they were let go of."""
        gone = []
        for copy in copies:
            if copy in self.tiers[tier] and copy.state == "leaving" and not self.pins(copy) and copy not in gone:
                gone.append(copy)
        for copy in gone:
            self.tiers[tier].remove(copy)
        self.say_gone(tier, gone)

    def say_gone(self, tier, copies):
        batch = []
        for copy in copies:
            if batch and batch[-1].reason != copy.reason:
                self.say_evict(tier, [c.chunk for c in batch], batch[-1].reason)
                batch = []
            batch.append(copy)
        if batch:
            self.say_evict(tier, [c.chunk for c in batch], batch[-1].reason)

    def say_evict(self, tier, chunks, reason):
        if chunks:
            self.out.append(Evict(tier=tier, chunks=tuple(chunks), reason=reason))

    def refuse(self, name, tier, chunks, reason):
        if chunks:
            self.out.append(Refuse(request=name, tier=tier, chunks=tuple(chunks), reason=reason))

    def InstanceRegistered(self, event):
        self.instances[event.instance] = event

    def LookedUp(self, event):  # noqa: C901 - one paragraph of the semantics after the other
        if event.request in self.askers:
            self.out.append(self.askers[event.request].matched)
            return
        if any(name == event.request for name, *_ in self.lost):
            hits = (0,) * len(self.tiers)
            self.out.append(Matched(request=event.request, hits=hits, resumed=event.resumed))
            return
        asker = Asker(event.request, event.instance, event.salt, event.chunks, event.resumed)
        self.askers[event.request] = asker
        for tier in range(len(self.tiers)):
            for chunk in event.chunks:
                copy = self.get(tier, chunk)
                if copy is not None:
                    asker.found.append((tier, copy))
        where = []
        for chunk in event.chunks:
            tiers = [t for t in range(len(self.tiers)) if self.get(t, chunk) is not None]
            if not tiers:
                break
            where.append(tiers[0])
        hits = tuple(where.count(t) for t in range(len(self.tiers)))
        asker.matched = Matched(request=event.request, hits=hits, resumed=event.resumed)
        self.out.append(asker.matched)
        pages = self.instances[event.instance].chunk_pages
        end = len(where)
        below = [i for i in range(event.computed_chunks, end) if where[i]]
        for i in below:  # what an engine writes again at this moment can be neither fetched nor matched
            if self.get(0, event.chunks[i], "writing", "leaving") and not self.fetched_by_another(event.chunks[i]):
                self.refuse(event.request, 0, event.chunks[i:end], "storing")
                end = i
                break
        fresh = [i for i in below if i < end and not self.fetched_by_another(event.chunks[i])]
        fit = self.make_room(0, [event.chunks[i] for i in fresh], pages, event.request, event.salt) if fresh else 0
        if fit < len(fresh):
            end = fresh[fit]
        asker.awaited = [event.chunks[i] for i in below if i < end and i not in fresh]
        for i in fresh[:fit]:
            asker.fetching.append(Copy(event.chunks[i], pages, event.salt))
        self.tiers[0] += asker.fetching
        for tier in range(1, len(self.tiers)):
            wanted = tuple(event.chunks[i] for i in fresh[:fit] if where[i] == tier)
            if wanted:
                self.out.append(Load(request=event.request, tier=tier, chunks=wanted))
        asker.run = event.chunks[event.computed_chunks : end]
        self.load_if_fetched(asker)

    def fetched_by_another(self, chunk):
        return any(copy.chunk == chunk for asker in self.askers.values() for copy in asker.fetching)

    def came(self, chunk, copy):
        """A fetch has ended; return the others that waited for it, first come first."""
        waiters = [asker for asker in self.askers.values() if chunk in asker.awaited]
        for asker in waiters:
            asker.awaited.remove(chunk)
            if copy is not None:
                asker.stored.append(copy)
                asker.passing.append(copy)  # not its own to tell the policy of, and gone with the one that fetched it
                asker.borrowed.append(copy)
            elif chunk in asker.run:
                asker.run = asker.run[: asker.run.index(chunk)]
        return waiters

    def go_on(self, askers):
        for asker in dict.fromkeys(askers):
            self.load_if_fetched(asker)
            self.finish(asker)

    def load_if_fetched(self, asker):
        if asker.run and not asker.fetching and not asker.awaited and not asker.ended:
            asker.loading = len(asker.run)
            self.out.append(Load(request=asker.name, tier=0, chunks=asker.run))
            asker.run = ()

    def settle(self, name, chunks):
        done = [one for chunk in chunks for one in self.lost if one[0] == name and one[3].chunk == chunk]
        for one in done:
            self.lost.remove(one)
            self.tiers[0].remove(one[3])
        if done:
            self.refuse(name, 0, [one[3].chunk for one in done], done[0][2])
        return bool(done)

    def LoadDone(self, event):
        asker = self.askers.get(event.request)
        if event.tier == 0:
            if asker:
                asker.loading = max(0, asker.loading - len(event.chunks))
                self.finish(asker)
            return
        self.settle(event.request, event.chunks)
        if asker is None:
            return
        waiters = []
        for copy in [c for chunk in event.chunks for c in asker.fetching if c.chunk == chunk]:
            asker.fetching.remove(copy)
            copy.state = "resident"
            asker.stored.append(copy)
            if not self.config.promote_on_hit:
                asker.passing.append(copy)
            waiters += self.came(copy.chunk, copy)
        self.go_on([asker, *waiters])

    def LoadFailed(self, event):
        asker = self.askers.get(event.request)
        if event.tier == 0:
            if asker:
                asker.loading = max(0, asker.loading - len(event.chunks))
                self.finish(asker)
            return
        if event.gone:
            self.remove(event.tier, event.chunks, "failed")
        self.settle(event.request, event.chunks)
        if asker is None:
            return
        waiters = []
        for chunk in event.chunks:
            for copy in [c for c in asker.fetching if c.chunk == chunk]:
                asker.fetching.remove(copy)
                self.tiers[0].remove(copy)
                waiters += self.came(chunk, None)
                if chunk in asker.run:
                    asker.run = asker.run[: asker.run.index(chunk)]
        self.go_on([asker, *waiters])

    def RoomAsked(self, event):
        asker = self.askers.get(event.request)
        if asker is None or asker.ended:
            self.refuse(event.request, 0, event.chunks, "unknown")
            return
        wanted, others = [], {}
        mine = [one[3].chunk for one in self.lost if one[0] == event.request]
        for chunk in event.chunks:
            if self.get(0, chunk):
                others.setdefault("resident", []).append(chunk)
            elif self.get(0, chunk, "writing"):
                others.setdefault("storing", []).append(chunk)
            elif self.get(0, chunk, "leaving") or chunk in mine:
                others.setdefault("cleared", []).append(chunk)
            elif self.config.admission == "second-use" and chunk not in self.missed:
                others.setdefault("first_use", []).append(chunk)
                self.missed.append(chunk)
            else:
                wanted.append(chunk)
        self.missed = self.missed[-self.config.admission_memory :]
        for reason, chunks in others.items():
            self.refuse(event.request, 0, chunks, reason)
        if not wanted:
            return
        pages = self.instances[asker.instance].chunk_pages
        fit = self.make_room(0, wanted, pages, asker.name, asker.salt)
        copies = [Copy(chunk, pages, asker.salt) for chunk in wanted[:fit]]
        asker.writing += copies
        self.tiers[0] += copies
        if copies:
            self.out.append(Place(request=asker.name, tier=0, chunks=tuple(wanted[:fit])))

    def make_room(self, tier, chunks, pages, name, salt):
        fit = len(chunks)
        if self.config.tiers[tier].pages is not None:
            fit = min(fit, self.free_or_idle(tier) // pages)
        reason = "room"
        if tier == 0 and salt in self.quotas:
            allowed = self.free_or_idle(0, salt) // pages
            if allowed < fit:
                fit, reason = allowed, "quota"
        if fit:
            if tier == 0 and salt in self.quotas:
                used = sum(c.pages for c in self.tiers[0] if c.salt == salt)
                over = used + fit * pages - self.quotas[salt]
                self.leave(0, self.pick(0, over, lambda c: c.salt == salt), "quota")
            if self.config.tiers[tier].pages is not None:
                short = self.used(tier) + fit * pages - self.config.tiers[tier].pages
                self.leave(tier, self.pick(tier, short, lambda c: True), "room")
        self.refuse(name, tier, chunks[fit:], reason)
        return fit

    def pick(self, tier, pages, which):
        """Victims are chosen together, in policy order, among the chunks that nobody holds."""
        if pages <= 0:
            return []

        def idle(chunk):
            copy = self.get(tier, chunk)
            return copy is not None and not self.pins(copy) and which(copy)

        victims = [self.get(tier, chunk) for chunk in self.policies[tier].victims(pages, idle)]
        for copy in victims:
            self.tiers[tier].remove(copy)
            self.order[tier].remove(copy.chunk)
        return victims

    def leave(self, tier, victims, reason):
        demoted = []
        if victims and self.config.placement == "write-back" and tier + 1 < len(self.tiers):
            demoted = self.reserve_below(tier, victims, "")
        self.say_evict(tier, [c.chunk for c in victims if c.chunk not in demoted], reason)
        if demoted:
            self.out.append(Demote(tier=tier, chunks=tuple(demoted)))

    def reserve_below(self, tier, copies, name):
        """Room in the next tier for those not there, the last of each like stretch first; the policy learns at once."""
        missing = [c for c in copies if not self.get(tier + 1, c.chunk, "resident", "writing", "leaving")]
        placed = []
        while missing:
            size = 1
            while size < len(missing) and (missing[size].pages, missing[size].salt) == (
                missing[0].pages,
                missing[0].salt,
            ):
                size += 1
            group, missing = missing[:size], missing[size:]
            fit = self.make_room(tier + 1, [c.chunk for c in reversed(group)], group[0].pages, name, group[0].salt)
            for source in group[len(group) - fit :]:
                copy = Copy(source.chunk, source.pages, source.salt)
                self.tiers[tier + 1].append(copy)
                self.learn(tier + 1, copy)
                placed.append(copy.chunk)
        return placed

    def learn(self, tier, copy):
        copy.known = True
        self.policies[tier].insert((copy.chunk,), copy.pages)
        self.note_use(tier, copy)

    def StoreCommitted(self, event):
        if event.tier:
            self.copied(event)
            return
        settled = self.settle(event.request, event.chunks)
        asker = self.askers.get(event.request)
        if asker is None:
            if not settled:
                self.refuse(event.request, 0, event.chunks, "unknown")
            return
        for copy in [c for chunk in event.chunks for c in asker.writing if c.chunk == chunk]:
            asker.writing.remove(copy)
            copy.state = "resident"
            asker.stored.append(copy)
        self.finish(asker)

    def copied(self, event):
        arrived = []
        for chunk in reversed(event.chunks):
            copy = self.get(event.tier, chunk, "writing")
            if copy is None:
                continue
            if copy.known:
                copy.state = "resident"
                arrived.append(copy)
            else:
                self.tiers[event.tier].remove(copy)
                self.say_evict(event.tier, [chunk], "cleared")
        self.release_sources(event.tier, event.chunks)
        self.write_through(event.tier, arrived, event.request)

    def release_sources(self, tier, chunks):
        done = [one for chunk in chunks for one in self.copying if one[:2] == (tier, chunk)]
        for one in done:
            self.copying.remove(one)
        self.let_go(tier - 1, [one[2] for one in done])

    def write_through(self, tier, copies, name):
        if self.config.placement != "write-through" or tier + 1 >= len(self.tiers):
            return
        placed = self.reserve_below(tier, copies, name)
        self.copying += [(tier + 1, c.chunk, c) for c in copies if c.chunk in placed]
        if placed:
            self.out.append(Place(request=name, tier=tier + 1, chunks=tuple(reversed(placed))))

    def StoreAborted(self, event):
        if event.tier:
            for chunk in event.chunks:
                copy = self.get(event.tier, chunk, "writing")
                if copy is not None:
                    if copy.known:
                        self.forget(event.tier, copy)
                    self.tiers[event.tier].remove(copy)
            self.release_sources(event.tier, event.chunks)
            return
        self.settle(event.request, event.chunks)
        asker = self.askers.get(event.request)
        if asker is None:
            return
        for copy in [c for chunk in event.chunks for c in asker.writing if c.chunk == chunk]:
            asker.writing.remove(copy)
            self.tiers[0].remove(copy)
        self.finish(asker)

    def RequestEnded(self, event):
        asker = self.askers.get(event.request)
        if asker is not None:
            asker.ended = True
            self.finish(asker)

    def finish(self, asker):
        if not asker.ended or asker.loading or asker.writing or asker.fetching or asker.awaited:
            return
        position = {chunk: i for i, chunk in enumerate(asker.chunks)}
        new = [c for c in asker.stored if c not in asker.passing and c.state == "resident"]
        new.sort(key=lambda c: -position[c.chunk])
        for copy in new:
            self.learn(0, copy)
        self.write_through(0, new, asker.name)
        if not asker.resumed:
            for tier in range(len(self.tiers)):
                for copy in [c for t, c in reversed(asker.found) if t == tier and c.known]:
                    self.policies[tier].touch((copy.chunk,))
                    self.note_use(tier, copy)
        for copy in [c for c in asker.passing if c not in asker.borrowed]:
            if copy.state == "resident":
                self.take_out(0, copy, "passing")
        del self.askers[asker.name]
        self.let_go(0, asker.stored)
        for tier in range(len(self.tiers)):
            self.let_go(tier, [c for t, c in asker.found if t == tier])

    def void(self, asker, copies, reason, filled=False):
        for copy in copies:
            copy.state = "lost"
            known = next((one[2] for one in self.lost if one[0] == asker.name), reason)
            self.lost.append([asker.name, asker.instance, known, copy, filled])

    def give_up(self, asker):
        asker.ended = True
        asker.loading = 0
        self.finish(asker)

    def LeaseExpired(self, event):
        asker = self.askers.get(event.request)
        if asker is not None:
            self.void(asker, asker.writing, "lease")
            asker.writing = []
            self.give_up(asker)

    def InstanceLeft(self, event):
        self.instances.pop(event.instance, None)
        for asker in [a for a in self.askers.values() if a.instance == event.instance]:
            self.void(asker, asker.writing, "left")
            asker.writing = []
            self.give_up(asker)
        names = list(dict.fromkeys(one[0] for one in self.lost if one[1] == event.instance))
        for name in names:
            for one in self.lost:
                if one[0] == name:
                    one[2] = "left"
            self.settle(name, [one[3].chunk for one in self.lost if one[0] == name and not one[4]])

    def remove(self, tier, chunks, reason):
        gone = [c for chunk in chunks if (c := self.get(tier, chunk)) and self.take_out(tier, c, reason)]
        self.say_gone(tier, gone)

    def Cleared(self, event):
        if event.chunks is None:
            self.missed = []
        self.clear(range(len(self.tiers)), event.chunks)

    def TierCleared(self, event):
        self.clear([event.tier], None)

    def clear(self, indices, wanted):
        everything = wanted is None
        if 0 in indices:
            self.Unpinned(Unpinned(now_ns=0, chunks=tuple(c.chunk for c in self.kept) if everything else wanted))
        for tier in indices:
            chunks = [c.chunk for c in self.tiers[tier] if c.state == "resident"] if everything else wanted
            if everything:  # in the order in which they became resident
                chunks = sorted(chunks, key=lambda chunk: self.arrivals(tier).index(chunk))
            self.remove(tier, chunks, "cleared")
        for tier in indices:
            for copy in self.tiers[tier] if tier else ():
                if copy.state == "writing" and copy.known and (everything or copy.chunk in wanted):
                    self.forget(tier, copy)
        for asker in list(self.askers.values()) if 0 in indices else ():
            hit = [c for c in asker.writing if everything or c.chunk in wanted]
            self.void(asker, hit, "cleared")
            asker.writing = [c for c in asker.writing if c not in hit]
            hit = [c for c in asker.fetching if everything or c.chunk in wanted]
            self.void(asker, hit, "cleared", filled=True)
            asker.fetching = [c for c in asker.fetching if c not in hit]
            waiters = []
            for copy in hit:
                waiters += self.came(copy.chunk, None)
                if copy.chunk in asker.run:
                    asker.run = asker.run[: asker.run.index(copy.chunk)]
            self.go_on([asker, *waiters])

    arrivals = None  # set by the machine: the order in which the core lists a tier's chunks is no part of the semantics

    def Pinned(self, event):
        for chunk in event.chunks:
            copy = self.get(0, chunk)
            if copy is not None and copy not in self.kept:
                self.kept.append(copy)

    def Unpinned(self, event):
        gone = [c for chunk in event.chunks for c in self.kept if c.chunk == chunk]
        self.kept = [c for c in self.kept if c not in gone]
        self.let_go(0, gone)

    def QuotaSet(self, event):
        self.quotas.pop(event.salt, None)
        if event.pages is not None:
            self.quotas[event.salt] = event.pages
