"""The engine as a single server: what queueing theory says of it."""

import numpy as np
import pytest

from kvsim.runner import run


def lindley(arrivals: np.ndarray, services: np.ndarray) -> np.ndarray:
    waits = np.zeros(len(arrivals))
    for i in range(1, len(arrivals)):
        waits[i] = max(0.0, waits[i - 1] + services[i - 1] - (arrivals[i] - arrivals[i - 1]))
    return waits


@pytest.fixture
def serve(make_profile, make_log, make_settings):
    def serve(arrivals, tokens, outputs=1, **profile):
        log = make_log(arrivals, tokens, outputs, chains=[()] * len(tokens))
        settings = make_settings(make_profile(**profile), max_num_seqs=1, l0_prefix_caching=False)
        return run(log, settings, baseline=False)

    return serve


def test_a_single_queue_follows_lindleys_recursion(serve):
    rng = np.random.default_rng(7)
    arrivals = np.cumsum(rng.exponential(1.0, 5_000)) - 1
    arrivals -= arrivals[0]
    tokens = rng.integers(1, 160_000, 5_000)
    result = serve(arrivals, tokens, linear=1e-5)
    np.testing.assert_allclose(result.columns["queue_s"], lindley(arrivals, 1e-5 * tokens), atol=1e-9, rtol=0)
    np.testing.assert_allclose(result.columns["prefill_s"], 1e-5 * tokens, atol=1e-9, rtol=0)
    assert result.load.sustained


def test_decode_is_part_of_the_service(serve):
    rng = np.random.default_rng(8)
    arrivals = np.sort(rng.uniform(0, 2_000, 1_000))
    arrivals -= arrivals[0]
    tokens, outputs = rng.integers(1, 60_000, 1_000), rng.integers(1, 50, 1_000)
    result = serve(arrivals, tokens, outputs, linear=1e-5, decode=0.02)
    services = 1e-5 * tokens + 0.02 * (outputs - 1)
    np.testing.assert_allclose(result.columns["queue_s"], lindley(arrivals, services), atol=1e-9, rtol=0)
    took = result.columns["finished_s"] - arrivals - result.columns["queue_s"]
    np.testing.assert_allclose(took, services, atol=1e-9, rtol=0)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_m_d_1(serve, load):
    rng = np.random.default_rng(11)
    arrivals = np.cumsum(rng.exponential(1.0, 30_000))
    result = serve(arrivals, np.full(30_000, 1000), linear=load / 1000)
    assert np.mean(result.columns["queue_s"]) == pytest.approx(load * load / (2 * (1 - load)), rel=0.06)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_m_m_1(serve, load):
    rng = np.random.default_rng(12)
    arrivals = np.cumsum(rng.exponential(1.0, 30_000))
    tokens = np.maximum(1, np.rint(rng.exponential(1e6, 30_000))).astype(np.int64)
    result = serve(arrivals, tokens, linear=load * 1e-6)
    waits = result.columns["queue_s"]
    assert np.mean(waits) == pytest.approx(load * load / (1 - load), rel=0.1)
    assert np.mean(waits > 1e-9) == pytest.approx(load, rel=0.05)  # who waits at all: the server is busy


def test_more_than_it_can_serve_gives_no_ttft_but_the_figures(serve):
    rng = np.random.default_rng(13)
    arrivals = np.cumsum(rng.exponential(1.0, 4_000))
    result = serve(arrivals, np.full(4_000, 1000), linear=2 / 1000)
    assert not result.load.sustained
    assert set(result.ttft_s.values()) == {None}
    assert result.load.offered_requests_per_s == pytest.approx(1.0, rel=0.1)
    assert result.load.served_requests_per_s == pytest.approx(0.5, rel=0.02)
    assert "grows without bound" in result.summary()["load"]["says"]


def test_a_short_burst_is_not_an_overload(serve):
    result = serve(np.zeros(500), np.full(500, 1000), linear=1e-3)
    assert result.load.sustained
    assert result.ttft_s["p50"] == pytest.approx(250.5)
    says = result.load.sentence()
    assert says == "500 requests (500,000 prompt tokens) at once: a burst, which does not say what rate can be served"


def test_requests_of_several_lengths_at_once_are_a_burst_too(serve):
    result = serve(np.zeros(500), np.arange(500) + 1, linear=1e-3, handling=1e-3)
    assert result.load.sustained
    assert "a burst" in result.load.sentence()


def test_only_what_was_served_while_requests_came_is_called_served(serve):
    fast, slow = (serve(np.linspace(0, 1, 40), np.full(40, 1000), linear=each) for each in (1e-6, 1e-3))
    assert "one engine serves them" in fast.load.sentence()
    assert "40 requests (40,000 prompt tokens) within 1 s: a burst" in slow.load.sentence()
    alone = serve(np.zeros(1), np.full(1, 1000), linear=1e-3)
    assert "1 request (1,000 prompt tokens) and no other: a burst" in alone.load.sentence()


def test_handling_is_served_beside_the_queue(make_profile, make_log, make_settings):
    log = make_log([0, 0], [1000, 1000])
    settings = make_settings(make_profile(linear=1e-3, handling=0.25), max_num_seqs=1)
    columns = run(log, settings).columns
    np.testing.assert_allclose(columns["ttft_s"], [1.25, 2.25])
    np.testing.assert_allclose(columns["handling_s"], [0.25, 0.25])
