"""When nothing takes time, the engine model finds what the core and the sweep find of requests one after the other."""

import dataclasses

import numpy as np
import pytest

from kvcore.policy import POLICIES
from kvsim.engine.instant import simulate_core
from kvsim.engine.settings import GIB, RunSettings
from kvsim.profiles import Grid, PrefillFit, TransferCurve, lookup
from kvsim.runner import run
from kvsim.sweep import chains, hit_chunks
from kvtraces import Chat, Rag, generate, read

INSTANT = TransferCurve(sizes=(2**60,), bytes_per_s=(1e40,))
ONLINE = [policy for policy in POLICIES if policy != "belady"]


def timeless(chunk_bytes_a_token=1):
    return dataclasses.replace(
        lookup("qwen3-8b", "h100"),
        prefill=None,
        prefill_fit=PrefillFit(floor_s=0, base_s=0, linear_s=1e-15, quadratic_s=0),
        decode=Grid((1, 2), (0, 1), ((1e-15, 1e-15), (1e-15, 1e-15))),
        transfers=dict.fromkeys(("h2d", "d2h", "disk_read", "disk_write"), INSTANT),
        kv_bytes_per_token=chunk_bytes_a_token,
        handling_base_s=0.0,
        handling_token_s=0.0,
        max_model_len=2**40,
        gpu_memory_bytes=2**60,
    )


def settings(chunk_tokens, chunks, policy, **changes):
    defaults = {
        "profile": timeless(),
        "chunk_tokens": chunk_tokens,
        "l1_gb": None if chunks is None else chunks * chunk_tokens / GIB,
        "page_bytes": chunk_tokens,
        "policy": policy,
        "arrivals": "uniform",
        "rate_per_s": 1.0,
        "l0_block_tokens": 1,
    }
    return RunSettings(**(defaults | changes))


def assert_same(log, chosen, chunk_tokens):
    result = run(log, chosen, baseline=False)
    config = chosen.core_config(chunk_tokens)
    core = simulate_core(log, config, chunk_tokens)
    np.testing.assert_array_equal(result.columns["matched_l1"], chunk_tokens * core.hits[:, 0])
    if len(config.tiers) == 1:
        swept = hit_chunks(chains(log, chunk_tokens), chosen.policy, config.tiers[0].pages)
        np.testing.assert_array_equal(result.columns["matched_l1"], chunk_tokens * swept)
    np.testing.assert_array_equal(result.columns["matched_l2"], chunk_tokens * core.hits[:, 1:].sum(axis=1))
    return result


@pytest.mark.parametrize("policy", ONLINE)
@pytest.mark.parametrize("chunks", [1, 40, 500, None])
def test_generated_logs(policy, chunks):
    log = generate(Chat(requests=300, seed=5, block_tokens=16))
    result = assert_same(log, settings(64, chunks, policy), 64)
    if chunks is None:
        assert result.total("matched_l1") > 0


@pytest.mark.parametrize("l0_prefix_caching", [True, False])
def test_what_l0_holds_does_not_change_what_l1_sees(l0_prefix_caching):
    log = generate(Rag(requests=300, seed=6, block_tokens=16))
    assert_same(log, settings(32, 60, "lru", l0_prefix_caching=l0_prefix_caching), 32)


@pytest.mark.parametrize("placement", ["write-through", "write-back"])
@pytest.mark.parametrize("load", ["auto", "layerwise", "sync", "async"])
def test_two_tiers(placement, load):
    log = generate(Chat(requests=300, seed=7, block_tokens=16))
    chosen = settings(64, 30, "lru", l2_gb=200 * 64 / GIB, placement=placement, load=load, l0_prefix_caching=False)
    assert assert_same(log, chosen, 64).total("matched_l2") > 0


def test_many_steps_a_prompt_store_the_same():
    log = generate(Chat(requests=200, seed=8, block_tokens=16))
    assert_same(log, settings(64, 50, "lru", max_num_batched_tokens=100), 64)


@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu"])
def test_the_conversation_log(shared, policy):
    log = read(shared / "traces" / "mooncake_conversation.jsonl")
    assert_same(log, settings(2048, 1000, policy, l0_block_tokens=512), 2048)
