"""The one module that knows vLLM's versions."""

import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvcore.vllm import compat

pytestmark = pytest.mark.vllm
SIZES = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
FULL = FullAttentionSpec(**SIZES)
SLIDING = SlidingWindowSpec(**SIZES, sliding_window=128)


def cache(*specs):
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


def test_full_attention_is_taken():
    assert compat.attention_spec(cache(FULL)) is FULL
    assert not compat.is_mla(FULL)


@pytest.mark.parametrize(
    ("specs", "said"),
    [((FULL, SLIDING), "2 KV cache groups .*FullAttentionSpec, SlidingWindowSpec"), ((SLIDING,), "SlidingWindowSpec")],
)
def test_models_that_cannot_be_reused_by_prefix_are_refused_by_name(specs, said):
    with pytest.raises(compat.UnsupportedModelError, match=said):
        compat.attention_spec(cache(*specs))


def test_other_versions_are_tried_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="kvcore"):
        assert compat.check_version("0.26.1")
        assert compat.check_version("0.32.0+cpu")
        assert not caplog.records
        assert not compat.check_version("0.320.0")
    assert "0.26 to 0.32" in caplog.text


def test_a_step_of_which_vllm_says_nothing_is_one_graph():
    """As its second model runner begins one; other steps come with the attention's metadata."""
    none = SimpleNamespace(name="NONE")
    assert compat.runs_as_one_graph(SimpleNamespace(attn_metadata=None, cudagraph_runtime_mode=none))
    assert not compat.runs_as_one_graph(SimpleNamespace(attn_metadata={"layer": 1}, cudagraph_runtime_mode=none))
