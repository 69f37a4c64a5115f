"""Real vLLM on the CPU with bf16 KV that is kept packed: the same bits come back, so the same answers do."""

import harness
import numpy as np
import pytest

pytest.importorskip("vllm")

from harness import CHUNK, generate, metrics
from servers import ServerInThread, status

pytestmark = pytest.mark.vllm


def prompts():
    rng = np.random.default_rng(8)
    shared = rng.integers(4, 300, 4 * CHUNK + 50).tolist()
    return [shared + rng.integers(4, 300, 30 * (1 + i)).tolist() for i in range(4)]


def answers(model, folder, packing):
    """What an engine answers first, then with hits in L1 alone; and what a chunk takes there."""
    folder.mkdir()
    server = ServerInThread(folder, l1_size_gb=1 / 8, page_size="64KiB", chunk_size=CHUNK)
    config = harness.connector_config("KVCoreMPConnector", endpoint=server.endpoint, packing=packing)
    with harness.engine(model, config, dtype="bfloat16", max_num_batched_tokens=256) as llm:
        (instance,) = status(server.endpoint)["instances"]
        cold = [answer.tokens for prompt in prompts() for answer in generate(llm, [prompt])]
        harness.step_idle(llm)
        hits = []
        for prompt in prompts():
            assert llm.reset_prefix_cache()
            hits += [answer.tokens for answer in generate(llm, [prompt])]
        loaded = metrics(llm)["vllm:kvcore_loaded_tokens"]
    server.stop()
    return cold, hits, loaded, instance["chunk_bytes"]


def test_answers_with_packed_hits_are_those_with_plain_ones(tiny_model, tmp_path):
    plain = answers(tiny_model, tmp_path / "plain", "none")
    packed = answers(tiny_model, tmp_path / "packed", "lossless")
    assert packed[:3] == plain[:3]
    assert packed[2] >= 4 * 4 * CHUNK  # all of the shared prefix, each time
    assert packed[3] < 0.8 * plain[3]
