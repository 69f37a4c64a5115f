"""Tensor parallel of 2: each rank keeps its shard of every chunk. On two GPUs where there are any, else on the CPU."""

import harness
import numpy as np
import pytest

pytest.importorskip("vllm")

from harness import CHUNK, assert_same, generate, metrics
from servers import ServerInThread, counters, environment, status

from kvcore.live.arena import Arena

pytestmark = pytest.mark.vllm
CHUNK_BYTES = 512 << 10  # a page: the shards of its two ranks
SIZES = {"l1_size_gb": 64 * CHUNK_BYTES / 2**30, "page_size": "512KiB", "chunk_size": CHUNK}


def tokens(count, seed):
    return np.random.default_rng(seed).integers(4, 300, count).tolist()


SHARED = tokens(4 * CHUNK + 50, 1)
PROMPTS = [SHARED + tokens(100, 2), SHARED + tokens(130, 3), tokens(60, 4)]


@pytest.fixture(scope="module")
def reference(tiny_model):
    with harness.engine(tiny_model) as llm:
        return generate(llm, PROMPTS)


@pytest.mark.parametrize("load_mode", ["sync", "async"])
def test_two_ranks_keep_a_shard_each(tiny_model, reference, tmp_path, monkeypatch, load_mode):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    server = ServerInThread(tmp_path, **SIZES)
    config = harness.connector_config(
        "KVCoreMPConnector", endpoint=server.endpoint, load_mode=load_mode, deadline_ms=10_000
    )
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with harness.engine(tiny_model, config, **options) as llm:
        assert_same(generate(llm, PROMPTS[:1]), reference[:1])
        assert llm.reset_prefix_cache()
        assert_same(generate(llm, PROMPTS[:1]), reference[:1])
        ours = metrics(llm)
        assert ours["vllm:external_prefix_cache_hits"] == 5 * CHUNK
        assert ours["vllm:kvcore_loaded_tokens"] == ours["vllm:kvcore_stored_tokens"] == 5 * CHUNK
        (instance,) = status(server.endpoint)["instances"]
        assert instance["chunk_bytes"] == CHUNK_BYTES
        assert ours["vllm:kvcore_loaded_bytes"] == 5 * CHUNK_BYTES
        served = counters(server.endpoint)
        assert served["loaded_tokens"] == served["stored_tokens"] == 5 * CHUNK
        assert llm.reset_prefix_cache()
        assert_same(generate(llm, PROMPTS), reference)
        assert metrics(llm)["vllm:kvcore_failed_tokens"] == 0
        each_rank_reads_its_own(llm, server, reference)
    server.stop()


def each_rank_reads_its_own(llm, server, reference):
    """Without the shards of one rank the answer is another; with all of them as they were, the same."""
    arena = status(server.endpoint)["arena"]
    with Arena.attach(arena["path"]) as mapped:
        shards = mapped.data[: arena["pages"] * CHUNK_BYTES].reshape(arena["pages"], 2, -1)
        kept = shards.copy()
        for rank in (0, 1):
            shards[:, rank] = 0
            assert llm.reset_prefix_cache()
            (answer,) = generate(llm, PROMPTS[:1])
            assert answer.tokens != reference[0].tokens, f"rank {rank}"
            shards[:] = kept
        assert llm.reset_prefix_cache()
        assert_same(generate(llm, PROMPTS[:1]), reference[:1])
