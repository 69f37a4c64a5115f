"""Models by name, from the shipped table or a config.json."""

import functools
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from kvsim.errors import UsageError
from kvsim.models.config import read_config
from kvsim.models.names import plain, unknown
from kvsim.models.shape import ModelShape

_HINT = " (or give the path of its config.json)"
_QUANTISED = re.compile(
    r"(-(fp8|nvfp4|mxfp4|awq|gptq|int4|int8|w4a16|w8a8|4bit|8bit|bnb|dynamic|static|per-?tensor))+$"
)


@functools.cache
def _table() -> dict[str, Any]:
    """Return the shipped table, read once."""
    return tomllib.loads(resources.files("kvsim.models").joinpath("models.toml").read_text("utf-8"))


@functools.cache
def _aliases() -> dict[str, str]:
    """Return every name of every model, as compared, with the table's own name."""
    found: dict[str, str] = {}
    for name, entry in _table().items():
        for alias in (name, *entry["hf"]):
            found[plain(alias)] = name
            found.setdefault(plain(alias.rpartition("/")[2]), name)
    return found


def model_names() -> list[str]:
    """Return the table's names, sorted."""
    return sorted(_table())


def canonical(name: str) -> str | None:
    """Return the table's name for a model under any of its names, None if it has none.

    Another publisher's copy counts as the model, and so does one with quantised weights: KV has its own dtype.
    """
    asked = plain(name)
    bare = asked.rpartition("/")[2]
    tries = (asked, bare, _QUANTISED.sub("", bare))
    return next((_aliases()[name] for name in tries if name in _aliases()), None)


def model(name: str) -> ModelShape:
    """Return a model by its name (`qwen3-8b`, `Qwen/Qwen3-8B`) or by the path of its config.json or of its folder.

    Raises UsageError for a name that is neither, listing close ones, and for a model whose KV is not so many bytes a
    token.
    """
    path = Path(name).expanduser()
    if path.is_file() or (path / "config.json").is_file():
        return read_config(path / "config.json" if path.is_dir() else path)
    if name.endswith(".json") or name.startswith((".", "/", "~")):
        raise UsageError(f"{name}: no such file, nor a folder with a config.json")
    key = canonical(name)
    if key is None:
        raise unknown("model", name.rpartition("/")[2], _table(), _HINT)
    entry = _table()[key]
    if "refuse" in entry:
        raise UsageError(f"{key}: {entry['refuse']}")
    latent = entry.get("latent", 0)
    local_layers, window = entry.get("local", (0, 0))
    return ModelShape(
        name=key,
        layers=entry["layers"],
        kv_heads=1 if latent else entry["kv_heads"],
        head_values=latent or 2 * entry["head_dim"],
        latent=bool(latent),
        local_layers=local_layers,
        window_tokens=window,
    )
