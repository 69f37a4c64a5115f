"""What of an engine's configuration changes KV, as a namespace."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvcore.policy.hashing import Namespace


def engine_namespace(vllm_config: Any, *, layout: str, isa: str, block_tokens: int) -> Namespace:
    """Return the namespace of an engine, without adapter and salt, which are a request's.

    Args:
        vllm_config: vLLM's configuration.
        layout: The workers' fingerprint of a block in memory.
        isa: What packed the inside of a block, on the CPU backend.
        block_tokens: Tokens of an engine block.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return Namespace(
        model="|".join([str(model.model), *_variants(vllm_config)]),
        revision=model_revision(model) or _of_this_start(vllm_config),
        kv_dtype=kv_dtype(vllm_config),
        layout=layout,
        isa=isa,
        block_tokens=block_tokens,
        parallel=(
            ("tensor", parallel.tensor_parallel_size),
            ("pipeline", parallel.pipeline_parallel_size),
        ),
    )


def kv_dtype(vllm_config: Any) -> str:
    """Return the element type of the KV cache: the configured one, or the model's where that is `auto`."""
    configured = str(vllm_config.cache_config.cache_dtype)
    return str(vllm_config.model_config.dtype).removeprefix("torch.") if configured == "auto" else configured


def model_revision(model_config: Any) -> str:
    """Return what tells one state of the weights from another.

    A commit where the model came from a hub. For a folder or a file the names, sizes and times of change of its
    weights, so that weights which are overwritten in place are not taken for those before; the same weights copied
    elsewhere are. For weights that lie elsewhere, as in object storage, what the user calls them (`--revision`);
    nothing where he does not.
    """
    here = Path(str(model_config.model))
    files = sorted(here.iterdir()) if here.is_dir() else [here] if here.is_file() else []
    weights = [file for file in files if file.suffix in {".safetensors", ".bin", ".pt", ".gguf"}]
    if weights:
        return ",".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in weights)
    commit = getattr(getattr(model_config, "hf_config", None), "_commit_hash", None)
    return str(commit or model_config.revision or "")


def lasts(vllm_config: Any) -> bool:
    """Return whether this engine's KV can be known for its own again when it has been started anew."""
    return bool(model_revision(vllm_config.model_config)) or _invented(vllm_config)


def _of_this_start(vllm_config: Any) -> str:
    """Name weights of which nothing tells whether they have changed: they are known for as long as the engine runs."""
    if _invented(vllm_config):
        return ""
    return f"start {vllm_config.instance_id} {vllm_config.kv_transfer_config.engine_id}"


def _invented(vllm_config: Any) -> bool:
    return bool(vllm_config.load_config.load_format == "dummy")


def _variants(vllm_config: Any) -> list[str]:
    """Name the settings that make other KV out of the same weights."""
    model, media = vllm_config.model_config, vllm_config.model_config.multimodal_config
    config = _config_text(model.hf_config)
    online = getattr(model, "quantization_config", None)
    facts = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "quantization_config": _text(online) if online else None,
        "config": sha256(config.encode()).hexdigest(),
        # Which of its factors such a model takes hangs on the longest prompt that is served.
        "max_model_len": model.max_model_len if any(kind in config for kind in _BY_LENGTH) else None,
        "mm_processor_kwargs": _text(media.mm_processor_kwargs) if media and media.mm_processor_kwargs else None,
        "weights": f"dummy {model.seed}" if _invented(vllm_config) else getattr(model, "model_weights", None) or None,
        "draft": getattr(vllm_config.speculative_config, "model", None),
    }
    return [f"{name}={value}" for name, value in facts.items() if value is not None]


_BY_LENGTH = ('"longrope"', '"su"')
"""Kinds of RoPE, as a model's configuration names them."""


def _config_text(config: Any) -> str:
    """Return a model's configuration, overrides included, but for where it came from and who wrote it."""
    facts = config.to_dict()
    for name in ("_name_or_path", "_commit_hash", "transformers_version"):
        facts.pop(name, None)
    return _text(facts)


def _text(facts: Any) -> str:
    return json.dumps(facts, sort_keys=True, default=str)
