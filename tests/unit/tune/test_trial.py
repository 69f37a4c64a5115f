"""Settling a sweep by simulation: each figure is that of `run` alone, and the choice follows its rule."""

import dataclasses
import json

import numpy as np
import pytest

import kvsim
from kvsim.engine.settings import SettingsError
from kvsim.errors import UsageError
from kvsim.report import render
from kvsim.report.tune_words import headline, sentences
from kvsim.tuner import Prices, Trial, costs, tune
from kvsim.tuner.run import _warnings
from kvsim.tuner.trial import candidates
from kvtraces import Chat, Poisson, generate

LOG = generate(Chat(requests=500, seed=3, arrivals=Poisson(sessions_per_s=1.5)))
COSTS = costs(model="qwen3-8b", gpu="h100")
BASE = kvsim.RunSettings(profile=COSTS.run_profile, l0_gb=6.0, rate_scale=2.0)


def settled(**changes):
    trial = Trial(**{"base": BASE, "top": 3, **changes})
    return tune(LOG, COSTS, policies=["lru", "arc"], l1_points=5, chunk_sizes=[64, 256], trial=trial)


@pytest.fixture(scope="module")
def result():
    return settled(l2_sizes_gb=(0.0, 20.0), prices=Prices(gpu_hour=2.0, ram_gb_hour=0.01, disk_gb_hour=0.001))


def alone(**changes):
    return kvsim.run(LOG, dataclasses.replace(BASE, **changes), baseline=False)


def test_each_setting_is_what_run_says_of_it(result):
    assert len(result.settled.tried) == 3 * 2
    for one in result.settled.tried:
        run = alone(
            chunk_tokens=one.point.chunk_tokens,
            policy=one.point.policy,
            l1_gb=one.point.l1_size_gb,
            l2_gb=one.settings.l2_gb,
        )
        assert one.ttft_s == run.ttft_s
        assert one.figures["hit_tokens"] == run.summary()["hit_tokens"]
        assert one.ttft_mean_s == pytest.approx(run.columns["ttft_s"].mean(), rel=1e-12)
    (bare,) = result.settled.no_cache
    assert bare.ttft_s == alone(l1_gb=0.0).ttft_s


def test_the_choice_is_the_smallest_that_saves_nearly_the_most(result):
    found = result.settled
    base = found.no_cache[0].ttft_mean_s
    most = base - min(one.ttft_mean_s for one in found.tried)
    assert most > 0.01 * base
    able = [one for one in found.tried if base - one.ttft_mean_s >= 0.95 * most]
    sizes = [(one.settings.l1_gb, one.settings.l2_gb) for one in able]
    assert (found.chosen.settings.l1_gb, found.chosen.settings.l2_gb) == min(sizes)
    assert result.point == found.chosen.point


def test_the_recommendation_has_the_simulated_times_and_the_sweeps_beside(result):
    found, chosen = result.to_dict(), result.settled.chosen
    recommendation = found["recommendation"]
    assert recommendation["ttft_p95_s"] == round(chosen.ttft_s["p95"], 9)
    assert recommendation["no_cache"]["ttft_p95_s"] == round(result.settled.no_cache[0].ttft_s["p95"], 9)
    saved = recommendation["no_cache"]["ttft_mean_s"] - recommendation["ttft_mean_s"]
    assert recommendation["ttft_mean_saved_s"] == pytest.approx(saved, abs=1e-8)
    assert recommendation["unqueued"]["ttft_p95_s"] == round(result.point.cold.ttft.p95_s, 9)
    assert recommendation["token_hit_ratio"] == round(result.point.cold.token_hit_ratio, 6)
    assert found["simulated"]["rate_scale"] == 2
    assert len(found["simulated"]["settings"]) == 6
    json.dumps(found, allow_nan=False)


def test_without_a_trial_nothing_of_it_is_there(result):
    plain = tune(LOG, COSTS, policies=["lru", "arc"], l1_points=5, chunk_sizes=[64, 256]).to_dict()
    found = result.to_dict()
    assert "simulated" not in plain
    assert set(found) == {*plain, "simulated"}
    assert found["sweep"] == plain["sweep"]
    assert set(plain["recommendation"]) <= set(found["recommendation"])


def test_cost_is_the_servers_price_by_the_tokens_served(result):
    hours = float(LOG.timestamp_ms.max() - LOG.timestamp_ms.min()) / 1000 / 3600 / 2
    for one in (*result.settled.no_cache, *result.settled.tried):
        l1, l2 = one.settings.l1_gb, one.settings.l2_gb
        price = (2.0 + 0.01 * l1 + 0.001 * l2) * hours
        assert one.cost == pytest.approx(price / int(LOG.input_tokens.sum()) * 1e6, rel=1e-6)


def test_a_target_takes_the_smallest_that_meets_it():
    everything = settled(top=5).settled
    by_p95 = sorted((one.ttft_s["p95"], one.settings.l1_gb) for one in (*everything.no_cache, *everything.tried))
    for target in (by_p95[0][0], by_p95[-1][0]):
        found = settled(top=5, slo_ttft_p95_s=target)
        meeting = [size for p95, size in by_p95 if p95 <= target]
        assert found.settled.chosen.settings.l1_gb == min(meeting)
        assert found.pays == (min(meeting) > 0)
        assert found.to_dict()["recommendation"]["meets_slo"] is True


def test_sizes_between_those_simulated_are_tried_below_one_that_meets_a_target():
    everything = settled(top=6)
    tried, frontier = everything.settled.tried, everything.choice.frontier
    by_size = {one.point.l1_size_gb: one.ttft_s["p95"] for one in tried if one.point in frontier}
    target = sorted(by_size.values())[len(by_size) // 2]
    found = settled(top=2, slo_ttft_p95_s=target).settled
    wanted = max(by_size)
    while smaller := [size for size in by_size if size < wanted and by_size[size] <= target]:
        wanted = max(smaller)
    assert found.chosen.settings.l1_gb == wanted
    assert [one.settings.l1_gb for one in found.tried] == sorted(one.settings.l1_gb for one in found.tried)


def test_prices_take_the_cheapest_that_meets_the_target():
    free = Prices(gpu_hour=1.0)
    dear = Prices(ram_gb_hour=1.0)
    for prices in (free, dear):
        found = settled(engines=(1, 2), slo_ttft_p95_s=10.0, prices=prices).settled
        good = [one for one in (*found.no_cache, *found.tried) if one.good]
        assert found.chosen.cost == min(one.cost for one in good)
    assert found.chosen.point is None


def test_prices_without_a_target_are_said_to_decide_nothing(result):
    told = "prices decide nothing without a target"
    assert any(told in note for note in result.notes)
    assert not any(told in note for note in settled(slo_ttft_p95_s=10.0, prices=Prices(gpu_hour=1.0)).notes)


def test_a_target_that_nothing_meets_is_said():
    found = settled(slo_ttft_p95_s=1e-6)
    assert found.settled.chosen is None
    recommendation = found.to_dict()["recommendation"]
    assert recommendation["ttft_p95_s"] is None
    assert recommendation["meets_slo"] is False
    assert "within 1e-06 s" in recommendation["reason"]
    told = words(found)
    assert told[0] == "No recommendation: no simulated setting meets the target of 1e-06 s."
    assert "The setting is the sweep's, which knows no queue: chunks of" in " ".join(told)
    assert "own cache is not in" not in " ".join(told)


def test_more_than_the_engines_can_do_is_said():
    base = dataclasses.replace(BASE, rate_scale=200.0)
    found = settled(base=base)
    assert found.settled.chosen is None
    assert "the queue grows" in found.settled.reason
    assert found.to_dict()["recommendation"]["sustained"] is False
    assert all(one.ttft_s["p50"] is None and one.cost is None for one in found.settled.tried)
    told = words(found)
    assert told[0] == "No recommendation: no simulated setting sustains the load."
    assert told[1].startswith("Under 200 times the recorded traffic no simulated setting sustains the load; the best:")
    assert told[2].startswith("The setting is the sweep's, which knows no queue: chunks of")


def test_one_more_engine_helps_where_one_is_not_enough():
    base = dataclasses.replace(BASE, rate_scale=12.0, routing="least-loaded")
    one, several = (settled(base=base, engines=engines, top=2).settled for engines in ((1,), (1, 6)))
    assert not any(tried.load.sustained for tried in one.tried)
    assert several.chosen.settings.engines == 6
    assert len(several.tried) == 2 * 2


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (dataclasses.replace(LOG, timestamp_ms=np.zeros(500)), "is seen to sustain the load; the best: 500 requests"),
        (LOG.head(30), "too few requests to tell"),
    ],
    ids=["at once", "few"],
)
def test_what_does_not_show_that_engines_keep_up_is_neither_priced_nor_recommended(log, told):
    base = dataclasses.replace(BASE, rate_scale=60.0 if len(log) == 30 else 1.0)
    trial = Trial(base=base, top=1, slo_ttft_p95_s=100.0, prices=Prices(gpu_hour=1.0), engines=(1, 2))
    found = tune(log, COSTS, policies=["lru"], l1_sizes_gb=[5.0], chunk_sizes=[64], trial=trial).settled
    assert found.chosen is None
    assert told in found.reason
    for one in (*found.no_cache, *found.tried):
        assert one.load.sustained
        assert one.meets_target
        assert not one.good
        assert one.cost is None
        assert one.to_dict()["load"]["keeps_up"] is False


@pytest.mark.parametrize("target", [None, 100.0])
def test_where_it_is_not_seen_the_load_is_what_is_said_not_the_target(target):
    trial = Trial(base=BASE, top=1, slo_ttft_p95_s=target)
    log = dataclasses.replace(LOG, timestamp_ms=np.zeros(500))
    told = words(tune(log, COSTS, policies=["lru"], l1_sizes_gb=[5.0], chunk_sizes=[64], trial=trial))
    assert told[0] == "No recommendation: no simulated setting is seen to sustain the load."


def words(result):
    return [headline(result), *sentences(result)]


def test_the_report_has_the_simulated_settings(result):
    pytest.importorskip("plotly")
    page = render(result, title="log")
    table = page[page.index("Settled by simulation") :]
    table = table[: table.index("</table>")]
    assert table.count("<tr") == 1 + 1 + 6
    assert table.count('class="marked"') == 1
    assert "on 1 engine." in words(result)[0]


def test_candidates_hold_the_recommended_one_and_span_the_sizes(result):
    plain = tune(LOG, COSTS, policies=["lru", "arc"], l1_points=9, chunk_sizes=[64, 256])
    frontier = plain.choice.frontier
    for top in range(1, len(frontier) + 1):
        picked = candidates(plain.points, plain.choice, top)
        assert len({id(point) for point in picked}) == len(picked) == top
        assert plain.point in picked
        assert set(picked) <= set(frontier)
    more = candidates(plain.points, plain.choice, len(frontier) + 2)
    extra = [point for point in more if point not in frontier]
    assert len(extra) == 2
    assert {point.l1_size_gb for point in extra} == {plain.point.l1_size_gb}


@pytest.mark.parametrize("below_largest", range(5))
def test_candidates_hold_the_largest_size_wherever_the_recommended_one_is(below_largest):
    plain = tune(LOG, COSTS, policies=["lru"], l1_points=9, chunk_sizes=[64])
    frontier = plain.choice.frontier
    here = frontier[-1 - below_largest]
    for top in range(2, len(frontier)):
        picked = candidates(plain.points, dataclasses.replace(plain.choice, point=here), top)
        assert len({id(point) for point in picked}) == len(picked) == top
        assert {frontier[-1], here} <= set(picked)


def test_of_sizes_far_below_l0_there_is_one_where_there_are_more_than_places():
    plain = tune(LOG, COSTS, policies=["lru"], l1_sizes_gb=[0.1 * 2**i for i in range(9)], chunk_sizes=[64])
    assert plain.point.l1_size_gb > 1
    for top, small in ((5, 1), (6, 1), (9, 4)):
        picked = candidates(plain.points, plain.choice, top, 1.0)
        assert len(picked) == top
        assert sum(point.l1_size_gb < 1 for point in picked) == small
    one, shared = (Trial(base=BASE, engines=engines) for engines in ((1,), (1, 2)))
    assert (one.least_gb, shared.least_gb) == (pytest.approx(6.0 / 8, rel=1e-3), 0)


def test_workers_change_nothing():
    two, one = (settled(top=2, workers=workers).to_dict()["simulated"] for workers in (2, 1))
    assert two == one


def test_what_cannot_be_tried_is_refused():
    for changes, word in (
        ({"top": 0}, "at least 1"),
        ({"workers": 0}, "at least 1"),
        ({"engines": ()}, "empty"),
        ({"l2_sizes_gb": (-1.0,)}, "not negative"),
        ({"slo_ttft_p95_s": 0.0}, "--slo-ttft-p95 0"),
    ):
        with pytest.raises(UsageError, match=word):
            Trial(**{"base": BASE, **changes})
    with pytest.raises(UsageError, match="--price-gpu-hour -1"):
        Prices(gpu_hour=-1)
    with pytest.raises(SettingsError, match="engines is 0"):
        settled(engines=(0,))


def test_a_warning_that_differs_in_its_numbers_alone_is_told_once(result):
    words = "prefill of up to {} tokens was asked for, measured are 1 to 32,768: extrapolated"
    tried = [
        dataclasses.replace(one, figures={**one.figures, "warnings": [words.format(count), "other"]})
        for one, count in zip(result.settled.tried, ("40,000", "126,195", "9", "50,001", "40,000", "8.5"), strict=True)
    ]
    found = _warnings(dataclasses.replace(result.settled, no_cache=(), tried=tuple(tried)))
    assert found == [words.format("126,195"), "other"]
