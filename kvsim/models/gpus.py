"""Accelerators by name."""

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources

from kvsim.models.names import plain, unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator: its memory in GiB and the nominal rate of its link to host memory in bytes a second, one way."""

    name: str
    memory_gib: float
    host_bytes_per_s: float


@functools.cache
def _table() -> dict[str, Gpu]:
    """Return every accelerator by every name, read once."""
    text = resources.files("kvsim.models").joinpath("gpus.toml").read_text("utf-8")
    found: dict[str, Gpu] = {}
    for name, entry in tomllib.loads(text).items():
        gpu_ = Gpu(name=name, memory_gib=entry["memory_gib"], host_bytes_per_s=entry["host_gb_per_s"] * 1e9)
        for alias in (name, *entry["aliases"]):
            found[plain(alias)] = gpu_
    return found


def gpu_names() -> list[str]:
    """Return the table's names, sorted."""
    return sorted({entry.name for entry in _table().values()})


def gpu(name: str) -> Gpu:
    """Return an accelerator by any of its names (`h100`, `NVIDIA H100`). Raises UsageError, listing close names."""
    found = _table().get(plain(name).removeprefix("nvidia-"))
    if found is None:
        raise unknown("GPU", name, gpu_names())
    return found
