"""Everything that differs between vLLM's versions, and what is not its public interface; see also `failed_loads`.

Tested with 0.26 and 0.32; any other version is tried, with a warning.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, MLAAttentionSpec

from kvcore.vllm.mover import Packing
from kvcore.vllm.transfers import Backends, CudaTransfers, HostTransfers, TransferFactory

__all__ = [
    "KVConnectorBase_V1",
    "KVConnectorHandshakeMetadata",
    "KVConnectorMetadata",
    "KVConnectorPromMetrics",
    "KVConnectorRole",
    "KVConnectorStats",
    "KVConnectorWorkerMetadata",
    "UnsupportedModelError",
    "attention_spec",
    "block_ids",
    "check_supported",
    "check_version",
    "connectors",
    "copies_in_step",
    "engine_facts",
    "hashes_by_sha256",
    "host_cache_hits",
    "isa",
    "kv_layout",
    "log_with_vllm",
    "names_media",
    "packing",
    "plans_ahead",
    "register",
    "runs_as_one_graph",
    "transfer_factory",
    "waits_layer_by_layer",
    "worker_connector",
]

TESTED = ("0.26", "0.32")
_LOG = logging.getLogger("kvcore.vllm")


class UnsupportedModelError(ValueError):
    """The model keeps KV in a form that cannot be reused by whole prefix blocks; vLLM does not start."""


def check_version(version: str = vllm.__version__) -> bool:
    """Return whether this version of vLLM was tested; warn where it was not."""
    tested = any(version == known or version.startswith(known + ".") for known in TESTED)
    if not tested:
        _LOG.warning("vLLM %s was not tested with kvcore: tested are %s to %s", version, TESTED[0], TESTED[-1])
    return tested


def log_with_vllm() -> None:
    """Let what kvcore logs appear where vLLM's own lines do, unless the user has arranged otherwise."""
    ours, theirs = logging.getLogger("kvcore"), logging.getLogger("vllm")
    if ours.handlers or ours.level or not theirs.handlers:
        return
    ours.setLevel(theirs.getEffectiveLevel())
    for handler in theirs.handlers:
        ours.addHandler(handler)


def attention_spec(kv_cache_config: Any) -> Any:
    """Return the one spec of the model's KV cache.

    Raises UnsupportedModelError for a model with several groups of layers (hybrid, sliding window beside full
    attention with the hybrid manager on), or one whose layers keep less than every token.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
        raise UnsupportedModelError(
            f"kvcore reuses KV of models whose layers all keep the same tokens; this one has {len(groups)} KV cache "
            f"groups ({', '.join(kinds)}). Start vLLM without --kv-transfer-config for it"
        )
    spec = groups[0].kv_cache_spec
    for one in _specs(spec):
        if getattr(one, "non_causal", False):
            raise UnsupportedModelError(
                "kvcore reuses KV by prefix; this model's layers attend to later tokens of the prompt, too. Start vLLM "
                "without --kv-transfer-config for it"
            )
        if not isinstance(one, FullAttentionSpec) or type(one).__name__ in _PARTIAL:
            raise UnsupportedModelError(
                f"kvcore reuses KV of full attention and MLA; this model's layers keep a {type(one).__name__}, which "
                "does not hold every token of a prefix. Start vLLM without --kv-transfer-config for it"
            )
    return spec


_PARTIAL = frozenset({"RSWASpec", "SinkFullAttentionSpec", "HiddenStateCacheSpec"})


def _specs(spec: Any) -> list[Any]:
    """Return the specs of the layers, each kind once or layer by layer."""
    return list(spec.kv_cache_specs.values()) if hasattr(spec, "kv_cache_specs") else [spec]


def check_supported(vllm_config: Any, spec: Any) -> None:
    """Raise UnsupportedModelError for a setting with which KV cannot be reused by prefix, or not by kvcore."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    for kind in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, kind, 1) > 1:
            raise UnsupportedModelError(f"kvcore does not handle {kind} > 1: a block's tokens lie on several ranks")
    if is_mla(spec) and parallel.pipeline_parallel_size > 1:
        raise UnsupportedModelError("kvcore does not handle MLA with pipeline_parallel_size > 1: use tensor parallel")
    if not model.is_prefix_caching_supported:
        raise UnsupportedModelError(
            "vLLM says that this model, or its pooling, does not support prefix caching, nor can kvcore reuse its KV. "
            "Start vLLM without --kv-transfer-config for it"
        )
    if getattr(getattr(vllm_config, "aux_output_config", None), "enabled", False):
        raise UnsupportedModelError(
            "kvcore does not handle --enable-return-routed-experts: there are none of tokens that are loaded"
        )
    ahead = getattr(vllm_config, "speculative_config", None) is not None and not vllm_config.use_v2_model_runner
    if ahead and parallel.pipeline_parallel_size > 1:
        raise UnsupportedModelError(
            "kvcore does not handle speculative decoding with pipeline_parallel_size > 1 in vLLM's first model runner: "
            "it does not say when a step's KV is computed on other than the last rank"
        )
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise UnsupportedModelError(
            "kvcore does not handle calculate_kv_scales: what fp8 KV means would hang on the first prompts of an engine"
        )


def is_mla(spec: Any) -> bool:
    """Return whether every tensor parallel rank holds the same KV."""
    return all(isinstance(one, MLAAttentionSpec) for one in _specs(spec))


def waits_layer_by_layer(kv_cache_config: Any) -> bool:
    """Return whether vLLM says of every layer that its KV is needed now.

    It does so in attention alone; the indexer of sparse MLA comes before it, and reads a cache of its own.
    """
    return not any("indexer" in name for group in kv_cache_config.kv_cache_groups for name in group.layer_names)


def names_media(vllm_config: Any) -> bool:
    """Return whether vLLM names images and the like by their content, rather than by a counter of its own.

    `_process_mm_uuids` in vllm/renderers/base.py.
    """
    media = vllm_config.model_config.multimodal_config
    return media is None or media.mm_processor_cache_gb != 0 or bool(vllm_config.cache_config.enable_prefix_caching)


def head_size(spec: Any) -> int | None:
    """Return the size of an attention head in elements, None where layers differ."""
    sizes = {one.head_size for one in _specs(spec) if isinstance(one, AttentionSpec)}
    return sizes.pop() if len(sizes) == 1 else None


def kv_layout(vllm_config: Any) -> str:
    """Return vLLM's name for the order of dimensions in the KV cache."""
    layout = getattr(vllm_config.cache_config, "kv_cache_layout", None)
    if layout is not None:
        return str(layout)
    try:
        from vllm.v1.attention.backends.utils import get_kv_cache_layout  # noqa: PLC0415 - gone in later versions
    except ImportError:
        return "default"
    return str(get_kv_cache_layout())


def isa(vllm_config: Any, spec: Any) -> str:
    """Return what packed the inside of a block: on the CPU backend the attention's instruction set, else nothing."""
    if not on_cpu(vllm_config):
        return ""
    try:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # noqa: PLC0415 - only where there is a CPU backend
    except ImportError:
        return f"cpu-{torch.backends.cpu.get_cpu_capability()}"
    cache = vllm_config.cache_config
    arguments = (vllm_config.model_config.dtype, cache.block_size, head_size(spec), cache.cache_dtype)
    wanted = _get_attn_isa.__code__.co_argcount
    return str(_get_attn_isa(*arguments[:wanted]))


def on_cpu(vllm_config: Any) -> bool:
    """Return whether the engine runs on the CPU backend."""
    device = getattr(vllm_config.device_config, "device_type", None) or vllm_config.device_config.device
    return str(device) == "cpu"


def engine_facts(vllm_config: Any, kv_cache_config: Any, spec: Any) -> dict[str, int]:
    """Return what a simulation of this engine has to know, by the names of its settings, and the GPU's blocks."""
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    return {
        "l0_blocks": int(kv_cache_config.num_blocks) - 1,  # one is vLLM's own
        "l0_block_tokens": int(spec.block_size),
        "l0_prefix_caching": int(bool(cache.enable_prefix_caching)),
        "max_model_len": int(vllm_config.model_config.max_model_len),
        "max_num_batched_tokens": int(scheduler.max_num_batched_tokens),
        "max_num_seqs": int(scheduler.max_num_seqs),
        "chunked_prefill": int(bool(scheduler.enable_chunked_prefill)),
        "async_scheduling": int(plans_ahead(vllm_config)),
    }


def hashes_by_sha256(vllm_config: Any) -> bool:
    """Return whether vLLM's own block hashes, chained over prompt, adapter, images and salt, are SHA-256."""
    return str(getattr(vllm_config.cache_config, "prefix_caching_hash_algo", "")).startswith("sha256")


def copies_in_step(vllm_config: Any) -> bool:
    """Return whether copies are done when the call that starts them returns, as they are without a copy engine."""
    return on_cpu(vllm_config)


def plans_ahead(vllm_config: Any) -> bool:
    """Return whether a step is planned while the one before it runs."""
    return bool(vllm_config.scheduler_config.async_scheduling)


def transfer_factory(vllm_config: Any) -> TransferFactory:
    """Return what makes the copies between the KV cache and the arena on this device."""
    return Backends(HostTransfers if on_cpu(vllm_config) else CudaTransfers)


def packing(vllm_config: Any, wanted: Packing) -> Packing:
    """Return how KV is kept beyond this device; `auto` packs where kernels do it, which the CPU has none for."""
    can = not on_cpu(vllm_config) and find_spec("triton") is not None
    return wanted if wanted != "auto" or can else "none"


def runs_as_one_graph(forward_context: Any) -> bool:
    """Return whether the step at hand is one CUDA graph, in which nothing can be ordered between two layers.

    vLLM's second model runner begins such a step outside its forward context: nothing is known of its attention then.
    """
    mode = getattr(forward_context, "cudagraph_runtime_mode", None)
    return getattr(mode, "name", "") == "FULL" or getattr(forward_context, "attn_metadata", None) is None


def worker_connector() -> Any:
    """Return the worker's connector where a worker runs in this process, else None."""
    return get_kv_transfer_group() if has_kv_transfer_group() else None


def connectors(connector: Any) -> list[Any]:
    """Return a connector and, where it is vLLM's MultiConnector, those that it is made of."""
    return [connector, *getattr(connector, "_connectors", ())]


def register(module: str, names: Sequence[str]) -> None:
    """Have vLLM know connectors by name."""
    for name in names:
        with suppress(ValueError):  # it does
            KVConnectorFactory.register_connector(name, module, name)


def block_ids(blocks: Any) -> list[int]:
    """Return the ids of a request's blocks, of the one group that there is."""
    return list(blocks.get_block_ids()[0])


def host_cache_hits() -> Any:
    """Return vLLM's label for hits that came from the host's memory; None where it has none."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource  # noqa: PLC0415 - since 0.27
    except ImportError:
        return None
    return CacheHitSource.HOST
