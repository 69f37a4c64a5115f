"""What the core decides, told as short stories; every sequence of events is the business of tests/model."""

import pytest

from kvcore.policy import (
    Cleared,
    Core,
    CoreConfig,
    Demote,
    Evict,
    InstanceLeft,
    InstanceRegistered,
    LeaseExpired,
    Load,
    LoadCost,
    LoadDone,
    LoadFailed,
    LookedUp,
    Matched,
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
    UnknownInstanceError,
    Unpinned,
    replay,
)


class Story:
    """A core with one instance, and short words for events."""

    def __init__(self, *tiers, chunk_pages=1, chunk_bytes=0, **config):
        tiers = tiers or (10,)
        named = tuple(TierConfig(name=f"l{i + 1}", pages=pages) for i, pages in enumerate(tiers))
        self.core = Core(CoreConfig(tiers=named, **config))
        self.now = 0
        self.tell(InstanceRegistered, instance="i", chunk_pages=chunk_pages, chunk_bytes=chunk_bytes)

    def tell(self, kind, **fields):
        self.now += 1
        decisions = self.core.handle(kind(now_ns=self.now, **fields))
        self.core.check()
        return decisions

    def look_up(self, request, chunks, **fields):
        return self.tell(LookedUp, request=request, instance="i", chunks=tuple(chunks), **fields)

    def ask(self, request, chunks):
        return self.tell(RoomAsked, request=request, chunks=tuple(chunks))

    def commit(self, request, chunks, tier=0):
        return self.tell(StoreCommitted, request=request, tier=tier, chunks=tuple(chunks))

    def loaded(self, request, chunks, tier=0):
        return self.tell(LoadDone, request=request, tier=tier, chunks=tuple(chunks))

    def end(self, request):
        return self.tell(RequestEnded, request=request)

    def store(self, request, chunks):
        """A whole request with nothing to load."""
        chunks = tuple(chunks)
        said = [*self.look_up(request, chunks, computed_chunks=len(chunks))]
        said += self.ask(request, chunks)
        for place in [d for d in said if isinstance(d, Place) and d.tier == 0]:
            said += self.commit(request, place.chunks)
        return [*said, *self.end(request)]

    def hits(self, chunks):
        """What a request that wants nothing would find."""
        found = self.look_up("probe", chunks, computed_chunks=len(chunks), resumed=True)[0].hits
        self.end("probe")
        return found


A, B, C, D = 1, 2, 3, 4
ABC = (A, B, C)


def test_a_prompt_is_stored_then_found_and_loaded():
    story = Story()
    assert story.look_up("r", ABC) == (Matched(request="r", hits=(0,)),)
    assert story.ask("r", ABC) == (Place(request="r", tier=0, chunks=ABC),)
    assert story.hits(ABC) == (0,), "nothing is found before its commit"
    story.commit("r", (A,))
    assert story.hits(ABC) == (1,), "a chunk is found from its commit"
    story.commit("r", (B, C))
    assert story.end("r") == ()
    assert story.look_up("s", (*ABC, D), computed_chunks=1) == (
        Matched(request="s", hits=(3,)),
        Load(request="s", tier=0, chunks=(B, C)),
    )


def test_a_lookup_asked_again_changes_nothing():
    story = Story()
    story.store("r", ABC)
    first = story.look_up("s", ABC)
    assert story.look_up("s", ABC) == first[:1]
    story.loaded("s", ABC)
    story.end("s")
    assert [entry.pins for entry in story.core.tiers[0].resident.values()] == [0, 0, 0]


def test_what_does_not_fit_is_the_tail():
    story = Story(2)
    story.look_up("r", ABC)
    assert story.ask("r", ABC) == (
        Refuse(request="r", tier=0, chunks=(C,), reason="room"),
        Place(request="r", tier=0, chunks=(A, B)),
    )


def test_pinned_chunks_are_not_evicted_and_a_prefix_outlives_its_extension():
    story = Story(3)
    story.store("r", ABC)
    story.look_up("reads", (A,))
    assert story.store("s", (D,))[-1] == Place(request="s", tier=0, chunks=(D,))
    assert story.hits(ABC) == (2,), "the extension went first"
    story.loaded("reads", (A,))
    story.end("reads")


def test_two_requests_do_not_store_a_chunk_twice():
    story = Story()
    story.look_up("r", ABC)
    story.look_up("s", ABC)
    story.ask("r", ABC)
    assert story.ask("s", ABC) == (Refuse(request="s", tier=0, chunks=ABC, reason="storing"),)
    story.commit("r", ABC)
    assert story.ask("s", ABC) == (Refuse(request="s", tier=0, chunks=ABC, reason="resident"),)


@pytest.mark.parametrize("ttl_ns", [None, 1000])
def test_what_is_stored_beside_the_prompt_can_be_evicted_too(ttl_ns):
    story = Story(10, ttl_ns=ttl_ns)
    story.look_up("r", (1, 2, 3))
    story.ask("r", (1, 7, 8, 9, 3))
    story.commit("r", (1, 7, 8, 9, 3))
    story.tell(Cleared, chunks=(8,))
    story.end("r")
    assert Evict(tier=0, chunks=(7, 9, 3, 1), reason="room") in story.store("s", range(20, 30))


def test_an_aborted_store_leaves_room():
    story = Story(3)
    story.look_up("r", ABC)
    story.ask("r", ABC)
    story.tell(StoreAborted, request="r", tier=0, chunks=ABC)
    story.end("r")
    assert story.core.tiers[0].used == 0


def test_an_expired_lease_frees_what_is_read_and_holds_what_is_written():
    story = Story(4)
    story.store("old", (A,))
    story.look_up("r", ABC)
    story.ask("r", (B, C))
    assert story.tell(LeaseExpired, request="r") == ()
    assert story.core.tiers[0].used == 3, "a writer that is slow may still write"
    assert story.look_up("r", ABC) == (Matched(request="r", hits=(0,)),), "and its name is not free either"
    assert story.ask("r", ABC)[0].reason == "unknown"
    assert story.commit("r", (B,)) == (Refuse(request="r", tier=0, chunks=(B,), reason="lease"),)
    assert story.tell(InstanceLeft, instance="i") == (Refuse(request="r", tier=0, chunks=(C,), reason="left"),)
    assert story.core.tiers[0].used == 1


def test_a_late_word_of_an_unknown_request_is_answered():
    story = Story()
    assert story.commit("?", (A,)) == (Refuse(request="?", tier=0, chunks=(A,), reason="unknown"),)
    assert story.ask("?", (A,)) == (Refuse(request="?", tier=0, chunks=(A,), reason="unknown"),)
    assert story.loaded("?", (A,)) == ()
    assert story.end("?") == ()


def test_written_through_found_below_and_promoted():
    story = Story(2, None)
    said = story.store("r", (A, B))
    assert said[-1] == Place(request="r", tier=1, chunks=(A, B))
    story.commit("r", (A, B), tier=1)
    story.store("s", (C, D))
    story.commit("s", (C, D), tier=1)  # until then both are the sources of a copy, so pinned
    assert story.hits((A, B)) == (0, 2)
    found = story.look_up("t", (A, B))
    assert found == (
        Matched(request="t", hits=(0, 2)),
        Evict(tier=0, chunks=(D, C), reason="room"),
        Load(request="t", tier=1, chunks=(A, B)),
    )
    assert story.loaded("t", (A, B), tier=1) == (Load(request="t", tier=0, chunks=(A, B)),)
    story.loaded("t", (A, B))
    story.end("t")
    assert story.hits((A, B)) == (2, 0)


def two_below(**options):
    """A story in which A and B have left tier 0, and lie in tier 1."""
    story = Story(2, None, **options)
    story.store("r", (A, B))
    story.commit("r", (A, B), tier=1)
    story.store("s", (C, D))
    story.commit("s", (C, D), tier=1)
    return story


def test_without_promotion_a_chunk_passes_through():
    story = two_below(promote_on_hit=False)
    story.look_up("t", (A, B))
    story.loaded("t", (A, B), tier=1)
    story.loaded("t", (A, B))
    assert story.end("t") == (Evict(tier=0, chunks=(A, B), reason="passing"),)


def test_a_fetch_serves_all_who_want_it():
    story = two_below()
    story.look_up("t", (A, B))
    assert story.look_up("u", (A, B)) == (Matched(request="u", hits=(0, 2)),), "no second fetch"
    assert story.loaded("t", (A, B), tier=1) == (
        Load(request="t", tier=0, chunks=(A, B)),
        Load(request="u", tier=0, chunks=(A, B)),
    )


def test_a_failed_fetch_ends_the_run_and_forgets_the_chunk_below():
    story = two_below()
    story.look_up("t", (A, B))
    assert story.loaded("t", (A,), tier=1) == ()
    assert story.tell(LoadFailed, request="t", tier=1, chunks=(B,)) == (Load(request="t", tier=0, chunks=(A,)),)
    story.loaded("t", (A,))
    assert story.end("t")[0] == Evict(tier=1, chunks=(B,), reason="failed")


def test_a_tier_that_could_not_be_asked_keeps_its_chunks():
    story = two_below()
    story.look_up("t", (A, B))
    assert story.tell(LoadFailed, request="t", tier=1, chunks=(A, B), gone=False) == ()
    assert not [said for said in story.end("t") if isinstance(said, Evict)]
    assert story.look_up("u", (A, B))[0] == Matched(request="u", hits=(0, 2))


def test_written_back_on_eviction():
    story = Story(2, 2, placement="write-back")
    story.store("r", (A, B))
    said = story.store("s", (C, D))
    assert Demote(tier=0, chunks=(B, A)) in said
    story.commit("", (B, A), tier=1)
    assert story.hits((A, B)) == (0, 2)


def test_a_tenant_over_its_quota_evicts_its_own():
    story = Story(10, quotas=(("t", 2),))
    story.store("other", (C,))
    story.look_up("r", (A, B), salt="t", computed_chunks=2)
    story.ask("r", (A, B))
    story.commit("r", (A, B))
    assert story.ask("r", (D,)) == (Refuse(request="r", tier=0, chunks=(D,), reason="quota"),), "its own are pinned"
    story.end("r")
    story.look_up("s", (D,), salt="t")
    assert story.ask("s", (D,))[0] == Evict(tier=0, chunks=(B,), reason="quota")
    story.tell(QuotaSet, salt="t", pages=None)
    assert story.core.tiers[0].quotas == {}


def test_a_quota_does_not_go_over_all_that_is_resident():
    class Watched(dict):
        def values(self):
            raise AssertionError("all of them are gone over")

    story = Story(10)
    story.store("r", (A, B))
    story.tell(QuotaSet, salt="", pages=2)
    story.look_up("s", (C,))
    story.core._state.tiers[0].resident = Watched(story.core.tiers[0].resident)
    decided = story.core.handle(RoomAsked(now_ns=story.now, request="s", chunks=(C,)))
    assert [type(one) for one in decided] == [Evict, Place]


def test_unused_chunks_expire():
    story = Story(10, ttl_ns=100)
    story.store("r", ABC)
    story.now += 60
    story.store("s", (A,))
    story.now += 60
    assert story.look_up("t", ABC)[:2] == (
        Evict(tier=0, chunks=(C, B), reason="expired"),
        Matched(request="t", hits=(1,)),
    )


class Counted:
    """A policy that counts how often it is told to forget."""

    def __init__(self, policy):
        self.policy = policy
        self.forgotten = []

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def forget(self, chunks):
        self.forgotten.append([*chunks])
        self.policy.forget(self.forgotten[-1])


@pytest.mark.parametrize("ttl_ns", [None, 50])
def test_many_chunks_leave_in_one_go(ttl_ns):
    story = Story(None, ttl_ns=ttl_ns)
    story.store("a", range(100))
    top = story.core.tiers[0]
    top.policy = Counted(top.policy)
    story.look_up("reader", range(3), computed_chunks=3)
    if ttl_ns is None:
        (evicted,) = story.tell(Cleared)
        assert evicted.reason == "cleared"
    else:
        story.now = 200
        (evicted,) = story.tell(Unpinned, chunks=())
        assert evicted.reason == "expired"
    assert sorted(evicted.chunks) == [*range(3, 100)]
    assert len(top.policy.forgotten) == 1


def test_admission_by_second_use():
    story = Story(10, admission="second-use")
    assert story.store("r", (A, B))[1] == Refuse(request="r", tier=0, chunks=(A, B), reason="first_use")
    assert story.store("s", (A, C))[1:3] == [
        Refuse(request="s", tier=0, chunks=(C,), reason="first_use"),
        Place(request="s", tier=0, chunks=(A,)),
    ]


def cost(bytes_per_s):
    return LoadCost(
        chunk_tokens=256,
        prefill_floor_ns=8.5e6,
        prefill_base_ns=4.1e6,
        prefill_linear_ns=18_965,
        prefill_quadratic_ns=0.45,
        latency_ns=(50e3,),
        bytes_per_s=(bytes_per_s,),
    )


@pytest.mark.parametrize(("bytes_per_s", "loads"), [(50e9, True), (1e9, False)])
def test_a_hit_is_loaded_where_that_is_faster(bytes_per_s, loads):
    story = Story(None, chunk_bytes=36 << 20, load_cost=cost(bytes_per_s))
    chunks = tuple(range(32))
    story.store("r", chunks)
    said = story.look_up("s", chunks)
    wanted = Load(request="s", tier=0, chunks=chunks)
    refused = Refuse(request="s", tier=0, chunks=chunks, reason="recompute")
    assert said == (Matched(request="s", hits=(32,)), wanted if loads else refused)


def test_a_full_queue_makes_computing_faster():
    story = Story(None, chunk_bytes=36 << 20, load_cost=cost(50e9))
    chunks = tuple(range(8))
    story.store("r", chunks)
    assert any(isinstance(decision, Load) for decision in story.look_up("s", chunks))
    assert story.look_up("t", chunks, queued_bytes=10**10)[1:] == (
        Refuse(request="t", tier=0, chunks=chunks, reason="recompute"),
    )


def test_a_prompt_that_is_held_whole_still_takes_a_step():
    story = Story(None, chunk_bytes=36 << 20, load_cost=cost(50e9))
    story.store("r", (A,))
    refused = Refuse(request="s", tier=0, chunks=(A,), reason="recompute")
    assert story.look_up("s", (A,))[1] == refused, "computing a chunk takes 9.0 ms, loading it and a step 9.3 ms"


def test_cleared_chunks_are_not_found_and_go_when_nobody_reads_them():
    story = Story()
    story.store("r", (A, B))
    story.look_up("reads", (A,))
    story.look_up("writes", (C,))
    story.ask("writes", (C,))
    assert story.tell(Cleared) == (Evict(tier=0, chunks=(B,), reason="cleared"),)
    assert story.hits((A, B)) == (0,)
    assert story.commit("writes", (C,)) == (Refuse(request="writes", tier=0, chunks=(C,), reason="cleared"),)
    story.loaded("reads", (A,))
    assert story.end("reads") == (Evict(tier=0, chunks=(A,), reason="cleared"),)
    assert story.core.tiers[0].used == 0


def test_a_tier_whose_memory_is_gone_leaves_the_others_as_they_are():
    story = Story(10, 10)
    story.store("r", (A, B))
    story.commit("r", (A, B), tier=1)
    story.tell(Pinned, chunks=(A,))
    story.store("s", (C,))  # on its way down
    story.look_up("writes", (D,))
    story.ask("writes", (D,))
    assert story.tell(TierCleared, tier=0) == (Evict(tier=0, chunks=(A, B), reason="cleared"),)
    assert story.hits((A, B)) == (0, 2)
    assert story.commit("s", (C,), tier=1) == (Evict(tier=0, chunks=(C,), reason="cleared"),), "its copy has read it"
    assert story.hits((C,)) == (0, 1)
    assert story.commit("writes", (D,)) == (Refuse(request="writes", tier=0, chunks=(D,), reason="cleared"),)
    assert story.core.tiers[0].used == 0
    assert not story.core.tiers[0].kept
    assert story.core.tiers[1].used == 3


def test_a_fetch_into_a_tier_whose_memory_is_gone_leaves_its_source():
    story = Story(1, 10)
    story.store("r", (A,))
    story.commit("r", (A,), tier=1)
    story.store("s", (B,))
    story.commit("s", (B,), tier=1)
    assert Load(request="t", tier=1, chunks=(A,)) in story.look_up("t", (A,))
    story.tell(TierCleared, tier=0)
    ended = story.tell(StoreAborted, request="t", tier=0, chunks=(A,))
    assert ended == (Refuse(request="t", tier=0, chunks=(A,), reason="cleared"),)
    story.end("t")
    assert story.core.tiers[0].used == 0
    assert story.hits((A, B)) == (0, 2)


def test_what_the_operator_pins_stays():
    story = Story(2)
    story.store("r", (A, B))
    story.tell(Pinned, chunks=(A, D))
    story.store("s", (C, D))
    assert story.hits((A,)) == (1,)
    story.tell(Unpinned, chunks=(A,))
    story.store("t", (B, D))
    assert story.hits((A,)) == (0,)


def test_a_resumed_request_notes_no_use():
    story = Story(2)
    story.store("r", (A,))
    story.store("s", (B,))
    story.hits((A,))  # a resumed lookup: A stays the older one
    story.store("t", (C,))
    assert (story.hits((A,)), story.hits((B,))) == ((0,), (1,))


def test_lookups_of_unknown_instances_are_errors_and_change_nothing():
    story = Story()
    with pytest.raises(UnknownInstanceError, match="'nobody' is not registered"):
        story.tell(LookedUp, request="r", instance="nobody", chunks=(A,))
    assert story.look_up("r", (A,)) == (Matched(request="r", hits=(0,)),)
    with pytest.raises(ValueError, match="is registered with chunks of 0 bytes"):
        story.tell(InstanceRegistered, instance="i", chunk_pages=3)


def test_replay_yields_each_event_with_its_decisions():
    story, events = Story(), []
    core = Core(story.core.config)
    handle = story.core.handle
    story.core.handle = lambda event: (events.append(event), handle(event))[1]
    expected = story.store("r", ABC)
    events.insert(0, InstanceRegistered(now_ns=0, instance="i", chunk_pages=1))
    assert [d for _, decisions in replay(core, events) for d in decisions] == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tiers": ()}, "at least one tier"),
        ({"tiers": (TierConfig(name="l1", pages=1),), "ttl_ns": 0}, "TTL"),
        ({"tiers": (TierConfig(name="l1", pages=1),), "quotas": (("a", -1),)}, "negative quota"),
    ],
)
def test_impossible_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        CoreConfig(**config)


def test_tiers_say_what_is_wrong_with_them():
    with pytest.raises(ValueError, match="capacity of -1 pages"):
        TierConfig(name="l1", pages=-1)
    with pytest.raises(ValueError, match="no eviction policy 'best'; there are lru, fifo"):
        TierConfig(name="l1", pages=1, eviction="best")
