"""The sweep against an instant cache driven request by request by the Python policies."""

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_belady import belady_hits

from kvcore.policy.eviction import OFFLINE, POLICIES, make_policy
from kvsim.sweep import Chains, chains, hit_chunks, lru_curve, point, sweep
from kvtraces import Log

BLOCK = 16
ALL = (*POLICIES, *OFFLINE)

Requests = list[list[int]]
"""The blocks of each request."""


def make_log(requests: Requests) -> Log:
    n = len(requests)
    lengths = np.array([len(blocks) for blocks in requests], np.int64)
    return Log(
        block_tokens=BLOCK,
        timestamp_ms=np.arange(n, dtype=np.float64),
        input_tokens=lengths * BLOCK + np.arange(n) % BLOCK,  # a partial block now and then
        output_tokens=np.ones(n, np.int64),
        starts=np.concatenate(([0], lengths.cumsum())),
        blocks=np.array([block for blocks in requests for block in blocks], np.int64),
    )


def driven_hits(chunks: Requests, policy: str, capacity: int | None) -> list[int]:
    """What the golden numbers' `spec` says, word for word, with a policy of the core to choose the victims."""
    if policy == "belady":
        return belady_hits(chunks, capacity)
    order = make_policy(policy, capacity)
    resident: set[int] = set()
    found = []
    for chain in chunks:
        present = [chunk in resident for chunk in chain]
        found.append((*present, False).index(False))
        pinned = [chunk for chunk in chain if chunk in resident]
        missing = [chunk for chunk in chain if chunk not in resident]
        if capacity is not None:
            missing = missing[: capacity - len(pinned)]
            over = len(resident) + len(missing) - capacity
            victims = order.victims(over, lambda chunk: chunk not in pinned) if over > 0 else []  # noqa: B023 - called here
            assert victims is not None
            resident -= set(victims)
        order.insert(reversed(missing), 1)
        resident |= set(missing)
        order.touch(reversed(pinned))
    return found


def coarse(requests: Requests, factor: int) -> Requests:
    return [blocks[factor - 1 :: factor] for blocks in requests]


@st.composite
def trees(draw: st.DrawFn) -> Requests:
    """Each request takes up to so many blocks of an earlier one and goes on with blocks of its own."""
    names = draw(st.sampled_from([1, 7, -(2**61) // 97, 2**62 // 101]))  # close together, or spread over 64 bits
    steps = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9), st.integers(0, 7)), max_size=30))
    requests: Requests = []
    fresh = 0
    for back, kept, added in steps:
        prefix = requests[-1 - back][:kept] if back < len(requests) else []
        requests.append([*prefix, *(names * (fresh + i) for i in range(added))])
        fresh += added
    return requests


def long_tree(rng: random.Random, requests: int) -> Requests:
    """Chats that grow or branch, system prompts that all share, and an interest that moves on."""
    found: Requests = []
    fresh = 0
    for number in range(requests):
        base: list[int] = []
        if found and rng.random() < 0.7:
            base = found[max(0, number - 1 - int(rng.expovariate(0.1)))]
            base = base[: rng.choice([len(base), len(base), rng.randint(0, len(base)), 3])]
        added = rng.choice([0, 1, 2, 5, 11])
        found.append(base[:40] + list(range(fresh, fresh + added)))
        fresh += added
    return found


def check(requests: Requests, policy: str, factor: int, capacity: int | None) -> None:
    each = chains(make_log(requests), factor * BLOCK)
    assert hit_chunks(each, policy, capacity).tolist() == driven_hits(coarse(requests, factor), policy, capacity)


@pytest.mark.parametrize("policy", ALL)
@settings(max_examples=120, deadline=None)
@given(requests=trees(), factor=st.integers(1, 3), capacity=st.one_of(st.integers(0, 25), st.none()))
def test_equals_driven(policy: str, requests: Requests, factor: int, capacity: int | None) -> None:
    check(requests, policy, factor, capacity)


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("capacity", [1, 2, 5, 11, 20, 35, 60, 110, 230, None])
def test_equals_driven_long(policy: str, capacity: int | None) -> None:
    """Far into a run; with 20 chunks and fewer some requests do not fit."""
    for seed in range(3):
        requests = long_tree(random.Random(seed), 400)
        assert max(len(blocks) for blocks in requests) > 20
        check(requests, policy, 1, capacity)
        check(requests, policy, 2, capacity)


@pytest.mark.parametrize("policy", ALL)
@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(0, 12), max_size=6, unique=True), max_size=40),
    capacity=st.one_of(st.integers(0, 14), st.none()),
)
def test_equals_driven_without_prefixes(policy: str, requests: Requests, capacity: int | None) -> None:
    """Logs whose blocks follow different blocks: not what a block's name says, but the numbers must be right."""
    check(requests, policy, 1, capacity)


def test_lru_on_a_log_that_is_no_tree() -> None:
    log = make_log([[1, 2, 3], [4, 2, 3], [1, 2, 3]])
    each = chains(log, BLOCK)
    assert not each.paths.is_tree
    assert [p.hit_chunks for p in sweep(log, chunk_tokens=[BLOCK], capacities=[3, 4, None], policies=["lru"])] == [
        sum(driven_hits([[1, 2, 3], [4, 2, 3], [1, 2, 3]], "lru", capacity)) for capacity in (3, 4, None)
    ]
    with pytest.raises(ValueError, match="a block of the log follows different blocks"):
        lru_curve(each)


@settings(max_examples=100, deadline=None)
@given(requests=trees(), factors=st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True))
def test_chains(requests: Requests, factors: list[int]) -> None:
    """Chunk sizes made from common nodes are what each would be by itself."""
    log = make_log(requests)
    points = sweep(log, chunk_tokens=[f * BLOCK for f in factors], capacities=[None, 0], policies=["lru", "fifo"])
    for factor, first in zip(factors, points[::4], strict=True):
        chunks = coarse(requests, factor)
        each = chains(log, factor * BLOCK)
        assert each.paths.is_tree
        assert each.accesses == first.chunk_accesses == sum(map(len, chunks))
        assert each.unique == len({chunk for chain in chunks for chunk in chain})
        assert each.requests == first.requests == len(requests)
        assert first.input_tokens == log.input_tokens.sum()
        assert first.hit_chunks == sum(driven_hits(chunks, "lru", None))
    assert [p.hit_chunks for p in points[1::2]] == [0] * 2 * len(factors)
    assert [p.hit_chunks for p in points[0::4]] == [p.hit_chunks for p in points[2::4]]


@settings(max_examples=60, deadline=None)
@given(requests=trees())
def test_lru_curve(requests: Requests) -> None:
    """The curve, its points and the single requests agree; a larger cache never hits less."""
    log = make_log(requests)
    each = chains(log, BLOCK)
    curve = lru_curve(each).tolist()
    assert len(curve) == each.unique + 1
    assert curve == sorted(curve)
    points = sweep(log, chunk_tokens=[BLOCK], capacities=range(len(curve)), policies=["lru"])
    assert [p.hit_chunks for p in points] == curve
    assert [int(hit_chunks(each, "lru", capacity).sum()) for capacity in range(len(curve))] == curve


def test_lru_over_many_requests() -> None:
    """Enough requests for all levels of the sums over later requests."""
    rng = random.Random(5)
    roots = [[10**6 * root + place for place in range(rng.randint(1, 3))] for root in range(3000)]
    requests = [roots[int(len(roots) * rng.random() ** 2)] + [10**9 + i] for i in range(40_000)]
    log = make_log(requests)
    for capacity in (100, 3000, 20_000):
        assert hit_chunks(chains(log, BLOCK), "lru", capacity).tolist() == driven_hits(requests, "lru", capacity)


def test_order_of_points_and_progress() -> None:
    log = make_log(long_tree(random.Random(1), 60))
    seen: list[tuple[int, int]] = []
    points = sweep(
        log,
        chunk_tokens=[32, 16],
        capacities={16: [9, None, 9], 32: [4]},
        policies=["fifo", "lru"],
        threads=3,
        progress=lambda done, of: seen.append((done, of)),
    )
    settings_given = [(p.chunk_tokens, p.policy, p.capacity_chunks) for p in points]
    assert settings_given == [
        *((32, policy, 4) for policy in ("fifo", "lru")),
        *((16, policy, capacity) for policy in ("fifo", "lru") for capacity in (9, None, 9)),
    ]
    assert seen[-1] == (6, 6)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    for p in points:
        assert p == point(chains(log, p.chunk_tokens), p.policy, p.capacity_chunks)
        assert p.hit_tokens == p.hit_chunks * p.chunk_tokens
        assert p.token_hit_ratio == p.hit_tokens / p.input_tokens


@pytest.mark.parametrize("requests", [[], [[]], [[], [1], []]])
def test_logs_with_next_to_nothing(requests: Requests) -> None:
    for policy in ALL:
        for capacity in (0, 1, None):
            check(requests, policy, 1, capacity)
            check(requests, policy, 2, capacity)
    assert lru_curve(chains(make_log(requests), BLOCK)).tolist() == [0] * (1 + sum(map(len, requests)))
    assert point(chains(make_log([]), BLOCK), "lru", None).token_hit_ratio == 0.0


def with_lengths_alone() -> Log:
    none = np.zeros(0, np.int64)
    return Log(
        block_tokens=None,
        timestamp_ms=np.zeros(1),
        input_tokens=np.ones(1, np.int64),
        output_tokens=np.ones(1, np.int64),
        starts=np.zeros(2, np.int64),
        blocks=none,
    )


def test_errors() -> None:
    log = make_log([[1, 2]])
    each: Chains = chains(log, BLOCK)
    with pytest.raises(ValueError, match="no blocks and hence no hit ratio"):
        chains(with_lengths_alone(), BLOCK)
    for size in (0, -16, 24):
        with pytest.raises(ValueError, match=f"chunk size {size} is no multiple of the log's block of 16 tokens"):
            chains(log, size)
    with pytest.raises(ValueError, match=r"unknown policy 'mru'; known are lru, fifo, .*, belady"):
        hit_chunks(each, "mru", 1)
    with pytest.raises(ValueError, match="unknown policy 'mru'"):
        sweep(log, chunk_tokens=[BLOCK], capacities=[1], policies=["lru", "mru"])
    with pytest.raises(ValueError, match="cannot hold -1 chunks"):
        hit_chunks(each, "lru", -1)
    with pytest.raises(ValueError, match="cannot hold -2 chunks"):
        sweep(log, chunk_tokens=[BLOCK], capacities=[1, -2], policies=["lru"])
    with pytest.raises(ValueError, match="request 1 names a block twice"):
        chains(make_log([[1], [2, 3, 2]]), BLOCK)


def test_an_error_in_progress_ends_the_sweep() -> None:
    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    log = make_log([[1, 2], [1, 2]])
    with pytest.raises(KeyboardInterrupt):
        sweep(log, chunk_tokens=[BLOCK], capacities=[1, 2], policies=["fifo"], progress=stop)


@pytest.mark.parametrize("spread", [1, 2**40 + 1, -(2**40) - 1])
def test_names_of_any_kind(spread: int) -> None:
    """Block names may be any 64-bit integers; how they are numbered changes nothing."""
    requests = long_tree(random.Random(3), 3000)
    spread_requests = [[block * spread for block in blocks] for blocks in requests]
    near, far = chains(make_log(requests), BLOCK).paths, chains(make_log(spread_requests), BLOCK).paths
    for one, other in zip(near, far, strict=True):
        np.testing.assert_array_equal(one, other)
    assert near.unique == len({block for blocks in requests for block in blocks})


def test_import_is_light() -> None:
    """Numba is loaded by the first sweep."""
    code = "import sys, kvsim.sweep; sys.exit('numba' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)}).returncode
        == 0
    )


def test_belady_is_above_all() -> None:
    log = make_log(long_tree(random.Random(8), 500))
    for capacity in (5, 30, 150):
        points = sweep(log, chunk_tokens=[BLOCK], capacities=[capacity], policies=ALL)
        best = max(points, key=lambda p: p.hit_chunks)
        assert best.hit_chunks == points[-1].hit_chunks
        assert points[-1].policy == "belady"
