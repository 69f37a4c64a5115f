"""From which length on a hit is worth its copy: the fit, the links' rates, and the crossing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.live.breakeven import Link, fitted, links_of, load_cost, worth_from

FLOOR_S = 0.0085
H100 = [(tokens, max(FLOOR_S, 0.004 + 1.9e-5 * tokens + 4.5e-10 * tokens**2)) for tokens in (16, 512, 1024, 2048, 4096)]
CHUNK_BYTES = 28 << 20


@given(
    st.floats(1e-3, 1e-1),
    st.one_of(st.just(0.0), st.floats(1e-6, 1e-3)),
    st.one_of(st.just(0.0), st.floats(1e-10, 1e-7)),
)
def test_the_fit_is_what_the_points_lie_on(base, linear, quadratic):
    points = [(tokens, base + linear * tokens + quadratic * tokens**2) for tokens in (100, 200, 400, 800)]
    a, b, c = fitted(points)
    assert [a + b * tokens + c * tokens**2 for tokens, _ in points] == pytest.approx([s for _, s in points], rel=1e-4)
    assert min(a, b, c) >= 0


@pytest.mark.parametrize(
    "points", [[(100, 0.01), (200, 0.04), (400, 0.16)], [(100, 0.2), (200, 0.1), (400, 0.05)], [(16, 0.5)]]
)
def test_no_cost_falls_with_the_length(points):
    factors = fitted(points)
    assert min(factors) >= 0
    assert max(factors) > 0


def metrics(*, loaded=(), load_s=(0, 0.0), l2_gets=None):
    """A server's report: bytes by model, counts and seconds of loads, and those of reads of L2."""
    histograms = [[["kvcore_load_seconds"], [1.0], [load_s[0], 0], load_s[1]]]
    histograms += [[["kvcore_l2_seconds", "put"], [1.0], [9, 0], 9.0]]
    if l2_gets is not None:
        histograms += [[["kvcore_l2_seconds", "get"], [1.0], [l2_gets[0] - 1, 1], l2_gets[1]]]
    return {"values": [["kvcore_loaded_bytes", *one] for one in loaded], "histograms": histograms}


def test_rates_are_those_of_real_loads():
    found = metrics(loaded=[("a", 3_000), ("b", 1_000)], load_s=(5, 2.0), l2_gets=(10, 0.5))
    assert links_of(found, 100, threads=None) == ((Link(latency_s=0.0, bytes_per_s=2_000.0),), "")
    (_, below), missing = links_of(found, 100, threads=4)
    assert not missing
    assert below.bytes_per_s == pytest.approx(4 * 100 / 0.05)
    assert below.latency_s == pytest.approx(0.05 * 3 / 8)
    alone = links_of(found, 100, threads=1)[0][1]
    assert (alone.latency_s, alone.bytes_per_s) == (0.0, pytest.approx(2_000.0))


def test_what_nothing_was_loaded_from_has_no_rate():
    assert links_of(metrics(), 100, threads=None) == ((), "L1")
    assert links_of(metrics(loaded=[("a", 10)], load_s=(1, 0.1)), 100, threads=2) == ((), "L2")
    assert links_of(metrics(loaded=[("a", 10)]), 100, threads=None) == ((), "L1"), "by a clock that stood still"


def test_a_hit_is_worth_its_copy_where_loading_begins_to_win():
    """L1 at 50 GB/s wins from two chunks on; L2 at 4 GB/s, 10 ms later, where attention has grown enough."""
    links = [Link(latency_s=0.0, bytes_per_s=50e9), Link(latency_s=0.010, bytes_per_s=4e9)]
    cost = load_cost(H100, links, 256)
    assert worth_from(cost, 0, CHUNK_BYTES) == 512
    worth = worth_from(cost, 1, CHUNK_BYTES)
    base, linear, quadratic = fitted(H100[1:])
    assert linear == pytest.approx(1.9e-5)

    def gain(tokens):
        size = tokens // 256 * CHUNK_BYTES
        compute = max(FLOOR_S, base + linear * (tokens + 1) + quadratic * (tokens + 1) ** 2)
        rest = max(FLOOR_S, base + linear + quadratic * (1 + 2 * tokens))
        return compute - (0.010 + size / 4e9 + size / 50e9 + rest)

    assert gain(worth - 256) <= 0 < gain(worth)
    assert worth > 4096


def test_a_link_that_is_too_slow_is_never_worth_it():
    cost = load_cost(H100, [Link(latency_s=0.0, bytes_per_s=1e8)], 256)
    assert worth_from(cost, 0, CHUNK_BYTES) is None
