"""What can be set for the connectors: `kv_connector_extra_config`, then `KVCORE_*` in the environment, then defaults."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from kvcore.live.connection import CurveKeys
from kvcore.live.wire import DEFAULT_ARENA_DIR, ipc_endpoint
from kvcore.vllm.scheduler import LoadMode


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorSettings:
    """Settings of both connectors.

    Attributes:
        endpoint: Where the server listens.
        load_mode: See `kvcore.vllm.scheduler.Options`.
        grant_wait_ms: How long the step that completes a prompt waits for its room.
        deadline_ms: A reply missing for longer marks the server away.
        fail_on_load_error: Leave vLLM's `kv_load_failure_policy` as it is. Otherwise a load that fails is recomputed,
            whatever it says, for a cache must not fail requests.
        chunk_tokens: Chunk size of the embedded server.
        l1_size_gb: L1 of the embedded server, in 2^30 bytes, for all ranks.
        eviction_policy: Of the embedded server.
        arena_dir: Where the embedded server's arena lies.
        record: The embedded server's request log; none where empty.
        http: `host:port` of the embedded server's HTTP; none where empty.
        layerwise: On a GPU, let attention of a layer wait for that layer's load only.
        curve: Keys, for a server on tcp that is not on the loopback.
    """

    endpoint: str
    load_mode: LoadMode = "auto"
    grant_wait_ms: float = 1.0
    deadline_ms: float = 500.0
    fail_on_load_error: bool = False
    chunk_tokens: int = 256
    l1_size_gb: float = 4.0
    eviction_policy: str = "lru"
    arena_dir: str = DEFAULT_ARENA_DIR
    record: str = ""
    http: str = ""
    layerwise: bool = False
    curve: CurveKeys | None = None


def read(extra: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> ConnectorSettings:
    """Return the settings. Raises ValueError naming the key that does not fit."""
    env = os.environ if environ is None else environ
    unknown = sorted(set(extra) - _KEYS)
    if unknown:
        raise ValueError(f"kv_connector_extra_config: no key {', '.join(unknown)}; there are {', '.join(sorted(_KEYS))}")

    def get(key: str, default: Any) -> Any:
        value = extra.get(key, env.get(f"KVCORE_{key.upper()}", default))
        try:
            return _bool(value) if isinstance(default, bool) else type(default)(value)
        except ValueError:
            raise ValueError(f"{key}: {value!r} is no {type(default).__name__}") from None

    mode = get("load_mode", "auto")
    if mode not in get_args(LoadMode):
        raise ValueError(f"load_mode: {mode!r} is none of {', '.join(get_args(LoadMode))}")
    arena_dir = get("arena_dir", DEFAULT_ARENA_DIR)
    return ConnectorSettings(
        endpoint=get("endpoint", ipc_endpoint(arena_dir)),
        load_mode=cast("LoadMode", mode),
        grant_wait_ms=get("grant_wait_ms", 1.0),
        deadline_ms=get("deadline_ms", 500.0),
        fail_on_load_error=get("fail_on_load_error", False),
        chunk_tokens=get("chunk_size", 256),
        l1_size_gb=get("l1_size_gb", 4.0),
        eviction_policy=get("eviction_policy", "lru"),
        arena_dir=arena_dir,
        record=get("record", ""),
        http=get("http", ""),
        layerwise=get("layerwise", False),
        curve=_curve(get("curve_server", ""), get("curve_public", ""), get("curve_secret", "")),
    )


_KEYS = frozenset(
    {
        "endpoint", "load_mode", "grant_wait_ms", "deadline_ms", "fail_on_load_error", "chunk_size", "l1_size_gb",
        "eviction_policy", "arena_dir", "record", "http", "layerwise", "curve_server", "curve_public", "curve_secret",
    }
)  # fmt: skip


def _curve(server: str, public: str, secret: str) -> CurveKeys | None:
    if not server and not public and not secret:
        return None
    if not (server and public and secret):
        raise ValueError("curve_server, curve_public and curve_secret go together")
    return CurveKeys(server=server, public=public, secret=secret)


def _bool(value: Any) -> bool:
    text = str(value).lower()
    if text not in {"true", "false", "1", "0", "yes", "no"}:
        raise ValueError(text)
    return text in {"true", "1", "yes"}
