import json

import numpy as np
import pytest

from kvcore.policy import CoreConfig, TierConfig
from kvsim.engine.instant import simulate_core
from kvtraces import read


def one_tier(pages, policy="lru"):
    return CoreConfig(tiers=(TierConfig(name="l1", pages=pages, eviction=policy),))


def test_hits_are_the_leading_chunks_seen_before(make_log):
    log = make_log([0, 1, 2], [70, 70, 40], chains=[[1, 2, 3, 4], [1, 2, 9, 10], [1, 2]])
    result = simulate_core(log, one_tier(None), 16)
    assert result.hit_chunks.tolist() == [0, 2, 2]
    assert result.accesses.tolist() == [4, 4, 2]
    assert result.hit_tokens == 64
    assert result.token_hit_ratio == pytest.approx(64 / 180)
    assert simulate_core(log, one_tier(None), 32).hit_chunks.tolist() == [0, 1, 1]


def test_a_chunk_that_is_no_multiple_is_refused(make_log):
    with pytest.raises(ValueError, match="no multiple"):
        simulate_core(make_log([0], [64]), one_tier(None), 24)


def test_two_tiers_count_apart(make_log):
    chains = [[1, 2], [3, 4], [1, 2]]
    config = CoreConfig(tiers=(TierConfig(name="l1", pages=2), TierConfig(name="l2", pages=None)))
    result = simulate_core(make_log([0, 1, 2], [32] * 3, chains=chains), config, 16)
    assert result.hits.tolist() == [[0, 0], [0, 0], [0, 2]]


def test_a_ttl_counts_from_the_logs_own_times(make_log):
    config = CoreConfig(tiers=(TierConfig(name="l1", pages=None),), ttl_ns=1_500_000_000)
    log = make_log([0, 1, 2, 4], [32] * 4, chains=[[1, 2]] * 4)
    assert simulate_core(log, config, 16).hit_chunks.tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize(("policy", "capacity"), [("lru", 1000), ("fifo", 1000), ("lfu", 1000)])
def test_the_core_reproduces_the_golden_rows(shared, policy, capacity):
    rows = json.loads((shared / "golden" / "conversation.json").read_text())["rows"]
    chunk = 2048
    wanted = [row for row in rows if (row["policy"], row["chunk_tokens"]) == (policy, chunk) and row["capacity_chunks"]]
    row = min(wanted, key=lambda row: abs(row["capacity_chunks"] - capacity))
    log = read(shared / "traces" / "mooncake_conversation.jsonl")
    result = simulate_core(log, one_tier(row["capacity_chunks"], policy), chunk)
    assert int(result.hit_chunks.sum()) == row["hit_chunks"]
    assert result.hit_tokens == row["hit_tokens"]
    assert int(result.accesses.sum()) == row["chunk_accesses"]
    assert np.all(result.hit_chunks <= result.accesses)
