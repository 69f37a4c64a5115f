import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.engine.settings import RunSettings, SettingsError
from kvsim.profiles import lookup
from kvsim.runner import run
from kvsim.validation import block_requests, from_others, mean_by_length, redrawn, validate
from kvtraces import Chat, Poisson, generate

PROFILE = lookup("qwen3-8b", "h100")
LOG = generate(Chat(requests=600, seed=21, block_tokens=16, arrivals=Poisson(sessions_per_s=0.8)))
SETTINGS = RunSettings(profile=PROFILE, chunk_tokens=64, l0_gb=6.0, l1_gb=30.0, max_model_len=65_536)


def recorded(result, noise=None, **changes):
    """The log as a server would have recorded the run."""
    columns = result.columns
    ttft = 1e3 * columns["ttft_s"]
    extra = {
        "ttft_ms": ttft if noise is None else ttft * noise,
        "queue_ms": 1e3 * (columns["handling_s"] + columns["queue_s"]),
        **{f"{part}_ms": 1e3 * columns[f"{part}_s"] for part in ("load", "prefill")},
        **{name: columns[name].astype(np.float64) for name in ("l0_tokens", "matched_l1", "loaded_tokens")},
    }
    return dataclasses.replace(LOG, extra={**LOG.extra, **extra, **changes})


@pytest.fixture(scope="module")
def truth():
    return run(LOG, SETTINGS, baseline=False)


def test_a_simulation_validates_itself(truth):
    found = validate(recorded(truth), SETTINGS)
    assert set(found.hits) == {"l0", "l1", "loaded"}
    for hits in found.hits.values():
        assert (hits.error, hits.equal_requests, hits.requests) == (0, 1, 600)
        assert hits.recorded > 0
    for quantile in found.ttft.values():
        assert quantile.error == pytest.approx(0, abs=1e-9)
        assert quantile.low == pytest.approx(0, abs=1e-9)
        assert quantile.high == pytest.approx(0, abs=1e-9)
    assert found.mean_absolute_error_s == pytest.approx(0, abs=1e-9)
    assert max(part.mean_absolute_error_s for part in found.parts.values()) == pytest.approx(0, abs=1e-9)
    assert found.beats_baseline
    assert found.baseline_mean_absolute_error_s > 1e-3
    assert found.compared == found.requests == 600
    json.dumps(found.as_dict())


def test_noise_is_found_with_its_size(truth):
    noise = np.random.default_rng(5).lognormal(np.log(1.25), 0.02, 600)
    found = validate(recorded(truth, noise), SETTINGS)
    for quantile in (found.ttft["p50"], found.ttft["p95"]):
        assert quantile.error == pytest.approx(1 / 1.25 - 1, abs=0.06)
        assert quantile.low < quantile.error < quantile.high
        assert quantile.high - quantile.low < 0.2
    assert found.median_relative_error == pytest.approx(0.2, abs=0.04)
    np.testing.assert_array_less(found.cdf["predicted_s"][1:-1], found.cdf["recorded_s"][1:-1])


def test_the_part_that_is_wrong_is_named(truth):
    slower = 1e3 * (truth.columns["prefill_s"] + 0.5)
    ttft = 1e3 * truth.columns["ttft_s"] + 500
    found = validate(recorded(truth, prefill_ms=slower, ttft_ms=ttft), SETTINGS)
    assert found.parts["prefill"].share == pytest.approx(1)
    assert found.parts["prefill"].mean_absolute_error_s == pytest.approx(0.5)
    assert {group.why for group in found.groups} == {"prefill"}
    assert {worst.why for worst in found.worst} == {"prefill"}
    assert abs(found.groups[0].error) >= abs(found.groups[-1].error)


def test_another_setting_is_told_apart(truth):
    other = dataclasses.replace(SETTINGS, l1_gb=0.5)
    found = validate(recorded(truth), other)
    assert found.hits["l1"].error < -0.1
    assert found.hits["l1"].equal_requests < 1
    assert found.mean_absolute_error_s > 0


def test_times_taken_inside_the_engine_are_without_the_handling(truth):
    columns = truth.columns
    inside = recorded(
        truth, ttft_ms=1e3 * (columns["ttft_s"] - columns["handling_s"]), queue_ms=1e3 * columns["queue_s"]
    )
    found = validate(inside, SETTINGS, handling=False)
    assert found.mean_absolute_error_s == pytest.approx(0, abs=1e-9)
    assert found.parts["queue"].mean_absolute_error_s == pytest.approx(0, abs=1e-9)
    assert validate(inside, SETTINGS).mean_absolute_error_s > 1e-3


@given(st.integers(2, 60), st.integers(0, 2**32))
def test_the_baseline_is_fitted_on_other_requests_only(count, seed):
    rng = np.random.default_rng(seed)
    tokens, ttft = rng.integers(1, 5000, count), rng.uniform(0.01, 1, count)
    before = from_others(tokens, ttft)
    np.testing.assert_allclose(before[1::2], mean_by_length(tokens[::2], ttft[::2], tokens[1::2]))
    np.testing.assert_allclose(before[::2], mean_by_length(tokens[1::2], ttft[1::2], tokens[::2]))
    row = int(rng.integers(count))
    ttft[row] *= 3
    assert from_others(tokens, ttft)[row] == before[row]


def test_mean_by_length_is_the_mean_of_the_bin():
    fit = np.repeat([100, 200], 50)
    ttft = np.where(fit == 100, 1.0, 3.0) + np.tile([-0.5, 0.5], 50)
    np.testing.assert_allclose(mean_by_length(fit, ttft, np.array([100, 150, 200, 5000])), [1, 1, 3, 3])


def test_rows_without_ttft_are_simulated_but_not_compared(truth):
    ttft = 1e3 * truth.columns["ttft_s"]
    ttft[::3] = np.nan
    found = validate(recorded(truth, ttft_ms=ttft), SETTINGS)
    assert (found.compared, found.requests) == (400, 600)
    assert found.mean_absolute_error_s == pytest.approx(0, abs=1e-9)


def test_a_log_with_nothing_recorded_is_refused(truth):
    with pytest.raises(SettingsError, match="ttft_ms"):
        validate(LOG, SETTINGS)
    with pytest.raises(SettingsError, match="at least"):
        validate(recorded(truth, ttft_ms=np.full(600, np.nan)), SETTINGS)


def test_hits_of_requests_that_the_simulation_refuses_are_not_compared(truth):
    log, settings = recorded(truth), dataclasses.replace(SETTINGS, max_model_len=2_500)
    found = validate(log, settings)
    served = ~found.result.columns["refused"].astype(bool)
    assert 100 < served.sum() < 500
    for name, column in (("l0", "l0_tokens"), ("l1", "matched_l1"), ("loaded", "loaded_tokens")):
        hits, there, then = found.hits[name], found.result.columns[column][served], log.extra[column][served]
        assert (hits.requests, hits.predicted, hits.recorded) == (served.sum(), there.sum(), then.sum())
        assert hits.equal_requests == np.mean(there == then)
    only_refused = np.where(served, np.nan, 64.0)
    assert "l1" not in validate(recorded(truth, matched_l1=only_refused), settings).hits


@given(st.integers(80, 3000), st.integers(0, 2**32))
def test_requests_are_drawn_again_in_blocks_of_neighbours(count, seed):
    rows = redrawn(count, np.random.default_rng(seed))
    block = block_requests(count)
    assert len(rows) == count
    assert set(np.flatnonzero(np.diff(rows) % count != 1) % block) <= {block - 1}
    np.testing.assert_array_equal(rows, redrawn(count, np.random.default_rng(seed)))


def test_errors_that_neighbours_share_make_the_interval_wider(truth):
    """What is off for 100 requests in a row is not a hundred findings."""
    rng = np.random.default_rng(3)
    noise = np.repeat(rng.lognormal(0, 0.3, 6), 100)
    together, apart = (validate(recorded(truth, one), SETTINGS).ttft["p50"] for one in (noise, rng.permutation(noise)))
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
