"""The rule of choice, on sweeps made by hand."""

import numpy as np
import pytest

from kvsim.errors import UsageError
from kvsim.tuner.grid import (
    check_chunk_sizes,
    check_l1_sizes,
    check_policies,
    default_chunk_sizes,
    spread,
)
from kvsim.tuner.points import Figures, Point, Times, quantiles
from kvsim.tuner.rule import Rule, choose

NO_CACHE_S = 1.0


def point(l1_size_gb, chunk_tokens, policy, saved_s):
    """A setting that saves so many seconds of a mean TTFT of one second."""
    figures = Figures(
        requests=100,
        input_tokens=100_000,
        hit_tokens=int(1000 * saved_s),
        loaded_tokens=0,
        ttft=Times(NO_CACHE_S - saved_s, 0.5, 0.9),
        no_cache=Times(NO_CACHE_S, 0.5, 0.9),
    )
    return Point(
        chunk_tokens=chunk_tokens,
        l1_size_gb=l1_size_gb,
        capacity_chunks=1,
        policy=policy,
        hit_chunks=0,
        cold=figures,
        warm=figures,
        warm_from=50,
        filled=True,
    )


def chosen(points, **rule):
    choice = choose(points, Rule(**rule))
    return choice.pays, choice.point.l1_size_gb, choice.point.chunk_tokens, choice.point.policy


def test_the_smallest_l1_within_five_percent_of_the_best():
    points = [point(gb, 512, "lru", saved) for gb, saved in ((1, 0.2), (2, 0.379), (3, 0.381), (4, 0.39), (5, 0.40))]
    assert chosen(points) == (True, 3, 512, "lru")
    assert chosen(points, within=0.0) == (True, 5, 512, "lru")
    assert chosen(points, within=0.2) == (True, 2, 512, "lru")


def test_another_policy_must_be_better_by_more_than_one_percent():
    assert chosen([point(1, 512, "lru", 0.300), point(1, 512, "arc", 0.3025)]) == (True, 1, 512, "lru")
    assert chosen([point(1, 512, "lru", 0.300), point(1, 512, "arc", 0.3035)]) == (True, 1, 512, "arc")
    assert chosen([point(1, 512, "s3fifo", 0.300), point(1, 512, "fifo", 0.2975)]) == (True, 1, 512, "fifo")


def test_the_largest_chunk_that_is_nearly_as_good():
    points = [point(1, 512, "lru", 0.300), point(1, 1024, "lru", 0.298), point(1, 2048, "lru", 0.296)]
    assert chosen(points) == (True, 1, 1024, "lru")
    assert chosen(points, near=0.0) == (True, 1, 512, "lru")


def test_a_size_counts_if_any_of_its_settings_is_good_enough():
    points = [point(1, 512, "lru", 0.1), point(1, 512, "arc", 0.39), point(2, 512, "lru", 0.40)]
    assert chosen(points) == (True, 1, 512, "arc")


def test_the_frontier_has_one_setting_a_size_in_order():
    points = [point(gb, chunk, "lru", gb / 10) for gb in (3, 1, 2) for chunk in (512, 1024)]
    frontier = choose(points, Rule()).frontier
    assert [(p.l1_size_gb, p.chunk_tokens) for p in frontier] == [(1, 1024), (2, 1024), (3, 1024)]


def test_nothing_is_recommended_that_saves_less_than_one_percent():
    assert not choose([point(1, 512, "lru", 0.0)], Rule()).pays
    assert not choose([point(1, 512, "lru", 0.0099)], Rule()).pays
    assert choose([point(1, 512, "lru", 0.0101)], Rule()).pays
    assert not choose([point(1, 512, "lru", 0.0)], Rule(worth=0.0)).pays


def test_thresholds_are_fractions():
    with pytest.raises(UsageError, match="within 1"):
        Rule(within=1.0)
    with pytest.raises(UsageError, match="near -"):
        Rule(near=-0.1)


def test_default_chunk_sizes():
    assert default_chunk_sizes(512) == [512, 1024, 2048, 4096, 8192, 16384]
    assert default_chunk_sizes(16) == [32 << i for i in range(10)]
    assert default_chunk_sizes(48) == [48 << i for i in range(9)]
    assert default_chunk_sizes(16384) == [16384]
    assert default_chunk_sizes(20_000) == [20_000]
    assert default_chunk_sizes(1) == default_chunk_sizes(16)


def test_spread_is_even_by_ratio_and_ends_at_the_most():
    sizes = spread(10, 1000, 5)
    assert sizes == [10, 32, 100, 317, 1000]
    assert spread(10, 1000, 5, most=500)[-1] == 500
    assert spread(100, 1000, 4, most=16) == [2, 4, 8, 16]
    assert spread(5, 5, 3) == [5]
    assert spread(1, 100, 1) == [100]


def test_settings_that_are_none():
    with pytest.raises(UsageError, match="96 is no multiple of the log's block of 64"):
        check_chunk_sizes([64, 96], 64)
    with pytest.raises(UsageError, match="chunk size 0"):
        check_chunk_sizes([0], 64)
    with pytest.raises(UsageError, match="l1-sizes-gb -1"):
        check_l1_sizes([-1.0])
    with pytest.raises(UsageError, match=r"'mru'; there are lru, fifo"):
        check_policies(["mru"], ["lru", "fifo"])
    with pytest.raises(UsageError, match="belady knows the future"):
        check_policies(["belady"], ["lru", "fifo"])
    assert check_chunk_sizes([128, 64, 128], 64) == [64, 128]


def test_quantiles_are_linear():
    values = np.random.default_rng(3).exponential(size=137)
    assert quantiles(values, (0.5, 0.95)) == pytest.approx(np.quantile(values, [0.5, 0.95]).tolist(), rel=1e-14)
    assert quantiles(np.array([2.5]), (0.5, 0.95)) == [2.5, 2.5]
