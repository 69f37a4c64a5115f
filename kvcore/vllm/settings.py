"""What can be set for the connectors: in `kv_connector_extra_config`, else by `KVCORE_*` in the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast, get_args

from kvcore.live.connection import CurveKeys
from kvcore.live.settings import Settings
from kvcore.live.wire import DEFAULT_ARENA_DIR, ipc_endpoint
from kvcore.vllm.mover import Packing
from kvcore.vllm.scheduler import LoadMode


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorSettings:
    """Settings of both connectors.

    Attributes:
        endpoint: Where the server listens; by default where a `kvcore serve` with defaults does.
        load_mode: See `kvcore.vllm.scheduler.Options`.
        grant_wait_ms: See `kvcore.vllm.scheduler.Options`.
        deadline_ms: A reply missing for longer marks the server away.
        fail_on_load_error: Leave vLLM's `kv_load_failure_policy` as it is. Otherwise a load that fails is recomputed,
            whatever it says, for a cache must not fail requests.
        packing: `lossless` keeps bf16 KV packed, a fifth smaller and bit for bit the same; `none` leaves it as it is;
            `auto` packs on a GPU, where it can be.
        layerwise: On a GPU, let attention of a layer wait for that layer's load only.
        curve_server: With the next two, keys (Z85) for a server on tcp that is not on the loopback.
        curve_public: The client's public key.
        curve_secret: The client's secret key.
        server: Settings of the embedded server (`kvcore.live.settings.Settings`).
    """

    endpoint: str = ""
    load_mode: LoadMode = "auto"
    grant_wait_ms: float = 2.0
    deadline_ms: float = 500.0
    fail_on_load_error: bool = False
    packing: Packing = "auto"
    layerwise: bool = True
    curve_server: str = ""
    curve_public: str = ""
    curve_secret: str = ""
    server: Mapping[str, Any] = field(default_factory=dict)

    @property
    def curve(self) -> CurveKeys | None:
        """Keys, where they are set."""
        if not self.curve_server:
            return None
        return CurveKeys(server=self.curve_server, public=self.curve_public, secret=self.curve_secret)


def read(
    extra: Mapping[str, Any], environ: Mapping[str, str] | None = None, *, embedded: bool = False
) -> ConnectorSettings:
    """Return the settings; with `embedded`, keys that are the server's are kept for it.

    Raises ValueError naming the key that is unknown or does not fit.
    """
    env = os.environ if environ is None else environ
    defaults = {one.name: one.default for one in fields(ConnectorSettings) if one.name != "server"}
    servers = set(Settings.__struct_fields__) if embedded else set()
    unknown = sorted(set(extra) - set(defaults) - servers)
    if unknown:
        known = ", ".join(sorted(set(defaults) | servers))
        raise ValueError(f"kv_connector_extra_config: no key {', '.join(unknown)}; there are {known}")
    found = {
        key: _read_one(key, extra.get(key, env.get(f"KVCORE_{key.upper()}")), default)
        for key, default in defaults.items()
    }
    for key, kind in (("load_mode", LoadMode), ("packing", Packing)):
        if found[key] not in get_args(kind):
            raise ValueError(f"{key}: {found[key]!r} is none of {', '.join(get_args(kind))}")
    if len({bool(found[key]) for key in ("curve_server", "curve_public", "curve_secret")}) > 1:
        raise ValueError("curve_server, curve_public and curve_secret go together")
    found["endpoint"] = found["endpoint"] or ipc_endpoint(env.get("KVCORE_ARENA_DIR", DEFAULT_ARENA_DIR))
    return ConnectorSettings(**found, server={key: extra[key] for key in extra if key not in defaults})


def _read_one(key: str, value: Any, default: Any) -> Any:
    if value is None:
        return default
    if isinstance(default, bool):
        if (text := str(value).lower()) not in _BOOLS:
            raise ValueError(f"{key}: {value!r} is neither true nor false")
        return _BOOLS[text]
    try:
        return cast("Any", type(default))(value)
    except ValueError:
        raise ValueError(f"{key}: {value!r} is no {type(default).__name__}") from None


_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
