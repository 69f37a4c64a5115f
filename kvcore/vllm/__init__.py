"""The vLLM connectors: KV of prompt prefixes, reused through a kvcore server.

    --kv-transfer-config '{"kv_connector": "KVCoreMPConnector", "kv_connector_module_path": "kvcore.vllm",
                           "kv_role": "kv_both"}'

`KVCoreMPConnector` uses a `kvcore serve` on the same host; `KVCoreConnector` brings its own.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcore.vllm.connector import KVCoreConnector, KVCoreMPConnector

__all__ = ["KVCoreConnector", "KVCoreMPConnector"]


def __getattr__(name: str) -> Any:
    """Import the connectors when they are asked for: the two halves can be used, and tested, without vLLM."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvcore.vllm import connector  # noqa: PLC0415

    return getattr(connector, name)
