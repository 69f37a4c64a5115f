"""When requests arrive, and which are let in."""

import numpy as np
from numpy.typing import NDArray

from kvsim.engine.settings import RunSettings, SettingsError
from kvtraces import Log


def arrival_times(log: Log, settings: RunSettings) -> NDArray[np.float64]:
    """Return when each request of a log arrives, in seconds from the first one.

    Raises:
        SettingsError: The log is empty.
    """
    count = len(log)
    if not count:
        raise SettingsError("the log has no requests")
    if settings.arrivals == "recorded":
        times = 1e-3 * (log.timestamp_ms - log.timestamp_ms.min())
        return np.asarray(times / settings.rate_scale)
    rate = (settings.rate_per_s or 1.0) * settings.rate_scale
    if settings.arrivals == "uniform":
        return np.arange(count) / rate
    gaps = np.random.default_rng(settings.seed).exponential(1 / rate, count)
    return np.asarray(np.cumsum(gaps) - gaps[0])


def refused(log: Log, settings: RunSettings) -> NDArray[np.bool_]:
    """Return which requests are turned away: no prompt, longer than the model's length, or than the GPU's cache."""
    tokens = log.input_tokens + log.output_tokens
    return np.asarray((log.input_tokens < 1) | (tokens > min(settings.model_len, settings.l0_tokens)))


def why_refused(settings: RunSettings) -> str:
    """Return what `refused` turns away, in words."""
    return (
        f"longer with their output than the model's {settings.model_len:,} tokens or the GPU's cache of "
        f"{settings.l0_tokens:,}, or without a prompt"
    )
