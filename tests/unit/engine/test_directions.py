"""Which way TTFT moves: everything else equal, each change has to make it worse (or better)."""

import dataclasses

import numpy as np
import pytest

from kvsim.engine.settings import RunSettings
from kvsim.profiles import TransferCurve, lookup
from kvsim.runner import run
from kvtraces import Chat, Poisson, Spread, generate

PROFILE = lookup("qwen3-8b", "h100")
LOG = generate(
    Chat(
        requests=1200,
        seed=9,
        block_tokens=16,
        arrivals=Poisson(sessions_per_s=0.13),
        system_tokens=Spread(median=2000, sigma=0.8, high=8000),
        user_tokens=Spread(median=1500, sigma=0.8, high=8000),
    )
)


def mean_ttft(log=LOG, **changes):
    defaults = {"profile": PROFILE, "chunk_tokens": 64, "l0_gb": 8.0, "l1_gb": 60.0, "max_model_len": 65_536}
    result = run(log, RunSettings(**(defaults | changes)), baseline=False)
    assert result.load.sustained
    return float(np.nanmean(result.columns["ttft_s"]))


@pytest.fixture(scope="module")
def usual():
    return mean_ttft()


def test_longer_outputs(usual):
    longer = dataclasses.replace(LOG, output_tokens=3 * LOG.output_tokens)
    assert mean_ttft(longer) > 1.02 * usual


def test_a_smaller_token_budget(usual):
    assert mean_ttft(max_num_batched_tokens=256) > 1.02 * usual


def test_a_slower_link(usual):
    slow = TransferCurve(sizes=(2**30,), bytes_per_s=(2e9,))
    profile = dataclasses.replace(PROFILE, transfers={**PROFILE.transfers, "h2d": slow})
    assert mean_ttft(profile=profile) > 1.02 * usual


def test_a_smaller_l0():
    small, large = (mean_ttft(l0_gb=size, l1_gb=0.0) for size in (8.0, 40.0))
    assert small > 1.02 * large


def test_a_larger_l1(usual):
    assert mean_ttft(l1_gb=0.0) > 1.02 * usual


def test_more_traffic(usual):
    assert mean_ttft(rate_scale=2.0) > 1.02 * usual


def test_one_more_engine(usual):
    assert mean_ttft(engines=2) < 0.99 * usual


def test_loads_that_overlap_less(usual):
    slow = TransferCurve(sizes=(2**30,), bytes_per_s=(5e9,))
    profile = dataclasses.replace(PROFILE, transfers={**PROFILE.transfers, "h2d": slow})
    assert mean_ttft(profile=profile, load="sync") > 1.005 * mean_ttft(profile=profile, load="layerwise")


def test_a_faster_gpu(usual):
    assert mean_ttft(profile=lookup("qwen3-8b", "h200")) < usual


def test_prefix_aware_routing_finds_more_in_l0():
    def l0(routing):
        chosen = RunSettings(
            profile=PROFILE, chunk_tokens=64, l0_gb=8.0, engines=4, routing=routing, max_model_len=65_536
        )
        return run(LOG, chosen, baseline=False).total("l0_tokens")

    assert l0("prefix-aware") > 1.2 * l0("round-robin")
