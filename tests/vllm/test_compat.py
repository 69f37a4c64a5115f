"""The one module that knows vLLM's versions."""

import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

from kvcore.vllm import compat
from kvcore.vllm.failed_loads import recompute_by_preemption

pytestmark = pytest.mark.vllm
SIZES = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
FULL = FullAttentionSpec(**SIZES)
SLIDING = SlidingWindowSpec(**SIZES, sliding_window=128)


MLA = MLAAttentionSpec(**{**SIZES, "num_kv_heads": 1})


def cache(*specs, layers=("model.layers.0.self_attn.attn",)):
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=list(layers)) for spec in specs]
    )


def config(*, pipeline=1, supported=True, media=None, caching=True, routed=False, drafts=False, runner=1, **cached):
    return SimpleNamespace(
        aux_output_config=SimpleNamespace(enabled=routed),
        speculative_config="ngram" if drafts else None,
        use_v2_model_runner=runner == 2,
        parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline, decode_context_parallel_size=1),
        model_config=SimpleNamespace(is_prefix_caching_supported=supported, multimodal_config=media),
        cache_config=SimpleNamespace(enable_prefix_caching=caching, **cached),
    )


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


def test_layers_that_attend_to_what_comes_later_are_refused():
    if not hasattr(FULL, "non_causal"):
        pytest.skip("this vLLM has no such layers")
    with pytest.raises(compat.UnsupportedModelError, match="attend to later tokens"):
        compat.attention_spec(cache(FullAttentionSpec(**SIZES, non_causal=True)))


def test_settings_with_which_kv_is_not_a_prefixs_are_refused():
    compat.check_supported(config(pipeline=2), FULL)
    compat.check_supported(config(drafts=True), MLA)
    compat.check_supported(config(pipeline=2, drafts=True, runner=2), FULL)
    for refused, spec, said in [
        (config(pipeline=2), MLA, "MLA with pipeline_parallel_size"),
        (config(supported=False), FULL, "does not support prefix caching"),
        (config(calculate_kv_scales=True), FULL, "calculate_kv_scales"),
        (config(routed=True), FULL, "routed-experts"),
        (config(pipeline=2, drafts=True), FULL, "speculative decoding with pipeline_parallel_size"),
    ]:
        with pytest.raises(compat.UnsupportedModelError, match=said):
            compat.check_supported(refused, spec)


def test_an_indexer_reads_its_cache_before_attention_is_waited_for():
    attention = "model.layers.0.self_attn.attn"
    assert compat.waits_layer_by_layer(cache(MLA, layers=[attention]))
    assert not compat.waits_layer_by_layer(cache(MLA, layers=["model.layers.0.self_attn.indexer.k_cache", attention]))


def test_media_is_numbered_rather_than_named_where_vllm_keeps_none_of_it():
    uncached = SimpleNamespace(mm_processor_cache_gb=0)
    assert compat.names_media(config(caching=False))
    assert compat.names_media(config(media=uncached))
    assert compat.names_media(config(media=SimpleNamespace(mm_processor_cache_gb=4), caching=False))
    assert not compat.names_media(config(media=uncached, caching=False))


def test_a_version_without_what_is_wrapped_does_not_start(monkeypatch):
    """Tokens that rest on a failed load would be given out."""
    monkeypatch.delattr(Scheduler, "_handle_invalid_blocks")
    with pytest.raises(RuntimeError, match=r"has no Scheduler\._handle_invalid_blocks"):
        recompute_by_preemption()


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
