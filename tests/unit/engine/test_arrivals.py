"""Recorded times, and those of logs that count in steps of seconds."""

from dataclasses import replace

import numpy as np
import pytest

from kvsim.engine.arrivals import arrival_times, coarse_times
from kvsim.engine.settings import RunSettings, SettingsError
from kvsim.profiles import lookup
from kvtraces import Log

RECORDED = RunSettings(profile=lookup("qwen3-8b", "h100"))
SPREAD = replace(RECORDED, arrivals="spread")


def log_at(*times_ms):
    count = len(times_ms)
    return Log(
        block_tokens=None,
        timestamp_ms=np.array(times_ms, np.float64),
        input_tokens=np.full(count, 100, np.int64),
        output_tokens=np.ones(count, np.int64),
        starts=np.zeros(count + 1, np.int64),
        blocks=np.zeros(0, np.int64),
    )


def test_requests_of_one_time_are_spread_over_the_step_in_their_order():
    log = log_at(1000, 1000, 1000, 1000, 3000, 3000, 4000, 6000, 6000)
    assert arrival_times(log, SPREAD).tolist() == [0, 0.25, 0.5, 0.75, 2, 2.5, 3, 5, 5.5]
    assert arrival_times(log, RECORDED).tolist() == [0, 0, 0, 0, 2, 2, 3, 5, 5]
    twice = replace(SPREAD, rate_scale=2.0)
    assert np.array_equal(arrival_times(log, twice), arrival_times(log, SPREAD) / 2)


def test_uneven_steps_change_no_order():
    times = np.cumsum([0, *[3000, 2999, 3001, 3000] * 20])  # as Mooncake's
    found = arrival_times(log_at(*np.repeat(times, 5)), SPREAD)
    assert (np.diff(found) > 0).all()
    assert np.allclose(found[::5], 1e-3 * times)
    assert np.allclose(np.diff(found), 0.6, atol=5e-3)


def test_a_log_whose_times_run_backwards_keeps_its_order_within_a_time():
    assert arrival_times(log_at(2000, 1000, 2000, 1000), SPREAD).tolist() == [1, 0, 1.5, 0.5]


def test_nothing_is_spread_where_no_times_are_equal():
    log = log_at(*np.cumsum(np.arange(50)))
    assert np.array_equal(arrival_times(log, SPREAD), arrival_times(log, RECORDED))


def test_one_time_alone_tells_no_step():
    with pytest.raises(SettingsError, match="which tells no step"):
        arrival_times(log_at(5, 5, 5), SPREAD)
    with pytest.raises(SettingsError, match="rate_per_s goes with arrivals poisson or uniform"):
        replace(SPREAD, rate_per_s=1.0)


def test_coarse_times_are_told():
    coarse = log_at(*np.repeat(np.arange(0, 60_000, 3000), 4))
    told = coarse_times(coarse, RECORDED)
    assert told.startswith("the log's times are in steps of 3 s, and 80 of 80 requests share theirs")
    assert "--arrivals spread" in told
    assert coarse_times(coarse, SPREAD) is None
    for fine in (
        log_at(*np.arange(0, 60_000, 3000)),
        log_at(*np.repeat(np.arange(0, 600, 30), 4)),
        log_at(*np.repeat(np.arange(0, 9000, 3000), 4)),
        log_at(0),
        log_at(),
        log_at(*np.arange(0, 60_000, 3000), 60_000, 60_000),
    ):
        assert coarse_times(fine, RECORDED) is None
