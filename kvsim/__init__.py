"""Predict KV-cache reuse from a request log: hit ratios exactly, time to first token by simulation.

    >>> import kvsim
    >>> log = kvsim.read("prod.jsonl")
    >>> kvsim.simulate(log, chunk_tokens=512, capacity_chunks=10_000).token_hit_ratio
    >>> costs = kvsim.costs(model="qwen3-8b", gpu="h100")
    >>> kvsim.tune(log, costs).point
    >>> settings = kvsim.RunSettings(profile=costs.run_profile, chunk_tokens=512, engines=4, l1_gb=200)
    >>> kvsim.run(log, settings).ttft_s
    >>> kvsim.validate(log, settings).ttft["p95"].error  # of a log that has its TTFT recorded

Names are loaded when they are first used: importing this imports nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsim.api import Simulation, simulate
    from kvsim.calibration import calibrate
    from kvsim.engine.settings import RunSettings
    from kvsim.errors import UsageError
    from kvsim.report import write_report
    from kvsim.runner import RunResult, run, run_many
    from kvsim.tuner import Costs, Prices, Rule, Trial, TuneResult, costs, tune
    from kvsim.validation import Validation, validate
    from kvtraces import Log, LogError, read

__all__ = [
    "Costs",
    "Log",
    "LogError",
    "Prices",
    "Rule",
    "RunResult",
    "RunSettings",
    "Simulation",
    "Trial",
    "TuneResult",
    "UsageError",
    "Validation",
    "calibrate",
    "costs",
    "read",
    "run",
    "run_many",
    "served",
    "simulate",
    "tune",
    "validate",
    "write_report",
]

# A module here must not have the name of a function above: importing it would put it in the function's place.
_HOMES = {
    "Costs": "kvsim.tuner",
    "Log": "kvtraces",
    "LogError": "kvtraces",
    "Prices": "kvsim.tuner",
    "Rule": "kvsim.tuner",
    "RunResult": "kvsim.runner",
    "RunSettings": "kvsim.engine.settings",
    "Simulation": "kvsim.api",
    "Trial": "kvsim.tuner",
    "TuneResult": "kvsim.tuner",
    "UsageError": "kvsim.errors",
    "Validation": "kvsim.validation",
    "calibrate": "kvsim.calibration",
    "costs": "kvsim.tuner",
    "read": "kvtraces",
    "run": "kvsim.runner",
    "run_many": "kvsim.runner",
    "served": "kvsim.recorded_settings",
    "simulate": "kvsim.api",
    "tune": "kvsim.tuner",
    "validate": "kvsim.validation",
    "write_report": "kvsim.report",
}
_MODULES = ("calibration", "engine", "models", "profiles", "sweep")


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
