"""Lanes change where a policy looks for victims, and nothing else."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from machine import PATHS, CoreMachine, chain

from kvcore.policy import (
    POLICIES,
    Core,
    CoreConfig,
    Evict,
    InstanceRegistered,
    LookedUp,
    Pinned,
    QuotaSet,
    RequestEnded,
    RoomAsked,
    StoreCommitted,
    TierConfig,
    Unpinned,
    tier,
)
from kvcore.policy.snapshot import dump, restore


class LanesMachine(CoreMachine):
    """Two tenants at their quotas and many pins; the twin's policies have no lanes."""

    @rule(
        salt=st.sampled_from(["", "s", "t"]),
        paths=st.lists(st.sampled_from(PATHS), min_size=1, max_size=6),
    )
    def serve_tenant(self, salt, paths):
        for path in paths:
            self.serve_one("one", chain("m" + salt, path), salt)

    @rule(salt=st.sampled_from(["", "s", "t"]), pages=st.sampled_from([None, 2, 4, 6]))
    def a_quota(self, salt, pages):
        self.send(QuotaSet(now_ns=self.tick(), salt=salt, pages=pages))

    @rule(salt=st.sampled_from(["", "s", "t"]), path=st.sampled_from(PATHS), pins=st.sampled_from([True, True, False]))
    def pins_of_tenants(self, salt, path, pins):
        kind = Pinned if pins else Unpinned
        self.send(kind(now_ns=self.tick(), chunks=chain("m" + salt, path)))

    @precondition(lambda self: self.count % 7 == 0)
    @rule()
    def restart(self):
        self.core = restore(self.core.config, dump(self.core))


@pytest.mark.parametrize("many", [1, 3])
def test_decisions_are_those_without_lanes(monkeypatch, many):
    monkeypatch.setattr(tier, "MANY_KEPT", many)
    machine = LanesMachine.TestCase
    machine.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
    machine().runTest()


def filled(policy, others, *, pages=None):
    """Return a core with `others` chunks of other tenants, then 20 of the tenant "t"."""
    core = Core(CoreConfig(tiers=(TierConfig(name="l1", pages=pages, eviction=policy),)))
    core.handle(InstanceRegistered(now_ns=0, instance="e", chunk_pages=1))
    serve(core, "others", [f"o{i}".encode() for i in range(others)], "")
    serve(core, "own", [f"t{i}".encode() for i in range(20)], "t")
    return core


def serve(core, request, chunks, salt):
    said = core.handle(LookedUp(now_ns=1, request=request, instance="e", chunks=tuple(chunks), salt=salt))
    said = core.handle(RoomAsked(now_ns=1, request=request, chunks=tuple(chunks)))
    core.handle(StoreCommitted(now_ns=1, request=request, tier=0, chunks=tuple(chunks)))
    core.handle(RequestEnded(now_ns=1, request=request))
    return [decision for decision in said if isinstance(decision, Evict)]


class Asked(dict):
    """A tier's resident chunks, that counts how often one is asked whether it is a victim."""

    count = 0

    def get(self, *args):
        self.count += 1
        return super().get(*args)


def asked(core, request, chunks, salt):
    """Return how many chunks were looked at to make room for `chunks`, and who went."""
    top = core.tiers[0]
    top.resident = Asked(top.resident)
    (evict,) = serve(core, request, chunks, salt)
    count = top.resident.count
    top.resident = dict(top.resident)
    return count, evict


LANED = [policy for policy in POLICIES if policy != "sieve"]  # its hand goes past the others itself


@pytest.mark.parametrize("policy", LANED)
def test_a_tenant_at_its_quota_does_not_walk_past_the_others(policy):
    counts = set()
    for others in (50, 2000):
        core = filled(policy, others)
        core.handle(QuotaSet(now_ns=2, salt="t", pages=20))
        serve(core, "first", [b"n0"], "t")  # lays the lanes, once
        count, evict = asked(core, "second", [b"n1"], "t")
        assert evict.reason == "quota"
        assert evict.chunks[0][:1] in (b"t", b"n")
        counts.add(count)
    assert max(counts) < 20


@pytest.mark.parametrize("policy", LANED)
def test_chunks_that_the_operator_keeps_are_not_walked_past(policy, monkeypatch):
    monkeypatch.setattr(tier, "MANY_KEPT", 40)
    counts = set()
    for others in (50, 2000):
        core = filled(policy, others, pages=others + 20)
        core.handle(Pinned(now_ns=2, chunks=tuple(f"o{i}".encode() for i in range(others))))
        serve(core, "first", [b"n0"], "")
        count, evict = asked(core, "second", [b"n1"], "")
        assert evict.reason == "room"
        assert evict.chunks[0][:1] in (b"t", b"n")
        counts.add(count)
        core.handle(Unpinned(now_ns=3, chunks=(f"o{others - 1}".encode(),)))  # the first of the queue again
        (evict,) = serve(core, "third", [b"n2"], "")
        if policy in ("lru", "fifo", "lfu", "gdsf"):
            assert evict.chunks == (f"o{others - 1}".encode(),)
    assert max(counts) < 20
