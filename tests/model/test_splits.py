"""However a request's stores are split over engine steps, the end state is the same."""

from hypothesis import given, settings
from hypothesis import strategies as st
from machine import PATHS, chain

from kvcore.policy import (
    POLICIES,
    Core,
    CoreConfig,
    InstanceRegistered,
    LoadDone,
    LookedUp,
    Place,
    RequestEnded,
    RoomAsked,
    StoreCommitted,
    TierConfig,
)
from kvcore.policy.snapshot import dump

requests = st.lists(
    st.tuples(st.sampled_from(PATHS), st.lists(st.integers(1, 3), max_size=4), st.booleans()), min_size=1, max_size=40
)


def serve(core, number, chunks, cuts, late):
    """Ask for room in pieces of the sizes `cuts`; commit each at once, or all of them `late`."""
    name = f"r{number}"
    found = core.handle(LookedUp(now_ns=number, request=name, instance="i", chunks=chunks, computed_chunks=len(chunks)))
    rest = chunks[found[0].hits[0] :]
    placed = []
    for size in [*cuts, len(rest)]:
        piece, rest = rest[:size], rest[size:]
        if not piece:
            continue
        for decision in core.handle(RoomAsked(now_ns=number, request=name, chunks=piece)):
            if isinstance(decision, Place):
                placed.append(decision)
                if not late:
                    commit(core, number, placed.pop())
    for place in reversed(placed):
        commit(core, number, place)
    core.handle(RequestEnded(now_ns=number, request=name))
    core.handle(LoadDone(now_ns=number, request=name, tier=0, chunks=()))


def commit(core, number, place):
    for chunk in place.chunks:
        core.handle(StoreCommitted(now_ns=number, request=place.request, tier=0, chunks=(chunk,)))


@settings(max_examples=400, deadline=None)
@given(requests=requests, policy=st.sampled_from(POLICIES), pages=st.sampled_from([1, 2, 3, 5, 8, 12, None]))
def test_splits_leave_one_state(requests, policy, pages):
    whole, split = (Core(CoreConfig(tiers=(TierConfig(name="l1", pages=pages, eviction=policy),))) for _ in range(2))
    for core in (whole, split):
        core.handle(InstanceRegistered(now_ns=0, instance="i", chunk_pages=1))
    for number, (path, cuts, late) in enumerate(requests):
        chunks = chain("m", path)
        serve(whole, number, chunks, [], late=False)
        serve(split, number, chunks, cuts, late)
        assert dump(split)["tiers"][0]["policy"] == dump(whole)["tiers"][0]["policy"]
        assert split.tiers[0].resident.keys() == whole.tiers[0].resident.keys()
        split.check()
