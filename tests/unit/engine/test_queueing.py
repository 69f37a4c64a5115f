"""The engine as a single server: what queueing theory says of it."""

import dataclasses

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


def poisson(rate, count, seed=3):
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def ramp(rate, count, seed=3):
    """Arrivals at a rate that rises from nothing to twice `rate`."""
    return np.sort(np.sqrt(np.random.default_rng(seed).uniform(0, 1, count))) * count / rate


@pytest.fixture
def several(make_profile, make_log, make_settings):
    """Serve a request a second on each of four engines."""

    def several(arrivals):
        log = make_log(arrivals, [1000] * len(arrivals), chains=[()] * len(arrivals))
        settings = make_settings(make_profile(linear=1e-3), engines=4, max_num_seqs=1, l0_prefix_caching=False)
        return run(log, settings, baseline=False)

    return several


@pytest.mark.parametrize("count", [120, 196, 240, 1000])
@pytest.mark.parametrize("rate", [5.5, 6.0, 8.0])
def test_engines_that_get_few_requests_each_are_judged_together(several, count, rate):
    load = several(poisson(rate, count)).load
    assert not load.sustained
    assert load.overloaded_engines == (0, 1, 2, 3)
    assert "4 engines serve" in load.sentence()
    assert "grows without bound" in load.sentence()


@pytest.mark.parametrize("count", [120, 196, 1000])
@pytest.mark.parametrize("rate", [1.0, 2.0, 2.8])
def test_engines_that_keep_up_serve_the_load_however_few_requests_each_gets(several, count, rate):
    load = several(poisson(rate, count)).load
    assert load.keeps_up
    assert load.sentence().endswith("offered, and 4 engines serve them")
    assert load.as_dict()["keeps_up"] is True


def test_of_too_few_requests_it_is_not_said_that_they_are_served(several):
    load = several(poisson(6.0, 40)).load
    assert load.sustained
    assert not load.burst
    assert load.served_requests_per_s < 0.9 * load.offered_requests_per_s
    assert not load.keeps_up
    assert "too few requests to tell" in load.sentence()
    assert "serve them" not in load.sentence()


def test_an_engine_with_many_requests_is_judged_alone(make_profile, make_log, make_settings):
    """One engine has all the load, and the others a few requests each, which they serve."""
    arrivals = np.concatenate([poisson(2.0, 400), np.linspace(5, 200, 30)])
    order = np.argsort(arrivals)
    names = np.array(["a"] * 400 + ["b", "c", "d"] * 10, dtype=np.dtypes.StringDType())
    log = make_log(arrivals[order], [1000] * 430, chains=[()] * 430)
    log = dataclasses.replace(log, extra={"instance": names[order]})
    settings = make_settings(
        make_profile(linear=1e-3), engines=4, routing="recorded", max_num_seqs=1, l0_prefix_caching=False
    )
    (overloaded,) = run(log, settings, baseline=False).load.overloaded_engines
    assert overloaded == 0


@pytest.mark.parametrize("behind", [0, 400])
def test_a_busy_minute_at_the_end_is_no_overload(serve, behind):
    rng = np.random.default_rng(0)
    arrivals = [np.sort(rng.uniform(0, 3600, 400)), 3600 + np.sort(rng.uniform(0, 60, 600))]
    if behind:
        arrivals.append(3700 + np.sort(rng.uniform(0, 3600, behind)))
    times = np.concatenate(arrivals)
    result = serve(times - times[0], np.full(len(times), 1000), linear=2e-4)  # five a second
    assert result.load.sustained
    assert result.ttft_s["p95"] == pytest.approx(np.percentile(result.columns["ttft_s"], 95))
    # Half of the requests have no first token when the last one comes: that they can be served at that rate is unseen.
    assert result.load.keeps_up == bool(behind)
    assert ("too many of them at the end" in result.load.sentence()) != bool(behind)


@pytest.mark.parametrize("count", [1000, 4000])
@pytest.mark.parametrize("arrivals", [lambda n: poisson(1.2, n), lambda n: poisson(3.0, n), lambda n: ramp(1.3, n)])
def test_a_steady_and_a_growing_overload_are_refused(serve, arrivals, count):
    result = serve(arrivals(count), np.full(count, 1000), linear=1e-3)  # one a second
    assert not result.load.sustained
    assert result.load.overloaded_engines == (0,)
    assert set(result.ttft_s.values()) == {None}


@pytest.mark.parametrize("rate", [0.75, 0.85, 1.0])
def test_a_load_that_grows_beyond_what_can_be_served_is_never_called_served(serve, rate):
    load = serve(ramp(rate, 2000), np.full(2000, 1000), linear=1e-3).load
    assert not load.keeps_up
    assert "serves them" not in load.sentence()


def test_handling_is_served_beside_the_queue(make_profile, make_log, make_settings):
    log = make_log([0, 0], [1000, 1000])
    settings = make_settings(make_profile(linear=1e-3, handling=0.25), max_num_seqs=1)
    columns = run(log, settings).columns
    np.testing.assert_allclose(columns["ttft_s"], [1.25, 2.25])
    np.testing.assert_allclose(columns["handling_s"], [0.25, 0.25])
