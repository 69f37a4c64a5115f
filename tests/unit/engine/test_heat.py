"""How a GPU slows down that computes without rest: against measured bursts, and in the engine."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.engine.heat import HOT, MEMORY_S, READING, WARM, Heat
from kvsim.runner import run

MEASURED = Path(__file__).parents[3] / "benchmarks" / "results" / "power-h100.json"


def burst_s(sustained, seconds, share, bursts=40):
    """The last of many bursts, each of ten steps, with pauses in between."""
    heat, now = Heat(sustained), 0.0
    for _ in range(bursts):
        began = now
        for _ in range(10):
            took = heat.took(now, seconds / 10, seconds / 10)
            heat.ran(now, now + took, took)
            now += took
        took = now - began
        now += took * (1 - share) / share
    return took


@pytest.mark.parametrize("burst", [8, 25])
def test_bursts_take_what_they_took_on_an_h100(burst):
    rows = {row["share"]: row["seconds"] for row in json.loads(MEASURED.read_text())["shares"] if row["burst"] == burst}
    rested = rows[0.2]
    sustained = rows[1.0] / rested
    assert sustained > 1.06
    for share, seconds in rows.items():
        predicted = burst_s(sustained, burst * rested, share) / burst
        assert predicted == pytest.approx(seconds, rel=0.013), share


def test_an_h100_that_has_rested_is_fast_for_two_thirds_of_a_second():
    tens = np.array(json.loads(MEASURED.read_text())["from_rest_s"])
    ends = tens.cumsum()
    early, late = tens[ends < 0.65].mean(), tens[ends > 0.7].mean()
    assert late / early > 1.05
    heat = Heat(late / early)
    heat.ran(0, 0.65, 0.65)
    assert heat.took(0.65, 1.0, 1.0) < 1 + 0.6 * (late / early - 1)
    heat.ran(0.65, 1.5, 0.85)
    assert heat.took(1.5, 1.0, 1.0) == pytest.approx(late / early)


def test_only_what_computes_takes_longer():
    heat = Heat(1.5)
    heat.ran(0, 100, 100)
    assert heat.took(100, 3.0, 2.0) == pytest.approx(4)
    assert heat.took(100, 3.0, -1.0) == 3
    assert heat.took(100 + 20 * MEMORY_S, 3.0, 2.0) == 3


def test_decoding_alone_does_not_slow_down():
    assert READING < WARM < HOT
    heat = Heat(1.5)
    heat.ran(0, 100, 0)
    assert heat.took(100, 1.0, 1.0) == 1
    heat.ran(100, 100.5, 0.5)
    mixed = heat.took(100.5, 1.0, 1.0)
    assert 1 < mixed < 1.5


def test_one_that_does_not_slow_down_costs_nothing():
    heat = Heat(1.0)
    heat.ran(0, 100, 100)
    assert heat.took(100, 3.0, 2.0) == 3


@given(
    st.floats(1, 2),
    st.lists(st.tuples(st.floats(0, 3), st.floats(1e-4, 2), st.floats(-0.5, 1)), min_size=1, max_size=30),
)
def test_a_step_is_never_faster_than_rested_nor_slower_than_sustained(sustained, steps):
    heat, now = Heat(sustained), 0.0
    for rest, seconds, share in steps:
        now += rest
        took = heat.took(now, seconds, share * seconds)
        assert seconds <= took <= seconds * (1 + (sustained - 1) * max(0, share)) * (1 + 1e-12)
        heat.ran(now, now + took, share * seconds)
        now += took
    assert heat.took(now + 20 * MEMORY_S, 1.0, 1.0) == 1


def test_prompts_without_rest_come_later(make_profile, make_log, make_settings):
    profile = replace(make_profile(linear=2e-4), sustained=1.2)
    settings = make_settings(profile, max_num_batched_tokens=1000)
    together = run(make_log([0.0] * 10, [1000] * 10), settings, baseline=False).columns["ttft_s"]
    heat, now, want = Heat(1.2), 0.0, []
    for _ in range(10):
        step = heat.took(now, 0.2, 0.2 - 2e-4)
        heat.ran(now, now + step, step - 2e-4)
        now += step
        want.append(step)
    steps = np.diff(together, prepend=0)
    assert steps == pytest.approx(want, rel=1e-6)
    assert steps[0] == pytest.approx(0.2)
    assert steps[-1] == pytest.approx(0.24, rel=0.002)
    apart = make_log([float(second) for second in range(10)], [1000] * 10)
    assert run(apart, settings, baseline=False).columns["ttft_s"] == pytest.approx(0.2)


def test_a_rest_counts_whether_or_not_a_step_was_asked_for_before():
    heat = Heat(1.5)
    heat.ran(0, 100, 100)
    heat.ran(120, 120.2, 0.2)
    assert heat.took(120.2, 1.0, 1.0) == 1


def test_decodes_in_between_are_no_rest(make_profile, make_log, make_settings):
    def last_prefill_s(sustained, decodes):
        profile = replace(make_profile(linear=2e-4, decode=1e-3), sustained=sustained)
        times = [0.0] * decodes + [0.5 * number for number in range(1, 9)]
        log = make_log(times, [16] * decodes + [2000] * 8, [6000] * decodes + [1] * 8)
        return run(log, make_settings(profile), baseline=False).columns["ttft_s"][-1]

    resting, decoding = (last_prefill_s(1.5, decodes) / last_prefill_s(1.0, decodes) for decodes in (0, 1))
    assert resting == pytest.approx(1)
    assert decoding > 1.05
