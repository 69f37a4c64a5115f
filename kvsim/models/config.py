"""Reading a model's shape from its Hugging Face config.json."""

from pathlib import Path
from typing import Any

from kvsim.errors import UsageError
from kvsim.models.shape import KV_DTYPES, ModelShape

# A field here means that KV is not the same number of bytes for every token and layer.
_UNEVEN = {
    "hybrid_override_pattern": "it mixes attention with state-space layers",
    "mamba_d_state": "it mixes attention with state-space layers",
    "mamba_d_ssm": "it mixes attention with state-space layers",
    "ssm_cfg": "it has state-space layers",
    "linear_num_key_heads": "it has linear attention layers",
    "linear_attn_config": "it has linear attention layers",
    "block_configs": "its layers differ from each other",
    "index_head_dim": "sparse attention keeps an indexer's cache beside the latent one",
    "compress_ratios": "its layers compress their KV by different ratios",
    "num_kv_shared_layers": "some layers reuse the KV of others",
    "num_global_key_value_heads": "its global layers have other heads than its sliding ones",
    "global_head_dim": "its global layers have other heads than its sliding ones",
    "swa_num_key_value_heads": "its sliding layers have other heads than its global ones",
}
_UNEVEN_TYPES = {
    "nemotron_h",
    "jamba",
    "bamba",
    "zamba2",
    "falcon_h1",
    "granitemoehybrid",
    "lfm2",
    "mamba",
    "mamba2",
    "rwkv",
}
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def read_config(path: Path) -> ModelShape:
    """Return the shape of the model that a config.json describes.

    Raises UsageError for a file that cannot be read, that lacks a field, or whose model's KV is not so many bytes
    a token.
    """
    config = _load(path)
    text = config.get("text_config")
    if isinstance(text, dict):  # a multimodal model: the language model inside keeps the KV
        config = {"torch_dtype": config.get("torch_dtype", config.get("dtype")), **text}
    for field, reason in _UNEVEN.items():
        if config.get(field):
            raise UsageError(f"{path}: {field}: {reason}; KV is not so many bytes a token")
    if config.get("model_type") in _UNEVEN_TYPES:
        raise UsageError(
            f"{path}: model_type: {config['model_type']} has state-space layers; KV is not so many bytes a token"
        )
    layers = _integer(path, config, "num_hidden_layers", "num_layers", "n_layer")
    local_layers, window = _local(path, config, layers)
    name, kv_dtype = _name(path, config), _dtype(config)
    if config.get("kv_lora_rank"):
        latent = _integer(path, config, "kv_lora_rank") + _integer(path, config, "qk_rope_head_dim")
        return ModelShape(name=name, layers=layers, kv_heads=1, head_values=latent, latent=True, kv_dtype=kv_dtype)
    heads = _integer(path, config, "num_attention_heads", "n_head")
    # ChatGLM says multi_query_group_num and kv_channels; a model without the field has as many KV heads as heads.
    kv_heads = _integer(path, config, "num_key_value_heads", "multi_query_group_num", default=heads)
    hidden = _integer(path, config, "hidden_size", "n_embd", default=0)
    head_dim = _integer(path, config, "head_dim", "kv_channels", default=hidden // heads)
    if not head_dim:
        raise UsageError(f"{path}: head_dim: missing, and so is hidden_size")
    return ModelShape(
        name=name,
        layers=layers,
        kv_heads=kv_heads,
        head_values=2 * head_dim,
        local_layers=local_layers,
        window_tokens=window,
        kv_dtype=kv_dtype,
    )


def _load(path: Path) -> dict[str, Any]:
    import json  # noqa: PLC0415 - a config is read once at most

    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path}: not a model's config.json: it holds no object")
    return config


def _integer(path: Path, config: dict[str, Any], *fields: str, default: int | None = None) -> int:
    """Return the first of `fields` that the config has."""
    for field in fields:
        value = config.get(field)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{path}: {field}: {value!r} is not a positive integer")
        return value
    if default is None:
        raise UsageError(f"{path}: {fields[0]}: missing; is this a model's config.json?")
    return default


def _local(path: Path, config: dict[str, Any], layers: int) -> tuple[int, int]:
    """Return how many layers attend to a window only, and its tokens."""
    kinds = config.get("layer_types")
    window = config.get("sliding_window") or config.get("attention_chunk_size") or 0
    if isinstance(kinds, list):
        strange = sorted({str(kind) for kind in kinds} - _ATTENTION)
        if strange:
            raise UsageError(f"{path}: layer_types: {', '.join(strange)}: KV is not so many bytes a token")
        local = sum(kind != "full_attention" for kind in kinds)
        return (local, int(window)) if local else (0, 0)
    if not window or config.get("use_sliding_window") is False:
        return 0, 0
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 0:  # Gemma 3: every pattern-th layer is global
        return layers - layers // pattern, int(window)
    if config.get("model_type") == "gemma2":
        return layers // 2, int(window)
    if "llama4" in str(config.get("model_type")):
        return layers - layers // 4, int(window)
    return layers, int(window)


def _dtype(config: dict[str, Any]) -> str:
    dtype = config.get("torch_dtype") or config.get("dtype")
    return dtype if isinstance(dtype, str) and dtype in KV_DTYPES else "bf16"


def _name(path: Path, config: dict[str, Any]) -> str:
    given = config.get("_name_or_path")
    return given if isinstance(given, str) and given else path.parent.name or str(path)
