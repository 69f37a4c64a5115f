"""The cut between what is loaded and what is computed, against trying every one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.policy import LoadCost
from kvcore.policy.cost import chunks_worth_loading

# Behind a network, a short prompt: what it takes beyond a step's floor is spared by its first chunks.
NETWORK = LoadCost(
    chunk_tokens=16,
    prefill_floor_ns=17e6,
    prefill_base_ns=12e6,
    prefill_linear_ns=60e3,
    prefill_quadratic_ns=0.5,
    latency_ns=(50e3, 1e6),
    bytes_per_s=(50e9, 10e9),
)


def took(cost, cut, *, tiers, computed, total, chunk_bytes, queued_bytes):
    sizes = tuple(chunk_bytes * tiers[computed:cut].count(tier) for tier in range(len(cost.latency_ns)))
    new, cached = (total - cut) * cost.chunk_tokens, cut * cost.chunk_tokens
    return cost.load_ns(sizes, queued_bytes) + cost.prefill_ns(new, cached)


times = st.floats(0, 1e8)
costs = st.builds(
    LoadCost,
    chunk_tokens=st.sampled_from([1, 16, 256]),
    prefill_floor_ns=times,
    prefill_base_ns=times,
    prefill_linear_ns=st.floats(0, 1e5),
    prefill_quadratic_ns=st.floats(0, 100),
    latency_ns=st.tuples(times, times, times),
    bytes_per_s=st.tuples(*[st.floats(1e8, 1e12)] * 3),
)


@st.composite
def prompts(draw):
    runs = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=6))
    tiers = tuple(tier for tier, count in runs for _ in range(count))
    return {
        "tiers": tiers,
        "computed": draw(st.integers(0, len(tiers))),
        "total": len(tiers) + draw(st.integers(0, 40)),
        "chunk_bytes": draw(st.sampled_from([1 << 12, 1 << 20, 1 << 26])),
        "queued_bytes": draw(st.sampled_from([0, 1 << 30])),
    }


@settings(max_examples=1000, deadline=None)
@given(costs, prompts())
def test_no_other_cut_is_faster(cost, prompt):
    cut = chunks_worth_loading(cost, **prompt)
    assert prompt["computed"] <= cut <= len(prompt["tiers"])
    best = min(took(cost, one, **prompt) for one in range(prompt["computed"], len(prompt["tiers"]) + 1))
    assert took(cost, cut, **prompt) <= best * (1 + 1e-9)


def test_no_more_is_loaded_than_spares_computing():
    prompt = {"tiers": (1,) * 32, "computed": 0, "total": 32, "chunk_bytes": 4 << 20, "queued_bytes": 0}
    cut = chunks_worth_loading(NETWORK, **prompt)
    assert cut == 27, "the rest is computed in a step's floor, with which nothing is spared by loading more"
