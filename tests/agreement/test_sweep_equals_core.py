"""The compiled sweep finds, request by request, what the core finds: one policy in two implementations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.policy import POLICIES, CoreConfig, TierConfig
from kvsim.engine.instant import simulate_core
from kvsim.sweep import chains, hit_chunks
from kvtraces import Agent, Chat, Rag, generate

BLOCK = 16
KINDS = {"chat": Chat, "rag": Rag, "agent": Agent}

logs = st.builds(
    lambda kind, seed, requests: generate(KINDS[kind](requests=requests, seed=seed, block_tokens=BLOCK)),
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 2**32 - 1),
    requests=st.integers(1, 60),
)


def agree(log, policy, chunk_tokens, capacity):
    config = CoreConfig(tiers=(TierConfig(name="l1", pages=capacity, eviction=policy),))
    core = simulate_core(log, config, chunk_tokens)
    np.testing.assert_array_equal(hit_chunks(chains(log, chunk_tokens), policy, capacity), core.hits[:, 0])


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=25, deadline=None)
@given(log=logs, factor=st.sampled_from([1, 2, 4, 7]), share=st.floats(0, 1.2))
def test_generated_logs(policy, log, factor, share):
    chunk_tokens = factor * BLOCK
    longest = int(np.diff(log.starts).max()) // factor
    unique = chains(log, chunk_tokens).unique
    # One chunk, less than one request, a share of everything, no bound.
    for capacity in {1, max(1, longest // 2), max(1, int(share * unique)), None}:
        agree(log, policy, chunk_tokens, capacity)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_log(policy):
    log = generate(Chat(requests=1500, seed=11, block_tokens=64))
    for capacity in (50, 400, 3000):
        agree(log, policy, 128, capacity)
