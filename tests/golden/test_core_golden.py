"""The core, driven request by request, against exact numbers from an independent program."""

import json

import pytest

from kvcore.policy import CoreConfig, TierConfig
from kvsim.engine.instant import simulate_core
from kvtraces import read

CHUNK = 2048


@pytest.fixture(scope="module")
def log(shared):
    return read(shared / "traces" / "mooncake_conversation.jsonl")


@pytest.fixture(scope="module")
def rows(shared):
    found = json.loads((shared / "golden" / "conversation.json").read_bytes())["rows"]
    return [row for row in found if row["chunk_tokens"] == CHUNK]


@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu"])
def test_every_row(log, rows, policy):
    mine = [row for row in rows if row["policy"] == policy]
    assert len(mine) == 7
    for row in mine:
        tier = TierConfig(name="l1", pages=row["capacity_chunks"], eviction=policy)
        found = simulate_core(log, CoreConfig(tiers=(tier,)), CHUNK)
        got = (int(found.accesses.sum()), int(found.hits.sum()), found.hit_tokens, found.input_tokens)
        assert got == (row["chunk_accesses"], row["hit_chunks"], row["hit_tokens"], row["input_tokens"])
        assert round(found.token_hit_ratio, 6) == row["token_hit_ratio"]
