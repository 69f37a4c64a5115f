"""The engine model against TTFTs measured on one H100: vLLM 0.26.0, Qwen3-8B in bf16, one request at a time.

Cold and with the prompt in the GPU's own cache (vLLM alone, CUDA graphs: benchmarks/results/ttft-graphs-h100.json), and
with a hit in host memory: kvcore's from the same file, packed; and of a plain connector that loaded layer by layer or
the whole of it first.
"""

import numpy as np
import pytest

from kvsim.engine.settings import RunSettings
from kvsim.profiles import lookup
from kvsim.runner import run
from kvtraces import Log


def second_of_two(tokens, **settings):
    """TTFT of a prompt that came an hour before."""
    blocks = np.tile(np.arange(tokens // 16), 2)
    log = Log(
        block_tokens=16,
        timestamp_ms=np.array([0.0, 3.6e6]),
        input_tokens=np.array([tokens, tokens]),
        output_tokens=np.array([1, 1]),
        starts=np.array([0, tokens // 16, 2 * (tokens // 16)]),
        blocks=blocks,
    )
    chosen = RunSettings(profile=lookup("qwen3-8b", "h100"), chunk_tokens=256, **settings)
    return float(run(log, chosen, baseline=False).columns["ttft_s"][1])


@pytest.mark.parametrize(("tokens", "measured"), [(8192, 0.2185), (32_000, 1.2233)])
def test_cold(tokens, measured):
    assert second_of_two(tokens, l0_prefix_caching=False) == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize(("tokens", "measured"), [(8192, 0.0202), (32_000, 0.0345)])
def test_hits_in_the_gpu(tokens, measured):
    assert second_of_two(tokens) == pytest.approx(measured, rel=0.2)  # 4 ms: the hosts' processors differ


@pytest.mark.parametrize(("tokens", "measured"), [(8192, 0.0334), (32_000, 0.0969)])
def test_packed_hits_in_host_memory(tokens, measured):
    packed = second_of_two(tokens, l0_prefix_caching=False, l1_gb=None, packed_share=0.7854)
    assert packed == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(
    ("load", "tokens", "measured"),
    [("layerwise", 32_000, 0.114), ("sync", 32_000, 0.144)],
)
def test_hits_in_host_memory(load, tokens, measured):
    predicted = second_of_two(tokens, l0_prefix_caching=False, l1_gb=None, load=load)
    # Eager: launching a step took longer than the profile's. Waiting for the whole load had costs a layer of its own.
    assert predicted == pytest.approx(measured, rel=0.2 if load == "layerwise" else 0.3)
