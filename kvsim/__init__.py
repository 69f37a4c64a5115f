"""Predict KV-cache reuse from a request log: hit ratios exactly, time to first token by simulation.

    >>> import kvsim
    >>> log = kvsim.read("prod.jsonl")
    >>> kvsim.simulate(log, chunk_tokens=512, capacity_chunks=10_000).token_hit_ratio
    >>> result = kvsim.tune(log, kvsim.costs(model="qwen3-8b", gpu="h100"))
    >>> result.point, result.columns()

Names are loaded when they are first used: importing this imports nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsim.api import Simulation, simulate
    from kvsim.errors import UsageError
    from kvsim.report import write_report
    from kvsim.tuner import Costs, Rule, TuneResult, costs, tune
    from kvtraces import Log, LogError, read

__all__ = [
    "Costs",
    "Log",
    "LogError",
    "Rule",
    "Simulation",
    "TuneResult",
    "UsageError",
    "costs",
    "read",
    "simulate",
    "tune",
    "write_report",
]

_HOMES = {
    "Costs": "kvsim.tuner",
    "Log": "kvtraces",
    "LogError": "kvtraces",
    "Rule": "kvsim.tuner",
    "Simulation": "kvsim.api",
    "TuneResult": "kvsim.tuner",
    "UsageError": "kvsim.errors",
    "costs": "kvsim.tuner",
    "read": "kvtraces",
    "simulate": "kvsim.api",
    "tune": "kvsim.tuner",
    "write_report": "kvsim.report",
}
_MODULES = ("engine", "models", "profiles", "sweep")


def __getattr__(name: str) -> Any:
    """Load a public name from where it lives."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"kvsim.{name}")
    raise AttributeError(f"module 'kvsim' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *__all__, *_MODULES})
