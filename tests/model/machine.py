"""Drives the core and its naive twin with the same random events and compares every decision."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from naive import Naive

from kvcore.policy import (
    POLICIES,
    Cleared,
    Core,
    CoreConfig,
    Demote,
    InstanceLeft,
    InstanceRegistered,
    LeaseExpired,
    Load,
    LoadDone,
    LoadFailed,
    LookedUp,
    Pinned,
    Place,
    QuotaSet,
    Refuse,
    RequestEnded,
    RoomAsked,
    StoreAborted,
    StoreCommitted,
    TierCleared,
    TierConfig,
    Unpinned,
)

# Chains share prefixes: a chunk's name is its path. Two namespaces never share one.
PATHS = ["a", "ab", "abc", "abcd", "abcde", "ab1", "ab12", "a3", "a34", "a345", "x", "xy", "xyz", "xyzw", "xyzwv"]
NAMESPACES = ["m", "n"]


def chain(namespace, path):
    """Return the chain of a path: in a log's names (integers), or a server's (bytes)."""
    parts = [f"{namespace}:{path[:i]}" for i in range(1, len(path) + 1)]
    return tuple(part.encode() for part in parts) if namespace == "m" else tuple(hash_of(part) for part in parts)


def hash_of(text):
    return int.from_bytes(text.encode().ljust(8, b"."), "little")


tiers = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 3, 5, 8, 13, None]), st.sampled_from(POLICIES)), min_size=1, max_size=3
)
INSTANCES = {"one": 1, "two": 2}  # pages of a chunk


class CoreMachine(RuleBasedStateMachine):
    core_class = Core

    @initialize(
        tiers=tiers,
        placement=st.sampled_from(["write-through", "write-back"]),
        promote=st.booleans(),
        admission=st.sampled_from(["always", "always", "second-use"]),
        ttl=st.sampled_from([None, None, 40]),
    )
    def start(self, tiers, placement, promote, admission, ttl):
        config = CoreConfig(
            tiers=tuple(
                TierConfig(name=f"l{i + 1}", pages=pages, eviction=policy) for i, (pages, policy) in enumerate(tiers)
            ),
            placement=placement,
            promote_on_hit=promote,
            admission=admission,
            admission_memory=4,
            ttl_ns=ttl,
        )
        self.core = self.core_class(config)
        self.naive = Naive(config)
        self.naive.arrivals = lambda tier: self.resident_before[tier]
        self.now = 0
        self.count = 0
        self.open = {}  # name: (instance, chain)
        self.loads = []  # decisions whose copies are under way
        self.stores = []
        for instance, pages in INSTANCES.items():
            self.send(InstanceRegistered(now_ns=0, instance=instance, chunk_pages=pages))

    def send(self, event):
        self.resident_before = [list(tier.resident) for tier in self.core.tiers]
        expected = self.naive.handle(event)
        decided = self.core.handle(event)
        assert decided == expected, (event, decided, expected)
        for decision in decided:
            match decision:
                case Load():
                    self.loads.append(decision)
                case Place():
                    self.stores.append(decision)
                case Demote():
                    self.stores.append(Place(request="", tier=decision.tier + 1, chunks=decision.chunks))
                case Refuse(reason="left"):
                    for place in self.stores:
                        if place.request == decision.request and place.tier == decision.tier:
                            self.drop(place, decision.chunks)
        return decided

    def drop(self, place, chunks):
        at = self.stores.index(place)
        left = tuple(chunk for chunk in place.chunks if chunk not in chunks)
        self.stores[at] = Place(request=place.request, tier=place.tier, chunks=left)

    def tick(self):
        self.now += 1
        return self.now

    @rule(
        instance=st.sampled_from(list(INSTANCES)),
        namespace=st.sampled_from(NAMESPACES),
        path=st.sampled_from(PATHS),
        computed=st.integers(0, 2),
        salt=st.sampled_from(["", "s"]),
        resumed=st.booleans(),
    )
    def look_up(self, instance, namespace, path, computed, salt, resumed):
        self.count += 1
        name = f"r{self.count}"
        chunks = chain(namespace + salt, path) if namespace == "m" else chain(namespace, path)
        self.open[name] = (instance, chunks)
        self.send(
            LookedUp(
                now_ns=self.tick(),
                request=name,
                instance=instance,
                chunks=chunks,
                computed_chunks=min(computed, len(chunks)),
                salt=salt,
                resumed=resumed and self.count % 5 == 0,
            )
        )

    @rule(
        instance=st.sampled_from(list(INSTANCES)),
        paths=st.lists(st.tuples(st.sampled_from(NAMESPACES), st.sampled_from(PATHS)), min_size=1, max_size=6),
    )
    def serve(self, instance, paths):
        """Requests one after the other from beginning to end: what fills a cache and makes its order count."""
        for namespace, path in paths:
            self.serve_one(instance, chain(namespace, path))

    def serve_one(self, instance, chunks, salt=""):
        self.count += 1
        name = f"r{self.count}"
        said = self.send(LookedUp(now_ns=self.tick(), request=name, instance=instance, chunks=chunks, salt=salt))
        while load := next((d for d in said if isinstance(d, Load)), None):
            self.loads.remove(load)
            said = self.send(LoadDone(now_ns=self.tick(), request=name, tier=load.tier, chunks=load.chunks))
        said = self.send(RoomAsked(now_ns=self.tick(), request=name, chunks=chunks))
        for place in [d for d in said if isinstance(d, Place) and d.request == name]:
            self.stores.remove(place)
            self.send(StoreCommitted(now_ns=self.tick(), request=name, tier=0, chunks=place.chunks))
        self.send(RequestEnded(now_ns=self.tick(), request=name))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def look_up_again(self, data):
        name = data.draw(st.sampled_from(list(self.open)))
        instance, chunks = self.open[name]
        self.send(LookedUp(now_ns=self.tick(), request=name, instance=instance, chunks=chunks))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), first=st.integers(0, 3), count=st.integers(1, 5))
    def ask(self, data, first, count):
        name = data.draw(st.sampled_from(list(self.open)))
        chunks = self.open[name][1][first : first + count]
        if chunks:
            self.send(RoomAsked(now_ns=self.tick(), request=name, chunks=chunks))

    @precondition(lambda self: self.stores)
    @rule(data=st.data(), count=st.integers(1, 5), ok=st.sampled_from([True, True, True, False]))
    def end_store(self, data, count, ok):
        at = data.draw(st.integers(0, len(self.stores) - 1))
        place = self.stores.pop(at)
        chunks = place.chunks[:count]
        if place.chunks[count:]:
            self.stores.append(Place(request=place.request, tier=place.tier, chunks=place.chunks[count:]))
        kind = StoreCommitted if ok else StoreAborted
        if chunks:
            self.send(kind(now_ns=self.tick(), request=place.request, tier=place.tier, chunks=chunks))

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), ok=st.sampled_from([True, True, False]), gone=st.booleans(), count=st.integers(1, 5))
    def end_load(self, data, ok, gone, count):
        at = data.draw(st.integers(0, len(self.loads) - 1))
        load = self.loads.pop(at)
        if load.chunks[count:]:
            self.loads.append(Load(request=load.request, tier=load.tier, chunks=load.chunks[count:]))
        how = {} if ok else {"gone": gone}
        kind = LoadDone if ok else LoadFailed
        self.send(kind(now_ns=self.tick(), request=load.request, tier=load.tier, chunks=load.chunks[:count], **how))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data):
        name = data.draw(st.sampled_from(list(self.open)))
        del self.open[name]
        self.send(RequestEnded(now_ns=self.tick(), request=name))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), forgets=st.booleans())
    def lease_runs_out(self, data, forgets):
        name = data.draw(st.sampled_from(list(self.open)))
        if forgets:  # else the engine goes on as if nothing had happened
            del self.open[name]
        self.send(LeaseExpired(now_ns=self.tick(), request=name))

    @rule(instance=st.sampled_from(list(INSTANCES)))
    def instance_goes_and_comes(self, instance):
        self.send(InstanceLeft(now_ns=self.tick(), instance=instance))
        self.open = {name: one for name, one in self.open.items() if one[0] != instance}
        self.send(InstanceRegistered(now_ns=self.tick(), instance=instance, chunk_pages=INSTANCES[instance]))

    @rule(namespace=st.sampled_from(NAMESPACES), path=st.sampled_from(PATHS), pins=st.booleans())
    def operator_pins(self, namespace, path, pins):
        kind = Pinned if pins else Unpinned
        self.send(kind(now_ns=self.tick(), chunks=chain(namespace, path)))

    @rule(namespace=st.sampled_from(NAMESPACES), path=st.sampled_from([None, *PATHS]))
    def operator_clears(self, namespace, path):
        self.send(Cleared(now_ns=self.tick(), chunks=None if path is None else chain(namespace, path)))

    @rule(data=st.data())
    def a_tier_is_emptied(self, data):
        tier = data.draw(st.integers(0, len(self.core.tiers) - 1))
        before = [list(one.resident) for one in self.core.tiers]
        self.send(TierCleared(now_ns=self.tick(), tier=tier))
        assert not self.core.tiers[tier].resident
        if self.core.config.ttl_ns is None:  # else some of the others may be due at this very moment
            assert [list(one.resident) for one in self.core.tiers if one is not self.core.tiers[tier]] == [
                chunks for at, chunks in enumerate(before) if at != tier
            ]

    @rule(pages=st.sampled_from([None, 0, 1, 3, 6]))
    def operator_sets_quota(self, pages):
        self.send(QuotaSet(now_ns=self.tick(), salt="s", pages=pages))

    @rule(ns=st.integers(10, 60))
    def time_passes(self, ns):
        self.now += ns

    @invariant()
    def core_holds(self):
        if hasattr(self, "core"):
            self.core.check()
